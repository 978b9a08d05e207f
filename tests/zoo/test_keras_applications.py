"""The families of ``keras.applications`` under SENG: the direction is the dense one, replicas stay the same.

    python -m pytest tests/zoo/test_keras_applications.py -m zoo
"""

from __future__ import annotations

import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="Keras is not installed")
pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

from tests.zoo import on_ranks  # noqa: E402
from tests.zoo.keras_measure import LIMIT, measure  # noqa: E402
from tests.zoo.keras_models import COVERED, FAMILIES  # noqa: E402


@pytest.mark.zoo
@pytest.mark.parametrize("name", FAMILIES)
def test_direction_is_the_dense_one(name):
    found = measure(name)
    assert found.error < LIMIT, found.worst
    assert found.coverage >= COVERED.get(name, 1.0), found.line
    assert found.placements == ("axis 0",)
    assert len(found.said) == (name in COVERED)


@pytest.mark.distributed
@pytest.mark.zoo
@pytest.mark.parametrize("size", [2])
@pytest.mark.parametrize("name", FAMILIES)
def test_one_batch(ranks, size, name):
    first, *others = ranks(size, init="tensorflow").run(on_ranks.one_batch, name, FAMILIES[name],
                                                        timeout=550)
    assert first["finite"]
    assert first["moved"]
    for other in others:
        np.testing.assert_array_equal(first["digest"], other["digest"])
    assert first["covered"] >= COVERED.get(name, 1.0)
    assert first["failures"] == 0
    assert first["refused"] == []
