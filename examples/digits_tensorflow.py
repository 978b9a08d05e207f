"""What the two TensorFlow digits examples share: model, optimizer and judgement."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import hvd_ext.tensorflow as hvd
from examples.digits import Deal, Digits
from examples.digits_run import Train, parse, run


def make_model(hidden: int, seed: int) -> keras.Model:
    """64 pixels, one hidden layer, 10 classes."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential([keras.Input((64,)), keras.layers.Dense(hidden, activation="relu"),
                             keras.layers.Dense(10)])


def make_loss() -> keras.losses.Loss:
    """Cross-entropy of logits and labels, the mean over the batch."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def make_optimizer(args: argparse.Namespace, deal: Deal) -> keras.Optimizer:
    """The ordinary optimizer of the command line."""
    # Adaptive steps do not grow with the batch; those of SGD do.
    scaled = args.lr * deal.workers
    made: dict[str, Callable[[], keras.Optimizer]] = {
        "sgd": lambda: keras.optimizers.SGD(scaled),
        "momentum": lambda: keras.optimizers.SGD(scaled, momentum=0.9),
        "adam": lambda: keras.optimizers.Adam(args.lr),
        "amsgrad": lambda: hvd.AMSGrad(args.lr),
    }
    return made[args.optimizer]()


def extensions(args: argparse.Namespace, microbatch: bool) -> dict[str, Any]:
    """``op`` and ``compression`` of the command line."""
    op: dict[str, Callable[[], Any]] = {
        "average": lambda: hvd.Average,
        "adasum": lambda: hvd.Adasum,
        "delay": lambda: hvd.DelayCompensated(
            args.lam, adaptive=not args.constant_lam,
            virtual_workers="microbatch" if microbatch else "rank"),
    }
    compression: dict[str, Callable[[], Any]] = {
        "none": lambda: hvd.Compression.none,
        "fp16": lambda: hvd.Compression.fp16,
        "topk": lambda: hvd.Compression.topk(args.ratio),
    }
    return {"op": op[args.op](), "compression": compression[args.compression]()}


def preconditioner(args: argparse.Namespace, model: keras.Model) -> Any:
    """SENG for ``model`` when the command line asks for it."""
    if args.preconditioner == "none":
        return None
    return hvd.SENG(model, damping=args.damping, update_freq=args.update_freq)


def distribute(args: argparse.Namespace, model: keras.Model, deal: Deal) -> keras.Optimizer:
    """The optimizer with its gradients reduced, after the micro-batches of a step."""
    return hvd.DistributedOptimizer(
        make_optimizer(args, deal), backward_passes_per_step=deal.passes,
        average_aggregated_gradients=True, server=args.server, preconditioner=preconditioner(args, model),
        **extensions(args, microbatch=deal.passes > 1))


def error_percent(model: keras.Model, data: Digits) -> float:
    """Share of wrong answers, in percent; each rank judges its part and the counts are summed."""
    part = slice(hvd.rank(), None, hvd.size())
    answers = np.argmax(model(tf.constant(data.test_x[part])), axis=1)
    wrong = tf.constant(float((answers != data.test_y[part]).sum()), tf.float64)
    return float(hvd.allreduce(wrong, op=hvd.Sum, name="wrong")) * 100 / len(data.test_y)


def main(program: str, description: str | None, train: Train,
         arguments: list[str] | None = None) -> None:
    """Run ``train`` once a seed; rank 0 shows a progress bar, a table, and writes what was asked."""
    args = parse(program, description, arguments)
    hvd.init()
    run(args, train, rank=hvd.rank(), size=hvd.size())
