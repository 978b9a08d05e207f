"""``overlap=`` over ``op=hvd.DelayCompensated``: both halves of the exchange beside the next backward "
  "pass."""

from __future__ import annotations

import copy

import pytest
import torch

import hvd_ext.torch as hvd
from tests.torch.problems import bits, make_parameters, named
from tests.torch.test_delay_overlap import BUCKETS, SHAPES, backward, goes_early, gradients_of, reducer_of

pytestmark = pytest.mark.distributed

ALL = list(range(1, BUCKETS))  # but for the first bucket, of which ``backward`` says nothing


def make(order, *, lam=0.7, **options):
    parameters = make_parameters(SHAPES)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(parameters, lr=0.1, momentum=0.5), named(parameters), groups=BUCKETS,
        op=hvd.DelayCompensated(order=order), overlap=hvd.DelayedUpdate(lam), **options)
    return parameters, optimizer


def go_on(parameters, optimizer, steps, spoil=None):
    """Which buckets went back in each step's backward passes."""
    early = []
    for step in steps:
        optimizer.zero_grad()
        for gradients in gradients_of(step, optimizer.backward_passes_per_step, spoil):
            moved = [g + 0.1 * p.detach().numpy() for g, p in zip(gradients, parameters, strict=True)]
            back = backward(optimizer, parameters, moved)
        if step % 2:
            optimizer.param_groups[0]["lr"] *= 0.9  # what is on its way has the rate of before
        optimizer.synchronize()
        with optimizer.skip_synchronize():
            if spoil is None or step != 3:  # of step 2
                optimizer.step()
        early.append(back)
    return early


def train(early, order, spoil=None, passes=1):
    parameters, optimizer = make(order, backward_passes_per_step=passes)
    goes_early(optimizer, early)
    found = go_on(parameters, optimizer, range(6), spoil)
    reducer = reducer_of(optimizer)
    squares = bits([square for _, square in sorted(reducer.mean_square.items())])
    optimizer.flush()
    return found, bits(parameters), squares, optimizer.report()["steps"], reducer.unusable_steps


def all_ways(*case):
    return [train(early, *case) for early in (range(3), (), (0,))]


@pytest.mark.parametrize(("size", "case"), [
    (2, ("rank",)), (2, ("norm",)), (2, ("norm", float("nan"))), (2, ("rank", float("nan"))),
    (2, ("norm", None, 2)), (3, ("norm",))])
def test_bits_do_not_depend_on_what_went_back_in_the_backward_pass(ranks, size, case):
    for rank, (early, late, on_one) in enumerate(found := ranks(size).run(all_ways, *case)):
        assert early[0] == [[], *[ALL] * 5]
        assert late[0] == [[]] * 6
        assert on_one[0] == ([[], *[ALL] * 5] if rank == 0 else [[]] * 6)
        assert late[1:] == early[1:]
        assert on_one[1:] == early[1:]
        assert early[1] == found[0][0][1]
        assert early[3:] == ((6, 0) if len(case) != 2 else (5, 1))


def late_and_not(order):
    """Without compensation for being late, and with the same gradients, both take the same updates."""
    found = []
    for late in (hvd.DelayedUpdate(0.0), None):
        parameters = make_parameters(SHAPES)
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(parameters, lr=0.1), named(parameters), groups=BUCKETS,
            op=hvd.DelayCompensated(order=order), overlap=late)
        seen = []
        for step in range(5):
            optimizer.zero_grad()
            backward(optimizer, parameters, gradients_of(step)[0])
            optimizer.step()
            seen.append(bits(parameters))
        optimizer.flush()
        found.append([*seen, bits(parameters)])
    return found


@pytest.mark.parametrize("order", ["rank", "norm"])
def test_it_is_the_synchronous_run_a_step_late(ranks, order):
    for late, synchronous in ranks(2).run(late_and_not, order):
        assert late[1:] == synchronous[:-1]


