"""Ends a wait that nobody will answer: who waits for what, since when, and what the other ranks do.

A thread of each process looks at what the process waits for. After ``HVD_EXT_TIMEOUT`` seconds without
progress (60; before the first step is over five times as long, or what follows a comma, as in "60,300")
it asks the other ranks what they do, says so on stderr with this process's Python stacks, and has
Horovod shut down, so that the wait ends in an error. A rank that is at work on something else (an
evaluation, a checkpoint) counts as progress: it is waited for.

A rank that ends with an exception tells the others, which then end too, with its reason in their error.
A script that catches the error of a wait that was given up, and goes on to its end, ends with status 70.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from hvd_ext.watchdog.peer_status import RankStatus, StatusServer, notify_failure, request_status

VARIABLE = "HVD_EXT_TIMEOUT"
KERAS_HINT = (". A Keras callback that acts on a metric (EarlyStopping, ReduceLROnPlateau) does so on "
              "some ranks only if the metric differs: list hvd.callbacks.MetricAverageCallback() before it")
DEFAULT = "60"
FIRST_STEP_FACTOR = 5.0  # times the limit, before the first step is over
GRACE = 10.0  # seconds from the verdict until the process is ended
PARTING = 1.0  # seconds for the others to say why they end, before a launcher sees this process's end
EXIT_STATUS = 70


def parse_limits(text: str | None = None) -> tuple[float, float]:
    """Seconds without progress on the first step and on later ones.

    Args:
        text: "later" or "later,first" in seconds; by default the environment's, or 60.

    Raises:
        ValueError: it is neither, or a limit is not above 0.
    """
    text = os.environ.get(VARIABLE) or DEFAULT if text is None else text
    try:
        later, *rest = [float(part) for part in text.split(",")]
        first = rest[0] if rest else FIRST_STEP_FACTOR * later
        fine = len(rest) <= 1 and later > 0 and first > 0
    except ValueError:
        fine = False
    if not fine:
        raise ValueError(f'{VARIABLE} must be seconds above 0, such as "60", or for later steps and the '
                         f'first, such as "60,300"; got {text!r}')
    return first, later


@dataclass(frozen=True)
class PendingWait:
    """What a process waits for, and since when (``time.monotonic()``)."""

    what: str
    since: float


class Watchdog:
    """The waits of this process. ``begin`` and ``end`` cost an assignment each.

    Attributes:
        verdict: why a wait was given up; None while none was.
    """

    def __init__(self) -> None:
        self.verdict: str | None = None
        self.rank = 0
        self._listener: StatusServer | None = None
        self.others: Mapping[int, Any] = {}
        self._sources: list[Callable[[], PendingWait | None]] = [lambda: self._now]
        self._now: PendingWait | None = None
        self._steps = 0
        self._abort: Callable[[], None] = lambda: None
        self._aborting: threading.Thread | None = None
        self._running: Callable[[], bool] = lambda: True
        self._thread: threading.Thread | None = None
        self._uncaught = False  # this process ends with an exception
        self._before_end: list[Callable[[], None]] = []

    @property
    def listener(self) -> StatusServer | None:
        """This process's end of the roll call."""
        return self._listener

    @listener.setter
    def listener(self, listener: StatusServer | None) -> None:
        self._listener = listener
        if listener is not None:
            listener.told = self.on_peer_failure

    def start_wait(self, what: str) -> None:
        """This process waits for ``what`` from now on."""
        self._now = PendingWait(what, time.monotonic())

    def end_wait(self) -> None:
        """What it waited for has come."""
        self._now = None

    def mark_step_done(self) -> None:
        """A whole step is over: from now on the limit of later steps counts."""
        self._steps += 1

    def add_probe(self, source: Callable[[], PendingWait | None]) -> None:
        """Look at this too: what is waited for where ``begin`` cannot be called."""
        self._sources.append(source)

    def call_before_end(self, function: Callable[[], None]) -> None:
        """Call ``function`` when this process ends without an error, before Horovod's shutdown."""
        if function not in self._before_end:
            self._before_end.append(function)

    def start_watching(self, rank: int, abort: Callable[[], None],
                       running: Callable[[], bool] = lambda: True) -> None:
        """Start to look; once per process.

        Args:
            rank: this process's.
            abort: ends all pending collectives with an error.
            running: whether this process still takes part; when it no longer does, it does not answer.

        Raises:
            ValueError: ``HVD_EXT_TIMEOUT`` is not as it should be.
        """
        parse_limits()
        self.rank, self._abort, self._running = rank, abort, running
        if self._thread is None:
            _bound_the_end_after_errors(self)
        if self._thread is None or not self._thread.is_alive():
            atexit.unregister(self._bound_the_end)
            atexit.register(self._bound_the_end)  # after hvd.init(), so before Horovod's own shutdown
            self.verdict = None
            self._thread = threading.Thread(target=self._watch_loop, name="hvd_ext watch", daemon=True)
            self._thread.start()

    def longest_wait(self) -> PendingWait | None:
        """The longest of this process's waits, if any."""
        found = [wait for source in list(self._sources) if (wait := source()) is not None]
        return min(found, key=lambda wait: wait.since, default=None)

    def current_limit(self) -> float:
        """Seconds without progress that are allowed now."""
        first, later = parse_limits()
        return later if self._steps else first

    def _watch_loop(self) -> None:
        known: PendingWait | None = None
        until = 0.0
        moves: dict[int, int] | None = None  # the others', at half of the time that is left
        while True:
            time.sleep(min(1.0, self.current_limit() / 8))
            if self.verdict is not None:
                return
            if not (_is_elastic() or self._running()):
                self._leave_group()
                return
            wait, now = self.longest_wait(), time.monotonic()
            if self.listener is not None:
                self.listener.record_wait(None if wait is None else (wait.what, now - wait.since))
            if wait is None:
                continue
            if wait != known:
                known, until, moves = wait, wait.since + self.current_limit(), None
            if now < until:
                if moves is None and now > until - self.current_limit() / 2:
                    moves = _rank_progress(self._request_statuses())
                continue
            answers = self._request_statuses()
            patience = remaining_grace(answers, moves or {}, self.current_limit())
            if patience == 0.0:
                self._give_up(wait, now, answers)
                return
            until, moves = now + patience, None

    def _leave_group(self) -> None:
        """This process has left the others, who may still wait for it. It may come back as another."""
        listener, self.listener, self.others = self.listener, None, {}
        if listener is not None:
            listener.close()

    def _request_statuses(self) -> dict[int, RankStatus | None]:
        return {rank: request_status(address) for rank, address in self.others.items() if rank != self.rank}

    def _give_up(self, wait: PendingWait, now: float, answers: Mapping[int, RankStatus | None]) -> None:
        told = [f"rank {self.rank} has waited {now - wait.since:.0f} s for {wait.what}"]
        told += [f"rank {rank} " + ("does not answer: its process or its host is stopped, dead or cut off"
                                    if one is None else str(one)) for rank, one in sorted(answers.items())]
        if not answers and not self._steps:
            told.append("the ranks had not met yet: see that every rank makes the same optimizer with the "
                        "same extensions and starts to train")
        self.verdict = (f"{'; '.join(told)}. Fix what keeps the ranks apart, or raise {VARIABLE} "
                        f"(seconds without progress, now {self.current_limit():g})"
                        + (KERAS_HINT if "keras" in sys.modules else ""))
        print(f"hvd_ext: {self.verdict}", file=sys.stderr, flush=True)
        with contextlib.suppress(AttributeError, ValueError, OSError):  # stderr may be no file here
            faulthandler.dump_traceback(file=sys.stderr.fileno(), all_threads=True)
        if not _is_elastic():  # there the launcher goes on without this process
            self._start_abort()
        self._end_unless_over(wait)

    def _start_abort(self) -> None:
        """End all pending collectives with an error, in a thread: that may take long, or forever."""
        self._aborting = threading.Thread(target=self._abort, daemon=True)
        self._aborting.start()

    def await_abort(self) -> bool:
        """Let Horovod finish its shutdown, for some seconds; whether it has.

        Horovod waits forever when it is shut down from two threads at once: call this before
        ``horovod.shutdown()``.
        """
        thread = self._aborting
        if thread is not None and thread is not threading.current_thread():
            thread.join(GRACE / 2)
        return thread is None or not thread.is_alive()

    def _bound_the_end(self) -> None:
        """At exit, before Horovod's shutdown: see that a process whose waits were given up ends."""
        if self.verdict is None and not self._uncaught:
            for function in self._before_end:
                function()
        if self.verdict is None or self._uncaught or _is_elastic():
            return
        if self.await_abort() and self._running():  # Horovod was initialised once more
            self.verdict = None
            return
        _flush_output()
        _end_process_in(GRACE / 2)

    def end_failed_process(self) -> None:
        """At exit, after Horovod's shutdown: a process whose waits were given up has failed.

        The script caught the error; without this its launcher would take it for a success.
        """
        if self.verdict is None or self._uncaught or _is_elastic():
            return
        print(f"hvd_ext: rank {self.rank} ends with status {EXIT_STATUS}: {self.verdict}", file=sys.stderr)
        logging.shutdown()
        _flush_output()
        os._exit(EXIT_STATUS)

    def process_failed(self, kind: type[BaseException], error: BaseException) -> bool:
        """This process ends with an exception; whether the others must hear of it: it is its own."""
        theirs = self.verdict is not None or kind.__name__ == "HorovodInternalError"
        if theirs or _is_elastic() or hasattr(sys, "ps1"):
            return False
        self.verdict = f"rank {self.rank} failed: {kind.__name__}: {error}"
        print(f"hvd_ext: {self.verdict}; its traceback:", file=sys.stderr, flush=True)
        return True

    def notify_peers(self, what: str) -> None:
        """Have the other processes end too, with ``what`` happened here in their errors."""
        told = [threading.Thread(target=notify_failure, daemon=True, args=(address, self.rank, what))
                for rank, address in self.others.items() if rank != self.rank]
        for thread in told:
            thread.start()
        for thread in told:
            thread.join(GRACE / 2)
        if told:
            time.sleep(PARTING)

    def fail_waits(self, what: str) -> None:
        """Give up this process's waits, and have the other processes give up theirs: ``what`` happened."""
        if self.verdict is not None:
            return
        self.verdict = f"rank {self.rank} failed: {what}"
        print(f"hvd_ext: {self.verdict}", file=sys.stderr, flush=True)
        self.notify_peers(what)  # first: the shutdown ends their waits without a reason
        if not _is_elastic():
            self._start_abort()

    def on_peer_failure(self, rank: int, what: str) -> None:
        """Another rank has failed: its exchanges will never come."""
        if self.verdict is not None:
            return
        self.verdict = f"rank {rank} failed: {what}. Its traceback is in its output"
        print(f"hvd_ext: rank {self.rank} ends because {self.verdict}", file=sys.stderr, flush=True)
        self._start_abort()
        wait = self.longest_wait()
        if wait is not None:
            threading.Thread(target=self._end_unless_over, args=(wait,), daemon=True).start()

    def _end_unless_over(self, wait: PendingWait) -> None:
        """End the process when it still waits after some seconds."""
        time.sleep(GRACE)
        still = self.longest_wait()
        if still is not None and still.since == wait.since:
            print(f"hvd_ext: rank {self.rank} ends: its collective cannot be taken back",
                  file=sys.stderr, flush=True)
            os._exit(EXIT_STATUS)


