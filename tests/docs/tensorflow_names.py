"""Small models, data and functions for the names that TensorFlow's and Keras' blocks leave open."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import hvd_ext.tensorflow as loops
import hvd_ext.tensorflow.keras as hvd
from tests.docs.completion import AS_ALWAYS

Names = dict[str, Any]  # the block's globals; those below are made when a block asks for them
FEATURES, CLASSES, ROWS = 8, 3, 4
USUAL_ARGUMENTS = "keras.optimizers.SGD(0.1)"
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def make_model(names: Names) -> keras.Model:
    """With one matrix that is large enough for TopK and PowerSGD to compress."""
    keras.utils.set_random_seed(names["_seed_"])
    return keras.Sequential([keras.Input((FEATURES,)), keras.layers.Dense(160, activation="tanh"),
                             keras.layers.Dense(CLASSES)])


def make_normalized(names: Names) -> keras.Model:
    """With batch normalization."""
    keras.utils.set_random_seed(names["_seed_"])
    return keras.Sequential([keras.Input((FEATURES,)), keras.layers.BatchNormalization(),
                             keras.layers.Dense(CLASSES)])


def make_compiled(names: Names) -> keras.Model:
    """Ready for ``model.fit``."""
    model = names["model"] = make_model(names)
    model.compile(need(names, "optimizer"), CROSS_ENTROPY)
    return model


def make_batch(step: int) -> tuple[Any, Any]:
    """Rows of this rank."""
    made = np.random.default_rng([step, hvd.rank()])
    return (made.normal(size=(ROWS, FEATURES)).astype("float32"), made.integers(CLASSES, size=ROWS))


def make_dataset(count: int = 2) -> tf.data.Dataset:
    """So many batches of this rank."""
    x, y = (np.concatenate(parts) for parts in zip(*map(make_batch, range(count)), strict=True))
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(ROWS)


def plain_optimizer(names: Names) -> keras.optimizers.Optimizer:
    """Not distributed."""
    return keras.optimizers.SGD(0.1, momentum=0.9)


def distributed_optimizer(names: Names) -> Any:
    """Plain reduction."""
    optimizer = hvd.DistributedOptimizer(plain_optimizer(names))
    optimizer.build(need(names, "model").trainable_variables)
    return optimizer


def make_step(names: Names) -> Callable[[Any, Any], None]:
    """A step of a loop of one's own."""
    model, optimizer = need(names, "model"), need(names, "optimizer")

    @tf.function
    def step(x: Any, y: Any) -> None:
        with tf.GradientTape() as tape:
            loss = CROSS_ENTROPY(y, model(x, training=True))
        optimizer.apply_gradients(zip(tape.gradient(loss, model.trainable_variables),
                                      model.trainable_variables, strict=True))
    return step


def make_tape(names: Names) -> tf.GradientTape:
    """After a forward pass of the block's model; the loss is ``loss``."""
    x, y = make_batch(0)
    with tf.GradientTape() as tape:
        names["loss"] = CROSS_ENTROPY(y, need(names, "model")(x, training=True))
    return loops.DistributedGradientTape(tape)


MAKERS: dict[str, Callable[[Names], Any]] = {
    "keras": lambda names: keras,
    "tf": lambda names: tf,
    "hvd": lambda names: hvd,
    "model": make_model,
    "optimizer": distributed_optimizer,
    "op": lambda names: hvd.DelayCompensated(lam=2.0),
    "loss": lambda names: CROSS_ENTROPY,
    "loss_of": lambda names: CROSS_ENTROPY,
    "tape": make_tape,
    "seng": lambda names: hvd.SENG(need(names, "model"), damping=0.2),
    "step": make_step,
    "dataset": lambda names: make_dataset(),
    "rows_of_this_rank": lambda names: make_dataset(),
    AS_ALWAYS: lambda names: lambda x=None, y=None: None,
}
ALWAYS_NEW = {"tape"}

# Sections whose blocks need something else, or begin anew, by page and heading.
SECTIONS: dict[tuple[str, str], dict[str, Callable[[Names], Any]]] = {
    ("docs/keras3.md", "Batch normalization over all ranks"): {"model": make_normalized},
    ("docs/uneven_data.md", "Ranks with different numbers of batches"): {
        "optimizer": lambda names: hvd.DistributedOptimizer(plain_optimizer(names)),
        "model": make_compiled, "step": make_step, "dataset": lambda names: make_dataset(2 + hvd.rank())},
    ("docs/uneven_data.md", "model.fit"): {
        "optimizer": lambda names: hvd.DistributedOptimizer(plain_optimizer(names)),
        "model": make_compiled, "dataset": lambda names: make_dataset(2 + hvd.rank())},
    ("docs/keras3.md", "Check your own script"): {
        "model": make_model, "optimizer": distributed_optimizer},
    ("docs/keras3.md", "A loop with a tape"): {
        "model": make_model, "optimizer": plain_optimizer,
        "seng": lambda names: hvd.SENG(names["model"], damping=0.2)},
    ("docs/elastic.md", "Elastic training"): {"model": make_compiled},
}
AGAIN: dict[tuple[str, str], dict[str, Callable[[Names], Any]]] = {}
ALONE: set[tuple[str, str]] = set()


def prove_trained(names: Names) -> None:
    """The script has learnt its data, and has written its last checkpoint."""
    assert names["accuracy"] > 0.8
    assert Path(names["_folder_"], "first_keras", "update-000000000005").is_dir()


PROOFS: dict[tuple[str, str], Callable[[Names], None]] = {
    ("docs/first_script.md", "Keras"): prove_trained,
}


def need(names: Names, name: str) -> Any:
    """A name of the block, made if it is not there."""
    if name not in names:
        names[name] = names["_makers_"][name](names)
    return names[name]


def train_with(made: Names, names: Names) -> None:
    """Train with what a block has made: weights move, and are the same on all ranks.

    Args:
        made: the names that the block has bound.
        names: all names.
    """
    optimizer, model = made.get("optimizer"), names.get("model")
    if model is None or ("optimizer" not in made and "step" not in made):
        return
    before = model.get_weights()
    if "step" in made:
        for number in range(2):
            made["step"](*make_batch(number))
    else:
        if not model.compiled:
            model.compile(optimizer, CROSS_ENTROPY)
        model.fit(make_dataset(), verbose=0)
        optimizer.flush()
    assert not all(np.array_equal(one, other) for one, other in zip(before, model.get_weights(), strict=True))
