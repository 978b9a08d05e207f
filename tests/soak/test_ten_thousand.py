"""Ten thousand steps on four ranks, gradients becoming ready in random order: one model, bit for bit."""

from __future__ import annotations

import os

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
hvd = pytest.importorskip("hvd_ext.torch", reason="Horovod is not built for PyTorch")

STEPS, EVERY = int(os.environ.get("HVD_EXT_STEPS", "10000")), 100
METHODS = ("plain", "delay", "topk", "powersgd", "seng", "sharded")
pytestmark = [pytest.mark.distributed, pytest.mark.slow]


class Branches(torch.nn.Module):
    """Layers side by side, whose gradients can become ready in any order."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(5, 4) for _ in range(5))
        self.last = torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.last(sum(torch.tanh(layer(x)) for layer in self.layers))


def options(method, model):
    return {
        "delay": lambda: {"op": hvd.DelayCompensated()},
        "topk": lambda: {"compression": hvd.Compression.topk(0.1, min_size=0, bucket_bytes=256)},
        "powersgd": lambda: {"compression": hvd.Compression.powersgd(rank=1)},
        "seng": lambda: {"preconditioner": hvd.SENG(model, damping=0.5, update_freq=50)},
        "sharded": lambda: {"server": "sharded"},
    }.get(method, dict)()


def train(method, steps):
    """How often the ranks were compared, and how many orders of gradients this rank has seen."""
    torch.manual_seed(0)
    model = Branches()
    inner = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = hvd.DistributedOptimizer(inner, named_parameters=model.named_parameters(),
                                         **options(method, model))
    rng = np.random.default_rng([7, hvd.rank()])  # another order on every rank
    orders, seen, compared = set(), [], 0
    for number, layer in enumerate(model.layers):
        layer.weight.register_post_accumulate_grad_hook(lambda _, number=number: seen.append(number))
    for step in range(steps):
        optimizer.zero_grad()
        x, y = (torch.from_numpy(rng.normal(size=(4, n)).astype("float32")) for n in (5, 3))
        # Autograd begins with what was computed last: the hooks' order is that of the branches, reversed.
        order = rng.permutation(len(model.layers))
        hidden = [torch.tanh(model.layers[number](x)) for number in order]
        sum_of = [hidden[list(order).index(number)] for number in range(len(order))]
        seen.clear()
        torch.nn.functional.mse_loss(model.last(sum(sum_of)), y).backward()
        orders.add(tuple(seen))
        optimizer.step()
        if (step + 1) % EVERY == 0:
            hvd.assert_replicas_equal(model)
            compared += 1
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    return compared, len(orders)


def check(ranks, method, steps):
    for compared, orders in ranks(4).run(train, method, steps, timeout=0.2 * steps + 60):
        assert compared == steps // EVERY
        assert orders > min(60, steps / 4), "the gradients did not become ready in random order"


@pytest.mark.parametrize("method", ["topk"])
def test_replicas_stay_equal(ranks, method):
    check(ranks, method, EVERY)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("method", METHODS)
def test_ten_thousand_steps(ranks, method):
    check(ranks, method, STEPS)
