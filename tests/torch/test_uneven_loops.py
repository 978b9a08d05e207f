"""``hvd.uneven_inputs`` around loops that clip, skip, unscale and schedule: ranks without a batch follow.

Each loop runs twice: with fewer batches on rank 1, and with as many of which rank 1's last have gradients of
zero. Both must give the same bits on all ranks.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hvd_ext.torch as hvd
from tests.torch.problems import backward, bits, flat, make_parameters, named, worker_gradients

pytestmark = pytest.mark.distributed
SHAPES = [(7, 3), (5,), (2, 3, 5)]
STEPS, SHORT = 6, 3  # batches of rank 0, and of the others
METHODS = {
    "plain": lambda: {},
    "topk": lambda: {"compression": hvd.Compression.topk(0.2, min_size=0)},
    "powersgd": lambda: {"compression": hvd.Compression.powersgd(rank=2, min_compression=1.0)},
    "delay": lambda: {"op": hvd.DelayCompensated(0.8)},
    "sharded": lambda: {"server": "sharded"},
    "rank0": lambda: {"server": "rank0"},
    "topk_sharded": lambda: {"server": "sharded", "compression": hvd.Compression.topk(0.2, min_size=0)},
}


def clip_by_torch(optimizer, parameters, scaler, step):
    optimizer.synchronize()
    torch.nn.utils.clip_grad_norm_(parameters, 0.3)
    with optimizer.skip_synchronize():
        optimizer.step()


def clip_by_hvd(optimizer, parameters, scaler, step):
    hvd.clip_grad_norm_(optimizer, 0.3)
    optimizer.step()


def skip_spikes(optimizer, parameters, scaler, step):
    optimizer.synchronize()
    if step % 3 == 1:
        optimizer.zero_grad()
        return
    with optimizer.skip_synchronize():
        optimizer.step()


def schedule(optimizer, parameters, scaler, step):
    optimizer.step()
    optimizer.param_groups[0]["lr"] *= 0.7


def scale(optimizer, parameters, scaler, step):
    optimizer.synchronize()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(parameters, 0.3)
    with optimizer.skip_synchronize():
        scaler.step(optimizer)
    scaler.update()


LOOPS = {one.__name__: one for one in (clip_by_torch, clip_by_hvd, skip_spikes, schedule, scale)}


def train(method, loop, uneven):
    """This rank's weights, rate and loss scale at the end; under ``scale`` rank 0 has an overflow."""
    parameters = make_parameters(SHAPES, dtype=torch.float64)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2) if loop == "scale" else None
    inner = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    optimizer = hvd.DistributedOptimizer(inner, named(parameters), grad_scaler=scaler, **METHODS[method]())
    mine = STEPS if hvd.rank() == 0 else SHORT

    def run(steps):
        for step in range(steps):
            optimizer.zero_grad()
            gradients = worker_gradients(SHAPES, worker=hvd.rank(), step=step)
            factor = (1.0 if scaler is None else scaler.get_scale()) if step < mine else 0.0
            if scaler is not None:
                scaler.scale(torch.zeros(()))  # as of the loss
            if scaler is not None and step == 4 and hvd.rank() == 0:
                factor = np.inf
            backward(parameters, [factor * np.asarray(g) for g in gradients])
            LOOPS[loop](optimizer, parameters, scaler, step)

    if uneven:
        with hvd.uneven_inputs(optimizer) as data:
            run(mine)
        shadowed = data.shadow_steps
    else:
        run(STEPS)
        shadowed = 0
    return (bits(parameters), flat(parameters), optimizer.param_groups[0]["lr"],
            None if scaler is None else scaler.get_scale(), shadowed)


def combinations():
    for method in METHODS:
        for loop in LOOPS:
            if loop != "scale" or method not in ("rank0", "topk_sharded"):
                yield method, loop


@pytest.mark.parametrize(("method", "loop"), combinations())
def test_ranks_without_a_batch_follow_the_loop(ranks, method, loop):
    pool = ranks(2)
    even, found = pool.run(train, method, loop, False), pool.run(train, method, loop, True)
    assert found[0][0] == found[1][0]
    assert found[0][2:4] == found[1][2:4]
    np.testing.assert_array_equal(found[0][1], even[0][1])
    assert found[0][2:4] == even[0][2:4]
    skipped = {"skip_spikes": 1, "scale": 1}.get(loop, 0)  # of the last three
    assert [one[4] for one in found] == [0, STEPS - SHORT - skipped]


def differently():
    """Rank 0 clips where rank 1 does not; rank 2 has no batch."""
    parameters = make_parameters(SHAPES)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=0.05), named(parameters),
                                         server="sharded")
    try:
        with hvd.uneven_inputs(optimizer):
            for step in range(1 if hvd.rank() == 2 else 3):
                optimizer.zero_grad()
                backward(parameters, worker_gradients(SHAPES, worker=hvd.rank(), step=step))
                if step == 2 and hvd.rank() == 0:
                    hvd.clip_grad_norm_(optimizer, 0.3)
                optimizer.step()
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_loops_that_differ_end_in_an_error_on_all_ranks(ranks):
    for said in ranks(3).run(differently):
        assert "treated reduced gradients differently" in said
