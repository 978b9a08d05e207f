"""scikit-learn's handwritten digits, real data that needs no download, and how they are dealt out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BATCH = 16  # samples of one worker's mini-batch


@dataclass(frozen=True)
class Digits:
    """Images (samples, 64) scaled to [0, 1], float32, and labels (samples,), int64."""

    train_x: NDArray[np.float32]
    train_y: NDArray[np.int64]
    test_x: NDArray[np.float32]
    test_y: NDArray[np.int64]


def load(seed: int, test_share: float = 0.2) -> Digits:
    """The 1,797 digits, split by ``seed``."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    split = train_test_split((x / 16).astype(np.float32), y.astype(np.int64), test_size=test_share,
                             random_state=seed, stratify=y)
    return Digits(split[0], split[2], split[1], split[3])


@dataclass(frozen=True)
class Deal:
    """How a step's samples are dealt to ranks and backward passes.

    ``workers`` mini-batches of ``batch`` make a step. With at least one a rank, each backward pass
    takes one; with fewer, the ranks share them.
    """

    workers: int
    ranks: int
    batch: int = BATCH

    def __post_init__(self) -> None:
        if self.workers % self.ranks and self.ranks % self.workers:
            raise ValueError(
                f"virtual workers and ranks must divide one another, got {self.workers} and "
                f"{self.ranks}; pass --virtual-workers {self.ranks * max(1, self.workers // self.ranks)}"
            )

    @property
    def passes(self) -> int:
        """Backward passes a rank makes in a step."""
        return max(1, self.workers // self.ranks)

    @property
    def share(self) -> int:
        """Samples of one backward pass."""
        return self.workers * self.batch // (self.ranks * self.passes)

    def steps(self, samples: int) -> int:
        """Steps in an epoch; what does not fill a step is left out."""
        return samples // (self.workers * self.batch)

    def microbatches(self, samples: int, epoch: int, seed: int, rank: int) -> NDArray[np.int64]:
        """This rank's samples of an epoch, (steps, passes, share): the same shuffle on every rank."""
        order = np.random.default_rng([seed, epoch]).permutation(samples)
        steps = self.steps(samples)
        dealt = order[: steps * self.workers * self.batch]
        return dealt.reshape(steps, self.ranks, self.passes, self.share)[:, rank]
