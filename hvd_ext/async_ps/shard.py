"""One server's slice of everything: weights, velocity, pulled weights and MeanSquare per worker."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_ext.async_ps.config import ServerSettings
from hvd_ext.async_ps.sequencer import Commit
from hvd_ext.reducers.delay_compensation.update_rules import BLOCK_NUMEL, apply_in_blocks

Array = NDArray[Any]


class Shard:
    """The slice (n,) that one server owns (DC-ASGD Algorithm 2).

    ``w_bak[m][slot]`` is both the weights that worker m pulled and the buffer they are sent from.

    Args:
        weights: the slice's starting weights (n,); copied.
        settings: the run's settings.
        workers: M.
    """

    def __init__(self, weights: Array, settings: ServerSettings, workers: int) -> None:
        self.settings = settings
        self.w = weights.copy()
        self.velocity = np.zeros_like(self.w) if settings.moves else None
        self.w_bak = [[self.w.copy() for _ in range(settings.depth)] for _ in range(workers)]
        self.mean_square = [
            np.zeros_like(self.w) if settings.rule.adaptive else None for _ in range(workers)
        ]
        size = min(BLOCK_NUMEL, self.w.size)
        self._work = np.empty(size, self.w.dtype), np.empty(size, self.w.dtype)

    def commit_update(self, order: Commit, gradient: Array) -> Array:
        """Applies an update; returns the buffer with the new weights for its worker (n,)."""
        bak = self.w_bak[order.worker][order.slot]
        with np.errstate(over="ignore", invalid="ignore"):  # a run that diverges goes on
            apply_in_blocks(
                self.settings.rule, self.w, gradient, lr=order.lr, momentum=order.momentum,
                w_bak=bak, mean_square=self.mean_square[order.worker], velocity=self.velocity,
                work=self._work,
            )
        return bak

    def copy_current(self, worker: int, slot: int) -> Array:
        """The current weights in a worker's buffer (n,), without an update."""
        bak = self.w_bak[worker][slot]
        bak[...] = self.w
        return bak

    def replace_buffer(self, worker: int, slot: int) -> None:
        """A new buffer in the place of one that MPI may still read."""
        self.w_bak[worker][slot] = self.w_bak[worker][slot].copy()

    def state_dict(self) -> dict[str, Array]:
        """Everything by name; the arrays themselves, not copies."""
        state = {"w": self.w}
        if self.velocity is not None:
            state["velocity"] = self.velocity
        for m, slots in enumerate(self.w_bak):
            state.update({f"w_bak.{m}.{slot}": bak for slot, bak in enumerate(slots)})
        for m, mean_square in enumerate(self.mean_square):
            if mean_square is not None:
                state[f"mean_square.{m}"] = mean_square
        return state

    def load_state_dict(self, state: dict[str, Array], *, reset_workers: bool) -> None:
        """Takes everything over bit for bit; with ``reset_workers`` only w and velocity."""
        self.w[...] = state["w"]
        if self.velocity is not None and "velocity" in state:
            self.velocity[...] = state["velocity"]
        for m, slots in enumerate(self.w_bak):
            for slot, bak in enumerate(slots):
                bak[...] = self.w if reset_workers else state[f"w_bak.{m}.{slot}"]
        for m, mean_square in enumerate(self.mean_square):
            if mean_square is not None and not reset_workers:
                mean_square[...] = state[f"mean_square.{m}"]
