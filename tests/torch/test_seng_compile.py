"""SENG on a model under ``torch.compile``: curvature is taken when it is due, whatever came first."""

from __future__ import annotations

import gc

import pytest
import torch

import hvd_ext.torch as hvd
from hvd_ext.torch.seng import force_eager
from tests.torch import small
from tests.torch.small import LAM, batch, loss_of


@pytest.fixture(autouse=True)
def compiled_anew():
    gc.collect()  # the SENGs of other tests
    torch._dynamo.reset()
    yield
    gc.collect()
    torch._dynamo.reset()


class Backend:
    """Counts how often code was compiled and how often compiled code ran."""

    def __init__(self) -> None:
        self.compiled = self.ran = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        self.compiled += 1

        def run(*args: torch.Tensor):
            self.ran += 1
            return graph(*args)

        return run


class Network(torch.nn.Module):
    """A class of its own: ``nn.Sequential.compile()`` compiles nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small.network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def ages(seng) -> set[int]:
    return {row["age"] for row in seng.report()["layers"]}


def train(model, called, seng, steps: range) -> list[torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in steps:
        optimizer.zero_grad()
        loss_of(called, batch(step)).backward()
        seng.step()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def compiled(model, backend, way: str):
    if way == "in place":
        model.compile(backend=backend)
        return model
    return torch.compile(model, backend=backend)


@pytest.mark.parametrize("way", ["in place", "wrapped", "wrapped and given"])
@pytest.mark.parametrize("order", ["compiled first", "compiled first and warm", "SENG first"])
def test_compiled_training_is_plain_training(order, way):
    plain = Network()
    wanted = train(plain, plain, hvd.SENG(plain, damping=LAM, update_freq=3), range(8))
    model, backend = Network(), Backend()
    called = None
    if order != "SENG first":
        called = compiled(model, backend, way)
        if order.endswith("warm"):
            start = {name: t.clone() for name, t in model.state_dict().items()}
            loss_of(called, batch(9)).backward()
            assert backend.ran == 1
            model.load_state_dict(start)
            model.zero_grad()
    seng = hvd.SENG(called if way == "wrapped and given" and called is not None else model, damping=LAM,
                    update_freq=3)
    called = compiled(model, backend, way) if called is None else called
    found = train(model, called, seng, range(8))
    assert ages(seng) == {2}
    assert backend.compiled <= 2
    assert backend.ran - order.endswith("warm") == 5  # steps 0, 3 and 6 refresh
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    seng.close()
    assert not force_eager._HELD


def test_a_resumed_run_with_no_refresh_due_refreshes_when_one_is():
    model = Network()
    seng = hvd.SENG(model, damping=LAM, update_freq=3)
    train(model, model, seng, range(2))
    state = seng.state_dict()
    seng.close()
    again, backend = Network(), Backend()
    again.load_state_dict(model.state_dict())
    seng = hvd.SENG(again, damping=LAM, update_freq=3)
    seng.load_state_dict(state)
    called = torch.compile(again, backend=backend)
    train(again, called, seng, range(2, 3))
    assert (backend.ran, ages(seng)) == (1, {3})
    train(again, called, seng, range(3, 11))
    assert ages(seng) == {2}
    assert backend.ran == 6
    seng.close()


def test_one_that_is_dropped_lets_go():
    model = Network()
    seng = hvd.SENG(model, damping=LAM)
    assert force_eager._HELD
    seng.capture.remove_hooks()
    del seng
    gc.collect()
    assert not force_eager._HELD
    assert not force_eager._STANCE
