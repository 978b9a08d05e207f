"""What ranks run for test_seng_ranks.py; every function is called on all ranks at once."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import hvd_ext.tensorflow.keras as hvd
from hvd_ext.tensorflow import DistributedGradientTape
from hvd_ext.tensorflow.collectives import Collectives
from tests.tensorflow import training
from tests.tensorflow.seng_cases import MODELS, L, batch, flat, gradient, places, u_of

LR = 0.05


def network(seed: int = 1) -> keras.Model:
    """No batch statistics, so that ranks and one process on the joined batch see the same."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential([
        keras.Input((5, 5, 2)), L.Conv2D(4, 3, padding="same"), L.GroupNormalization(2), L.ReLU(),
        L.Conv2D(6, 3, groups=2, use_bias=False, activation="tanh"),
        L.Conv2DTranspose(4, 2, activation="tanh"), L.Flatten(), L.Dense(2)])


def directions(model: keras.Model, seng: Any, collectives: Collectives, steps: int, rho: int,
               batch_of: Any) -> list[dict[str, list[Any]]]:
    """Each step's mean gradient, direction and this rank's U, by layer; weights follow them."""
    variables = model.trainable_variables

    @tf.function(reduce_retracing=True)
    def step(x: tf.Tensor, y: tf.Tensor) -> Any:
        found = gradient(model, x, y)
        mean = [collectives.if_distributed(lambda k=k, g=g: collectives.allreduce(g, f"g{k}"), lambda g=g: g)
                for k, g in enumerate(found)]
        turned = seng.precondition(mean, variables, collectives)
        for variable, direction in zip(variables, turned, strict=True):
            variable.assign_sub(LR * direction)
        return mean, turned

    seen = []
    for number in range(steps):
        x, y = batch_of(number, rho)
        mean, p = step(tf.constant(x), tf.constant(y))
        where = places(seng, variables)
        seen.append({"u": [u_of(state) for state in seng.states],
                     "g": [flat([mean[k] for k in numbers]) for numbers in where],
                     "p": [flat([p[k] for k in numbers]) for numbers in where]})
    return seen


def rank_batch(rank: int, number: int, rho: int) -> tuple[np.ndarray, np.ndarray]:
    """A rank's batch of a step."""
    return batch((5, 5, 2), rho, seed=100 * rank + number)


def trained(settings: dict[str, Any], steps: int, rho: int) -> list[dict[str, list[Any]]]:
    """``directions`` on this rank, of a batch of ``rho`` and as many more as its number."""
    model = network()
    seng = hvd.SENG(model, update_freq=2, **settings)
    seen = directions(model, seng, Collectives(), steps, rho + hvd.rank() % 2,
                      lambda number, rho: rank_batch(hvd.rank(), number, rho))
    hvd.assert_replicas_equal(model)
    seng.close()
    return seen


def joined(settings: list[dict[str, Any]], rho: int) -> list[list[list[np.ndarray]]]:
    """Directions in full coupling for several settings."""
    found = []
    for one in settings:
        model = network()
        seng = hvd.SENG(model, update_freq=2, coupling="full", **one)
        seen = directions(model, seng, Collectives(), 2, rho,
                          lambda number, rho: rank_batch(hvd.rank(), number, rho))
        found.append([step["p"] for step in seen])
        seng.close()
    return found


def fitted(how: dict[str, Any], wrap: str = "plain", policy: str = "float32",
           coupling: str = "full") -> tuple[list[np.ndarray], int, int]:
    """Weights after ``model.fit``, the steps that counted, and refreshes that failed."""
    keras.config.set_dtype_policy(policy)
    try:
        model = training.dense_model()
    finally:
        keras.config.set_dtype_policy("float32")
    seng = hvd.SENG(model, damping=0.5, update_freq=2, sketch=None, coupling=coupling)
    options: dict[str, Any] = {}
    sgd: dict[str, Any] = {"learning_rate": 0.1, "momentum": 0.9}
    if wrap == "factor":
        sgd["loss_scale_factor"] = 8.0
    elif wrap == "accumulation":
        sgd["gradient_accumulation_steps"] = 2
    elif wrap == "passes":
        options = {"backward_passes_per_step": 2, "average_aggregated_gradients": True}
    optimizer: Any = keras.optimizers.SGD(**sgd)
    if wrap == "inside":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=64.0,
                                                        dynamic_growth_steps=3)
    optimizer = hvd.DistributedOptimizer(optimizer, preconditioner=seng, **options)
    if wrap in ("outside", "overflow"):
        optimizer = keras.optimizers.LossScaleOptimizer(
            optimizer, initial_scale=2.0**16 if wrap == "overflow" else 64.0, dynamic_growth_steps=3)
    training.fit(model, optimizer, hvd.rank(), hvd.size(), **how)
    hvd.assert_replicas_equal(model, optimizer=optimizer)
    return training.weights(model), int(seng.steps), seng.report()["failures"]


