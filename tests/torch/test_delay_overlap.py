"""``order="rank"``: buckets go back during the backward pass, and what comes out does not depend on which."""

from __future__ import annotations

import copy
import time

import numpy as np
import pytest
import torch

import hvd_ext.torch as hvd
from hvd_ext.torch import collectives
from tests.reference.delay_compensation import DelayOracle
from tests.torch.problems import bits, flat, make_parameters, named, worker_gradients

pytestmark = pytest.mark.distributed

SHAPES = [(9, 4), (3,), (8, 3, 2, 2), (), (31,)]
BUCKETS = 5  # one a parameter
ALL_BUT_LAST = list(range(1, BUCKETS))  # the last gradient is the first parameter's


class Layer(torch.autograd.Function):
    """Hands its input on; its backward pass yields a gradient when what was sent before has arrived."""

    @staticmethod
    def forward(ctx, x, parameter, gradient, reducer):
        ctx.gradient, ctx.reducer = gradient, reducer
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        wait_for_what_was_sent(ctx.reducer)
        return grad, ctx.gradient, None, None


def wait_for_what_was_sent(reducer):
    sent = [one.handle for (index, _), one in reducer._started.items() if index not in reducer._back]
    sent += reducer._asked.pending_handles() if reducer._asked else []
    deadline = time.monotonic() + 30
    while not all(handle.is_done() for handle in sent):
        assert time.monotonic() < deadline, "what was sent does not arrive"
        time.sleep(0.001)


def reducer_of(optimizer):
    """The reducer of DelayCompensated, also within that of ``overlap=``."""
    reducer = optimizer._hvd_ext.reducer
    return getattr(reducer, "inner", reducer)


def backward(optimizer, parameters, gradients):
    """One backward pass over all; which buckets, but for the last to be sent, were on their way back then."""
    reducer = reducer_of(optimizer)
    x = torch.zeros((), requires_grad=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        made = torch.as_tensor(np.asarray(gradient)).to(parameter.dtype)
        x = Layer.apply(x, parameter, made, reducer)
    x.backward()
    return sorted(reducer._back.keys() - {0})


def make(rule=None, *, dtype=torch.float32, lr=0.1, **options):
    parameters = make_parameters(SHAPES, dtype=dtype)
    parameters[2].data = parameters[2].data.contiguous(memory_format=torch.channels_last)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(parameters, lr=lr, momentum=0.5), named(parameters),
        op=hvd.DelayCompensated(**{"order": "rank", **(rule or {})}), groups=BUCKETS, **options)
    return parameters, optimizer


def goes_early(optimizer, early):
    """Let second halves start early on the ranks ``early``, and on the others only in ``synchronize()``."""
    reducer = reducer_of(optimizer)
    go_back = reducer._start_return
    if hvd.rank() not in early:
        reducer._start_return = lambda *, wait, **how: go_back(wait=wait, **how) if wait else None


def gradients_of(step, passes=1, spoil=None):
    found = []
    for number in range(passes):
        made = worker_gradients(SHAPES, worker=hvd.rank(), step=10 * number + step)
        if spoil is not None and step == 2 and hvd.rank() == 1:
            made[2].flat[5], made[4].flat[0] = spoil, spoil
        found.append(made)
    return found


def train(early, rule=None, steps=5, spoil=None, passes=1, **options):
    """By step: the reduced gradients, MeanSquare, which buckets were early; at the end the weights."""
    parameters, optimizer = make(rule, backward_passes_per_step=passes, **options)
    goes_early(optimizer, early)
    reducer, seen = reducer_of(optimizer), []
    for step in range(steps):
        optimizer.zero_grad()
        for gradients in gradients_of(step, passes, spoil):
            back = backward(optimizer, parameters, gradients)
        optimizer.synchronize()
        kept = [square for _, square in sorted(reducer.mean_square.items())]
        seen.append((bits([p.grad for p in parameters]), bits(kept), back))
        if spoil is None or step != 2:
            with optimizer.skip_synchronize():
                optimizer.step()
    assert optimizer.report()["buckets"] == BUCKETS
    return seen, bits(parameters), reducer.unusable_steps, flat([p.grad for p in parameters])


