"""Scripts of TensorFlow 1 and of Keras 2's time: they give what they gave, or an error that names the way."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras
import tensorflow as tf

import hvd_ext.tensorflow.keras as hvd
from tests.ranks import run_ranks
from tests.tensorflow import training


def in_a_session():
    """Broadcast by the hook; the errors of extensions."""
    import tensorflow as tf

    v1 = tf.compat.v1
    v1.disable_eager_execution()
    import hvd_ext.tensorflow as hvd

    hvd.init()
    w = v1.get_variable("w", initializer=np.full((3, 1), 0.5 + hvd.rank()), use_resource=True)
    with v1.train.MonitoredTrainingSession(hooks=[hvd.BroadcastGlobalVariablesHook(0)]) as session:
        found = session.run(w)
    said = []
    for options in ({"compression": hvd.Compression.topk(0.1)}, {"op": hvd.DelayCompensated()},
                    {"server": "sharded"}, {"overlap": hvd.DelayedUpdate()}):
        with pytest.raises(NotImplementedError) as caught:
            hvd.DistributedOptimizer(v1.train.GradientDescentOptimizer(0.1), **options)
        said.append(str(caught.value))
        with pytest.raises(NotImplementedError, match="in a graph of TensorFlow 1"):
            hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), **options)
    with pytest.raises(TypeError, match="has no argument nonsense"):
        hvd.DistributedOptimizer(v1.train.GradientDescentOptimizer(0.1), nonsense=1)
    assert hvd.DistributedOptimizer(v1.train.GradientDescentOptimizer(0.1), server=None,
                                    reset_per_rank_state=False)
    return found, said


@pytest.mark.distributed
def test_graphs_of_tensorflow_1():
    for found, said in run_ranks(in_a_session, 2, init=None, timeout=100):
        np.testing.assert_array_equal(found, np.full((3, 1), 0.5))
        names = ("Compression.topk", "DelayCompensated", "server=", "overlap=")
        for text, name in zip(said, names, strict=True):
            assert text.startswith(name)
            assert "use a Keras optimizer" in text


def test_the_hook_without_a_graph():
    import hvd_ext.tensorflow as hvd

    with pytest.raises(RuntimeError, match=r"hvd\.broadcast_variables\(variables"):
        hvd.BroadcastGlobalVariablesHook(0).begin()


@pytest.mark.parametrize("name", ["hvd_ext.tensorflow", "hvd_ext.tensorflow.keras.callbacks", "hvd_ext.keras",
                                  "hvd_ext.tensorflow.elastic"])
def test_legacy_keras_is_refused_before_tensorflow_is_imported(name):
    code = f"import sys\ntry:\n    import {name}\nfinally:\n    assert 'tensorflow' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "TF_USE_LEGACY_KERAS": "1"},
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: TF_USE_LEGACY_KERAS=1 makes tf.keras")


@pytest.mark.parametrize(("backend", "name"), [
    ("torch", "hvd_ext.tensorflow.keras"), ("torch", "hvd_ext.keras"), ("jax", "hvd_ext.tensorflow.keras")])
def test_another_backend_is_refused_at_import(backend, name):
    done = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, text=True,
                          env={**os.environ, "KERAS_BACKEND": backend}, timeout=120)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: ")
    assert "Keras on the TensorFlow backend" in last
    assert "set KERAS_BACKEND=tensorflow" in last


def amp_loop(new, clip, graph):
    """The weights after a few steps of an AMP loop, one of which overflows."""
    model = training.dense_model()
    optimizer = keras.optimizers.LossScaleOptimizer(
        hvd.DistributedOptimizer(keras.optimizers.SGD(0.05, momentum=0.9)), initial_scale=1024.0)
    variables = model.trainable_variables

    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
            scaled = optimizer.scale_loss(loss) if new else optimizer.get_scaled_loss(loss)
        gradients = tape.gradient(scaled, variables)
        if not new:
            gradients = optimizer.get_unscaled_gradients(gradients)
            gradients = [tf.clip_by_value(one, -clip, clip) for one in gradients] if clip else gradients
        elif clip:
            scale = optimizer.dynamic_scale if optimizer.built else optimizer.initial_scale
            gradients = [tf.clip_by_value(one / scale, -clip, clip) * scale for one in gradients]
        optimizer.apply_gradients(zip(gradients, variables, strict=True))

    step = tf.function(step) if graph else step
    for number in range(4):
        rows = np.random.default_rng([hvd.rank(), number])
        x = rows.normal(size=(8, 5)) * (np.inf if number == 2 else 1.0)
        step(tf.constant(x, "float32"), tf.constant(rows.normal(size=(8, 3)), "float32"))
    hvd.assert_replicas_equal(model)
    return [*training.weights(model), np.array(optimizer.dynamic_scale)]


def amp_loops():
    return [[amp_loop(new, clip, graph) for new in (True, False)]
            for clip, graph in ((None, False), (0.01, True))]


@pytest.mark.distributed
def test_amp_loops_of_keras_2(ranks):
    for found in ranks(2, init="tensorflow").run(amp_loops):
        for new, old in found:
            assert old[-1] == 512.0
            for one, other in zip(new, old, strict=True):
                np.testing.assert_array_equal(one, other)


def load_with_options(path):
    model = keras.Sequential([keras.Input((5,)), keras.layers.Lambda(lambda t: t * 2.0),
                              keras.layers.Dense(3)])
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), "mse")
    path = f"{path}/model{hvd.rank()}.keras"
    model.save(path)
    with pytest.raises(ValueError, match="safe_mode=False"):
        hvd.load_model(path)
    with pytest.raises(TypeError, match=r"hvd\.load_model has no argument nonsense"):
        hvd.load_model(path, safe_mode=False, nonsense=1)
    again = hvd.load_model(path, safe_mode=False, op=hvd.Sum)
    bare = hvd.load_model(path, safe_mode=False, compile=False)
    return again.optimizer.report() is not None, getattr(bare, "optimizer", None)


@pytest.mark.distributed
def test_load_model_takes_what_keras_takes(ranks, tmp_path):
    assert ranks(2, init="tensorflow").run(load_with_options, str(tmp_path)) == [(True, None)] * 2
