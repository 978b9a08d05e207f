"""Names of collectives: the same on all ranks, whatever else a rank has built, and never used twice at once."""

from __future__ import annotations

import pytest
import torch

import hvd_ext.torch as hvd
from tests.torch.problems import backward, bits, make_parameters, named, worker_gradients


def with_an_extra_optimizer(what):
    """Train while rank 1 has, or had, an optimizer that rank 0 does not have."""
    def wrap(shapes):
        parameters = make_parameters(shapes)
        return parameters, hvd.DistributedOptimizer(
            torch.optim.SGD(parameters, lr=0.1), named(parameters), op=hvd.DelayCompensated())

    extra = None
    if hvd.rank() == 1:
        extra = wrap([(3, 2)] if what == "another model" else [(6, 4), (5,)])
    if what == "dropped":
        extra = None
    parameters, optimizer = wrap([(6, 4), (5,)])
    for step in range(2):
        optimizer.zero_grad()
        backward(parameters, worker_gradients([(6, 4), (5,)], worker=hvd.rank(), step=step))
        optimizer.step()
    return bits(parameters), extra is not None


@pytest.mark.ranks
@pytest.mark.parametrize("what", ["another model", "dropped"])
def test_one_more_optimizer_on_one_rank_does_not_stop_the_others(ranks, what):
    (first, _), (second, kept) = ranks(2).run(with_an_extra_optimizer, what, timeout=40)
    assert first == second
    assert kept is (what == "another model")


def two_twins():
    """Two optimizers of the same shapes, alive together: their collectives have names of their own."""
    built = []
    for _ in range(2):
        parameters = make_parameters([(6, 4)])
        built.append((parameters, hvd.DistributedOptimizer(
            torch.optim.SGD(parameters, lr=0.1), named(parameters), op=hvd.DelayCompensated())))
    gradients = [worker_gradients([(6, 4)], worker=hvd.rank() + 10 * k, step=0) for k in range(2)]
    for (parameters, _), own in zip(built, gradients, strict=True):
        backward(parameters, own)
    for _, optimizer in reversed(built):
        optimizer.step()
    return [bits(parameters) for parameters, _ in built]


@pytest.mark.ranks
def test_twins_under_way_together(ranks):
    first, second = ranks(2).run(two_twins)
    assert first == second
    assert first[0] != first[1]
