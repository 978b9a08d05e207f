"""What travels: tags, headers of fixed size, and waiting without burning a core.

Buffers go as they are, never pickled. A push is a header to every server and to each server its
slice of the gradient; a reply is a header from the primary server and from each server its slice
of the weights. The primary alone decides the order of updates and tells the other servers, so
that all slices see the same updates in the same order.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

Header = NDArray[Any]  # one element of HEADER

HEADER = np.dtype([
    ("kind", "i8"), ("worker", "i8"), ("step", "i8"), ("version", "i8"), ("update", "i8"),
    ("lr", "f8"), ("momentum", "f8"), ("size", "i8"),
])

# tags
TO_SERVER, GRADIENT, REPLY, WEIGHTS, SNAPSHOT, TEXT, CONFIRM, ORDER, EXCHANGE = range(1, 10)

# kinds, worker to server; in STOPPED and STOP a version of 1 says that a server was lost
PUSH, PUSH_NOT_FINITE, ASK_SNAPSHOT, PING, FINISH, LEAVE = range(1, 7)
# kinds, server to worker
PULLED, LEFT_OUT, STOPPED, DONE, SNAPSHOT_READY = range(11, 16)
# kinds, other server to primary server
RECEIVED, SAVED, INTERRUPTED, FAILED, ALIVE = range(21, 26)
# kinds, primary server to other servers
COMMIT, DROP, FORGET, SEND_SNAPSHOT, SAVE, END, STOP, ASK_ALIVE = range(31, 39)


def make_header(kind: int, **values: Any) -> Header:
    """A header of one kind; fields not given are 0."""
    made = np.zeros(1, dtype=HEADER)
    made["kind"] = kind
    for name, value in values.items():
        made[name] = value
    return made


def header_bytes(made: Header) -> NDArray[np.uint8]:
    """The header's bytes, for MPI."""
    return made.view(np.uint8)


class Backoff:
    """Waits a little longer each time nothing happened, at most half a millisecond."""

    def __init__(self) -> None:
        self.rounds = 0

    def reset(self) -> None:
        """Something happened."""
        self.rounds = 0

    def wait(self) -> None:
        """Nothing happened: give the core away."""
        self.rounds += 1
        if self.rounds > 20:
            time.sleep(min(5e-4, 1e-5 * (self.rounds - 20)))
