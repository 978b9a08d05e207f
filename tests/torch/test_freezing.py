"""Parameters that are frozen and unfrozen in mid-run: they stay still, and go on as one process would."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hvd_ext.torch as hvd
from tests.reference.step_programs import LR, Method
from tests.torch.problems import backward, bits, flat, make_parameters, named, worker_gradients

pytestmark = pytest.mark.distributed
SHAPES = [(6, 4), (5,), (4, 3)]
SIZES = [int(np.prod(shape)) for shape in SHAPES]
PLACES = [slice(sum(SIZES[:i]), sum(SIZES[:i + 1])) for i in range(len(SIZES))]
BUCKETS = [[2, 1, 0]]  # gradients travel last parameter first
STEPS = 10
METHODS = {  # kind of the reference, and the options
    "plain": ("plain", {}),
    "groups": ("plain", {"groups": 2}),
    "topk": ("topk", {"compression": hvd.Compression.topk(0.3, min_size=0)}),
    "topk_sparse": ("topk_sparse", {"compression": hvd.Compression.topk(
        1.0, min_size=0, exchange="sparse_allreduce")}),
    "powersgd": ("plain", {"compression": hvd.Compression.powersgd(rank=8, min_compression=1.0)}),
    "adaptive": ("adaptive", {"op": hvd.DelayCompensated(0.8)}),
    "late": ("plain", {"overlap": hvd.DelayedUpdate(0.0, adaptive=False)}),
    "late_compensated": ("plain", {"overlap": hvd.DelayedUpdate(0.4, adaptive=False)}),
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, weight_decay=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.1),
}


def frozen_at(step):
    """Parameters that are frozen in a step."""
    return {3: [1], 4: [0, 1], 5: [0], 7: [0, 1, 2]}.get(step, [])


def freeze(parameters, step):
    for number, parameter in enumerate(parameters):
        parameter.requires_grad_(number not in frozen_at(step))


def gradients_of(rank, step):
    return worker_gradients(SHAPES, worker=rank, step=step)


def train(optimizer_name, method, server):
    """The weights after each step, how far frozen ones have moved, and this rank's bits."""
    parameters = make_parameters(SHAPES, dtype=torch.float64)
    optimizer = hvd.DistributedOptimizer(OPTIMIZERS[optimizer_name](parameters), named(parameters),
                                         server=server, **METHODS[method][1])
    found, moved = [], 0.0
    for step in range(STEPS):
        freeze(parameters, step)
        before = [p.detach().clone() for p in parameters]
        backward(parameters, gradients_of(hvd.rank(), step), skip=frozen_at(step))
        optimizer.step()
        assert all(parameters[number].grad is None for number in frozen_at(step))
        moved = max([moved, *(float((parameters[number] - before[number]).abs().max().detach())
                              for number in frozen_at(step))])
        optimizer.zero_grad()
        found.append(flat(parameters))
    if "late" in method:
        optimizer.flush()
        found.append(flat(parameters))
    return found, moved, bits(parameters)


class Reference:
    """The same in one process, in float64: gradients reduced in NumPy, torch's own optimizer."""

    def __init__(self, optimizer, method, ranks):
        self.parameters = make_parameters(SHAPES, dtype=torch.float64)
        self.optimizer = OPTIMIZERS[optimizer](self.parameters)
        self.order = np.concatenate([np.arange(PLACES[i].start, PLACES[i].stop) for i in BUCKETS[0]])
        kind = METHODS[method][0].replace("topk_sparse", "plain")
        self.method = Method(kind, ranks, [slice(0, sum(SIZES))])
        self.late, self.lam = "late" in method, 0.4 if method == "late_compensated" else 0.0
        self.waiting = self.before = None

    def reduce(self, step):
        """The reduced gradient, flat; nan where there is none."""
        ranks, frozen = self.method.ranks, np.zeros(sum(SIZES), bool)
        for number in frozen_at(step):
            frozen[PLACES[number]] = True
        mine = [flat(gradients_of(rank, step)) for rank in range(ranks)]
        held, state = frozen[self.order], self.method.state
        waiting = {key: np.array(value) for key, value in state.items()}
        self.method.state = {key: [np.where(held, 0, one) for one in value] if key == "residuals" else value
                             for key, value in waiting.items()}
        reduced, after, _ = self.method.reduce([np.where(frozen, 0, g)[self.order] for g in mine])
        self.method.state = {key: np.where(held, waiting.get(key, np.zeros_like(value)), value)
                             for key, value in after.items()}
        result = np.empty_like(reduced)
        result[self.order] = reduced
        result[frozen] = np.nan
        return result

    def apply(self, gradient, step):
        for number, (place, parameter) in enumerate(zip(PLACES, self.parameters, strict=True)):
            missing = number in frozen_at(step) or np.isnan(gradient[place]).any()
            parameter.grad = None if missing else torch.from_numpy(gradient[place].reshape(parameter.shape))
        self.optimizer.step()

    def step(self, step):
        gradient = None if step == STEPS else self.reduce(step)
        if not self.late:
            self.apply(gradient, step)
            return
        now = flat(self.parameters)
        if self.waiting is not None:
            self.apply(self.waiting + self.lam * self.waiting**2 * (now - self.before), step)
        self.waiting, self.before = gradient, now


