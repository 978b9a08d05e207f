"""Algorithms 1 and 2 on real ranks, and 20 workers in one process, against the float64 oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hvd_ext.torch as hvd
from hvd_ext.reducers.topk import Layout, TopK, keep_count
from hvd_ext.reducers.topk.plan import Segment
from hvd_ext.torch.reducers.kernels import topk as kernels
from tests.reference.spars_ams import algorithm_1, algorithm_2
from tests.torch.problems import UNEVEN, flat, make_parameters, named, worker_gradients

STEPS = 30
LR = 0.05
PIECES = [slice(int(stop - np.prod(shape)), int(stop)) for shape, stop in
          zip(UNEVEN, np.cumsum([np.prod(shape) for shape in UNEVEN]), strict=True)]


def gradient(weights, worker, step):
    """Of ``w -> noise w + 0.1 w^2``: each worker has its own noise at each step."""
    return flat(worker_gradients(UNEVEN, worker=worker, step=step)) + 0.2 * weights


def backward(parameters, worker, step):
    loss = sum((p * torch.as_tensor(np.asarray(g)).to(p.dtype)).sum() + 0.1 * (p * p).sum()
               for p, g in zip(parameters, worker_gradients(UNEVEN, worker=worker, step=step),
                               strict=True))
    loss.backward()


def train(settings, optimizer="amsgrad", server=None, dtype=torch.float64, steps=STEPS):
    """The weights after each step, and this rank's residual."""
    parameters = make_parameters(dtype=dtype)
    wrapped = (hvd.AMSGrad(parameters, LR) if optimizer == "amsgrad"
               else torch.optim.SGD(parameters, LR))
    topk = {} if settings is None else {"compression": hvd.Compression.topk(**settings)}
    wrapped = hvd.DistributedOptimizer(wrapped, named(parameters), server=server, **topk)
    seen = []
    for step in range(steps):
        wrapped.zero_grad()
        backward(parameters, hvd.rank(), step)
        wrapped.step()
        seen.append(flat(parameters))
    residual = {} if settings is None else wrapped.state_dict()["hvd_ext"]["reducer"]["residual"]
    left = flat([residual.get(name, torch.zeros(p.numel())) for name, p in named(parameters)])
    return seen, left


EXACT = {"min_size": 0, "values": "float64"}
CASES = {
    "one bucket": ({"ratio": 0.05, **EXACT}, {}),
    "one percent": ({"ratio": 0.01, **EXACT}, {}),
    "per tensor": ({"ratio": 0.1, "per_tensor": True, **EXACT}, {"pieces": PIECES}),
    "no feedback": ({"ratio": 0.05, "error_feedback": False, **EXACT}, {"feedback": False}),
}


@pytest.mark.distributed
@pytest.mark.parametrize("size", [1, 2, 4])
def test_thirty_steps_of_algorithm_1(ranks, size):
    start = flat(make_parameters(dtype=torch.float64))
    for name in CASES if size < 4 else ["one bucket"]:
        settings, oracle = CASES[name]
        ratio = settings["ratio"]
        expected, errors = algorithm_1(gradient, start, workers=size, steps=STEPS, lr=LR,
                                       keep=lambda n, ratio=ratio: keep_count(n, ratio), **oracle)
        for rank, (seen, left) in enumerate(ranks(size).run(train, settings)):
            np.testing.assert_allclose(seen, expected, rtol=1e-11, atol=1e-12,
                                       err_msg=f"{name}, rank {rank}")
            np.testing.assert_allclose(left, errors[rank], rtol=1e-11, atol=1e-12, err_msg=name)
    if size == 1:  # Algorithm 2
        expected = algorithm_2(gradient, start, steps=STEPS, k=keep_count(len(start), 0.05), lr=LR)
        ((seen, _),) = ranks(1).run(train, CASES["one bucket"][0])
        np.testing.assert_allclose(seen, expected, rtol=1e-11, atol=1e-12)
    dense = ranks(size).run(train, None)
    full = ranks(size).run(train, {"ratio": 1.0, **EXACT})
    for (one, _), (other, left) in zip(dense, full, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-12, atol=1e-13)
        assert not left.any()


def test_twenty_workers_in_one_process():
    """The paper's number of workers, through the kernels that ranks use."""
    config = TopK(0.02, values="float64")
    parameters = make_parameters(dtype=torch.float64)
    start = flat(parameters)
    k = keep_count(len(start), 0.02)
    layout, pieces = Layout(k, "float64"), [Segment(0, len(start), k)]
    optimizer = hvd.AMSGrad([torch.nn.Parameter(torch.from_numpy(start.copy()))], LR)
    (weights,) = optimizer.param_groups[0]["params"]
    residuals = [torch.zeros_like(weights) for _ in range(20)]
    expected, errors = algorithm_1(gradient, start, workers=20, steps=STEPS, lr=LR,
                                   keep=lambda n: k)
    for step in range(STEPS):
        messages = []
        for worker in range(20):
            g = torch.from_numpy(gradient(weights.detach().numpy(), worker, step))
            residuals[worker] += g
            positions = kernels.select_entries(residuals[worker], pieces, config, (step, worker))
            values = kernels.split_selected(residuals[worker], positions, torch.float64)
            messages.append(kernels.pack_message(positions, values, layout))
        weights.grad = torch.zeros_like(weights)
        kernels.add_up(torch.cat(messages), [k] * 20, layout, torch.float64, weights.grad)
        weights.grad /= 20
        optimizer.step()
        np.testing.assert_allclose(weights.detach().numpy(), expected[step], rtol=1e-11, atol=1e-12)
    for mine, theirs in zip(residuals, errors, strict=True):
        np.testing.assert_allclose(mine.numpy(), theirs, rtol=1e-11, atol=1e-12)
