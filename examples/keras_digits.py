"""Train a classifier of handwritten digits with ``model.fit``, with or without the extensions.

    horovodrun -np 2 python -m examples.keras_digits --op delay --virtual-workers 16

``--lr`` is the learning rate of one worker's step: large batches of M workers take M times as much
(linear scaling), so the same value compares all of them with sequential SGD.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

import hvd_ext.tensorflow.keras as hvd
from examples import digits_tensorflow as shared
from examples.digits import Deal, Digits


class Dealt(keras.utils.PyDataset):
    """This rank's micro-batches, dealt anew each epoch in the same shuffle on every rank."""

    def __init__(self, data: Digits, deal: Deal, seed: int) -> None:
        super().__init__()
        self.data, self.deal, self.seed, self.epoch = data, deal, seed, 0
        self.picked = self._deal()

    def _deal(self) -> np.ndarray:
        picked = self.deal.microbatches(len(self.data.train_x), self.epoch, self.seed, hvd.rank())
        return picked.reshape(-1, self.deal.share)

    def __len__(self) -> int:
        return len(self.picked)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.data.train_x[self.picked[index]], self.data.train_y[self.picked[index]]

    def on_epoch_end(self) -> None:
        self.epoch += 1
        self.picked = self._deal()


class TestError(keras.callbacks.Callback):
    """Notes the test error after each epoch."""

    def __init__(self, data: Digits, advance: Callable[[], None]) -> None:
        super().__init__()
        self.data, self.advance = data, advance
        self.errors: list[float] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.errors.append(shared.error_percent(self.model, self.data))
        self.advance()


def train(args: argparse.Namespace, seed: int, data: Digits,
          advance: Callable[[], None]) -> dict[str, Any]:
    """One run. The test error after each epoch, in percent, and the seconds it took."""
    deal = Deal(args.virtual_workers or hvd.size(), hvd.size())
    model = shared.make_model(args.hidden, seed)
    model.compile(shared.distribute(args, model, deal), shared.make_loss())
    noted = TestError(data, advance)
    started = time.perf_counter()
    model.fit(Dealt(data, deal, seed), epochs=args.epochs, shuffle=False, verbose=0, callbacks=[
        hvd.callbacks.BroadcastGlobalVariablesCallback(0), hvd.callbacks.MetricAverageCallback(),
        hvd.callbacks.AssertReplicasEqualCallback(), noted])
    return {"seed": seed, "test_error": noted.errors[-1], "test_errors": noted.errors,
            "seconds": time.perf_counter() - started, "workers": deal.workers}


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    shared.main("keras_digits", __doc__, train, arguments)


if __name__ == "__main__":
    main()