def resumed(order):
    """A state taken in a step whose second halves have begun, and loaded where others have."""
    parameters, optimizer = make(order)
    goes_early(optimizer, (0,))
    go_on(parameters, optimizer, range(4))
    backward(optimizer, parameters, gradients_of(99)[0])
    assert bool(reducer_of(optimizer)._back) == (hvd.rank() == 0)
    saved = copy.deepcopy((optimizer.state_dict(), [p.detach().clone() for p in parameters]))
    optimizer._hvd_ext.abort_step()  # the backward pass above is not a step's
    go_on(parameters, optimizer, range(4, 8))
    optimizer.flush()

    others, other = make(order)
    goes_early(other, (1,))
    go_on(others, other, range(2))
    backward(other, others, gradients_of(98)[0])
    assert bool(reducer_of(other)._back) == (hvd.rank() == 1)
    other.load_state_dict(saved[0])  # what is on its way is dropped
    assert not reducer_of(other).pending_handles()
    with torch.no_grad():
        for parameter, value in zip(others, saved[1], strict=True):
            parameter.copy_(value)
    go_on(others, other, range(4, 8))
    other.flush()
    return bits(parameters) == bits(others), other.report()["overlap"]["updates"]


@pytest.mark.parametrize("order", ["rank", "norm"])
def test_a_resumed_run_is_the_same_bit_for_bit(ranks, order):
    assert ranks(2).run(resumed, order) == [(True, 8)] * 2


def rates_that_differ(order):
    """Those of the third step's gradients; its exchange ends in the fourth."""
    parameters, optimizer = make(order)
    said = []
    for step in range(7):
        optimizer.zero_grad()
        back = backward(optimizer, parameters, gradients_of(step)[0])  # it never raises
        assert back == ([] if step in (0, 3, 4) else ALL)
        optimizer.param_groups[0]["lr"] = 0.1 * (1 + hvd.rank()) if step == 2 else 0.1
        try:
            optimizer.synchronize()
        except ValueError as error:
            said.append((step, str(error)))
        else:
            optimizer.param_groups[0]["lr"] = 0.1
            with optimizer.skip_synchronize():
                optimizer.step()
    optimizer.flush()
    return said, bits(parameters)


@pytest.mark.parametrize("order", ["rank", "norm"])
def test_rates_that_differ_are_an_error_of_the_step_that_ends_the_exchange(ranks, order):
    found = ranks(2).run(rates_that_differ, order)
    for said, weights in found:
        assert [step for step, _ in said] == [3]
        assert "(0.1,), (0.2,)" in said[0][1]
        assert weights == found[0][1]


def two_at_once(order):
    """Two models whose exchanges, and what the ranks agree on, are on their way at the same time."""
    def both(pairs, numbers):
        for step in range(4):
            for number, (parameters, optimizer) in zip(numbers, pairs, strict=True):
                optimizer.zero_grad()
                backward(optimizer, parameters, gradients_of(step + 50 * number)[0])
            for _, optimizer in pairs:
                optimizer.step()
        for _, optimizer in pairs:
            optimizer.flush()
        return [bits(parameters) for parameters, _ in pairs]

    together = both([make(order), make(order)], (0, 1))
    return together, both([make(order)], (0,)) + both([make(order)], (1,))


def test_two_models_of_the_same_shapes(ranks):
    for together, alone in ranks(2).run(two_at_once, "norm"):
        assert together == alone


def joining():
    """A parameter that is unfrozen while gradients of the others are on their way."""
    parameters = make_parameters(SHAPES)
    parameters[4].requires_grad_(False)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, 0.1), named(parameters),
                                         op=hvd.DelayCompensated(), overlap=hvd.DelayedUpdate())
    frozen = parameters[4].detach().clone()
    for step in range(5):
        if step == 2:
            parameters[4].requires_grad_(True)
        trained = [p for p in parameters if p.requires_grad]
        optimizer.zero_grad()
        backward(optimizer, trained, gradients_of(step)[0][:len(trained)])
        optimizer.step()
        assert torch.equal(parameters[4], frozen) == (step < 3)
    hvd.assert_replicas_equal(named(parameters))


def test_a_parameter_that_is_unfrozen_waits_its_step(ranks):
    ranks(2).run(joining)
