"""Attributes of Horovod's optimizers that scripts read and set."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hvd_ext.torch as hvd
from tests.torch.problems import backward, make_parameters, named, worker_gradients

pytestmark = pytest.mark.distributed
SHAPES = [(6, 4), (5,)]
METHODS = {
    "plain": dict, "sharded": lambda: {"server": "sharded"},
    "topk": lambda: {"compression": hvd.Compression.topk(1.0, min_size=1)},
    "delay": lambda: {"op": hvd.DelayCompensated(0.0, adaptive=False)},
}


def train(method, required):
    """Weights after steps of which the second and later do not reach the last parameter."""
    parameters = make_parameters(SHAPES)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=0.1, momentum=0.9), named(parameters),
                                         **METHODS[method]())
    everything = optimizer._requires_update == set(parameters)
    if not required:
        optimizer._requires_update = set()
    begun = []
    for step in range(3):
        optimizer.zero_grad()
        gradients = worker_gradients(SHAPES, worker=hvd.rank(), step=step)
        used = parameters if step == 0 else parameters[:1]
        sum((p * torch.as_tensor(g, dtype=p.dtype)).sum()
            for p, g in zip(used, gradients, strict=False)).backward()
        begun.append(set(optimizer._handles) == set(used))
        optimizer.step()
    return [p.detach().numpy() for p in parameters], everything, begun, optimizer._handles


def empty_handles(method):
    """A step is begun and dropped as some scripts do, then one is taken; the weights."""
    parameters = make_parameters(SHAPES)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=0.1), named(parameters),
                                         **METHODS[method]())
    for step in range(2):
        backward(parameters, worker_gradients(SHAPES, worker=hvd.rank(), step=step))
        if step == 0:
            optimizer._handles = {}
            for parameter in parameters:
                parameter.grad = None
    optimizer.step()
    with pytest.raises(ValueError, match="can be emptied"):
        optimizer._handles = {parameters[0]: None}
    return [p.detach().numpy() for p in parameters]


@pytest.mark.parametrize("method", METHODS)
def test_emptied_handles_drop_the_step(ranks, method):
    means = [np.mean(pair, axis=0) for pair in zip(
        *(worker_gradients(SHAPES, worker=rank, step=1) for rank in range(2)), strict=True)]
    for weights in ranks(2).run(empty_handles, method):
        for weight, start, mean in zip(weights, make_parameters(SHAPES), means, strict=True):
            np.testing.assert_allclose(weight, start.detach().numpy() - 0.1 * mean, rtol=1e-5, atol=1e-6)


def one_process(required):
    weights = [p.detach().numpy().astype(np.float64) for p in make_parameters(SHAPES)]
    momenta = [np.zeros_like(weight) for weight in weights]
    for step in range(3):
        means = [np.mean(pair, axis=0) for pair in zip(
            *(worker_gradients(SHAPES, worker=rank, step=step) for rank in range(2)), strict=True)]
        for number, mean in enumerate(means):
            if number == 0 or step == 0 or required:
                gradient = mean if number == 0 or step == 0 else 0.0
                momenta[number] = 0.9 * momenta[number] + gradient
                weights[number] = weights[number] - 0.1 * momenta[number]
    return weights


@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_requires_update_and_handles(ranks, method, required):
    for weights, everything, begun, handles in ranks(2).run(train, method, required):
        assert everything
        assert begun == [True] * 3
        assert handles == {}
        for found, expected in zip(weights, one_process(required), strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
