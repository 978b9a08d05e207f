"""Train a small network on the handwritten digits asynchronously over MPI.

    mpirun -np 4 --oversubscribe --enable-recovery python examples/async_digits.py
    mpirun -np 5 --oversubscribe python examples/async_digits.py --servers 2 --rule asgd --slow 4

Rank 0 (and further ones with --servers) serves the weights, the other ranks are workers; no worker
waits for another. The same program with ``--frontend tensorflow`` trains the same network in Keras.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images (samples, 64) in [0, 1] and labels, then the test ones."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    parts = train_test_split((x / 16).astype(np.float32), y, test_size=0.2, random_state=0,
                             stratify=y)
    return parts[0], parts[2], parts[1], parts[3]


class Torch:
    """The network in PyTorch."""

    def __init__(self, seed: int) -> None:
        import torch

        torch.set_num_threads(1)
        torch.manual_seed(seed)
        self.torch = torch
        self.model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(),
                                         torch.nn.Linear(32, 10))

    def server(self, **settings: Any) -> Any:
        """The parameter server of this model."""
        import hvd_ext.torch as hvd

        return hvd.ParameterServer(self.model, **settings)

    def step(self, server: Any, x: np.ndarray, y: np.ndarray) -> None:
        """One mini-batch: gradients, push, pull."""
        torch = self.torch
        self.model.zero_grad()
        scores = self.model(torch.from_numpy(x))
        torch.nn.functional.cross_entropy(scores, torch.from_numpy(y)).backward()
        server.step()

    def error(self, x: np.ndarray, y: np.ndarray) -> float:
        """Share of wrong answers in percent."""
        with self.torch.no_grad():
            return 100 * float(np.mean(self.model(self.torch.from_numpy(x)).argmax(1).numpy() != y))


class TensorFlow:
    """The same network in Keras."""

    def __init__(self, seed: int) -> None:
        import keras
        import tensorflow as tf

        keras.utils.set_random_seed(seed)
        self.tf = tf
        self.model = keras.Sequential([keras.layers.Input((64,)),
                                       keras.layers.Dense(32, activation="relu"),
                                       keras.layers.Dense(10)])

    def server(self, **settings: Any) -> Any:
        """The parameter server of this model."""
        import hvd_ext.tensorflow as hvd

        return hvd.ParameterServer(self.model, **settings)

    def step(self, server: Any, x: np.ndarray, y: np.ndarray) -> None:
        """One mini-batch: gradients, push, pull."""
        with self.tf.GradientTape() as tape:
            losses = self.tf.nn.sparse_softmax_cross_entropy_with_logits(y, self.model(x))
            loss = self.tf.reduce_mean(losses)
        server.step(tape.gradient(loss, self.model.trainable_variables))

    def error(self, x: np.ndarray, y: np.ndarray) -> float:
        """Share of wrong answers in percent."""
        return 100 * float(np.mean(self.model(x).numpy().argmax(1) != y))


def main(arguments: list[str] | None = None) -> None:
    """Runs this rank's part."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--frontend", choices=["torch", "tensorflow"], default="torch")
    parser.add_argument("--rule", choices=["asgd", "dc-asgd-c", "dc-asgd-a"], default="dc-asgd-a")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--momentum", default="0", help='a number in [0, 1) or "auto"')
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--prefetch", action="store_true")
    parser.add_argument("--slow", type=float, default=1.0,
                        help="how many times slower the last worker is")
    parser.add_argument("--checkpoint-dir", help="folder for checkpoints, one an epoch")
    parser.add_argument("--resume", help="a checkpoint folder to go on from")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    network = (Torch if options.frontend == "torch" else TensorFlow)(options.seed)
    train_x, train_y, test_x, test_y = digits()
    per_epoch = len(train_x) // options.batch  # updates
    ps = network.server(
        lr=options.lr, rule=options.rule, servers=options.servers, prefetch=options.prefetch,
        momentum=options.momentum if options.momentum == "auto" else float(options.momentum),
        checkpoint_dir=options.checkpoint_dir, resume=options.resume,
        checkpoint_every=per_epoch if options.checkpoint_dir else None,
        total_updates=per_epoch * options.epochs,
    )
    if ps.is_server:
        report = ps.serve()
        if report is not None:
            print(f"test error {network.error(test_x, test_y):.2f} % after {report.updates} "
                  f"updates, {report.updates_per_second:.0f} a second, delay "
                  f"{report.delay.mean:.2f} (max {report.delay.maximum})")
        return
    own = np.arange(ps.worker, len(train_x), ps.workers)  # this worker's share of the data
    rng = np.random.default_rng([options.seed, ps.worker, ps.steps])
    while ps.updates < per_epoch * options.epochs:
        rows = rng.choice(own, options.batch, replace=False)
        began = time.perf_counter()
        network.step(ps, train_x[rows], train_y[rows])
        if ps.worker == ps.workers - 1:
            time.sleep((options.slow - 1) * (time.perf_counter() - began))
    ps.finish()


if __name__ == "__main__":
    main()
