"""``hvd.join()`` while an extension is in use: a barrier, and an error on all ranks where one trains on.

Horovod lets a rank that has joined answer the others' allreduces with zeros. An allgather or alltoall of a
rank that trains on crashes the joined rank, and zeros in an allreduce of an extension are wrong numbers. So
the ranks first wait for each other in an allreduce of their own. A rank that trains on then waits for this
one in an exchange, which this rank learns by asking it, and ends both.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from hvd_ext.watchdog.peer_status import RankStatus, request_status
from hvd_ext.watchdog.watchdog import WATCH

NAME = "hvd_ext/join"
PERIOD_S = 1.0  # between two looks at the other ranks
LEAST_WAIT_S = 2.0  # of another rank in one exchange, before it counts
MESSAGE = ("rank {other} trains on ({status}) while rank {here} is in hvd.join(). With {extension} no rank "
           "can train on alone: call hvd.join() on all ranks after the same number of steps, as a barrier. "
           "Where ranks have different numbers of batches, put the loop over the batches into "
           "`with hvd.uneven_inputs(optimizer):`")


@dataclass(frozen=True)
class Sighting:
    """A rank that waits in an exchange which is not the barrier."""

    rank: int
    what: str
    status: str


@contextmanager
def fail_if_a_rank_trains_on(extension: str, idle: Callable[[], bool]) -> Iterator[None]:
    """Within the block this rank waits for all ranks to join.

    Args:
        extension: what is in use, for the message.
        idle: whether every exchange that this rank has begun is over, so that the others cannot wait for
            one of them.

    Raises:
        RuntimeError: another rank trains on.
    """
    over, error = threading.Event(), ""

    def look() -> None:
        nonlocal error
        before: Sighting | None = None
        while not over.wait(PERIOD_S):
            now = find_training_rank() if idle() else None
            if now is not None and before is not None and (now.rank, now.what) == (before.rank, before.what):
                error = MESSAGE.format(other=now.rank, status=now.status, here=WATCH.rank,
                                       extension=extension)
                WATCH.fail_waits(f"RuntimeError: {error}")
                return
            before = now

    thread = threading.Thread(target=look, name="hvd_ext join", daemon=True)
    thread.start()
    try:
        yield
    except Exception as caught:
        if error:
            raise RuntimeError(error) from caught
        raise
    finally:
        over.set()


def find_training_rank(ask_rank: Callable[[object], RankStatus | None] = request_status) -> Sighting | None:
    """The first rank, from this one's neighbour on, that waits in an exchange other than the barrier."""
    others = sorted(WATCH.others, key=lambda rank: (rank < WATCH.rank, rank))
    for rank in others:
        answer = None if rank == WATCH.rank else ask_rank(WATCH.others[rank])
        if answer is None or answer.waiting is None or answer.waiting[0] == NAME:
            continue
        what, seconds = answer.waiting
        return Sighting(rank, what, str(answer)) if seconds >= LEAST_WAIT_S else None
    return None
