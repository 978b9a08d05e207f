"""Which Keras a process has asked for in its environment, and whether this package can train with it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping

LEGACY, BACKEND = "TF_USE_LEGACY_KERAS", "KERAS_BACKEND"


def refuse_legacy_keras(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse TensorFlow's older Keras, before anything imports TensorFlow.

    Raises:
        RuntimeError: the environment asks for it.
    """
    value = environment.get(LEGACY)
    if value in ("1", "true", "True"):
        raise RuntimeError(
            f"{LEGACY}={value} makes tf.keras the older Keras 2, which hvd_ext.tensorflow does not train "
            f"with: unset {LEGACY} (Keras 3 runs most scripts of Keras 2), or keep horovod.tensorflow for "
            "this script")


def refuse_missing_backend(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse a backend of Keras that is not installed, with which Keras cannot be imported.

    Raises:
        RuntimeError: the environment asks for it.
    """
    backend = environment.get(BACKEND, "")
    if backend in ("jax", "torch", "openvino") and importlib.util.find_spec(backend) is None:
        raise RuntimeError(
            f"hvd_ext.tensorflow needs Keras on the TensorFlow backend, {BACKEND}={backend}, which is not "
            f"installed: set {BACKEND}=tensorflow in the environment before Keras is imported")
