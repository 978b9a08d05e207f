"""Models of timm and transformers: SENG's direction is the dense one, and replicas stay the same."""

from __future__ import annotations

import pytest

from tests.zoo import lacking
from tests.zoo.measure import measure
from tests.zoo.steps import MODELS, trained
from tests.zoo.timm_models import TIMM

FEW = ("ConvNeXt", "EfficientNet", "NFNet", "Swin", "BERT", "GPT-2", "OPT", "Llama", "Mixtral")
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


@pytest.mark.distributed
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name in ("EfficientNet", "Mixtral") else [pytest.mark.zoo])
    for name in MODELS])
def test_replicas_stay_the_same(ranks, name):
    why = lacking("timm" if name in TIMM else "transformers")
    if why:
        pytest.skip(why)
    one, other = ranks(2).run(trained, name, timeout=180.0)
    assert one == other
