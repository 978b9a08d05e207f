"""Copies to the host that nothing on the device waits for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hvd_ext.torch as hvd
from hvd_ext.torch import async_d2h
from hvd_ext.torch.async_d2h import AsyncHostCopy, on_host
from tests.torch.problems import backward, bits, make_parameters, named, worker_gradients

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_copy_is_what_the_tensor_was(device):
    tensor = torch.arange(5.0, device=device, requires_grad=True)
    copy = AsyncHostCopy(tensor)
    for found in (copy.read(), copy.read()):
        assert found.device.type == "cpu"
        assert not found.requires_grad
        assert found.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("device", DEVICES)
def test_many_come_in_their_order(device):
    tensors = [torch.full((2,), float(number), device=device) for number in range(20)]
    assert [one.tolist() for one in on_host(tensors)] == [[number, number] for number in range(20)]
    assert on_host([]) == []


SHAPES = [(12, 9), (5,), (10, 3, 4), (20, 21)]
COMPRESSED = {
    "topk": lambda: {"compression": hvd.Compression.topk(0.2, min_size=0)},
    "sparse allreduce": lambda: {"compression": hvd.Compression.topk(0.2, min_size=0,
                                                                     exchange="sparse_allreduce")},
    "powersgd": lambda: {"compression": hvd.Compression.powersgd(2)},
    "late": lambda: {"compression": hvd.Compression.topk(0.2, min_size=0), "overlap": hvd.DelayedUpdate(1.0)},
}


def with_answers(at_once):
    """Weights and figures by compression, where the host reads at once and where it reads late.

    At step 2 rank 1 has a NaN; at step 4 gradients are finite, and the square of their norm is not.
    """
    found = {}
    read, async_d2h.is_host_readable = async_d2h.is_host_readable, lambda tensor: at_once
    try:
        for name, options in COMPRESSED.items():
            parameters = make_parameters(SHAPES)
            before = bits(parameters)
            optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, 0.1), named(parameters),
                                                 **options())
            for step in range(7):
                optimizer.zero_grad()
                gradients = worker_gradients(SHAPES, worker=hvd.rank(), step=step)
                if step == 2 and hvd.rank() == 1:
                    gradients[2].flat[1] = np.nan
                if step == 4:
                    gradients[0][:2, :2] = 1e20
                backward(parameters, gradients)
                optimizer.step()
            assert bits(parameters) != before
            report = optimizer.report()
            found[name] = bits(parameters), report["steps"], report["skipped_steps"], report["gradient_norm"]
    finally:
        async_d2h.is_host_readable = read
    return found


@pytest.mark.distributed
def test_what_is_heard_late_changes_no_bit(ranks):
    """As on a GPU, where a bucket is on its way before the host knows whether it is finite."""
    at_once, late = (ranks(2).run(with_answers, when) for when in (True, False))
    assert late == at_once
    for name, (weights, steps, skipped, norm) in at_once[0].items():
        assert norm > 0, name
        assert weights == at_once[1][name][0], name
        assert (steps, skipped) == (5 if name == "late" else 6, 1), name  # one is on its way


@pytest.mark.gpu
def test_the_device_goes_on_and_the_copy_is_of_what_was_before():
    """Work queued after the copy neither waits for it nor is waited for, and does not change it."""
    tensor = torch.ones(3, device="cuda")
    torch.cuda.synchronize()
    copy = AsyncHostCopy(tensor)
    torch.cuda._sleep(2_000_000_000)  # cycles: about a second
    behind = torch.cuda.current_stream().record_event()
    assert copy.read().tolist() == [1.0, 1.0, 1.0]
    assert not behind.query()


@pytest.mark.gpu
def test_a_backward_pass_with_delay_compensation_never_waits_for_the_device():
    hvd.init()
    parameters = [torch.nn.Parameter(p.detach().cuda()) for p in make_parameters([(33, 11), (7,)])]
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(parameters, lr=0.3), named_parameters=named(parameters),
        op=hvd.DelayCompensated(virtual_workers="microbatch"), backward_passes_per_step=2)
    torch.cuda.set_sync_debug_mode("error")  # any wait of the host in a backward pass raises
    try:
        for _ in range(2):
            sum(p.square().sum() for p in parameters).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    optimizer.step()