REDRAWN = {"damping": 0.5, "update_freq": 3, "sketch_size": 20, "resample": "step"}


def fitted_redrawn() -> list[np.ndarray]:
    """Weights after ``model.fit`` in full coupling, other rows at every step."""
    model = training.dense_model()
    seng = hvd.SENG(model, coupling="full", **REDRAWN)
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=0.9), preconditioner=seng)
    training.fit(model, optimizer, hvd.rank(), hvd.size())
    hvd.assert_replicas_equal(model, optimizer=optimizer)
    return training.weights(model)


def redrawn_without_curvature(settings: dict[str, Any]) -> tuple[float, bool]:
    """A step of joined, redrawn sketches where a layer has no curvature: how far that one's direction is
    from g/(1 + lam), and whether all are finite."""
    model, collectives = network(), Collectives()
    seng = hvd.SENG(model, update_freq=5, coupling="full", **settings)
    state = seng.states[0]
    for number in range(2):
        found = gradient(model, *map(tf.constant, rank_batch(hvd.rank(), number, 3)))
        mean = [collectives.allreduce(g, f"g{k}") for k, g in enumerate(found)]
        p = seng.precondition(mean, model.trainable_variables, collectives)
        if number == 0:  # as it is before the first refresh
            state.ready.assign(False)
            for one in (state.rho, state.offset):
                one.assign(0)
            for one in (state.gram, state.lower, *(v for block in state.blocks for v in block.variables)):
                if one.shape.rank == 2:
                    one.assign(one[:0, :0] if one is state.gram or one is state.lower else one[:0])
                elif one.shape.rank == 4:
                    one.assign(one[:, :, :0, :0])
    seng.close()
    own = places(seng, model.trainable_variables)[0]
    error = max(float(tf.reduce_max(tf.abs(p[k] - mean[k] / (1 + settings["damping"])))) for k in own)
    return error, all(bool(tf.reduce_all(tf.math.is_finite(one))) for one in p)


def taped(compiled: bool, scale: float | None, coupling: str = "lagged") -> list[np.ndarray]:
    """Weights after steps with a tape, the loss scaled by its optimizer or not."""
    model = training.dense_model()
    seng = hvd.SENG(model, damping=0.5, update_freq=2, sketch=None, coupling=coupling)
    optimizer: Any = keras.optimizers.SGD(0.1, momentum=0.9)
    if scale is not None:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=scale,
                                                        dynamic_growth_steps=2)
    optimizer.build(model.trainable_variables)
    x, y = training.data()

    def step(x: tf.Tensor, y: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            loss = optimizer.scale_loss(tf.reduce_mean((model(x, training=True) - y) ** 2))
        tape = DistributedGradientTape(tape, preconditioner=seng, optimizer=optimizer)
        found = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(list(zip(found, model.trainable_variables, strict=True)))

    run = tf.function(step) if compiled else step
    for number in range(5):
        rows = slice(number * 8 + 4 * hvd.rank(), number * 8 + 4 * hvd.rank() + 4)
        run(tf.constant(x[rows]), tf.constant(y[rows]))
    hvd.assert_replicas_equal(model)
    return training.weights(model)


def resumed(coupling: str, folder: str, load: int | None = None) -> tuple[bool, str]:
    """Whether a run that was saved and loaded ends as one that was not, and what was refused."""
    def make(model: keras.Model) -> Any:
        return hvd.SENG(model, damping=0.5, update_freq=3, coupling=coupling, sketch_size=20,
                        explicit_threshold=40, row_sketch=3)

    def fit(model: keras.Model, epochs: int) -> None:
        x, y = training.data()
        x, y = x[:16][hvd.rank()::hvd.size()], y[:16][hvd.rank()::hvd.size()]
        model.fit(x, y, batch_size=4, epochs=epochs, shuffle=False, verbose=0)

    path = Path(folder)
    model = training.dense_model()
    seng = make(model)
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.05, momentum=0.9),
                                           preconditioner=seng), "mse")
    fit(model, 2)
    model.save(path / f"model{hvd.rank()}.keras")
    tf.train.Checkpoint(seng=seng).write(str(path / f"seng{hvd.rank()}"))
    fit(model, 2)
    again = keras.models.load_model(path / f"model{hvd.rank()}.keras")
    other = make(again)
    read = tf.train.Checkpoint(seng=other).read(str(path / f"seng{hvd.rank()}"))
    read.assert_existing_objects_matched()
    hvd.DistributedOptimizer(again.optimizer, preconditioner=other)
    fit(again, 2)
    same = all(np.array_equal(one, two) for one, two in zip(
        training.weights(model), training.weights(again), strict=True))
    hvd.allreduce(tf.zeros(1), name="saved")
    swapped = training.dense_model()
    third = make(swapped)
    tf.train.Checkpoint(seng=third).read(str(path / f"seng{(hvd.rank() + 1) % hvd.size()}"))
    swapped.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.05), preconditioner=third), "mse")
    try:
        fit(swapped, 1)
    except ValueError as error:
        third.reset_state()
        fit(swapped, 1)
        return same, str(error)
    return same, ""


