"""Whether an optimizer may update parts of the parameters on different ranks: made-up data and the verdict.

``server="sharded"`` runs the wrapped optimizer on what a rank owns. That is correct only if the update of a
parameter, or of an element, depends on nothing else. Each front end tries it on small parameters: it updates
all of them together, and each part alone (``separability.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_EXTENT = 4  # of each axis of a made-up parameter
PARAMETERS = 3  # of each group
GROUPS = 3
SCALES = (1.0, 1e4, 1e-2, 1e2)  # of the gradients, by step: a norm that is limited meets its limit
RELATIVE_ERROR = {"float64": 1e-6, "float32": 1e-2}

Array = npt.NDArray[np.float64]


def small_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of the made-up parameter that stands for one of ``shape``."""
    return tuple(min(extent, MAX_EXTENT) for extent in shape)


def choose_parameters(shapes: Sequence[Sequence[int]]) -> list[int]:
    """Which parameters of a group are tried: one of each number of axes first, then the first ones."""
    filled = [number for number, shape in enumerate(shapes) if all(shape)]
    ranks: dict[int, int] = {}
    for number in filled:
        ranks.setdefault(len(shapes[number]), number)
    first = list(ranks.values())[:PARAMETERS]
    return sorted([*first, *[one for one in filled if one not in first][:PARAMETERS - len(first)]])


def made_weights(number: int, shape: Sequence[int]) -> Array:
    """Weights of the ``number``-th parameter."""
    return np.random.default_rng([number, 0]).normal(size=tuple(shape))


def made_gradient(number: int, step: int, shape: Sequence[int]) -> Array:
    """Its gradient at a step; every second parameter's has a direction that stays."""
    noise = np.random.default_rng([number, 1 + step]).normal(size=tuple(shape))
    return (noise + 2.0 * (number % 2 == 0)) * (SCALES[step] * 10.0 ** (number % 3))


def has_diverged(whole: Sequence[Array], part: Sequence[Array], precision: str) -> bool:
    """Whether a parameter's weights, before the first step and after each, went another way.

    Args:
        whole, part: the weights in the update of all, and in that of a part.
        precision: of the weights, "float64" or "float32".
    """
    limit = RELATIVE_ERROR[precision]
    for before, after, former, latter in zip(whole, whole[1:], part, part[1:], strict=False):
        one, other = after - before, latter - former
        scale = float(np.max(np.abs(one), initial=0.0))
        rounding = 8 * float(np.finfo(precision).eps) * float(np.max(np.abs(before), initial=0.0))
        if not np.allclose(one, other, rtol=0.0, atol=limit * scale + rounding, equal_nan=True):
            return True
    return False


def differing_settings(whole: Mapping[str, Any], part: Mapping[str, Any]) -> list[str]:
    """The numbers of a parameter group that came out differently where only a part was updated."""
    found = []
    for key in whole.keys() & part.keys():
        one, other = _as_number(whole[key]), _as_number(part[key])
        if one is None or other is None:
            continue
        if not np.isclose(one, other, rtol=1e-4, atol=0.0, equal_nan=True):
            found.append(key)
    return sorted(found)


def _as_number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def depends_on_others(name: str, elementwise: bool, settings: Sequence[str] = (), *,
                      accepted: Sequence[str] = ("replicated", "rank0")) -> str:
    """The message where the update of a part came out otherwise; ``accepted``: what ``server=`` may be."""
    what = "an element's update depends" if elementwise else "a parameter's update depends"
    seen = f", and so does {', '.join(settings)} of its group" if settings else ""
    claim = f"; {name} says elementwise = True, which is wrong" if elementwise else ""
    return (f"server='sharded' cannot be used with {name}: {what} on others too{seen} (for example on a norm "
            f"of all gradients), and those are on other ranks{claim}. Use "
            + " or ".join(f"server={one!r}" for one in accepted))


def fails_in_part(name: str, where: str, error: Exception) -> str:
    """The message where the optimizer runs on all parameters and not on what one rank owns."""
    return (f"server={where!r} cannot be used with {name}: it fails where a rank keeps the state of some "
            f"parameters only ({type(error).__name__}: {_first_line(error)}). Use server='replicated'")


def untested_message(name: str, where: str, why: Exception | str) -> str:
    """The message where the optimizer could not be tried."""
    if isinstance(why, Exception):
        why = f"its update raised {type(why).__name__}: {_first_line(why)}"
    return (f"server={where!r} needs an optimizer that updates every parameter by itself, and {name} could "
            f"not be tried on made-up parameters: {why}. Use server='replicated'; if it does update every "
            "parameter by itself, set the class attribute separable = True")


def beyond_step(name: str, where: str, methods: Sequence[str]) -> str:
    """The message where other methods than ``step()`` move weights by what only owners keep."""
    calls = " and ".join(f"{one}()" for one in methods)
    return (f"server={where!r} cannot be used with {name}: its {calls} would change only the weights whose "
            "state this rank keeps, and replicas would differ. Use server='replicated'")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")
