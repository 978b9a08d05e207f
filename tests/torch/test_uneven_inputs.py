"""Ranks that run out of batches at different times: reducers and servers against one float64 process."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hvd_ext.torch as hvd
from tests.reference.spars_ams import top_k
from tests.torch.problems import backward, bits, flat, make_parameters, named, worker_gradients

pytestmark = pytest.mark.distributed
SHAPES = [(7, 3), (5,), (2, 3, 5)]
LR, MOMENTUM, LAM = 0.05, 0.9, 0.8
SIZE = sum(int(np.prod(shape)) for shape in SHAPES)


def samples_of(rank, step):
    return 3 + 2 * rank + step


def options_of(method):
    return {
        "plain": {}, "sum": {"op": hvd.Sum},
        "grouped": {"groups": 2},
        "topk": {"compression": hvd.Compression.topk(0.2, min_size=0)},
        "powersgd": {"compression": hvd.Compression.powersgd(rank=16)},
        "delay": {"op": hvd.DelayCompensated(LAM, adaptive=False, order="rank")},
    }[method]


def train(method, server, weigh, batches):
    """This rank's trajectory; what each step's weights are; and how often it shadowed."""
    mine = batches[hvd.rank()]
    parameters = make_parameters(SHAPES, dtype=torch.float64)
    extra = {} if server is None else {"server": server}
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM),
                                         named(parameters), **options_of(method), **extra)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    trajectory, called = [], []

    def over():
        called.append(1)
        schedule.step()
        trajectory.append(flat(parameters))

    with hvd.uneven_inputs(optimizer, weigh, on_shadow_step=over) as data:
        for step in range(mine):
            if weigh == "samples":
                data.samples(samples_of(hvd.rank(), step))
            optimizer.zero_grad()
            backward(parameters, worker_gradients(SHAPES, worker=hvd.rank(), step=step))
            optimizer.step()
            schedule.step()
            trajectory.append(flat(parameters))
    assert data.shadow_steps == len(called) == max(batches) - mine
    # And another epoch, where nobody is short: nothing has been left behind.
    optimizer.zero_grad()
    backward(parameters, worker_gradients(SHAPES, worker=hvd.rank(), step=99))
    optimizer.step()
    return np.array(trajectory), bits(parameters)


def oracle(method, weigh, batches):
    ranks, w = len(batches), flat(make_parameters(SHAPES, dtype=torch.float64))
    velocity, errors, trajectory = np.zeros(SIZE), [np.zeros(SIZE) for _ in batches], []
    for step in range(max(batches)):
        lr = LR * 0.5 ** (step // 2)
        active = [r for r in range(ranks) if step < batches[r]]
        g = [flat(worker_gradients(SHAPES, worker=r, step=step)) if r in active else np.zeros(SIZE)
             for r in range(ranks)]
        if weigh == "samples":
            total = sum(samples_of(r, step) for r in active)
            g = [ranks * samples_of(r, step) / total * one if r in active else one
                 for r, one in enumerate(g)]
        count = len(active) if weigh == "active" else ranks
        if method == "topk":
            for r in range(ranks):
                whole = g[r] + errors[r]
                sent = np.zeros(SIZE)
                chosen = top_k(whole, round(0.2 * SIZE))
                sent[chosen] = whole[chosen].astype(np.float32)
                errors[r], g[r] = whole - sent, sent
        if method == "delay":
            s = np.zeros(SIZE)
            for r in active:
                s = s + g[r] - lr / count * LAM * g[r] * g[r] * s
            mean = s / count
        else:
            mean = sum(g) / (1 if method == "sum" else count)
        velocity = MOMENTUM * velocity + mean
        w = w - lr * velocity
        trajectory.append(w)
    return np.array(trajectory)


CASES = [("plain", None, "ranks"), ("plain", "sharded", "active"), ("plain", "rank0", "samples"),
         ("plain", "replicated", "samples"), ("grouped", None, "active"), ("sum", None, "ranks"),
         ("topk", None, "active"), ("topk", "sharded", "samples"), ("topk", "rank0", "ranks"),
         ("powersgd", None, "samples"), ("powersgd", "sharded", "ranks"),
         ("delay", None, "ranks"), ("delay", "sharded", "active"), ("delay", "rank0", "active")]


@pytest.mark.parametrize("size", [2, 3])
def test_against_one_process(ranks, size):
    batches = {2: (4, 2), 3: (1, 4, 0)}[size]
    pool = ranks(size)
    for method, server, weigh in CASES:
        found = pool.run(train, method, server, weigh, batches)
        assert all(one[1] == found[0][1] for one in found), (method, server, weigh)
        for trajectory, _ in found:
            np.testing.assert_array_equal(trajectory, found[0][0])
        tolerance = 1e-6 if method in ("powersgd", "topk") else 1e-12
        np.testing.assert_allclose(found[0][0], oracle(method, weigh, batches), rtol=tolerance,
                                   atol=tolerance, err_msg=f"{method} {server} {weigh}")


def micro_batches(method):
    """Rank 1 ends in the middle of a step of two passes: it is taken with the one that it has."""
    parameters = make_parameters(SHAPES, dtype=torch.float64)
    before = flat(parameters)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=1.0), named(parameters),
                                         backward_passes_per_step=2, **options_of(method))
    with hvd.uneven_inputs(optimizer) as data:
        for step in range(2 if hvd.rank() == 0 else 1):
            backward(parameters, worker_gradients(SHAPES, worker=hvd.rank(), step=step))
            if step == 1:
                optimizer.step()
    return before - flat(parameters), data.shadow_steps


@pytest.mark.parametrize("method", ["plain", "topk"])
def test_a_step_that_was_begun_is_taken(ranks, method):
    found = ranks(2).run(micro_batches, method)
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert [one[1] for one in found] == [0, 0]
    if method == "plain":
        total = sum(flat(worker_gradients(SHAPES, worker=r, step=s)) for r, s in ((0, 0), (0, 1), (1, 0)))
        np.testing.assert_allclose(found[0][0], total / 2, rtol=1e-12)


def with_seng(evenly):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), named_parameters=model.named_parameters(),
        preconditioner=hvd.SENG(model, damping=0.3, update_freq=100))

    def batch(step):
        generator = torch.Generator().manual_seed(10 * step + hvd.rank())
        x, y = (torch.randn(8, n, generator=generator, dtype=torch.float64) for n in (6, 3))
        return torch.nn.functional.mse_loss(model(x), y)

    steps = 4 if hvd.rank() == 0 else 2
    if evenly:
        for step in range(4):
            optimizer.zero_grad()
            (batch(step) if step < steps else 0.0 * batch(step)).backward()
            optimizer.step()
    else:
        with hvd.uneven_inputs(optimizer):
            for step in range(steps):
                optimizer.zero_grad()
                batch(step).backward()
                optimizer.step()
    return flat(model.parameters())


def test_seng_keeps_its_curvature(ranks):
    pool = ranks(2)
    expected, found = pool.run(with_seng, True), pool.run(with_seng, False)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-12, atol=1e-14)


def refused():
    parameters = make_parameters(SHAPES)

    def wrap(**options):
        return hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=0.1), named(parameters), **options)

    def enter(optimizer, *args):
        with hvd.uneven_inputs(optimizer, *args) as data:
            return data

    with pytest.raises(TypeError, match=r"must be a hvd\.DistributedOptimizer"):
        enter(torch.optim.SGD(parameters, lr=0.1))
    with pytest.raises(ValueError, match="average_over must be one of"):
        enter(wrap(), "batches")
    with pytest.raises(ValueError, match="mean over the ranks, and the optimizer has op=Sum;"):
        enter(wrap(op=hvd.Sum), "active")
    with pytest.raises(ValueError, match=r"DelayCompensated cannot be combined.*use average_over='active'"):
        enter(wrap(op=hvd.DelayCompensated()), "samples")
    optimizer = wrap()
    with hvd.uneven_inputs(optimizer) as data:
        with pytest.raises(ValueError, match="of use with average_over='samples' only"):
            data.samples(3)
        with pytest.raises(RuntimeError, match=r"inside hvd\.uneven_inputs already"):
            enter(optimizer)
        with pytest.raises(RuntimeError, match="SyncBatchNorm cannot be used inside"):
            hvd.SyncBatchNorm(2)(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="call samples"), hvd.uneven_inputs(optimizer, "samples"):
        backward(parameters, worker_gradients(SHAPES, worker=0, step=0))
    optimizer._hvd_ext.abort_step()
    return True


def test_what_cannot_be(ranks):
    assert ranks(2).run(refused) == [True, True]


def with_a_scaler(method):
    """Mixed precision: a step without a batch goes through the scaler too, so that scales stay equal."""
    parameters = make_parameters(SHAPES)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=LR), named(parameters),
                                         grad_scaler=scaler, **options_of(method))
    before = flat(parameters)
    with hvd.uneven_inputs(optimizer):
        for step in range((5, 0)[hvd.rank()]):
            optimizer.zero_grad()
            gradients = worker_gradients(SHAPES, worker=hvd.rank(), step=step)
            scaler.scale(sum((p * torch.from_numpy(np.asarray(g)).to(p.dtype)).sum()
                             for p, g in zip(parameters, gradients, strict=True))).backward()
            optimizer.synchronize()
            scaler.unscale_(optimizer)
            with optimizer.skip_synchronize():
                scaler.step(optimizer)
            scaler.update()
    return before - flat(parameters), bits(parameters), scaler.get_scale()


def test_with_a_gradient_scaler(ranks):
    for method in ("plain", "topk"):
        found = ranks(2).run(with_a_scaler, method)
        assert found[0][1:] == found[1][1:]
        assert found[0][2] == 32.0
        if method == "plain":
            total = sum(flat(worker_gradients(SHAPES, worker=0, step=step)) for step in range(5)) / 2
            np.testing.assert_allclose(found[0][0], LR * total, rtol=1e-4, atol=1e-6)


def other_ways(case):
    """Cases without an oracle of their own: the block ends, and the replicas are the same bits."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(9, 6, sparse=case == "sparse"), torch.nn.Linear(6, 5),
                                torch.nn.Tanh(), torch.nn.Linear(5, 3))
    options = {"sparse": {}, "half": {"compression": hvd.Compression.fp16},
               "microbatch": {"op": hvd.DelayCompensated(virtual_workers="microbatch"),
                              "backward_passes_per_step": 2},
               "seng": {"preconditioner": hvd.SENG(model, damping=0.3, update_freq=2), "server": "sharded"},
               "lagged": {"preconditioner": hvd.SENG(model, damping=0.3, update_freq=3, coupling="lagged")},
               "full": {"preconditioner": hvd.SENG(model, damping=0.3, update_freq=2, coupling="full")},
               }[case]
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1),
                                         named_parameters=model.named_parameters(), **options)
    generator = torch.Generator().manual_seed(hvd.rank())
    with hvd.uneven_inputs(optimizer, "active") as data:
        for _ in range((5, 2)[hvd.rank()]):
            optimizer.zero_grad()
            for _ in range(options.get("backward_passes_per_step", 1)):
                x = torch.randint(0, 9, (8,), generator=generator)
                torch.nn.functional.cross_entropy(model(x), x % 3).backward()
            optimizer.step()
    assert data.shadow_steps == (0, 3)[hvd.rank()]
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    return bits(model.parameters())


@pytest.mark.parametrize("case", ["sparse", "half", "microbatch", "seng", "lagged", "full"])
def test_other_ways_end_with_equal_replicas(ranks, case):
    found = ranks(2).run(other_ways, case)
    assert found[0] == found[1]
