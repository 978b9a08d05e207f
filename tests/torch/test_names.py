"""Names of collectives: the same on all ranks whatever else a rank has built, never two at once."""

from __future__ import annotations

import weakref

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
    if hvd.rank() == 1 and what != "rebuilt":
        extra = wrap([(3, 2)] if what == "another model" else [(6, 4), (5,)])
    if what == "dropped":
        extra = None
    parameters, optimizer = wrap([(6, 4), (5,)])
    if what == "rebuilt" and hvd.rank() == 1:
        optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=0.1), named(parameters),
                                             op=hvd.DelayCompensated())
    for step in range(2):
        optimizer.zero_grad()
        backward(parameters, worker_gradients([(6, 4), (5,)], worker=hvd.rank(), step=step))
        optimizer.step()
    return bits(parameters), extra is not None


@pytest.mark.distributed
@pytest.mark.parametrize("what", ["another model", "dropped", "rebuilt"])
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


@pytest.mark.distributed
def test_twins_under_way_together(ranks):
    first, second = ranks(2).run(two_twins)
    assert first == second
    assert first[0] != first[1]


def life_of_an_optimizer():
    """Whether a dropped optimizer is gone with its hooks; calls of a step hook after loading a state;
    the learning rate after a step of a scheduler that was made before wrapping, and after loading."""
    parameters = make_parameters([(6, 4)])
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=0.1), named(parameters),
                                         op=hvd.DelayCompensated(), server="sharded")
    gone = weakref.ref(optimizer)
    del optimizer
    hooks = len(parameters[0]._post_accumulate_grad_hooks or {})
    inner = torch.optim.SGD(parameters, lr=0.5)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(inner, 0.5)
    optimizer = hvd.DistributedOptimizer(inner, named(parameters), op=hvd.DelayCompensated())
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    optimizer.load_state_dict(optimizer.state_dict())
    backward(parameters, worker_gradients([(6, 4)], worker=hvd.rank(), step=0))
    optimizer.step()
    scheduler.step()
    return gone() is None, hooks, len(calls), optimizer.param_groups[0]["lr"]


@pytest.mark.distributed
def test_an_optimizer_ends_and_is_loaded_cleanly(ranks):
    assert ranks(2).run(life_of_an_optimizer) == [(True, 0, 1, 0.25)] * 2
