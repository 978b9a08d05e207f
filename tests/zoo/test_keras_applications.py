"""``model.fit`` of the families of ``keras.applications`` under SENG, two ranks, one tiny batch.

    python -m pytest tests/zoo/test_keras_applications.py -m zoo
"""

from __future__ import annotations

import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="Keras is not installed")
pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

from tests.zoo import on_ranks  # noqa: E402

pytestmark = [pytest.mark.ranks, pytest.mark.zoo]

# The smallest image that each takes.
FAMILIES = {
    "MobileNetV2": 32, "MobileNetV3Small": 32, "EfficientNetB0": 32, "EfficientNetV2B0": 32,
    "DenseNet121": 32, "ResNet50": 32, "ResNet50V2": 32, "ConvNeXtTiny": 32, "NASNetMobile": 32,
    "Xception": 71, "InceptionV3": 75,
}
# ConvNeXt's learned scale of each channel has no rule.
COVERED = {"ConvNeXtTiny": 0.999}


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
