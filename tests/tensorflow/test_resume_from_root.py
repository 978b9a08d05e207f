"""Horovod's usual resume: the root's file is loaded, by the root or by all, then broadcast."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras  # noqa: E402

import hvd_ext.tensorflow.keras as hvd  # noqa: E402
from hvd_ext.tensorflow.variables import as_tf, is_per_rank  # noqa: E402
from tests.tensorflow import training  # noqa: E402

pytestmark = pytest.mark.distributed


def topk(**options):
    return hvd.Compression.topk(0.3, min_size=1, **options)


METHODS = {
    "topk": lambda: {"compression": topk()},
    "sparse allreduce": lambda: {"compression": topk(exchange="sparse_allreduce")},
    "delay": lambda: {"op": hvd.DelayCompensated()},
    "powersgd": lambda: {"compression": hvd.Compression.powersgd(1, min_compression=1.0)},
    "overlap": lambda: {"overlap": hvd.DelayedUpdate()},
    "passes": lambda: {"compression": topk(), "backward_passes_per_step": 2},
    "none": lambda: {},
}
LABELS = {"topk": "residuals", "sparse allreduce": "owners' residuals", "delay": "slices of MeanSquare",
          "powersgd": "residuals", "overlap": "delayed gradients", "passes": "residuals", "none": None}
WAYS = ("load_model on the root", "load_model on all", "checkpoint on the root", "checkpoint on all")
STEPS = 2


def ways_of(method):
    return WAYS if method == "topk" else WAYS[:2]


def compiled(method):
    model = training.dense_model()
    model.compile(hvd.DistributedOptimizer(keras.optimizers.Adam(0.05), **METHODS[method]()), "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def train(model, first, last):
    x, y = training.data()
    for step in range(first, last):
        rows = slice(8 * step, 8 * step + 8)
        model.train_on_batch(x[rows][hvd.rank()::2], y[rows][hvd.rank()::2])


def restored(method, way, folder):
    """A model that has the root's file, and a fresh one on other ranks."""
    mine = hvd.rank() == 0 or way.endswith("all")
    if way.startswith("load_model") and mine:
        return hvd.load_model(f"{folder}/{method}.keras", **METHODS[method]())
    model = compiled(method)
    for weight in model.weights:
        weight.assign(weight + 0.1 * hvd.rank())
    if mine and way.startswith("checkpoint"):
        tf.train.Checkpoint(model=model, optimizer=model.optimizer).read(
            f"{folder}/{method}").assert_existing_objects_matched()
    return model


def resume_each_way(method, folder):
    """By way: warnings, state of its own after the broadcast, and weights of the steps that follow."""
    model = compiled(method)
    train(model, 0, STEPS)
    if hvd.rank() == 0:
        model.save(f"{folder}/{method}.keras")
        tf.train.Checkpoint(model=model, optimizer=model.optimizer).write(f"{folder}/{method}")
    hvd.allreduce([0.0], name="saved")
    found = {}
    for way in ways_of(method):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            again = restored(method, way, folder)
            hvd.broadcast_variables(again.variables, root_rank=0)
            hvd.broadcast_variables(again.optimizer.variables, root_rank=0)
        own = [np.array(as_tf(one)) for one in again.optimizer.variables
               if is_per_rank(one) and "rank_and_ranks" not in one.path]
        shared = [np.array(as_tf(one)) for one in again.optimizer.variables if not is_per_rank(one)]
        train(again, STEPS, STEPS + 2)
        found[way] = ([str(one.message) for one in caught if "begin new" in str(one.message)],
                      own, shared, training.weights(again))
    model.optimizer.reset_per_rank_state()
    shared = [np.array(as_tf(one)) for one in model.optimizer.variables if not is_per_rank(one)]
    train(model, STEPS, STEPS + 2)
    return found, shared, training.weights(model)


def resume_every_method(folder):
    return {method: resume_each_way(method, folder) for method in METHODS}


