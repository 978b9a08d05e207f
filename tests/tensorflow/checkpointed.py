"""Trainings that save and load checkpoints, step by step reproducible; run by tests and by the soak."""

from __future__ import annotations

import hashlib

import keras
import numpy as np

import hvd_ext.tensorflow.keras as hvd
from hvd_ext.tensorflow.keras_hooks import wrapper_of
from hvd_ext.tensorflow.variables import as_tf

METHODS = ("plain", "fp16", "delay", "topk", "scaled", "powersgd", "seng", "sharded", "rank0")


def build(method, seed=0):
    """A compiled model with batch statistics and dropout, both of which differ by rank."""
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([
        keras.Input((6,)), keras.layers.Dense(9), keras.layers.BatchNormalization(),
        keras.layers.Activation("tanh"), keras.layers.Dropout(0.1, seed=seed),
        keras.layers.Dense(7, activation="tanh"), keras.layers.Dense(3)])
    options = {
        "fp16": lambda: {"compression": hvd.Compression.fp16},
        "delay": lambda: {"op": hvd.DelayCompensated()},
        "topk": lambda: {"compression": hvd.Compression.topk(0.2, min_size=0)},
        "scaled": lambda: {"compression": hvd.Compression.topk(0.2, min_size=0)},
        "powersgd": lambda: {"compression": hvd.Compression.powersgd(rank=1)},
        "seng": lambda: {"preconditioner": hvd.SENG(model, damping=0.2, update_freq=5)},
        "sharded": lambda: {"server": "sharded"},
        "rank0": lambda: {"server": "rank0"},
    }.get(method, dict)()
    rate = keras.optimizers.schedules.ExponentialDecay(0.05, 3, 0.9, staircase=True)
    inner = keras.optimizers.Adam(rate) if method in ("sharded", "rank0") else \
        keras.optimizers.SGD(rate, momentum=0.0 if method == "delay" else 0.9)
    if method.startswith("scaled"):
        inner = keras.optimizers.LossScaleOptimizer(inner, initial_scale=64.0, dynamic_growth_steps=4)
    optimizer = hvd.DistributedOptimizer(inner, **options)
    model.compile(optimizer, "mse")
    optimizer.build(model.trainable_variables)
    return model, optimizer


def train_step(model, number):
    """Step ``number`` with the batch of this rank, which depends on nothing else."""
    rng = np.random.default_rng([hvd.rank(), number])
    model.train_on_batch(*(rng.normal(size=(8, n)).astype("float32") for n in (6, 3)))


def digest(model, optimizer):
    """Of all that this rank has: weights, statistics, moments, what the extensions keep."""
    found = hashlib.sha256()
    extra = wrapper_of(optimizer).preconditioner
    for variable in [*model.variables, *optimizer.variables, *(extra.variables if extra else ())]:
        array = as_tf(variable).numpy()
        found.update(str(array.dtype).encode() + repr(array.shape).encode() + array.tobytes())
    return found.hexdigest()


def run(method, folder, steps, every, *, before_step=lambda number: None, keep=3):
    """Train to ``steps``, going on from what ``folder`` holds; (first step, digest of this rank)."""
    model, optimizer = build(method, seed=hvd.rank())  # loading must bring the same to all
    loaded = hvd.load_checkpoint(folder, model=model, optimizer=optimizer)
    if loaded is None:
        hvd.broadcast_variables(model.weights, 0)
    first = 0 if loaded is None else loaded.step
    for number in range(first, steps):
        before_step(number)
        train_step(model, number)
        if (number + 1) % every == 0:
            hvd.save_checkpoint(folder, number + 1, model=model, optimizer=optimizer, keep=keep,
                                epoch=number // 3)
    hvd.assert_replicas_equal(model)
    return first, digest(model, optimizer)
