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

from hvd_ext.roll_call import Answer, Listener, ask, tell

VARIABLE = "HVD_EXT_TIMEOUT"
DEFAULT = "60"
FIRST = 5.0  # times the limit, before the first step is over
GRACE = 10.0  # seconds from the verdict until the process is ended
PARTING = 1.0  # seconds for the others to say why they end, before a launcher sees this process's end
EXIT_STATUS = 70


def limits(text: str | None = None) -> tuple[float, float]:
    """Seconds without progress on the first step and on later ones.

    Args:
        text: "later" or "later,first" in seconds; by default the environment's, or 60.

    Raises:
        ValueError: it is neither, or a limit is not above 0.
    """
    text = os.environ.get(VARIABLE) or DEFAULT if text is None else text
    try:
        later, *rest = [float(part) for part in text.split(",")]
        first = rest[0] if rest else FIRST * later
        fine = len(rest) <= 1 and later > 0 and first > 0
    except ValueError:
        fine = False
    if not fine:
        raise ValueError(f'{VARIABLE} must be seconds above 0, such as "60", or for later steps and the '
                         f'first, such as "60,300"; got {text!r}')
    return first, later


@dataclass(frozen=True)
class Wait:
    """What a process waits for, and since when (``time.monotonic()``)."""

    what: str
    since: float


class Watch:
    """The waits of this process. ``begin`` and ``end`` cost an assignment each.

    Attributes:
        verdict: why a wait was given up; None while none was.
    """

    def __init__(self) -> None:
        self.verdict: str | None = None
        self.rank = 0
        self._listener: Listener | None = None
        self.others: Mapping[int, Any] = {}
        self._sources: list[Callable[[], Wait | None]] = [lambda: self._now]
        self._now: Wait | None = None
        self._steps = 0
        self._abort: Callable[[], None] = lambda: None
        self._aborting: threading.Thread | None = None
        self._running: Callable[[], bool] = lambda: True
        self._thread: threading.Thread | None = None
        self._uncaught = False  # this process ends with an exception
        self._before_end: list[Callable[[], None]] = []

    @property
    def listener(self) -> Listener | None:
        """This process's end of the roll call."""
        return self._listener

    @listener.setter
    def listener(self, listener: Listener | None) -> None:
        self._listener = listener
        if listener is not None:
            listener.told = self.told

    def begin(self, what: str) -> None:
        """This process waits for ``what`` from now on."""
        self._now = Wait(what, time.monotonic())

    def end(self) -> None:
        """What it waited for has come."""
        self._now = None

    def step_over(self) -> None:
        """A whole step is over: from now on the limit of later steps counts."""
        self._steps += 1

    def add_source(self, source: Callable[[], Wait | None]) -> None:
        """Look at this too: what is waited for where ``begin`` cannot be called."""
        self._sources.append(source)

    def call_before_end(self, function: Callable[[], None]) -> None:
        """Call ``function`` when this process ends without an error, before Horovod's shutdown."""
        if function not in self._before_end:
            self._before_end.append(function)

    def start(self, rank: int, abort: Callable[[], None],
              running: Callable[[], bool] = lambda: True) -> None:
        """Start to look; once per process.

        Args:
            rank: this process's.
            abort: ends all pending collectives with an error.
            running: whether this process still takes part; when it no longer does, it does not answer.

        Raises:
            ValueError: ``HVD_EXT_TIMEOUT`` is not as it should be.
        """
        limits()
        self.rank, self._abort, self._running = rank, abort, running
        if self._thread is None:
            _bound_the_end_after_errors(self)
        if self._thread is None or not self._thread.is_alive():
            atexit.unregister(self._bound_the_end)
            atexit.register(self._bound_the_end)  # after hvd.init(), so before Horovod's own shutdown
            self.verdict = None
            self._thread = threading.Thread(target=self._run, name="hvd_ext watch", daemon=True)
            self._thread.start()

    def waiting(self) -> Wait | None:
        """The longest of this process's waits, if any."""
        found = [wait for source in list(self._sources) if (wait := source()) is not None]
        return min(found, key=lambda wait: wait.since, default=None)

    def limit(self) -> float:
        """Seconds without progress that are allowed now."""
        first, later = limits()
        return later if self._steps else first

    def _run(self) -> None:
        known: Wait | None = None
        until = 0.0
        moves: dict[int, int] | None = None  # the others', at half of the time that is left
        while True:
            time.sleep(min(1.0, self.limit() / 8))
            if self.verdict is not None:
                return
            if not (_elastic() or self._running()):
                self._leave()
                return
            wait, now = self.waiting(), time.monotonic()
            if self.listener is not None:
                self.listener.sample(None if wait is None else (wait.what, now - wait.since))
            if wait is None:
                continue
            if wait != known:
                known, until, moves = wait, wait.since + self.limit(), None
            if now < until:
                if moves is None and now > until - self.limit() / 2:
                    moves = _moves(self._ask())
                continue
            answers = self._ask()
            patience = patience_with(answers, moves or {}, self.limit())
            if patience == 0.0:
                self._give_up(wait, now, answers)
                return
            until, moves = now + patience, None

    def _leave(self) -> None:
        """This process has left the others, who may still wait for it. It may come back as another."""
        listener, self.listener, self.others = self.listener, None, {}
        if listener is not None:
            listener.close()

    def _ask(self) -> dict[int, Answer | None]:
        return {rank: ask(address) for rank, address in self.others.items() if rank != self.rank}

    def _give_up(self, wait: Wait, now: float, answers: Mapping[int, Answer | None]) -> None:
        told = [f"rank {self.rank} has waited {now - wait.since:.0f} s for {wait.what}"]
        told += [f"rank {rank} " + ("does not answer: its process or its host is stopped, dead or cut off"
                                    if one is None else str(one)) for rank, one in sorted(answers.items())]
        if not answers and not self._steps:
            told.append("the ranks had not met yet: see that every rank makes the same optimizer with the "
                        "same extensions and starts to train")
        self.verdict = (f"{'; '.join(told)}. Mend what keeps the others, or raise {VARIABLE} "
                        f"(seconds without progress, now {self.limit():g})")
        print(f"hvd_ext: {self.verdict}", file=sys.stderr, flush=True)
        with contextlib.suppress(AttributeError, ValueError, OSError):  # stderr may be no file here
            faulthandler.dump_traceback(file=sys.stderr.fileno(), all_threads=True)
        if not _elastic():  # there the launcher goes on without this process
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
        if self.verdict is None or self._uncaught or _elastic():
            return
        if self.await_abort() and self._running():  # Horovod was initialised once more
            self.verdict = None
            return
        _flush()
        _end_process_in(GRACE / 2)

    def end_failed_process(self) -> None:
        """At exit, after Horovod's shutdown: a process whose waits were given up has failed.

        The script caught the error; without this its launcher would take it for a success.
        """
        if self.verdict is None or self._uncaught or _elastic():
            return
        print(f"hvd_ext: rank {self.rank} ends with status {EXIT_STATUS}: {self.verdict}", file=sys.stderr)
        logging.shutdown()
        _flush()
        os._exit(EXIT_STATUS)

    def failed(self, kind: type[BaseException], error: BaseException) -> bool:
        """This process ends with an exception; whether the others must hear of it: it is its own."""
        theirs = self.verdict is not None or kind.__name__ == "HorovodInternalError"
        if theirs or _elastic() or hasattr(sys, "ps1"):
            return False
        self.verdict = f"rank {self.rank} failed: {kind.__name__}: {error}"
        print(f"hvd_ext: {self.verdict}; its traceback:", file=sys.stderr, flush=True)
        return True

    def tell_the_others(self, what: str) -> None:
        """Have the other processes end too, with ``what`` happened here in their errors."""
        told = [threading.Thread(target=tell, daemon=True, args=(address, self.rank, what))
                for rank, address in self.others.items() if rank != self.rank]
        for thread in told:
            thread.start()
        for thread in told:
            thread.join(GRACE / 2)
        if told:
            time.sleep(PARTING)

    def fail(self, what: str) -> None:
        """Give up this process's waits, and have the other processes give up theirs: ``what`` happened."""
        if self.verdict is not None:
            return
        self.verdict = f"rank {self.rank} failed: {what}"
        print(f"hvd_ext: {self.verdict}", file=sys.stderr, flush=True)
        self.tell_the_others(what)  # first: the shutdown ends their waits without a reason
        if not _elastic():
            self._start_abort()

    def told(self, rank: int, what: str) -> None:
        """Another rank has failed: its exchanges will never come."""
        if self.verdict is not None:
            return
        self.verdict = f"rank {rank} failed: {what}. Its traceback is in its output"
        print(f"hvd_ext: rank {self.rank} ends because {self.verdict}", file=sys.stderr, flush=True)
        self._start_abort()
        wait = self.waiting()
        if wait is not None:
            threading.Thread(target=self._end_unless_over, args=(wait,), daemon=True).start()

    def _end_unless_over(self, wait: Wait) -> None:
        """End the process when it still waits after some seconds."""
        time.sleep(GRACE)
        still = self.waiting()
        if still is not None and still.since == wait.since:
            print(f"hvd_ext: rank {self.rank} ends: its collective cannot be taken back",
                  file=sys.stderr, flush=True)
            os._exit(EXIT_STATUS)


