"""Names of parameters, checked as Horovod checks them."""

from __future__ import annotations

from collections import Counter
from typing import Any


def checked_names(param_groups: list[dict[str, Any]], named_parameters: Any) -> dict[Any, str]:
    """Names by parameter.

    Args:
        param_groups: the optimizer's.
        named_parameters: (name, parameter) pairs, or None.

    Raises:
        ValueError: these are no pairs, a name is there twice, or a parameter has none.
    """
    if named_parameters is None:
        return {}
    named = list(named_parameters)
    if any(not isinstance(pair, tuple) for pair in named):
        raise ValueError("named_parameters should be a sequence of tuples (name, parameter), "
                         "usually produced by model.named_parameters().")
    repeated = sorted(name for name, count in Counter(n for n, _ in named).items() if count > 1)
    if repeated:
        raise ValueError("Parameter names in named_parameters must be unique. Found duplicates: "
                         + ", ".join(repeated))
    names = {parameter: name for name, parameter in named}
    unnamed = [p for group in param_groups for p in group["params"] if p not in names]
    if unnamed:
        shapes = ", ".join(str(tuple(p.shape)) for p in unnamed[:4])
        raise ValueError(
            "named_parameters was specified, but one or more model parameters were not named "
            f"(shapes {shapes}); pass the named_parameters() of the whole model"
        )
    return names
