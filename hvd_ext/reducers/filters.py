"""``exclude=``: which tensors a compression leaves alone, by name, pattern or function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

Exclude = Sequence[str] | Callable[[str, tuple[int, ...]], bool]


def checked_exclude(exclude: Exclude | None) -> Exclude | None:
    """``exclude`` with its patterns as a tuple.

    Raises:
        TypeError: it is a string, or holds something that is not a name.
    """
    if exclude is None or callable(exclude):
        return exclude
    if isinstance(exclude, str):
        raise TypeError(f"exclude must be a list of names or a function, got the string "
                        f"{exclude!r}; pass exclude=[{exclude!r}]")
    if not isinstance(exclude, Iterable):
        raise TypeError(f"exclude must be a list of names or a function, got {exclude!r}")
    patterns = tuple(exclude)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"exclude must hold names, got {pattern!r}; to choose by shape "
                            "pass a function of (name, shape)")
    return patterns


def is_excluded(exclude: Exclude | None, name: str, shape: tuple[int, ...]) -> bool:
    """Whether the tensor is to be left alone."""
    if exclude is None:
        return False
    if callable(exclude):
        return bool(exclude(name, shape))
    return any(fnmatchcase(name, pattern) for pattern in exclude)


def check_names(exclude: Exclude | None, names: Iterable[str]) -> None:
    """Refuse a pattern that matches no name: most likely it is misspelt.

    Raises:
        ValueError: a pattern matches none of the names.
    """
    if exclude is None or callable(exclude):
        return
    names = list(names)
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in names):
            shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
            raise ValueError(f"exclude has {pattern!r}, which matches no parameter; names here "
                             f"look like {shown}; correct it or leave it out")
