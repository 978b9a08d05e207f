"""Fixtures of TensorFlow's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def float64() -> Iterator[None]:
    """Make Keras models in float64, where comparisons need not allow for an instruction set's float32."""
    import keras

    floats, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")  # of losses and metrics
    keras.config.set_dtype_policy("float64")  # of layers
    yield
    keras.config.set_floatx(floats)
    keras.config.set_dtype_policy(policy)
