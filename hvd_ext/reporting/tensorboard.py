"""The figures of ``report()`` as scalars, for TensorBoard and what is like it."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any


def scalars(figures: Mapping[str, Any], prefix: str = "hvd_ext") -> dict[str, float]:
    """Numbers by path, such as ``hvd_ext/sent/gradients``; texts and what is missing are left out.

    A list of dicts that name their layer becomes ``.../LAYER/...``.
    """
    found: dict[str, float] = {}
    for key, value in figures.items():
        path = f"{prefix}/{key}" if prefix else str(key)
        if isinstance(value, Real):
            found[path] = float(value)
        elif isinstance(value, Mapping):
            found.update(scalars(value, path))
        elif isinstance(value, (list, tuple)):
            for one in value:
                if isinstance(one, Mapping) and "layer" in one:
                    found.update(scalars(one, f"{path}/{one['layer']}"))
    return found


def log_report(writer: Any, optimizer: Any, step: int, *, prefix: str = "hvd_ext") -> None:
    """Write the figures of the optimizer's last step as scalars.

    Args:
        writer: anything with ``add_scalar(tag, value, step)``, such as PyTorch's ``SummaryWriter``.
        optimizer: one of ``DistributedOptimizer``, or anything else with ``report()``.
        step: the number that the scalars get.
        prefix: of their names.

    Raises:
        TypeError: the writer or the optimizer is something else.
    """
    if not callable(getattr(writer, "add_scalar", None)):
        raise TypeError("writer must have add_scalar(tag, value, step), such as a SummaryWriter; got "
                        f"{writer!r}")
    if not callable(getattr(optimizer, "report", None)):
        raise TypeError("optimizer must have report(), such as a hvd.DistributedOptimizer; got "
                        f"{type(optimizer).__name__}")
    for tag, value in scalars(optimizer.report(), prefix).items():
        writer.add_scalar(tag, value, step)
