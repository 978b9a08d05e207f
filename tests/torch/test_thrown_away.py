"""Gradients that are reduced and thrown away: all that is kept between steps is what it was, bit for bit."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

import hvd_ext.torch as hvd
from tests.torch.problems import backward, flat, make_parameters, named, worker_gradients
from tests.torch.seng_on_ranks import LAM, data, loss_of, network
from tests.torch.small import same

pytestmark = pytest.mark.distributed
SHAPES = [(7, 3), (12,)]
METHODS = {
    "topk": {"compression": hvd.Compression.topk(0.3, min_size=0)},
    "topk_owners": {"compression": hvd.Compression.topk(0.3, min_size=0, exchange="sparse_allreduce")},
    "powersgd": {"compression": hvd.Compression.powersgd(rank=1, min_compression=1.0)},
    "delay": {"op": hvd.DelayCompensated()},
    "overlap": {"overlap": hvd.DelayedUpdate()},
    "sharded": {"server": "sharded"},
    "downlink": {"server": hvd.Server("sharded", downlink=hvd.Compression.topk(0.3))},
}
COUNTERS = ("skipped_steps", "unusable_steps")


def build(method, **options):
    parameters = make_parameters(SHAPES, dtype=torch.float64)
    optimizer = hvd.DistributedOptimizer(hvd.AMSGrad(parameters, lr=0.05), named(parameters),
                                         **METHODS[method], **options)
    return parameters, optimizer


def local_gradients(step, factor=1.0):
    """Gradients of this rank; rank 0's times ``factor``."""
    made = worker_gradients(SHAPES, worker=hvd.rank(), step=step)
    return [g * factor for g in made] if hvd.rank() == 0 else made


def discard(method, factor):
    """Whether the state after a reduction that is thrown away is the state before it; at three steps."""
    parameters, optimizer = build(method)
    found = []
    for step in range(3):
        before = optimizer.state_dict()
        backward(parameters, local_gradients(50 + step, factor))
        optimizer.synchronize()
        held = same(optimizer.state_dict(), before)
        optimizer.zero_grad()
        found.append((held, same(optimizer.state_dict(), before)))
        backward(parameters, local_gradients(step))
        optimizer.step()
        optimizer.zero_grad()
    return found


@pytest.mark.parametrize("factor", [1e3, np.inf])
@pytest.mark.parametrize("method", METHODS)
def test_the_state_is_the_same_bit_for_bit(ranks, method, factor):
    assert ranks(2).run(discard, method, factor) == [[(True, True)] * 3] * 2