def test_what_is_shared_is_broadcast_and_the_rest_begins_new(ranks, tmp_path):
    by_rank = ranks(2, init="tensorflow").run(resume_every_method, str(tmp_path), timeout=400)
    for method in METHODS:
        for way in ways_of(method):
            told = []
            for found, shared, expected in (rank[method] for rank in by_rank):
                said, own, given, weights = found[way]
                told += said
                assert all(not one.any() for one in own), (method, way)
                for mine, wanted in zip((*given, *weights), (*shared, *expected), strict=True):
                    np.testing.assert_array_equal(mine, wanted, err_msg=f"{method}, {way}")
            assert len(told) == (LABELS[method] is not None), (method, way, told)
            for text in told:
                assert LABELS[method] in text
                assert "hvd.save_checkpoint" in text


def own_files(folder):
    """Every rank loads its own file, and the broadcast leaves its state alone."""
    model = compiled("topk")
    train(model, 0, STEPS)
    model.save(f"{folder}/{hvd.rank()}.keras")
    again = hvd.load_model(f"{folder}/{hvd.rank()}.keras", **METHODS["topk"]())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hvd.broadcast_variables(again.optimizer.variables, root_rank=0)
    for one in (model, again):
        train(one, STEPS, STEPS + 2)
    return all(map(np.array_equal, training.weights(model), training.weights(again)))


def test_the_broadcast_leaves_alone_what_every_rank_has_loaded(ranks, tmp_path):
    assert ranks(2, init="tensorflow").run(own_files, str(tmp_path)) == [True, True]


def without_a_broadcast(folder):
    """All ranks load the root's file, where a gradient waits, and none broadcasts: the error."""
    model = compiled("overlap")
    train(model, 0, STEPS)
    if hvd.rank() == 0:
        model.save(f"{folder}/waits.keras")
    hvd.allreduce([0.0], name="saved")
    again = hvd.load_model(f"{folder}/waits.keras", **METHODS["overlap"]())
    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        train(again, STEPS, STEPS + 1)
    return str(caught.value)


@pytest.mark.filterwarnings("ignore:this optimizer state was saved by rank 0")
def test_a_gradient_that_waits_on_one_rank_is_an_error_that_names_the_broadcast(ranks, tmp_path):
    for said in ranks(2, init="tensorflow").run(without_a_broadcast, str(tmp_path)):
        assert "the ranks did not load states that belong together" in said
        assert "with hvd.broadcast_variables" in said


def moments_on_the_root(folder):
    model = training.dense_model()
    model.compile(hvd.DistributedOptimizer(keras.optimizers.Adam(0.05), server="sharded"), "mse")
    train(model, 0, STEPS)
    hvd.save_model(model, f"{folder}/whole.keras")
    found = []
    for on_all in (False, True):
        if hvd.rank() == 0 or on_all:
            again = hvd.load_model(f"{folder}/whole.keras", server="sharded")
        else:
            again = training.dense_model()
            again.compile(hvd.DistributedOptimizer(keras.optimizers.Adam(0.05), server="sharded"), "mse")
            again.optimizer.build(again.trainable_variables)
        try:
            hvd.broadcast_variables([*again.variables, *again.optimizer.variables], root_rank=0)
        except ValueError as error:
            found.append(str(error))
            continue
        train(again, STEPS, STEPS + 2)
        found.append(training.weights(again))
    train(model, STEPS, STEPS + 2)
    return found, training.weights(model)


def test_moments_that_the_root_alone_has_loaded_are_an_error(ranks, tmp_path):
    for (said, weights), expected in ranks(2, init="tensorflow").run(moments_on_the_root, str(tmp_path)):
        assert "only some ranks have loaded" in said
        assert "with hvd.load_model on every rank" in said
        for mine, wanted in zip(weights, expected, strict=True):
            np.testing.assert_array_equal(mine, wanted)