CASES = {
    "adaptive": {}, "constant": {"rule": {"adaptive": False, "lam": 1.5}},
    "local": {"rule": {"displacement": "local"}}, "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16}, "fp16": {"compression": hvd.Compression.fp16},
    "passes": {"passes": 2}, "nan": {"spoil": np.nan}, "inf": {"spoil": -np.inf},
}


def all_ways(case):
    return [train(early, **CASES[case]) for early in (range(3), (), (0,))]


@pytest.mark.parametrize(("size", "case"), [(2, case) for case in CASES] + [(3, "adaptive"), (3, "nan")])
def test_bits_do_not_depend_on_what_was_early(ranks, size, case):
    for rank, (early, late, on_one) in enumerate(found := ranks(size).run(all_ways, case)):
        # The ranks first meet at the end of a step. From the second on all but the last bucket are early.
        assert [back for *_, back in early[0]] == [[], *[ALL_BUT_LAST] * 4]
        assert [back for *_, back in late[0]] == [[]] * 5
        assert [back for *_, back in on_one[0]] == ([[], *[ALL_BUT_LAST] * 4] if rank == 0 else [[]] * 5)
        for one in (late, on_one):
            assert [step[:2] for step in one[0]] == [step[:2] for step in early[0]]
            assert one[1:3] == early[1:3]
        assert early[1] == found[0][0][1]
        assert early[2] == 0  # that step is thrown away


def reduced_gradients(lrs, spoil=None):
    """Each step's reduced gradient, where the learning rate changes between backward pass and step."""
    parameters, optimizer = make(lr=lrs[0], dtype=torch.float64)
    seen, kept, early = [], [], []
    for step, lr in enumerate(lrs):
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = lr
        early.append(backward(optimizer, parameters, gradients_of(step, spoil=spoil)[0]))
        if step:
            optimizer.param_groups[0]["lr"] = 100.0
        optimizer.synchronize()
        seen.append(flat([p.grad for p in parameters]))
        with optimizer.skip_synchronize():
            optimizer.step()
        kept.append(flat(square for _, square in sorted(reducer_of(optimizer).mean_square.items())))
    assert early[1:] == [ALL_BUT_LAST] * (len(lrs) - 1)
    return seen, kept


@pytest.mark.parametrize(("size", "spoil"), [(2, None), (3, None), (2, np.nan), (2, np.inf)])
def test_gradients_are_the_oracles_at_the_backward_passes_rates(ranks, size, spoil):
    lrs = [0.5, 0.2, 0.3, 0.4]
    found = ranks(size).run(reduced_gradients, lrs, spoil)
    oracle = DelayOracle(order="rank")
    for step, lr in enumerate(lrs):
        before = copy.copy(oracle)
        gradients = [flat(worker_gradients(SHAPES, worker=rank, step=step)) for rank in range(size)]
        if spoil is not None and step == 2:
            gradients[1][[36 + 3 + 5, 36 + 3 + 96 + 1]] = spoil
        with np.errstate(invalid="ignore"):
            expected = oracle.reduce(gradients, lr)
        finite = np.isfinite(np.sum(gradients, axis=0))
        if not finite.all():
            oracle = before  # MeanSquare is that of the step before
        for seen, kept in found:
            np.testing.assert_array_equal(np.isfinite(seen[step]), finite)
            np.testing.assert_allclose(seen[step][finite], expected[finite], rtol=1e-9, atol=1e-12)
            np.testing.assert_array_equal(seen[step], found[0][0][step])
            if not finite.all():
                np.testing.assert_array_equal(kept[step], kept[step - 1])
        assert finite.all() == (spoil is None or step != 2)


