"""Train a classifier of handwritten digits with a loop and tapes of one's own.

    horovodrun -np 2 python -m examples.tf_digits --op delay --virtual-workers 16

``--lr`` is the learning rate of one worker's step: large batches of M workers take M times as much
(linear scaling), so the same value compares all of them with sequential SGD.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import tensorflow as tf

import hvd_ext.tensorflow as hvd
from examples import digits_tensorflow as shared
from examples.digits import Deal, Digits


def make_step(args: argparse.Namespace, model: Any, deal: Deal) -> Callable[[Any, Any], Any]:
    """One backward pass and, after the last of a step, the update.

    Micro-batches that are workers of their own (--op delay) or sent compressed are summed by
    ``DistributedOptimizer``; otherwise the tape is distributed and the step's rows are one batch.
    """
    loss_of = shared.make_loss()
    if deal.passes > 1 or args.server:
        optimizer, wrap = shared.distribute(args, model, deal), lambda tape: tape
    else:
        optimizer = shared.make_optimizer(args, deal)
        options = {"preconditioner": shared.preconditioner(args, model),
                   **shared.extensions(args, microbatch=False)}

        def wrap(tape: tf.GradientTape) -> tf.GradientTape:
            return hvd.DistributedGradientTape(tape, optimizer=optimizer, **options)

    optimizer.build(model.trainable_variables)

    @tf.function(reduce_retracing=True)
    def step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = loss_of(y, model(x, training=True))
        gradients = wrap(tape).gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    return step


def train(args: argparse.Namespace, seed: int, data: Digits,
          advance: Callable[[], None]) -> dict[str, Any]:
    """One run. The test error after each epoch, in percent, and the seconds it took."""
    deal = Deal(args.virtual_workers or hvd.size(), hvd.size())
    model = shared.make_model(args.hidden, seed)
    hvd.broadcast_variables(model.weights, root_rank=0)
    step = make_step(args, model, deal)
    errors = []
    started = time.perf_counter()
    for epoch in range(args.epochs):
        for picked in deal.microbatches(len(data.train_x), epoch, seed,
                                        hvd.rank()).reshape(-1, deal.share):
            step(tf.constant(data.train_x[picked]), tf.constant(data.train_y[picked]))
        hvd.assert_replicas_equal(model)
        errors.append(shared.error_percent(model, data))
        advance()
    return {"seed": seed, "test_error": errors[-1], "test_errors": errors,
            "seconds": time.perf_counter() - started, "workers": deal.workers}


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    shared.main("tf_digits", __doc__, train, arguments)


if __name__ == "__main__":
    main()
