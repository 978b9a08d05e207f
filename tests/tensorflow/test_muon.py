"""``hvd.Muon``: convolutions as matrices, alone and with each rank's share of them."""

from __future__ import annotations

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras  # noqa: E402

import hvd_ext.tensorflow.keras as hvd  # noqa: E402
from hvd_ext.sharding import orthogonalising_cost  # noqa: E402
from hvd_ext.tensorflow.sharding.shards import update_cost  # noqa: E402
from tests.problems import worker_gradients  # noqa: E402
from tests.tensorflow import synthetic_steps  # noqa: E402

SHAPES = [(3, 3, 3, 8), (3, 8, 6), (10, 12), (7,)]


def variables(shapes=SHAPES):
    return [keras.Variable(one.numpy(), name=f"p{number}")
            for number, one in enumerate(synthetic_steps.make_variables(shapes))]


@pytest.mark.parametrize("nesterov", [True, False])
def test_a_convolution_is_updated_as_the_matrix_of_its_kernels(nesterov):
    mine = variables()
    shapes = [(-1, one.shape[-1]) if len(one.shape) > 1 else one.shape for one in mine]
    flat = [keras.Variable(np.asarray(one).reshape(shape), name=one.name)
            for one, shape in zip(mine, shapes, strict=True)]
    pairs = [(hvd.Muon(0.05, nesterov=nesterov), mine),
             (keras.optimizers.Muon(0.05, nesterov=nesterov), flat)]
    for optimizer, owned in pairs:
        for step in range(3):
            gradients = worker_gradients(SHAPES, worker=0, step=step)
            optimizer.apply([tf.constant(g.reshape(one.shape), tf.float32)
                             for g, one in zip(gradients, owned, strict=True)], owned)
    for one, other in zip(mine, flat, strict=True):
        np.testing.assert_allclose(np.asarray(one).ravel(), np.asarray(other).ravel(), rtol=1e-5, atol=1e-6)
    assert [one is None for one in pairs[0][0].adam_velocities] == [True, True, True, False]


def test_layers_are_left_to_adamw_by_name():
    optimizer = hvd.Muon(0.05, exclude_layers=["p1"])
    optimizer.build(variables())
    assert [one is None for one in optimizer.adam_velocities] == [True, False, True, False]
    again = hvd.Muon.from_config(optimizer.get_config())
    assert type(again) is hvd.Muon
    assert again.exclude_layers == ["p1"]


def test_owners_are_balanced_by_the_matrix():
    convolution, _, matrix, vector = variables()
    ours, keras_own = hvd.Muon(0.1), keras.optimizers.Muon(0.1)
    assert update_cost(ours, convolution) == orthogonalising_cost((27, 8)) == 8 * 8 * 27
    assert update_cost(keras_own, convolution) == 27 * 8  # left to AdamW
    assert update_cost(ours, matrix) == update_cost(keras_own, matrix) == 10 * 10 * 12
    assert update_cost(ours, vector) == 7


def on_ranks(server):
    owned = variables()
    optimizer = hvd.DistributedOptimizer(hvd.Muon(0.05), server=server)
    synthetic_steps.run_steps(optimizer, owned, hvd.rank(), 3, compiled=True)
    hvd.assert_replicas_equal(owned, optimizer=optimizer)
    return synthetic_steps.flat(owned), sum(int(np.prod(v.shape)) > 2 for v in optimizer.variables)


@pytest.mark.distributed
def test_each_rank_orthogonalises_what_it_owns(ranks):
    plain, sharded = (ranks(2, init="tensorflow").run(on_ranks, server)
                      for server in ("replicated", "sharded"))
    for one, other in zip(plain, sharded, strict=True):
        np.testing.assert_allclose(one[0], other[0], rtol=1e-5, atol=1e-6)
    assert sum(one[1] for one in sharded) == plain[0][1] == 5  # momenta, and a velocity of the vector
    assert all(one[1] for one in sharded)