def bytes_alive():
    """Bytes of all tensors that Python can see, each memory once."""
    gc.collect()
    storages = [one.untyped_storage() for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
    return sum({one.data_ptr(): one.nbytes() for one in storages}.values())


def grow(method):
    """What a reduction adds to ``bytes_held`` by step, and in the last one to the tensors alive; every third
    is thrown away."""
    parameters, optimizer = build(method)
    growth, alive = [], 0
    for step in range(8):
        optimizer.zero_grad(set_to_none=False)
        alive = bytes_alive() if step == 7 else 0
        held = optimizer.report()["bytes_held"]
        backward(parameters, local_gradients(step))
        optimizer.synchronize()
        growth.append(optimizer.report()["bytes_held"] - held)
        if step % 3 != 1:
            with optimizer.skip_synchronize():
                optimizer.step()
    return growth[3:], bytes_alive() - alive


@pytest.mark.parametrize("method", ["topk", "topk_owners", "powersgd", "delay"])
def test_what_is_pending_takes_one_buffer_more_at_most(ranks, method):
    numel = sum(int(np.prod(shape)) for shape in SHAPES)
    for growth, alive in ranks(2).run(grow, method):
        assert max(*growth, alive) <= 8 * numel, (growth, alive)


def count_skipped(method):
    """The counters after an overflow that is thrown away, and after one that ``step()`` skips."""
    parameters, optimizer = build(method)
    found = []
    for step in range(3):
        backward(parameters, local_gradients(step, np.inf if step else 1.0))
        if step == 1:
            optimizer.synchronize()
        else:
            optimizer.step()
        optimizer.zero_grad()
        report = optimizer.report()
        found.append([report[name] for name in COUNTERS if name in report])
    return found


def count_scaled(method, order):
    """The counters after two steps of which a GradScaler skips the second."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    parameters, optimizer = build(method, grad_scaler=scaler)
    for step in range(3):
        scaler.scale(torch.zeros(()))  # as of the loss
        backward(parameters, [g * 8.0 for g in local_gradients(step, np.inf if step == 1 else 1.0)])
        optimizer.synchronize()
        scaler.unscale_(optimizer)
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
        if order == "optimizer":
            optimizer.zero_grad()
        else:
            for parameter in parameters:
                parameter.grad = None
    report = optimizer.report()
    return [report[name] for name in COUNTERS if name in report], report["steps"], scaler.get_scale()


@pytest.mark.parametrize("method", ["topk", "topk_owners", "powersgd", "delay"])
def test_only_skipped_steps_are_counted(ranks, method):
    pool = ranks(2)
    assert pool.run(count_skipped, method) == [[[0], [0], [1]]] * 2
    for order in ("optimizer", "model"):
        assert pool.run(count_scaled, method, order) == [([1], 2, 4.0)] * 2


def build_seng(**options):
    model = network()
    seng = hvd.SENG(model, damping=LAM, update_freq=2)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1),
                                         named_parameters=model.named_parameters(), preconditioner=seng,
                                         **options)
    return model, seng, optimizer


def count_seng():
    """SENG's counter after an overflow that is thrown away, and after one that ``step()`` applies."""
    model, seng, optimizer = build_seng()
    found = []
    for step in range(3):
        (loss_of(model, data(hvd.rank(), step, 5)) * (np.inf if step else 1.0)).backward()
        before = seng.state_dict()
        if step == 1:
            optimizer.synchronize()
            optimizer.zero_grad()
            assert same(seng.state_dict(), before)
        else:
            optimizer.step()
        found.append(seng.report()["skipped"])
    return found


def change_the_scale(scale):
    """Weights after two steps, the first after a pass with an eighth of the scale that is thrown away."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    model, _, optimizer = build_seng(grad_scaler=scaler)
    for step in range(2):
        if step == 0:
            for number in range(2):  # the second is after the reduction, and is not reduced
                scaler.scale(loss_of(model, data(hvd.rank(), 50 + number, 5))).backward()
                if number == 0:
                    optimizer.synchronize()
            optimizer.skip_step()
            model.zero_grad()
            scaler.update(8.0)
        scaler.scale(loss_of(model, data(hvd.rank(), step, 5))).backward()
        optimizer.synchronize()
        scaler.unscale_(optimizer)
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return flat(model.parameters())


def test_curvature_is_without_the_scale_of_its_own_pass(ranks):
    pool = ranks(2)
    expected = pool.run(change_the_scale, 8.0)[0]
    for found in pool.run(change_the_scale, 1.0):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def count_scaled_seng():
    """The same after two steps of which a GradScaler skips the second."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    model, seng, optimizer = build_seng(grad_scaler=scaler)
    for step in range(3):
        loss = loss_of(model, data(hvd.rank(), step, 5))
        scaler.scale(loss * (np.inf if step == 1 and hvd.rank() else 1.0)).backward()
        optimizer.synchronize()
        scaler.unscale_(optimizer)
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
        model.zero_grad()
    return seng.report()["skipped"], seng.report()["step"], scaler.get_scale()


def test_seng_counts_only_skipped_steps(ranks):
    pool = ranks(2)
    assert pool.run(count_seng) == [[0, 0, 1]] * 2
    assert pool.run(count_scaled_seng) == [(1, 2, 4.0)] * 2
