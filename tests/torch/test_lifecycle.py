"""What happens to a training in weeks: steps begun and dropped, uneven passes, rates, large tensors."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import hvd_ext.torch as hvd
from hvd_ext.torch.reducers.buckets import BucketReducer
from tests.torch.problems import backward, make_parameters, named

pytestmark = pytest.mark.distributed
SHAPES = [(6, 5), (7,)]


def wrapped(parameters, lr=0.1, **options):
    return hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=lr),
                                    named_parameters=named(parameters), **options)


def gradients(number, parameters):
    rng = np.random.default_rng([hvd.rank(), number])
    return [rng.normal(size=tuple(p.shape)).astype("float32") for p in parameters]


def other_rate():
    parameters = make_parameters(SHAPES)
    optimizer = wrapped(parameters, lr=0.1 * (1 + hvd.rank()), op=hvd.DelayCompensated())
    backward(parameters, gradients(0, parameters))
    with pytest.raises(ValueError, match=r"learning rates differ.*\(0\.1,\), \(0\.2,\)"):
        optimizer.step()


def dropped_step(method):
    """A step is begun and dropped by load_state_dict; the next one is as without it."""
    options = {"plain": {}, "delay": {"op": hvd.DelayCompensated()},
               "topk": {"compression": hvd.Compression.topk(0.3, min_size=0)},
               "powersgd": {"compression": hvd.Compression.powersgd()}}[method]
    results = []
    for drop in (False, True):
        parameters = make_parameters(SHAPES)
        optimizer = wrapped(parameters, **options)
        for number in range(4):
            if drop and number == 2:
                state = optimizer.state_dict()
                backward(parameters, gradients(99, parameters))
                optimizer.load_state_dict(state)
                optimizer.zero_grad()
            backward(parameters, gradients(number, parameters))
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.detach().clone() for p in parameters])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other), method


def uneven_passes(size):
    """A parameter that takes no part in the first micro-batch: as with a gradient of zeros there."""
    results = []
    for explicit in (False, True):
        parameters = make_parameters(SHAPES)
        optimizer = wrapped(parameters, op=hvd.DelayCompensated(virtual_workers="microbatch"),
                            backward_passes_per_step=2)
        for number in range(3):
            for part in range(2):
                used = [(p, torch.from_numpy(g)) for p, g in
                        zip(parameters, gradients(2 * number + part, parameters), strict=True)]
                loss = (used[0][0] * used[0][1]).sum()
                if part == 1:
                    loss = loss + (used[1][0] * used[1][1]).sum()
                elif explicit:
                    loss = loss + 0.0 * used[1][0].sum()
                (loss / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.detach().clone() for p in parameters])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def too_large():
    parameters = [torch.nn.Parameter(torch.empty(2**29 + 1))]  # 2 GiB and 4 bytes, never touched
    with pytest.raises(ValueError, match=r"p0 is 2147483652; MPI takes at most 2147483647"):
        wrapped(parameters, op=hvd.DelayCompensated())


def test_two_devices_of_one_process_do_not_share_a_bucket():
    """Named by their order, so that ranks agree whichever number each device has."""
    device_name = BucketReducer._device_name
    names = []
    for first, second in ((0, 1), (3, 2)):
        reducer = SimpleNamespace(_devices=[])
        devices = [torch.device("cpu"), torch.device("cuda", first), torch.device("cuda", second),
                   torch.device("cuda", first)]
        names.append([device_name(reducer, device) for device in devices])
    assert names[0] == names[1] == ["cpu", "cuda", "cuda 1", "cuda"]


class Experts(torch.nn.Module):
    """Two experts; the second gets the rows whose first entry is above a threshold."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)

    def forward(self, x):
        rows = x[:, 0] > 100.0
        return torch.cat([self.first(x[~rows]), self.second(x[rows])])


def expert_without_tokens():
    torch.manual_seed(0)
    model = Experts()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1),
                                         named_parameters=model.named_parameters(),
                                         preconditioner=hvd.SENG(model, damping=0.5))
    for step in range(3):
        optimizer.zero_grad()
        x = torch.randn(8, 4)
        if step == 2:
            x[:3, 0] = 200.0
        model(x).square().mean().backward()
        optimizer.step()
    hvd.assert_replicas_equal(model)
    assert all(p.isfinite().all() for p in model.parameters())


def only_spectral_norm():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.utils.spectral_norm(torch.nn.Linear(4, 3)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seng = hvd.SENG(model, damping=0.5)
        optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1),
                                             named_parameters=model.named_parameters(), preconditioner=seng)
        for step in range(3):
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.zero_grad()
            model(torch.randn(8, 4, generator=torch.Generator().manual_seed(10 * step + hvd.rank()))
                  ).square().mean().backward()
            optimizer.step()
            assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert sum("SENG" in str(one.message) for one in caught) <= 1
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    hvd.assert_replicas_equal(model.named_parameters())


def plain_path():
    """What Horovod's own optimizer gets wrong: gradients set to None, parameters unfrozen later."""
    parameters = make_parameters(SHAPES)
    parameters[1].requires_grad_(False)
    optimizer = wrapped(parameters)
    for number in range(4):
        optimizer.zero_grad(set_to_none=True)
        if number == 2:
            parameters[1].requires_grad_(True)
        backward([p for p in parameters if p.requires_grad], gradients(
            number, [p for p in parameters if p.requires_grad]))
        optimizer.step()
    hvd.assert_replicas_equal(zip("ab", parameters, strict=True), optimizer=optimizer)


@pytest.mark.parametrize("case", [other_rate, uneven_passes, too_large, expert_without_tokens,
                                  only_spectral_norm, plain_path])
def test_on_two_ranks(ranks, case):
    ranks(2).run(case, *([2] if case is uneven_passes else []))


@pytest.mark.parametrize("method", ["plain", "delay", "topk", "powersgd"])
def test_step_that_is_dropped_leaves_nothing(ranks, method):
    ranks(2).run(dropped_step, method)


def count_updates():
    """The steps in reports after steps of two passes, and after ``flush()``."""
    found = []
    for options in ({}, {"server": "sharded"}, {"overlap": hvd.DelayedUpdate()},
                    {"compression": hvd.Compression.topk(0.3)}):
        parameters = make_parameters(SHAPES)
        optimizer = wrapped(parameters, backward_passes_per_step=2, **options)
        for step in range(3):
            optimizer.zero_grad()
            for part in range(2):
                backward(parameters, gradients(2 * step + part, parameters))
            optimizer.step()
        found.append(optimizer.report()["steps"])
        if "overlap" in options:
            optimizer.flush()
            found.append(optimizer.report()["steps"])
    return found


@pytest.mark.parametrize("size", [1, 2])
def test_updates_are_counted_whatever_reduces(ranks, size):
    assert ranks(size).run(count_updates) == [[3, 3, 2, 3, 3]] * size