def expected(optimizer, method, ranks):
    reference, found = Reference(optimizer, method, ranks), []
    for step in range(STEPS + ("late" in method)):
        reference.step(step)
        found.append(flat(reference.parameters))
    return found


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("server", [None, "rank0", "sharded"])
@pytest.mark.parametrize("method", METHODS)
def test_frozen_parameters_stay_and_go_on_as_in_one_process(ranks, method, server, size):
    tolerance = 1e-9 if "topk" not in method else 1e-4  # values travel as float32
    for optimizer in OPTIMIZERS:
        if optimizer == "adamw" and "topk" in method:
            continue  # divides by what may be as small as the rounding
        results = ranks(size).run(train, optimizer, method, server)
        for found, moved, mine in results:
            assert moved == 0.0
            assert mine == results[0][2]
            for step, (one, other) in enumerate(zip(found, expected(optimizer, method, size), strict=True)):
                np.testing.assert_allclose(one, other, rtol=0, atol=tolerance, err_msg=f"{optimizer} {step}")


KEEPING = {
    "topk": {"compression": hvd.Compression.topk(0.2, min_size=0)},
    "topk_sparse": {"compression": hvd.Compression.topk(0.2, min_size=0, exchange="sparse_allreduce")},
    "powersgd": {"compression": hvd.Compression.powersgd(rank=1, min_compression=1.0)},
    "late_topk": {"compression": hvd.Compression.topk(0.2, min_size=0),
                  "overlap": hvd.DelayedUpdate(0.0, adaptive=False)},
}


def kept_of(optimizer, number):
    """What this rank keeps of a parameter: its residual, as an owner, and its Q, in one vector."""
    state = optimizer.state_dict()["hvd_ext"]["reducer"]
    place, kept = PLACES_IN_BUCKET[number], [state["residual"][f"p{number}"]]
    for one in state.get("owned", {}).values():
        if one["residual"] is not None:
            low, high = one["bounds"][one["rank"]], one["bounds"][one["rank"] + 1]
            whole = torch.zeros(sum(SIZES), dtype=torch.float64)
            whole[low:high] = one["residual"]
            kept.append(whole[place])
    for q in state.get("q", {}).values():
        kept.append(q[{2: slice(0, 3), 0: slice(3, 7)}[number]])
    return flat(kept)


PLACES_IN_BUCKET = {2: slice(0, 12), 1: slice(12, 17), 0: slice(17, 41)}


def keep_residuals(method, number):
    """What is kept of a parameter before and after steps in which it is frozen, and after one more."""
    parameters = make_parameters(SHAPES, dtype=torch.float64)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, LR), named(parameters),
                                         **KEEPING[method])
    seen = []
    for step in range(8):
        frozen = [number] if step in (3, 4, 5) else []
        for index, parameter in enumerate(parameters):
            parameter.requires_grad_(index not in frozen)
        backward(parameters, gradients_of(hvd.rank(), step), skip=frozen)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(kept_of(optimizer, number))
    return seen, bits(parameters)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("method", KEEPING)
def test_the_residual_of_a_frozen_parameter_waits_bit_for_bit(ranks, method, size):
    for number in (0, 2):
        results = ranks(size).run(keep_residuals, method, number)
        for seen, mine in results:
            assert mine == results[0][1]
            assert np.abs(seen[2]).max() > 0
            for step in (3, 4, 5):
                np.testing.assert_array_equal(seen[step], seen[2])
            assert not np.array_equal(seen[7], seen[5])


def add_up_with_freezing(method):
    """Every rank's gradients, what was applied, and what is kept of it, added up over the ranks."""
    parameters = make_parameters(SHAPES, dtype=torch.float64)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, 1.0), named(parameters),
                                         **KEEPING[method])
    begin, given = flat(parameters), np.zeros(sum(SIZES))
    for step in range(STEPS):
        freeze(parameters, step)
        mine = gradients_of(hvd.rank(), step)
        backward(parameters, mine, skip=frozen_at(step))
        optimizer.step()
        optimizer.zero_grad()
        for number, place in enumerate(PLACES):
            if number not in frozen_at(step):
                given[place] += mine[number].ravel()
    state = optimizer.state_dict()["hvd_ext"]["reducer"]
    kept = np.zeros(sum(SIZES))
    for number, place in enumerate(PLACES):
        if f"p{number}" in state["residual"]:
            kept[place] = state["residual"][f"p{number}"].numpy()  # PowerSGD sends vectors whole
    for one in state.get("owned", {}).values():
        if one["residual"] is not None:
            whole = np.zeros(sum(SIZES))
            whole[one["bounds"][one["rank"]]:one["bounds"][one["rank"] + 1]] = flat([one["residual"]])
            for number, place in enumerate(PLACES):
                kept[place] += hvd.size() * whole[PLACES_IN_BUCKET[number]]
    return given, kept, begin - flat(parameters)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("method", ["topk", "topk_sparse", "powersgd"])
