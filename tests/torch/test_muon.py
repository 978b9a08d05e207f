"""``hvd.Muon``: convolutions as matrices, alone and with each rank's share of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hvd_ext.torch as hvd
from hvd_ext.sharding import orthogonalising_cost
from hvd_ext.torch.sharding.shards import update_cost
from tests.torch.problems import backward, bits, flat, make_parameters, named, worker_gradients

SHAPES = [(8, 3, 3, 3), (16, 8, 3, 3), (10, 12), (6, 4, 5)]
SETTINGS = {"lr": 0.05, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}


def train(optimizer, parameters, steps=4):
    for step in range(steps):
        optimizer.zero_grad()
        gradients = worker_gradients(SHAPES, worker=0, step=step)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            given = torch.from_numpy(gradient).to(parameter.dtype)
            parameter.grad = given.reshape(parameter.shape)
        optimizer.step()


@pytest.mark.parametrize("nesterov", [True, False])
def test_a_convolution_is_updated_as_the_matrix_of_its_kernels(nesterov):
    mine, matrices = make_parameters(SHAPES), [p.detach().flatten(1).clone().requires_grad_()
                                               for p in make_parameters(SHAPES)]
    train(hvd.Muon(mine, nesterov=nesterov, **SETTINGS), mine)
    train(torch.optim.Muon(matrices, nesterov=nesterov, **SETTINGS), matrices)
    for one, matrix in zip(mine, matrices, strict=True):
        assert one.detach().flatten(1).numpy().tobytes() == matrix.detach().numpy().tobytes()


def test_weights_that_lie_in_another_order_are_updated_alike():
    plain, last = make_parameters(SHAPES), make_parameters(SHAPES)
    for one in last:
        if one.dim() == 4:
            one.data = one.data.to(memory_format=torch.channels_last)
    train(hvd.Muon(plain, **SETTINGS), plain)
    optimizer = hvd.Muon(last, **SETTINGS)
    train(optimizer, last)
    for one, other in zip(plain, last, strict=True):
        # Newton-Schulz runs in bfloat16: columns in another order are added up in another order.
        np.testing.assert_allclose(one.detach().numpy(), other.detach().numpy(), atol=4 * 0.05 * 2**-5)
    assert last[1].is_contiguous(memory_format=torch.channels_last)
    before = [one.detach().clone() for one in last]
    train(optimizer, last, steps=1)
    assert all(not torch.equal(a, b) for a, b in zip(before, last, strict=True))


def test_state_comes_back():
    straight, first, second = (make_parameters(SHAPES) for _ in range(3))
    optimizer = hvd.Muon(straight, **SETTINGS)
    train(optimizer, straight, 2)
    train(optimizer, straight, 2)
    optimizer = hvd.Muon(first, **SETTINGS)
    train(optimizer, first, 2)
    again = hvd.Muon([{"params": second, "lr": 1.0}])
    again.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        for one, other in zip(second, first, strict=True):
            one.copy_(other)
    train(again, second, 2)
    assert bits(second) == bits(straight)


def test_bad_input():
    for shape in [(3,), ()]:
        with pytest.raises(ValueError, match=r"orthogonalises matrices, got a parameter of shape"):
            hvd.Muon([torch.nn.Parameter(torch.zeros(shape))])
    optimizer = hvd.Muon(make_parameters([(2, 2)]))
    with pytest.raises(ValueError, match="AdamW"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match="no parameters"):
        hvd.Muon([])
    with pytest.raises(ValueError, match="Learning rate"):
        hvd.Muon(make_parameters([(2, 2)]), lr=-1.0)


def test_owners_are_balanced_by_the_matrix():
    convolution = torch.nn.Parameter(torch.zeros(16, 8, 3, 3))
    assert update_cost(hvd.Muon, convolution) == orthogonalising_cost((16, 72)) == 16 * 16 * 72
    assert update_cost(torch.optim.Adam, convolution) == 4 * 16 * 72


def on_ranks(server):
    parameters = make_parameters(SHAPES)
    optimizer = hvd.DistributedOptimizer(hvd.Muon(parameters, **SETTINGS), server=server,
                                         named_parameters=named(parameters))
    for step in range(3):
        optimizer.zero_grad()
        backward(parameters, worker_gradients(SHAPES, worker=hvd.rank(), step=step))
        optimizer.step()
    hvd.assert_replicas_equal(named(parameters))
    return flat(parameters), len(optimizer.state)


@pytest.mark.distributed
def test_each_rank_orthogonalises_what_it_owns(ranks):
    plain, sharded = ranks(2).run(on_ranks, "replicated"), ranks(2).run(on_ranks, "sharded")
    for one, other in zip(plain, sharded, strict=True):
        np.testing.assert_allclose(one[0], other[0], rtol=1e-5, atol=1e-6)
    assert sum(one[1] for one in sharded) == len(SHAPES)
    assert all(one[1] for one in sharded)
