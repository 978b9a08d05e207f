"""Every public callable takes Horovod's arguments, by position and by name, with Horovod's defaults."""

from __future__ import annotations

import importlib
import inspect

import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import horovod.tensorflow  # noqa: E402
import horovod.tensorflow.keras  # noqa: E402
import keras  # noqa: E402

import hvd_ext.tensorflow as hvd  # noqa: E402
import hvd_ext.tensorflow.keras as hvd_keras  # noqa: E402
from tests.signatures import compared, differences, modules_below  # noqa: E402

MODULES = [*modules_below("horovod.tensorflow", left_out=("mpi_lib",)), *modules_below("horovod.keras")]

OTHERWISE = {
    "horovod.keras.allreduce",  # Horovod's default of average= refuses every op=
    "horovod.keras.callbacks.BestModelCheckpoint",  # takes the order of horovod.tensorflow.keras too
}


@pytest.mark.parametrize("name", MODULES)
def test_signatures_are_horovods(name):
    ours = importlib.import_module(name.replace("horovod.", "hvd_ext.", 1))
    assert differences(importlib.import_module(name), ours).keys() - OTHERWISE == set()


def test_what_is_compared():
    assert {"DistributedGradientTape", "PartialDistributedGradientTape", "DistributedOptimizer", "allreduce",
            "broadcast", "broadcast_variables", "join"} <= set(compared(horovod.tensorflow, hvd))
    assert {"DistributedOptimizer", "load_model", "allreduce"} <= \
        set(compared(horovod.tensorflow.keras, hvd_keras))


def patched_defaults():
    """A mean and a sum, inside and outside of a graph; a tape whose op was patched."""
    seen = []
    for function, name in ((hvd.allreduce, "op"), (hvd.DistributedGradientTape, "op")):
        before = function.__defaults__
        names = [one.name for one in inspect.signature(function).parameters.values()
                 if one.default is not one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
        patched = list(before)
        patched[names.index(name)] = hvd.Sum
        function.__defaults__ = tuple(patched)
    try:
        variable = keras.Variable(1.0)

        def gradient():
            with tf.GradientTape() as tape:
                loss = variable * 3.0
            return hvd.DistributedGradientTape(tape).gradient(loss, [variable])[0]

        for run in (gradient, tf.function(gradient), lambda: hvd.allreduce(tf.constant(1.0)),
                    tf.function(lambda: hvd.allreduce(tf.constant(1.0)))):
            seen.append(float(run()))
    finally:
        for function in (hvd.allreduce, hvd.DistributedGradientTape):
            defaults = list(function.__defaults__)
            defaults[defaults.index(hvd.Sum)] = hvd.Average
            function.__defaults__ = tuple(defaults)
    return seen


@pytest.mark.distributed
def test_patched_defaults_have_effect(ranks):
    assert ranks(2, init="tensorflow").run(patched_defaults) == [[6.0, 6.0, 2.0, 2.0]] * 2
