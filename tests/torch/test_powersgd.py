"""PowerSGD in PyTorch: the loss scale, figures, refused states; its steps are in ``tests/conformance``."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hvd_ext.torch as hvd
from tests.torch.problems import backward, flat, make_parameters, named, worker_gradients

pytestmark = pytest.mark.distributed

SHAPES = [(12, 9), (5,), (10, 3, 4), (20, 21)]


def build(settings=None, **options):
    parameters = make_parameters(SHAPES, dtype=torch.float64)
    compression = hvd.Compression.powersgd(**{"rank": 2, **(settings or {})})
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, 1.0), named(parameters),
                                         compression=compression, **options)
    return parameters, optimizer


def scaled(factors):
    """The weights when the loss is scaled by another factor at each step, the report, a refused state."""
    scaler = torch.amp.GradScaler("cpu")
    parameters, optimizer = build(grad_scaler=scaler)
    for step, factor in enumerate(factors):
        scaler.scale(torch.zeros(()))  # makes the scaler's own tensors
        scaler.update(factor)
        optimizer.zero_grad()
        backward(parameters, worker_gradients(SHAPES, worker=hvd.rank(), step=step, scale=factor))
        optimizer.synchronize()
        with torch.no_grad():
            for p in parameters:
                p.grad.div_(factor)
        with optimizer.skip_synchronize():
            optimizer.step()
    _, refused = build({"rank": 1})
    with pytest.raises(ValueError, match="PowerSGD factors do not fit"):
        refused.load_state_dict(optimizer.state_dict())
    return flat(parameters), optimizer.report()


def test_residuals_follow_the_loss_scale(ranks):
    (plain, _), (rescaled, report) = (ranks(2).run(scaled, factors)[0]
                                      for factors in ([1.0] * 4, [1.0, 8.0, 0.5, 4.0]))
    np.testing.assert_allclose(rescaled, plain, rtol=1e-10)
    numbers = 2 * ((12 + 9) + (10 + 12) + (20 + 21))
    assert report["sent_fraction"] == numbers / (12 * 9 + 10 * 12 + 20 * 21)
    assert report["residual_norm"] > 0
