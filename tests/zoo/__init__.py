"""Tiny models of timm and transformers, families of ``keras.applications``: SENG against the dense solve.

Weights are random. ``python -m tests.zoo`` prints the table of docs/seng_models.md, also into ``out/``, with
``--framework tensorflow`` that of Keras; ``make test-zoo`` runs the tests and then both. Nothing is
downloaded.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path


def lacking(package: str) -> str:
    """Why models of a package cannot be made; nothing when they can."""
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed (the extra `zoo`)"
    return ""


def prepare() -> None:
    """Let timm be imported where torchvision's compiled operators are for another build of torch.

    timm imports torchvision, of which it needs no compiled operator here. Where they do not load,
    torchvision's own import fails at registering the shapes of their results.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or "torchvision" in sys.modules:
        return
    try:
        import torch

        torch.ops.load_library(str(Path(spec.origin).parent / "_C.so"))
    except OSError:
        name = "torchvision._meta_registrations"
        sys.modules.setdefault(name, types.ModuleType(name))