def patience_with(answers: Mapping[int, Answer | None], moves: Mapping[int, int],
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


def _moves(answers: Mapping[int, Answer | None]) -> dict[int, int]:
    return {rank: one.moves for rank, one in answers.items() if one is not None}


def _elastic() -> bool:
    return os.environ.get("HOROVOD_ELASTIC") == "1"


def _bound_the_end_after_errors(watch: Watch) -> None:
    """A process that ends with an error must end, and the others with it: its last collectives, and
    theirs, may never be answered."""
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        watch._uncaught = not hasattr(sys, "ps1")
        must_tell = watch.failed(kind, error)
        before(kind, error, trace)  # first: once another rank has ended, the launcher may kill this one
        if not hasattr(sys, "ps1"):
            sys.stderr.flush()
            if must_tell:
                watch.tell_the_others(f"{kind.__name__}: {error}")
            _end_process_in(GRACE)

    sys.excepthook = hook


def _end_process_in(seconds: float) -> None:
    """End the process unless it has ended by itself until then."""
    timer = threading.Timer(seconds, os._exit, [EXIT_STATUS])
    timer.daemon = True
    timer.start()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, OSError):  # it may be closed, or no file
            stream.flush()


WATCH = Watch()
"""The watch of this process."""

atexit.register(WATCH.end_failed_process)
