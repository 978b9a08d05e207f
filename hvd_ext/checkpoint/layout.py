"""What stands where in the numbered state of a Keras optimizer, and what of it another one takes over.

The plain optimizer's variables come first, under every setting; what the extensions keep follows, by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from hvd_ext.reducers.registry import public_server

KEY = "hvd_ext"  # beside the numbers, in a file that has more than the plain optimizer's variables
STAMP, SERVER_STAMP = "rank_and_ranks", "rank_and_ranks_of_server"
APART = ("late_", "passes_", STAMP)  # names that mean the same whatever reduces the gradients
METHODS = {"Delay": "DelayCompensated", "PowerSGD": "Compression.powersgd", "TopK": "Compression.topk"}
MARKS = {"mean_square_": "Delay", "q_": "PowerSGD", "residual_": "TopK"}  # in files that do not say
COUNTERS = ("steps", "skipped_steps", "unusable_steps", "late_updates", "passes_done")


@dataclass(frozen=True)
class Layout:
    """What follows the plain optimizer's variables.

    Attributes:
        names: of each, in order; "" where a file does not say.
        method: what reduced the gradients: the reducer's class, without "Reducer".
        server: the kind of server; None without one, "" where a file does not say which.
        ranks: how many shared the state.
    """

    names: tuple[str, ...] = ()
    method: str = ""
    server: str | None = None
    ranks: int = 0

    def to_bytes(self) -> bytes:
        """The layout as a file holds it."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Layout:
        """What :meth:`to_bytes` gave."""
        found = json.loads(data)
        return cls(tuple(found["names"]), found["method"], found["server"], found["ranks"])

    @classmethod
    def from_names(cls, names: Iterable[str]) -> Layout:
        """What the names alone tell."""
        names = tuple(names)
        methods = [kind for mark, kind in MARKS.items() if any(one.startswith(mark) for one in names)]
        return cls(names, methods[0] if methods else "", "" if SERVER_STAMP in names else None)

    def list_extensions(self) -> list[str]:
        """Those that keep something, as a user writes them."""
        found = [METHODS.get(self.method, self.method)] if self.method else []
        if any(name.startswith("late_") for name in self.names):
            found.append("overlap=")
        if any(name.startswith("passes_") for name in self.names):
            found.append("backward_passes_per_step")
        return found


def common_names(saved: Layout, here: Layout) -> set[str]:
    """The names whose values are taken over."""
    both = set(saved.names) & set(here.names) - {"", SERVER_STAMP}
    if saved.method != here.method:
        both = {name for name in both if name.startswith(APART)}
    return both


def check_server(saved: Layout, here: Layout) -> None:
    """Refuse a file that has but a part of the plain optimizer's variables, or of the weights.

    Raises:
        ValueError: it names both servers and the way.
    """
    if saved.server in (None, "", here.server) or saved.ranks == 1:
        return
    why = "its weights lack what was still to be sent" if "replies" in saved.server else \
        "it holds the moments of what one rank owns"
    raise ValueError(
        f"the file was saved with server={saved.server!r} and is loaded with {public_server(here.server)}, "
        f"but {why}; load it with the same server=, or write one file for all with hvd.save_model, which "
        "loads under every server= and on any number of ranks")


def dropped_message(saved: Layout, here: Layout, held: Mapping[str, bool]) -> str:
    """The warning for what is not taken over; "" where nobody misses anything.

    Args:
        held: of each name that is not taken over, whether its value is other than zeros.
    """
    missed = sorted({name.rstrip("0123456789").rstrip("_") or "state without a name"
                     for name, full in held.items()
                     if full and not name.startswith(STAMP) and name not in COUNTERS})
    if not missed:
        return ""
    before = " and ".join(saved.list_extensions()) or "an extension"
    now = " and ".join(here.list_extensions()) or "no extension"
    return (f"the optimizer was saved with {before} and is loaded with {now}: {', '.join(missed)} of this "
            "rank are dropped, the moments and iterations are restored. Give hvd.load_model the settings "
            "that it was saved with to keep them, or pass reset_per_rank_state=True to silence this")
