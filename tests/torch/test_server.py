"""The three servers on two and four ranks: one trajectory, one owner, checkpoints, failures."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

import hvd_ext.torch as hvd
from tests.torch.problems import backward, bits, flat, make_parameters, named, worker_gradients

pytestmark = pytest.mark.distributed

SERVERS = ("rank0", "replicated", "sharded")
SHAPES = [(20, 10), (10,), (30, 20), (), (7, 3, 2), (200,)]
WRAPPED = {
    "sgd": lambda groups: torch.optim.SGD(groups, 0.1),
    "momentum": lambda groups: torch.optim.SGD(groups, 0.1, momentum=0.9, weight_decay=1e-2),
    "adam": lambda groups: torch.optim.Adam(groups, 0.05),
    "adamw": lambda groups: torch.optim.AdamW(groups, 0.05, weight_decay=0.1),
    "amsgrad": lambda groups: hvd.AMSGrad(groups, 0.05),
}
MOMENTS = {"sgd": 0, "momentum": 1, "adam": 2, "adamw": 2, "amsgrad": 3}


def build(name, server, compression=None, *, dtype=torch.float32, **options):
    parameters = make_parameters(SHAPES, dtype=dtype)
    inner = WRAPPED[name]([{"params": parameters[:2], "lr": 0.02}, {"params": parameters[2:]}])
    optimizer = hvd.DistributedOptimizer(
        inner, named(parameters), compression=compression or hvd.Compression.none, server=server,
        **options,
    )
    return parameters, optimizer


def step_once(parameters, optimizer, step, *, clip=None, passes=1):
    optimizer.zero_grad()
    for number in range(passes):
        backward(parameters, worker_gradients(SHAPES, worker=hvd.rank(), step=step * passes + number))
    if clip is None:
        optimizer.step()
        return
    optimizer.synchronize()
    torch.nn.utils.clip_grad_norm_(parameters, clip)
    with optimizer.skip_synchronize():
        optimizer.step()


def moments(optimizer):
    """Elements of parameter-shaped state that this rank holds."""
    return sum(value.numel() for state in optimizer.state.values() for value in state.values()
               if isinstance(value, torch.Tensor) and value.dim() > 0)


def trajectories(names, compress):
    """Weights after 12 clipped, scheduled, accumulated steps under each server."""
    results = {}
    for name in names:
        for server in (None, *SERVERS):
            topk = hvd.Compression.topk(0.1, min_size=50) if compress else None
            parameters, optimizer = build(name, server, topk, backward_passes_per_step=2)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)
            for step in range(12):
                step_once(parameters, optimizer, step, clip=1.0, passes=2)
                schedule.step()
            report = {} if server is None else optimizer.report()["server"]
            results[name, server] = (flat(parameters), bits(parameters), moments(optimizer), report)
    return results


@pytest.mark.parametrize(("size", "names", "compress"), [
    (2, tuple(WRAPPED), False), (2, ("amsgrad", "adam"), True),
])


def test_the_three_servers_give_the_same_trajectory(ranks, size, names, compress):
    everyone = ranks(size).run(trajectories, names, compress, timeout=120)
    total = sum(int(np.prod(shape)) for shape in SHAPES)
    for name in names:
        plain = everyone[0][name, None][0]
        for server in SERVERS:
            for result in everyone:
                np.testing.assert_allclose(result[name, server][0], plain, rtol=2e-6, atol=1e-7)
                assert result[name, server][1] == everyone[0][name, server][1]
        held = {server: [result[name, server][2] for result in everyone] for server in SERVERS}
        vectors = MOMENTS[name] * (total - 1)  # the scalar parameter's state has no axis
        assert held["replicated"] == [vectors] * size
        assert held["rank0"] == [vectors] + [0] * (size - 1)
        assert sum(held["sharded"]) == vectors
        largest = max(int(np.prod(shape)) for shape in SHAPES)
        shares = [result[name, "sharded"][3]["owned_elements"] for result in everyone]
        assert sum(shares) == total
        assert max(shares) <= total / size + largest
        assert max(held["sharded"]) <= MOMENTS[name] * max(shares)


def checkpoint(kind, server):
    """Train 5 steps under ``server``; this rank's state, weights, and the bits 5 steps later."""
    parameters, optimizer = build(kind, server)
    for step in range(5):
        step_once(parameters, optimizer, step)
    saved = pickle.dumps(([p.detach().clone() for p in parameters], optimizer.gather_state_dict(),
                          optimizer.state_dict()))
    for step in range(5, 10):
        step_once(parameters, optimizer, step)
    return saved, bits(parameters)


def resume(kind, server, saved, own):
    """Go on from a checkpoint under another server; the bits, or the error."""
    weights, gathered, mine = pickle.loads(saved[hvd.rank()] if own else saved[0])
    parameters, optimizer = build(kind, server)
    with torch.no_grad():
        for p, w in zip(parameters, weights, strict=True):
            p.copy_(w)
    said = ""
    try:
        optimizer.load_state_dict(mine if own else gathered)
    except ValueError as error:
        said = str(error)
    if any(hvd.allgather_object(said)):
        return said
    hvd.broadcast_optimizer_state(optimizer, 0)
    for step in range(5, 10):
        step_once(parameters, optimizer, step)
    return bits(parameters), moments(optimizer)