def bad_on_one_rank() -> tuple[list[Any], bool]:
    """A pass whose captured gradients are not finite on the last rank only, the gradient is."""
    model = MODELS["dense"]()[0]
    seng = hvd.SENG(model, damping=0.5, update_freq=1, sketch=None, coupling="full")
    collectives, ages = Collectives(), []
    for number in range(3):
        x, y = batch((5,), seed=10 * hvd.rank() + number)
        found = gradient(model, x, y)
        if number == 1 and hvd.rank() == hvd.size() - 1:
            captured = seng.states[0].captured
            captured.u.assign(captured.u * np.nan)
        mean = [collectives.allreduce(g, f"g{k}") for k, g in enumerate(found)]
        p = seng.precondition(mean, model.trainable_variables, collectives)
        ages.append([row["age"] for row in seng.report()["layers"]])
    seng.close()
    return ages, all(bool(tf.reduce_all(tf.math.is_finite(g))) for g in p)


class PastOnOneRank(keras.Model):
    """Uses a weight past its layer's call, on the last rank only."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.out = L.Dense(4, use_bias=False), L.Dense(2)

    def call(self, x: Any) -> Any:
        y = self.used(x)
        past = keras.ops.matmul(x, self.used.kernel) if hvd.rank() == hvd.size() - 1 else 0.0
        return self.out(keras.ops.tanh(y) + past)


def check_fails_on_one_rank() -> tuple[list[bool], list[str], list[int]]:
    """Which layers have no curvature, what is said of it, and each one's failures, after a fit."""
    keras.utils.set_random_seed(1)
    model = PastOnOneRank()
    seng = hvd.SENG(model, damping=0.5, update_freq=2, sketch=None)
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), preconditioner=seng), "mse")
    x, _ = batch((5,), 12, seed=hvd.rank())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(x, x[:, :2], batch_size=4, verbose=0)
    hvd.assert_replicas_equal(model)
    rows = seng.report()["layers"]
    said = [str(one.message) for one in caught if "no curvature" in str(one.message)]
    return [row["held"] == "identity" for row in rows], said, [row["failures"] for row in rows]


def other_settings_on_one_rank() -> str:
    """The error where the last rank has another seed."""
    return error_of_a_step(damping=0.5, seed=int(hvd.rank() == hvd.size() - 1))


def other_damping_on_one_rank() -> str:
    """The error where the last rank has another damping."""
    return error_of_a_step(damping=0.3 * (1 + int(hvd.rank() == hvd.size() - 1)))


def error_of_a_step(**settings: Any) -> str:
    """What goes wrong at the first step."""
    model = MODELS["dense"]()[0]
    seng = hvd.SENG(model, **settings)
    try:
        seng.precondition(gradient(model, *batch((5,))), model.trainable_variables, Collectives())
    except RuntimeError as error:
        return str(error)
    finally:
        seng.close()
    return ""


def other_image_sizes(uc: str) -> bool:
    """Ranks with images of other sizes keep factors of other ranks."""
    model = keras.Sequential([keras.Input((3 + hvd.rank(), 3, 2)), L.Conv2D(6, 2),
                              L.GlobalAveragePooling2D(), L.Dense(2)])
    seng = hvd.SENG(model, damping=0.5, explicit_threshold=0, uc=uc, coupling="full")
    collectives = Collectives()
    found = gradient(model, *batch((3 + hvd.rank(), 3, 2), seed=hvd.rank()))
    mean = [collectives.allreduce(g, f"g{k}") for k, g in enumerate(found)]
    p = seng.precondition(mean, model.trainable_variables, collectives)
    seng.close()
    hvd.assert_replicas_equal([tf.Variable(g, name=f"p{k}") for k, g in enumerate(p)])
    return seng.report()["failures"] == 0
