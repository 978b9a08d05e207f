"""The digits with a small network whose runs are all computed at once, in NumPy.

One run is a row: weights (R, n), one mini-batch a run and step. Used by the asynchronous
benchmarks, where the gradient is one function of (weights, update) whatever the method.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Data:
    """Images scaled to [0, 1] (samples, pixels) and labels (samples,)."""

    train_x: Array
    train_y: NDArray[np.int64]
    test_x: Array
    test_y: NDArray[np.int64]


def digits(seed: int = 0, test_share: float = 0.2) -> Data:
    """scikit-learn's 1,797 handwritten digits, split once for all runs."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    parts = train_test_split((x / 16.0).astype(np.float32), y.astype(np.int64), random_state=seed,
                             test_size=test_share, stratify=y)
    return Data(parts[0], parts[2], parts[1], parts[3])


class Network:
    """pixels - hidden (ReLU) - classes with softmax cross-entropy, for R runs at once.

    Args:
        data: to train on.
        hidden: width.
        batch: samples in a mini-batch.
        seeds: one a run (R,): of its starting weights and of its order of samples.
    """

    def __init__(self, data: Data, *, hidden: int, batch: int, seeds: list[int]) -> None:
        self.data = data
        self.hidden, self.batch, self.seeds = hidden, batch, seeds
        self.pixels, self.classes = data.train_x.shape[1], int(data.train_y.max()) + 1
        self.cuts = np.cumsum([self.pixels * hidden, hidden, hidden * self.classes])
        self.numel = int(self.cuts[-1]) + self.classes
        self.batches = len(data.train_x) // batch  # in an epoch
        self._orders: dict[tuple[int, int], NDArray[np.int64]] = {}

    def start(self) -> Array:
        """Starting weights (R, n), the same for equal seeds."""
        w = np.zeros((len(self.seeds), self.numel), np.float32)
        for row, seed in enumerate(self.seeds):
            rng = np.random.default_rng([seed, 0])
            w1, _, w2, _ = np.split(w[row], self.cuts)
            w1[:] = rng.normal(size=w1.size) * np.sqrt(2 / self.pixels)
            w2[:] = rng.normal(size=w2.size) * np.sqrt(1 / self.hidden)
        return w

    def _layers(self, w: Array) -> tuple[Array, Array, Array, Array]:
        runs = len(w)
        w1, b1, w2, b2 = np.split(w, self.cuts, axis=1)
        return (w1.reshape(runs, self.pixels, self.hidden), b1[:, None, :],
                w2.reshape(runs, self.hidden, self.classes), b2[:, None, :])

    def samples(self, draw: int) -> NDArray[np.int64]:
        """The mini-batch of each run (R, batch): the draw-th of a fresh order each epoch."""
        epoch, place = divmod(draw, self.batches)
        rows = []
        for seed in self.seeds:
            order = self._orders.get((seed, epoch))
            if order is None:
                self._orders = {key: kept for key, kept in self._orders.items()
                                if key[1] >= epoch - 1}
                rng = np.random.default_rng([seed, 1, epoch])
                order = self._orders[seed, epoch] = rng.permutation(len(self.data.train_x))
            rows.append(order[place * self.batch : (place + 1) * self.batch])
        return np.stack(rows)

    def gradient(self, w: Array, draw: int) -> Array:
        """Of each run's mean loss over its draw-th mini-batch, (R, n)."""
        rows = self.samples(draw)
        x, y = self.data.train_x[rows], self.data.train_y[rows]
        w1, b1, w2, b2 = self._layers(w)
        z = x @ w1 + b1
        a = np.maximum(z, 0)
        scores = a @ w2 + b2
        scores -= scores.max(axis=2, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=2, keepdims=True)
        np.put_along_axis(scores, y[:, :, None],
                          np.take_along_axis(scores, y[:, :, None], 2) - 1, axis=2)
        scores /= self.batch
        g = np.empty_like(w)
        g1, g2, g3, g4 = np.split(g, self.cuts, axis=1)
        back = scores @ w2.transpose(0, 2, 1)
        back *= z > 0
        runs = len(w)
        g1[:] = (x.transpose(0, 2, 1) @ back).reshape(runs, -1)
        g2[:] = back.sum(axis=1)
        g3[:] = (a.transpose(0, 2, 1) @ scores).reshape(runs, -1)
        g4[:] = scores.sum(axis=1)
        return g

    def errors(self, w: Array) -> NDArray[np.float64]:
        """Test error of each run in percent (R,); a diverged run has every sample wrong."""
        w1, b1, w2, b2 = self._layers(w)
        with np.errstate(over="ignore", invalid="ignore"):
            scores = np.maximum(self.data.test_x @ w1 + b1, 0) @ w2 + b2
        wrong = scores.argmax(axis=2) != self.data.test_y
        wrong |= ~np.isfinite(scores).all(axis=2)
        return 100.0 * wrong.mean(axis=1)