def remaining_grace(answers: Mapping[int, RankStatus | None], moves: Mapping[int, int],
                    limit: float) -> float:
    """How many seconds more to wait for the others; 0 when none of them makes progress.

    Args:
        answers: what they say now.
        moves: their moves some time ago; without those that did not answer then.
        limit: seconds without progress that are allowed.
    """
    if any(one is None and rank not in moves for rank, one in answers.items()):
        return 0.0  # somebody has not answered twice
    found = 0.0
    for rank, one in answers.items():
        if one is not None and one.waiting is not None:
            found = max(found, limit - one.waiting[1])  # it came to a collective not long ago
        elif one is None or one.moves > moves.get(rank, 0):
            found = limit  # at work
    return found


def _rank_progress(answers: Mapping[int, RankStatus | None]) -> dict[int, int]:
    return {rank: one.moves for rank, one in answers.items() if one is not None}


def _is_elastic() -> bool:
    return os.environ.get("HOROVOD_ELASTIC") == "1"


def _bound_the_end_after_errors(watch: Watchdog) -> None:
    """A process that ends with an error must end, and the others with it: its last collectives, and
    theirs, may never be answered."""
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        watch._uncaught = not hasattr(sys, "ps1")
        must_tell = watch.process_failed(kind, error)
        before(kind, error, trace)  # first: once another rank has ended, the launcher may kill this one
        if not hasattr(sys, "ps1"):
            sys.stderr.flush()
            if must_tell:
                watch.notify_peers(f"{kind.__name__}: {error}")
            _end_process_in(GRACE)

    sys.excepthook = hook


def _end_process_in(seconds: float) -> None:
    """End the process unless it has ended by itself until then."""
    timer = threading.Timer(seconds, os._exit, [EXIT_STATUS])
    timer.daemon = True
    timer.start()


def _flush_output() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, OSError):  # it may be closed, or no file
            stream.flush()


WATCH = Watchdog()
"""The watch of this process."""

atexit.register(WATCH.end_failed_process)
