"""TopK on two ranks: replicas, bytes, non-finite gradients, missing ones, checkpoints, disagreement."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
import torch

import hvd_ext.torch as hvd
from tests.torch.problems import UNEVEN, backward, bits, flat, make_parameters, named, worker_gradients

pytestmark = pytest.mark.distributed

SHAPES = [(40, 30), (30,), (7, 11, 3), (), (2000,)]


def build(settings=None, *, shapes=SHAPES, dtype=torch.float32, passes=1, lr=0.05, scaler=None,
          wrapped=None, server=None, **options):
    parameters = make_parameters(shapes, dtype=dtype)
    inner = hvd.AMSGrad(parameters, lr) if wrapped is None else wrapped(parameters)
    optimizer = hvd.DistributedOptimizer(
        inner, named(parameters), backward_passes_per_step=passes, server=server,
        compression=hvd.Compression.topk(**{"ratio": 0.05, "min_size": 100, **(settings or {})}),
        grad_scaler=scaler, **options,
    )
    return parameters, optimizer


def step_once(parameters, optimizer, step, *, shapes=SHAPES, passes=1, poison=None, **how):
    optimizer.zero_grad()
    for number in range(passes):
        gradients = worker_gradients(shapes, worker=hvd.rank(), step=step * passes + number)
        if poison is not None:
            gradients[0].flat[3] = poison
        backward(parameters, gradients, **how)
    optimizer.step()


def residuals(optimizer):
    saved = optimizer.state_dict()["hvd_ext"]["reducer"]["residual"]
    return {name: piece.numpy().tobytes() for name, piece in saved.items()}


def huge_but_finite():
    """The norm of the gradient overflows, none of its elements does."""
    parameters, optimizer = build({})
    step_once(parameters, optimizer, 0, shapes=SHAPES)
    optimizer.zero_grad()
    backward(parameters, [g * 1e30 for g in worker_gradients(SHAPES, worker=0, step=1)])
    optimizer.step()
    first = optimizer.report()["step_taken"]
    # g + e overflows though neither does.
    for _ in range(2):
        optimizer.zero_grad()
        backward(parameters, [np.full(shape, 3e38) for shape in SHAPES])
        optimizer.step()
    kept = optimizer.state_dict()["hvd_ext"]["reducer"]["residual"].values()
    return first, optimizer.report()["step_taken"], all(bool(k.isfinite().all()) for k in kept)


def test_overflow(ranks):
    assert ranks(2).run(huge_but_finite) == [(True, False, True)] * 2


def train_with_scaler(scaled):
    """Half the steps at another loss scale, one step with an overflow; weights and scale."""
    scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=1024.0, growth_interval=3)
    parameters, optimizer = build({}, scaler=scaler)
    scales, taken = [], []
    for step in range(10):
        optimizer.zero_grad()
        poison = scaled and step == 5 and hvd.rank() == 1
        for p, g in zip(parameters, worker_gradients(SHAPES, worker=hvd.rank(), step=step), strict=True):
            if poison:
                g = g * np.inf
            scaler.scale((p * torch.as_tensor(np.asarray(g)).to(p.dtype)).sum()).backward()
        optimizer.synchronize()
        scaler.unscale_(optimizer)
        if not scaled and step == 5:
            continue
        torch.nn.utils.clip_grad_norm_(parameters, 1e6)
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        taken.append(optimizer.report()["step_taken"])
    return scales, taken, flat(parameters), bits(parameters)


def test_grad_scaler_backs_off_and_residuals_follow_the_scale(ranks):
    first, second = ranks(2).run(train_with_scaler, True)
    assert first[3] == second[3]
    scales, taken, weights, _ = first
    assert taken == [True] * 5 + [False] + [True] * 4
    assert scales[:3] == [1024.0, 1024.0, 2048.0]
    assert scales[5] == scales[4] / 2
    # Powers of two change no bit: the same as without a scale, but for the step that was lost.
    (plain, _) = ranks(2).run(train_without_step_five)
    np.testing.assert_allclose(weights, plain, rtol=1e-6)


def train_without_step_five():
    parameters, optimizer = build({})
    for step in range(10):
        if step != 5:
            step_once(parameters, optimizer, step)
    return flat(parameters)


def one_rank_has_no_gradient(empty_too):
    """Rank 1 lacks the gradients of p0 and p4; with ``empty_too`` nobody has any."""
    parameters, optimizer = build({"min_size": 0})
    for step in range(3):
        skip = range(5) if empty_too else ((0, 4) if hvd.rank() == 1 else ())
        step_once(parameters, optimizer, step, skip=skip)
    zero = all(not bool(p.grad.any()) for p in parameters)
    return bits(parameters), zero, optimizer.report()["kept_fraction"]


def test_missing_gradients_count_as_zeros_and_nothing_can_be_sent(ranks):
    (first, zero, _), (second, _, _) = ranks(2).run(one_rank_has_no_gradient, False)
    assert first == second
    assert not zero
    for _, zero, kept in ranks(2).run(one_rank_has_no_gradient, True):
        assert zero
        assert kept == 0.0


def resumed(steps, at):
    """Bits after all steps in one go, and after stopping and going on from a checkpoint."""
    results = []
    for stop in (None, at):
        parameters, optimizer = build({"values": "float16"})
        for step in range(steps):
            if step == stop:
                saved = pickle.dumps(([p.detach() for p in parameters], optimizer.state_dict()))
                parameters, optimizer = build({"values": "float16"})
                weights, state = pickle.loads(saved)
                with torch.no_grad():
                    for p, w in zip(parameters, weights, strict=True):
                        p.copy_(w)
                optimizer.load_state_dict(state)
            step_once(parameters, optimizer, step)
        results.append((bits(parameters), residuals(optimizer)))
    return results[0] == results[1], pickle.dumps(optimizer.state_dict())


def load_elsewhere(saved, settings=None):
    """What loading says when the state is of another number of ranks, model, or plain torch."""
    state = pickle.loads(saved)
    parameters, optimizer = build({"values": "float16", **(settings or {})})
    said = []
    for options in ({}, {"reset_per_rank_state": True}):
        try:
            optimizer.load_state_dict(state, **options)
            said.append("loaded")
        except ValueError as error:
            said.append(str(error))
    step_once(parameters, optimizer, 0)
    optimizer.load_state_dict({key: value for key, value in state.items() if key != "hvd_ext"})
    step_once(parameters, optimizer, 1)
    return said, optimizer.report()["steps"]


def test_checkpoints(ranks):
    (same0, saved), (same1, _) = ranks(2).run(resumed, 12, 7)
    assert same0
    assert same1
    (said, _), _ = ranks(2).run(load_elsewhere, saved, {"error_feedback": False})
    assert "error_feedback=False would drop" in said[0]
    said = [outcome[0] for outcome in ranks(2).run(load_elsewhere, saved, {"exclude": ["p0"]})]
    assert "p0" in said[0][0]
    assert "reset_per_rank_state=True" in said[0][0]
    assert said[1][0] == "loaded"  # the residuals are rank 0's, and begin new here
    assert [s[1] for s in said] == ["loaded", "loaded"]
    ((said, steps),) = ranks(1).run(load_elsewhere, saved)
    assert said == ["loaded", "loaded"]
    assert steps == 1


def disagreeing(what):
    settings, shapes = {}, list(SHAPES)
    if hvd.rank() == 1:
        if what == "ratio":
            settings["ratio"] = 0.1
        elif what == "function":
            settings["ratio"] = lambda step: 0.2
        elif what == "shape":
            shapes[0] = (41, 30)
    elif what == "function":
        settings["ratio"] = lambda step: 0.1
    parameters, optimizer = build(settings, shapes=shapes)
    if what == "steps" and hvd.rank() == 1:
        optimizer._hvd_ext.reducer.steps = 3
    try:
        step_once(parameters, optimizer, 0, shapes=shapes)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize(("what", "said"), [
    ("ratio", "ratio=0.1"), ("function", "same point of training"),
    ("shape", "p0"), ("steps", "same point of training"),
])


def test_ranks_that_disagree_all_say_so(ranks, what, said):
    first, second = ranks(2).run(disagreeing, what)
    assert said in first
    assert said in second


def refusals():
    said = {}
    weight = [torch.nn.Parameter(torch.ones(2000))]
    topk = hvd.Compression.topk(0.1)

    def wrap(optimizer=None, **options):
        return hvd.DistributedOptimizer(optimizer or torch.optim.SGD(weight, 0.1),
                                        [("w", weight[0])], **options)

    table = torch.nn.Embedding(500, 8, sparse=True)

    def sparse():
        optimizer = hvd.DistributedOptimizer(torch.optim.SGD(table.parameters(), 0.1),
                                             table.named_parameters(), compression=topk)
        table(torch.tensor([1])).sum().backward()
        optimizer.step()

    attempts = {
        "adasum": lambda: wrap(compression=topk, op=hvd.Adasum),
        "sum": lambda: wrap(compression=topk, op=hvd.Sum),
        "delay": lambda: wrap(compression=topk, op=hvd.DelayCompensated()),
        "exclude": lambda: wrap(compression=hvd.Compression.topk(exclude=["wight"])),
        "server": lambda: wrap(server="rank1"),
        "sparse": sparse,
    }
    for name, attempt in attempts.items():
        try:
            attempt()
            said[name] = "no error"
        except ValueError as error:
            said[name] = str(error)
    return said


def test_what_is_refused(ranks):
    for said in ranks(2).run(refusals):
        assert "op=Adasum cannot be combined" in said["adasum"]
        assert "op=Average" in said["sum"]
        assert "op=DelayCompensated cannot be combined" in said["delay"]
        assert "'wight', which matches no parameter" in said["exclude"]
        assert "'rank0', 'replicated', 'sharded'" in said["server"]
        assert "sparse gradient" in said["sparse"]


def under_way():
    """Messages that were sent when the backward pass ended, before ``step()``."""
    parameters, optimizer = build({"bucket_bytes": 4000, "min_size": 100})
    counts = []
    for skip in ((), (4,)):
        optimizer.zero_grad()
        backward(parameters, worker_gradients(SHAPES, worker=hvd.rank(), step=0), skip=skip,
                 reverse=bool(hvd.rank()))
        counts.append(len(optimizer._hvd_ext.reducer._started))
        optimizer.step()
    return counts, optimizer.report()["buckets"]


def test_buckets_start_during_the_backward_pass(ranks):
    for (full, without_one), buckets in ranks(2).run(under_way):
        assert buckets == 4
        assert full == buckets
        assert without_one == buckets - 1


def new_parameters():
    """A parameter group that comes later joins the exchange; earlier residuals stay."""
    parameters, optimizer = build({"min_size": 0}, shapes=UNEVEN)
    step_once(parameters, optimizer, 0, shapes=UNEVEN)
    before = residuals(optimizer)
    late = make_parameters([(50, 4)], seed=9)
    optimizer.add_param_group({"params": late})
    now = residuals(optimizer)  # with zeros for the new parameter
    first = {name: now[name] for name in before} == before
    for step in itertools.chain(range(1, 4)):
        optimizer.zero_grad()
        backward(parameters + late, worker_gradients([*UNEVEN, (50, 4)], worker=hvd.rank(), step=step))
        optimizer.step()
    return bits(parameters + late), first, len(residuals(optimizer)) == len(before) + 1


def test_parameters_that_come_later(ranks):
    (first, kept, more), (second, _, _) = ranks(2).run(new_parameters)
    assert first == second
    assert kept
    assert more
