"""Models of timm and transformers: SENG's direction is the dense one, and replicas stay the same."""

from __future__ import annotations

import warnings

import pytest
import torch

import hvd_ext.torch as hvd
from tests.zoo import lacking
from tests.zoo.measure import LAM, B, build, loss_of, measure
from tests.zoo.timm_models import TIMM
from tests.zoo.transformers_models import TRANSFORMERS

FEW = ("ConvNeXt", "EfficientNet", "NFNet", "Swin", "BERT", "GPT-2", "OPT", "Llama", "Mixtral")
MODELS = {**TIMM, **TRANSFORMERS}
# Tables of positions and the like weigh much in models as small as these; in Mamba a fourth is used without
# its modules, in Swin v2 half is the network of fixed width that makes a table of positions.
LEAST = 0.75
LESS = {"Swin v2": 0.45}


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name in FEW else [pytest.mark.zoo]) for name in MODELS])
def test_direction_is_the_dense_one(name):
    why = lacking("timm" if name in TIMM else "transformers")
    if why:
        pytest.skip(why)
    found = measure(MODELS[name])
    assert found.error < MODELS[name].limit, found.worst
    assert found.coverage > LESS.get(name, LEAST), found.line
    assert "rows" not in found.placements
    assert len(found.said) == len({text[:60] for text in found.said}), "more than one warning for a cause"


def trained(name: str) -> bytes:
    """Weights after a few steps in float32, of data that differs from rank to rank."""
    model, inputs = build(MODELS[name], torch.float32)
    torch.manual_seed(hvd.rank())
    inputs = MODELS[name].inputs(B)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seng = hvd.SENG(model.train(), damping=LAM, update_freq=2, name=f"zoo {name}")
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.01), named_parameters=model.named_parameters(),
            preconditioner=seng)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model, inputs, MODELS[name].output).backward()
            optimizer.step()
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert any(row["held"] != "identity" for row in seng.report()["layers"])
    return b"".join(p.detach().numpy().tobytes() for p in model.parameters())


@pytest.mark.ranks
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name in ("EfficientNet", "Mixtral") else [pytest.mark.zoo])
    for name in MODELS])
def test_replicas_stay_the_same(ranks, name):
    why = lacking("timm" if name in TIMM else "transformers")
    if why:
        pytest.skip(why)
    one, other = ranks(2).run(trained, name, timeout=180.0)
    assert one == other
