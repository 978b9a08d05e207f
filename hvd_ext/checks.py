"""Checks of arguments at construction: every message says the value, the limit and what to do."""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any


def check_float(name: str, value: Any, *, low: float = -math.inf, high: float = math.inf,
                open_low: bool = False, open_high: bool = False, hint: str = "") -> float:
    """``value`` as a float inside an interval.

    Raises:
        TypeError: ``value`` is no real number.
        ValueError: it is not finite or lies outside the interval.
    """
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {value!r}{_append_hint(hint)}")
    number_ = float(value)
    above = number_ > low if open_low else number_ >= low
    below = number_ < high if open_high else number_ <= high
    if not (math.isfinite(number_) and above and below):
        left = "(" if open_low or low == -math.inf else "["
        right = ")" if open_high or high == math.inf else "]"
        raise ValueError(
            f"{name} must be in {left}{low:g}, {high:g}{right}, got {value!r}{_append_hint(hint)}"
        )
    return number_


def check_int(name: str, value: Any, *, low: int, high: int | None = None, hint: str = "") -> int:
    """``value`` as an int in ``[low, high]``.

    Raises:
        TypeError: ``value`` is no integer.
        ValueError: it lies outside the interval.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be a whole number, got {value!r}{_append_hint(hint)}")
    number = int(value.__index__())
    if number < low or (high is not None and number > high):
        limit = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {limit}, got {value!r}{_append_hint(hint)}")
    return number


UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def check_bytes(name: str, value: Any) -> int:
    """Bytes: a whole number of them, or a text with a unit.

    Raises:
        TypeError: neither a whole number nor a text.
        ValueError: a text that is no size, or less than a byte.
    """
    hint = 'pass a number of bytes, or a text such as "500MB" or "2GiB"'
    if not isinstance(value, str):
        return check_int(name, value, low=1, hint=hint)
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*((?:[kmg]i?)?)b?\s*", value.lower())
    size_ = int(float(found[1]) * UNITS[found[2]]) if found else 0
    if size_ < 1:
        raise ValueError(f"{name} must be a size of at least 1 byte, got {value!r}{_append_hint(hint)}")
    return size_


def check_choice(name: str, value: Any, choices: Iterable[Any], *, hint: str = "") -> Any:
    """``value`` when it is one of ``choices``.

    Raises:
        ValueError: it is none of them.
    """
    options = list(choices)
    if not any(value is option or value == option for option in options):
        listed = ", ".join(repr(option) for option in options)
        raise ValueError(f"{name} must be one of {listed}; got {value!r}{_append_hint(hint)}")
    return value


def check_bool(name: str, value: Any) -> bool:
    """``value`` when it is a bool.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def number_or_schedule(name: str, value: Any, **limits: Any) -> float | Callable[[int], float]:
    """A number inside the limits of :func:`check_float`, or a function of the step (checked when used)."""
    if callable(value):
        return value  # type: ignore[no-any-return]
    return check_float(name, value, **limits)


def _append_hint(hint: str) -> str:
    return f"; {hint}" if hint else ""
