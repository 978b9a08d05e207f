"""Several threads for one pass: the compiled loops release the GIL, so plain threads do."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

MIN_THREAD_NUMEL = 2**16  # elements that are worth another thread


def run_in_parts(loop: Callable[[int, int], None], length: int, threads: int) -> None:
    """Call ``loop(start, stop)`` for parts of ``range(length)`` that cover it, on up to ``threads`` threads.

    The parts begin at multiples of 16 elements, so that no two threads write to one line of the cache.
    """
    parts = max(1, min(threads, length // MIN_THREAD_NUMEL))
    if parts == 1:
        loop(0, length)
        return
    step = -(-length // parts // 16) * 16
    others = [_thread_pool(os.getpid(), threads).submit(loop, start, min(start + step, length))
              for start in range(step, length, step)]
    try:
        loop(0, step)
    finally:
        for other in others:
            other.result()


@functools.lru_cache(maxsize=1)
def _thread_pool(process: int, threads: int) -> ThreadPoolExecutor:
    """The threads of this process: those of a process that was forked stay behind in it."""
    return ThreadPoolExecutor(threads, thread_name_prefix="hvd_ext.kernels")