def test_nothing_of_the_gradients_is_lost_by_freezing(ranks, method, size):
    results = ranks(size).run(add_up_with_freezing, method)
    given = sum(one for one, _, _ in results)
    kept = sum(one for _, one, _ in results)
    np.testing.assert_allclose(size * results[0][2] + kept, given, rtol=0, atol=1e-5)


DISAGREEING = {
    "plain": {}, "groups": {"groups": 1}, "fp16": {"compression": hvd.Compression.fp16},
    "sharded": {"server": "sharded"}, "rank0": {"server": "rank0"}, "late": {"overlap": hvd.DelayedUpdate()},
    "delay": {"op": hvd.DelayCompensated()}, **{key: KEEPING[key] for key in ("topk", "powersgd")},
}


def disagree(method, step_of_others, unfreeze):
    """The error that this rank meets when rank 1 freezes, or unfreezes, a parameter alone."""
    parameters = make_parameters([*SHAPES, (1,)])
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, LR), named(parameters),
                                         **DISAGREEING[method])
    try:
        for step in range(step_of_others + 3):
            on = step < 2 or (unfreeze and step >= step_of_others and hvd.rank() == 1)
            if not unfreeze:
                on = step < step_of_others or hvd.rank() != 1
            for number in (1, 3):
                parameters[number].requires_grad_(on)
            backward(parameters, [torch.ones(p.shape).numpy() for p in parameters],
                     skip=() if on else (1, 3))
            optimizer.step()
            optimizer.zero_grad()
    except ValueError as error:
        return step, str(error)
    finally:
        optimizer._hvd_ext.abort_step()
    return None, "no error"


@pytest.mark.parametrize("unfreeze", [False, True])
@pytest.mark.parametrize("method", DISAGREEING)
def test_ranks_that_freeze_differently_all_see_an_error(ranks, method, unfreeze):
    for step, message in ranks(2).run(disagree, method, 3, unfreeze):
        assert step in ((3, 4) if method == "late" else (3,)), message
        assert "p1" in message or "p3" in message
        assert "requires_grad" in message or "frozen: p" in message, message


def leave_out(options):
    """What the gradient of a parameter is that takes no part in a step, on any rank."""
    parameters = make_parameters(SHAPES)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, LR), named(parameters), **options)
    for step in range(3):
        backward(parameters, gradients_of(hvd.rank(), step), skip=(1,))
        optimizer.synchronize()
        gradient = parameters[1].grad
        with optimizer.skip_synchronize():
            optimizer.step()
        optimizer.zero_grad()
    return None if gradient is None else float(gradient.abs().sum())


@pytest.mark.parametrize(("size", "found"), [(1, None), (2, 0.0)])
@pytest.mark.parametrize("options", [
    {}, {"groups": 1}, {"server": "sharded"}, {"op": hvd.DelayCompensated()}], ids=str)
def test_a_trainable_parameter_without_a_gradient(ranks, options, size, found):
    assert ranks(size).run(leave_out, options) == [found] * size


def join_group(options, how):
    """The reduced gradients of steps before and after parameters of a group join, and what they should be."""
    parameters = make_parameters(SHAPES, dtype=torch.float64)
    named_parameters, late = named(parameters), parameters[:1]
    if how == "unfreeze":
        late[0].requires_grad_(False)
    inner = torch.optim.SGD(parameters if how == "unfreeze" else parameters[1:], LR)
    if options["groups"] == "lists":
        options = {**options, "groups": [parameters[:2], [parameters[2]]]}
    optimizer = hvd.DistributedOptimizer(inner, named_parameters, **options)
    found = []
    for step in range(5):
        if step == 2 and how == "unfreeze":
            late[0].requires_grad_(True)
        elif step == 2:
            optimizer.add_param_group({"params": late})
        backward(parameters, gradients_of(hvd.rank(), step), skip=(0,) if step < 2 else ())
        optimizer.synchronize()
        skipped = 0 if step >= 2 else SIZES[0]
        found.append(flat([p.grad for p in parameters[skipped > 0:]]))
        right = [flat(gradients_of(rank, step))[skipped:] for rank in range(hvd.size())]
        divisor = hvd.size() if options["op"] == hvd.Average else 1
        np.testing.assert_allclose(found[-1], sum(right) / divisor, rtol=0, atol=1e-12, err_msg=str(step))
        with optimizer.skip_synchronize():
            optimizer.step()
        optimizer.zero_grad()
    return flat(parameters).tobytes()


@pytest.mark.parametrize("how", ["unfreeze", "add"])
@pytest.mark.parametrize("groups", [1, 2, "lists"])
@pytest.mark.parametrize("op", [hvd.Average, hvd.Sum], ids=["average", "sum"])
def test_gradients_of_a_group_that_others_join_are_reduced_once(ranks, op, groups, how):
    found = ranks(2).run(join_group, {"op": op, "groups": groups}, how)
    assert found[0] == found[1]