def resume_everywhere(kind, saves, own):
    return {(a, b): resume(kind, b, saves[a], own) for a in SERVERS for b in SERVERS}


def checkpoints(kind):
    return {server: checkpoint(kind, server) for server in SERVERS}


def test_a_checkpoint_of_one_server_loads_under_another(ranks):
    by_rank = ranks(2).run(checkpoints, "adam")
    saves = {server: [result[server][0] for result in by_rank] for server in SERVERS}
    expected = by_rank[0]["replicated"][1]
    total = sum(int(np.prod(shape)) for shape in SHAPES) - 1
    for rank, results in enumerate(ranks(2).run(resume_everywhere, "adam", saves, False)):
        for (saved, loaded), (after, held) in results.items():
            assert after == expected, (saved, loaded)
            if loaded == "rank0":
                assert held == (2 * total if rank == 0 else 0)
            elif loaded == "sharded":
                assert held < 2 * total
    # Each rank's own state_dict(): complete only where the owner of everything saved it.
    own = ranks(2).run(resume_everywhere, "adam", saves, True)
    for rank, results in enumerate(own):
        assert results["sharded", "sharded"][0] == expected
        assert results["rank0", "rank0"][0] == expected
        assert results["replicated", "sharded"][0] == expected
        assert "gather_state_dict()" in results["sharded", "replicated"]
        if rank == 1:
            assert "gather_state_dict()" in results["rank0", "replicated"]


def failing(server, where):
    """The update fails on one rank: every rank raises, nobody waits for ever."""
    parameters, optimizer = build("sgd", server)
    step_once(parameters, optimizer, 0)
    if hvd.rank() == where:
        def broken(*args, **kwargs):
            raise ArithmeticError("planted")

        for group in optimizer.param_groups:
            group["lr"] = property(broken)  # no number: the wrapped optimizer cannot multiply by it
    try:
        step_once(parameters, optimizer, 1)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize(("server", "where"), [("rank0", 0), ("sharded", 1)])
def test_an_update_that_fails_fails_everywhere(ranks, server, where):
    said = ranks(2).run(failing, server, where)
    assert said[where].startswith("TypeError")
    assert f"the update failed on rank {where}" in said[1 - where]


def with_closure(server):
    """Weights after steps with a closure, and after the same without one."""
    found = []
    for closures in (True, False):
        parameters, optimizer = build("sgd", server)
        for step in range(3):
            gradients = worker_gradients(SHAPES, worker=hvd.rank(), step=step)

            def closure(optimizer=optimizer, parameters=parameters, gradients=gradients):
                optimizer.zero_grad()
                backward(parameters, gradients)
                return torch.tensor(3.0)

            if closures:
                assert float(optimizer.step(closure)) == 3.0
            else:
                closure()
                optimizer.step()
        found.append(bits(parameters))
    return found


@pytest.mark.parametrize("server", [None, "rank0", "sharded"])
def test_a_closure_is_run_once_on_every_rank(ranks, server):
    for with_closures, without in ranks(2).run(with_closure, server):
        assert with_closures == without


def scaled(server):
    """A GradScaler that meets an overflow on one rank at step 2."""
    parameters, optimizer = build("adam", server)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    kept = []
    for step in range(4):
        before = bits(parameters)
        optimizer.zero_grad()
        for p, g in zip(parameters, worker_gradients(SHAPES, worker=hvd.rank(), step=step), strict=True):
            factor = np.inf if step == 2 and hvd.rank() == 1 else 1.0
            scaler.scale((p * torch.as_tensor(np.asarray(g) * factor).to(p.dtype)).sum()).backward()
        optimizer.synchronize()
        scaler.unscale_(optimizer)
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
        kept.append(bits(parameters) == before)
    return kept, scaler.get_scale(), bits(parameters)


def test_grad_scaler(ranks):
    weights = set()
    for server in SERVERS:
        for kept, scale, after in ranks(2).run(scaled, server):
            assert kept == [False, False, True, False]
            assert scale == 4.0
            weights.add(after)
    assert len(weights) == 1


def weights_in_half(server):
    topk = hvd.Compression.topk(0.5)  # Horovod itself cannot add up bfloat16
    parameters, optimizer = build("sgd", server, topk, dtype=torch.bfloat16)
    for step in range(3):
        step_once(parameters, optimizer, step)
    late = make_parameters([(9, 9), (50,)], seed=5, dtype=torch.bfloat16)
    optimizer.add_param_group({"params": late})
    for p in late:
        p.requires_grad_(True)
    shapes = [*SHAPES, (9, 9), (50,)]
    optimizer.zero_grad()
    backward(parameters + late, worker_gradients(shapes, worker=hvd.rank(), step=3))
    optimizer.step()
    report = optimizer.report()
    moved = report["sent"].get("weights", 0) + report["received"].get("weights", 0)
    return bits(parameters + late), moved


def test_bfloat16_weights_late_groups_and_bytes(ranks):
    results = {server: ranks(2).run(weights_in_half, server) for server in SERVERS}
    assert len({result[0] for pair in results.values() for result in pair}) == 1
    assert [moved for _, moved in results["replicated"]] == [0, 0]
    elements = sum(int(np.prod(shape)) for shape in [*SHAPES, (9, 9), (50,)])
    for server in ("rank0", "sharded"):
        for _, moved in results[server]:  # every weight once, and one status word a message
            assert 2 * elements < moved <= 2 * (elements + 4)