def rates_that_differ():
    """In the third step; then on, after an error that all ranks share. Rank 0 alone is early."""
    parameters, optimizer = make()
    goes_early(optimizer, (0,))
    said = []
    for step in range(6):
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = 0.1 * (1 + hvd.rank()) if step == 2 else 0.1
        backward(optimizer, parameters, gradients_of(step)[0])
        try:
            optimizer.step()
        except ValueError as error:
            said.append((step, str(error)))
    return said, unanswered(), bits(parameters)


def unanswered():
    """Second halves that were given up on this rank and that another does not answer."""
    deadline = time.monotonic() + 30
    while left := [one.name for one in collectives._UNFINISHED if one.name.endswith("/reduced")]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
        collectives.keep_alive_until_done([])  # lets go of those that are over
    return left


def test_rates_that_differ_are_an_error_on_all_ranks_that_leaves_nobody_waiting(ranks):
    found = ranks(2).run(rates_that_differ)
    for said, left, weights in found:
        assert [step for step, _ in said] == [2]
        assert "(0.1,), (0.2,)" in said[0][1]
        assert left == []
        assert weights == found[0][2]


def dropped_in_the_middle():
    """A step begun, of which rank 0 has begun second halves, is dropped; the run is the undisturbed one."""
    found = []
    for disturbed in (False, True):
        parameters, optimizer = make()
        goes_early(optimizer, (0,))
        for step in range(5):
            if disturbed and step == 3:
                back = backward(optimizer, parameters, gradients_of(99)[0])
                assert back == (ALL_BUT_LAST if hvd.rank() == 0 else [])
                optimizer.load_state_dict(optimizer.state_dict())
                assert not reducer_of(optimizer).pending_handles()
            optimizer.zero_grad()
            backward(optimizer, parameters, gradients_of(step)[0])
            optimizer.step()
        found.append((bits(parameters), optimizer.report()["steps"]))
    return found


def test_a_step_that_is_dropped_leaves_no_rank_waiting_and_no_trace(ranks):
    for undisturbed, disturbed in ranks(2).run(dropped_in_the_middle):
        assert disturbed == undisturbed


def two_at_once():
    """Two models of the same shapes with both exchanges under way, and each by itself."""
    def both(pairs):
        for step in range(4):
            for number, (parameters, optimizer) in enumerate(pairs):
                optimizer.zero_grad()
                back = backward(optimizer, parameters, gradients_of(step + 50 * number)[0])
                assert back == (ALL_BUT_LAST if step else [])
            for _, optimizer in pairs:
                optimizer.step()
        return [bits(parameters) for parameters, _ in pairs]

    def alone(number):
        parameters, optimizer = make()
        for step in range(4):
            optimizer.zero_grad()
            backward(optimizer, parameters, gradients_of(step + 50 * number)[0])
            optimizer.step()
        return bits(parameters)

    return both([make(), make()]), [alone(0), alone(1)]


def test_two_models_of_the_same_shapes(ranks):
    for together, alone in ranks(2).run(two_at_once):
        assert together == alone


def within_uneven():
    parameters, optimizer = make()
    backward(optimizer, parameters, gradients_of(0)[0])
    optimizer.step()
    with hvd.uneven_inputs(optimizer, "active"):
        for step in range(2):
            optimizer.zero_grad()
            assert backward(optimizer, parameters, gradients_of(step)[0]) == []
            optimizer.step()
    return bits(parameters)


def test_within_uneven_nothing_is_early(ranks):
    """Who takes part in the mean is known at the end of the step."""
    assert len(set(ranks(2).run(within_uneven))) == 1


def by_norm():
    parameters, optimizer = make({"order": "norm"})
    for step in range(3):
        optimizer.zero_grad()
        assert backward(optimizer, parameters, gradients_of(step)[0]) == []
        optimizer.step()


def test_an_order_by_norm_is_known_after_the_backward_pass(ranks):
    ranks(2).run(by_norm)
