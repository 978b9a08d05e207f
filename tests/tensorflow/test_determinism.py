"""Training under ``enable_op_determinism()``, which refuses some of TensorFlow's operations."""

from __future__ import annotations

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras  # noqa: E402
from tensorflow.python.framework.config import disable_op_determinism  # noqa: E402

import hvd_ext.tensorflow as hvd  # noqa: E402
from tests.tensorflow import training  # noqa: E402

CASES = {
    "plain": lambda model: {},
    "sharded": lambda model: {"server": "sharded"},
    "topk": lambda model: {"compression": hvd.Compression.topk(0.3, min_size=0)},
    "delay": lambda model: {"op": hvd.DelayCompensated(lam=1.0)},
    "late": lambda model: {"overlap": hvd.DelayedUpdate()},
    "seng": lambda model: {"preconditioner": hvd.SENG(model, damping=0.5, update_freq=2)},
}


def deterministic(case):
    found = []
    tf.config.experimental.enable_op_determinism()
    try:
        for _ in range(2):
            model = training.dense_model()
            optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.05), **CASES[case](model))
            found.append(training.weights(training.fit(model, optimizer, hvd.rank(), 2, epochs=1)))
    finally:
        disable_op_determinism()
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_operations_are_deterministic(ranks, case):
    by_rank = ranks(2, init="tensorflow").run(deterministic, case)
    for found in by_rank:
        for one, again, other in zip(*found, by_rank[0][0], strict=True):
            np.testing.assert_array_equal(one, again)
            np.testing.assert_array_equal(one, other)
