"""A Keras training in which rank 1 fails: ``python -m tests.tensorflow.failing_program HOW METHOD``.

With "join" as HOW rank 1 joins while rank 0 trains on. With an ending of ``ENDINGS`` rank 1 goes on to
another collective; both ranks catch the errors of their waits, and end so.
"""

from __future__ import annotations

import os
import sys

import keras
import numpy as np
import tensorflow as tf

import hvd_ext.tensorflow as hvd

ENDINGS = {"end": lambda: None, "exit": lambda: sys.exit(0), "_exit": lambda: os._exit(0),
           "shutdown": hvd.shutdown}


def main(how: str, method: str) -> None:
    hvd.init()
    rank = hvd.rank()
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Input((6,)), keras.layers.Dense(3)])
    options = {"topk": {"compression": hvd.Compression.topk(0.5, min_size=0)},
               "sharded": {"server": "sharded"}}.get(method, {})
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), **options), "mse")
    train(model, 3)
    if how == "join":
        if hvd.rank() == 1:
            hvd.join()
        train(model, 3)
        return
    try:
        if hvd.rank() == 1:
            hvd.allreduce(tf.ones(1), name="something else")
        else:
            train(model, 1)
    except Exception as error:
        print(f"rank {rank} caught: {type(error).__name__}", flush=True)  # os._exit() does not
    ENDINGS[how]()


def train(model: keras.Model, steps: int) -> None:
    for _ in range(steps):
        model.train_on_batch(np.ones((4, 6)), np.ones((4, 3)))


if __name__ == "__main__":
    main(*sys.argv[1:])
