"""Scripts that use Horovod's API as its examples do, on made data, with the import to be exchanged.

Each takes the module under the name ``hvd``, the further arguments of its distributed optimizer (tape)
and a folder, and returns the trained weights.
"""

from __future__ import annotations

import os
from typing import Any

import keras
import numpy as np
import tensorflow as tf


def images(count: int = 32, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Small grey images of two classes, one brighter than the other."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    return (rng.normal(size=(count, 8, 8, 1)) + labels[:, None, None, None]).astype("float32"), labels


def classifier() -> keras.Model:
    """A convolution and a dense layer, of other weights on each rank until they are broadcast."""
    keras.utils.set_random_seed(int(os.environ.get("OMPI_COMM_WORLD_RANK", "0")))
    return keras.Sequential([
        keras.layers.Input((8, 8, 1)), keras.layers.Conv2D(4, 3, activation="relu"),
        keras.layers.Flatten(), keras.layers.Dense(2, activation="softmax")])


def keras_mnist(hvd: Any, options: dict[str, Any], folder: str) -> list[np.ndarray]:
    """Keras with ``fit``, categorical labels, Adadelta and a checkpoint on rank 0."""
    hvd.init()
    if tf.config.list_physical_devices("GPU"):
        tf.config.set_visible_devices(tf.config.list_physical_devices("GPU")[hvd.local_rank()], "GPU")
    x, y = images()
    y = keras.utils.to_categorical(y, 2)
    model = classifier()
    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adadelta(1.0 * hvd.size()), **options)
    model.compile(loss="categorical_crossentropy", optimizer=optimizer, metrics=["accuracy"])
    callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0)]
    if hvd.rank() == 0:
        callbacks.append(keras.callbacks.ModelCheckpoint(os.path.join(folder, "checkpoint-{epoch}.h5")))
    model.fit(x[hvd.rank()::hvd.size()], y[hvd.rank()::hvd.size()], batch_size=4, callbacks=callbacks,
              epochs=2, verbose=0, validation_data=(x, y))
    model.evaluate(x, y, verbose=0)
    return model.get_weights()


def tensorflow2_keras_mnist(hvd: Any, options: dict[str, Any], folder: str) -> list[np.ndarray]:
    """``tf.keras`` with a dataset, warm-up, metrics and ``experimental_run_tf_function``."""
    hvd.init()
    x, y = images()
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).repeat().shuffle(32, seed=hvd.rank()).batch(4)
    model = classifier()
    scaled_lr = 0.001 * hvd.size()
    optimizer = hvd.DistributedOptimizer(
        tf.optimizers.Adam(scaled_lr), backward_passes_per_step=1, average_aggregated_gradients=True,
        **options)
    model.compile(loss=tf.losses.SparseCategoricalCrossentropy(), optimizer=optimizer,
                  metrics=["accuracy"], experimental_run_tf_function=False)
    callbacks = [
        hvd.callbacks.BroadcastGlobalVariablesCallback(0),
        hvd.callbacks.MetricAverageCallback(),
        hvd.callbacks.LearningRateWarmupCallback(initial_lr=scaled_lr, warmup_epochs=2, verbose=1),
    ]
    if hvd.rank() == 0:
        callbacks.append(tf.keras.callbacks.ModelCheckpoint(os.path.join(folder, "tf2-{epoch}.h5")))
    model.fit(dataset, steps_per_epoch=8 // hvd.size(), callbacks=callbacks, epochs=3, verbose=0)
    return model.get_weights()


def tensorflow2_mnist(hvd: Any, options: dict[str, Any], folder: str) -> list[np.ndarray]:
    """A loop of one's own with a tape, a broadcast after the first batch and tf.train.Checkpoint."""
    hvd.init()
    x, y = images()
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).repeat().shuffle(32, seed=hvd.rank()).batch(4)
    model, loss = classifier(), tf.losses.SparseCategoricalCrossentropy()
    opt = tf.optimizers.Adam(0.001 * hvd.size())
    if options:
        options = {**options, "optimizer": opt}
    checkpoint = tf.train.Checkpoint(model=model, optimizer=opt)

    @tf.function
    def training_step(images, labels, first_batch):
        with tf.GradientTape() as tape:
            loss_value = loss(labels, model(images, training=True))
        tape = hvd.DistributedGradientTape(tape, **options)
        grads = tape.gradient(loss_value, model.trainable_variables)
        opt.apply_gradients(zip(grads, model.trainable_variables, strict=True))
        if first_batch:
            hvd.broadcast_variables(model.variables, root_rank=0)
            hvd.broadcast_variables(opt.variables(), root_rank=0)
        return loss_value

    for batch, (rows, labels) in enumerate(dataset.take(8 // hvd.size())):
        training_step(rows, labels, batch == 0)
    if hvd.rank() == 0:
        checkpoint.save(os.path.join(folder, "checkpoint"))
    return model.get_weights()


def tensorflow2_synthetic(hvd: Any, options: dict[str, Any], folder: str) -> list[np.ndarray]:
    """The synthetic benchmark: fp16 where nothing else is asked for, figures of all ranks together."""
    hvd.init()
    model, opt = classifier(), tf.optimizers.SGD(0.01)
    data, target = tf.random.uniform([4, 8, 8, 1]), tf.random.uniform([4, 1], 0, 2, dtype=tf.int64)
    options = {**options, "optimizer": opt} if options else {"compression": hvd.Compression.fp16}

    @tf.function
    def benchmark_step(first_batch):
        with tf.GradientTape() as tape:
            probs = model(data, training=True)
            loss = tf.losses.sparse_categorical_crossentropy(target, probs)
        tape = hvd.DistributedGradientTape(tape, **options)
        gradients = tape.gradient(loss, model.trainable_variables)
        opt.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        if first_batch:
            hvd.broadcast_variables(model.variables, root_rank=0)
            hvd.broadcast_variables(opt.variables(), root_rank=0)

    for number in range(3):
        benchmark_step(first_batch=number == 0)
    speeds = hvd.allgather(tf.constant([1.0 + hvd.rank()]))
    assert speeds.numpy().tolist() == [1.0 + rank for rank in range(hvd.size())]
    assert float(hvd.allreduce(tf.constant(3.0), average=False, name="total")) == 3.0 * hvd.size()
    return model.get_weights()


def keras_imagenet(hvd: Any, options: dict[str, Any], folder: str) -> list[np.ndarray]:
    """Resuming from an epoch that rank 0 knows, warm-up and schedules, regularisation, ``load_model``."""
    hvd.init()
    resume_from_epoch = hvd.broadcast(3 if hvd.rank() == 0 else 0, 0, name="resume_from_epoch")
    assert int(resume_from_epoch) == 3
    x, y = images()
    x, y = x[hvd.rank()::hvd.size()], keras.utils.to_categorical(y[hvd.rank()::hvd.size()], 2)
    model, initial_lr = classifier(), 0.0125 * hvd.size()
    opt = hvd.DistributedOptimizer(keras.optimizers.SGD(initial_lr, momentum=0.9), **options)
    model.compile(loss=keras.losses.categorical_crossentropy, optimizer=opt,
                  metrics=["accuracy", "top_k_categorical_accuracy"])
    schedule = hvd.callbacks.LearningRateScheduleCallback
    callbacks = [
        hvd.callbacks.BroadcastGlobalVariablesCallback(0),
        hvd.callbacks.MetricAverageCallback(),
        hvd.callbacks.LearningRateWarmupCallback(initial_lr=initial_lr, warmup_epochs=1, verbose=1),
        schedule(initial_lr=initial_lr, multiplier=1.0, start_epoch=1, end_epoch=2),
        schedule(initial_lr=initial_lr, multiplier=lambda epoch: 1e-1, start_epoch=2),
    ]
    path = os.path.join(folder, "imagenet-{epoch}.h5")
    if hvd.rank() == 0:
        callbacks.append(keras.callbacks.ModelCheckpoint(path))
        callbacks.append(keras.callbacks.TensorBoard(os.path.join(folder, "logs")))
    model.fit(x, y, batch_size=4, epochs=3, verbose=0, callbacks=callbacks, validation_data=(x, y))
    assert abs(float(model.optimizer.learning_rate) - initial_lr * 0.1) < 1e-6
    if hvd.rank() == 0 and not options:
        assert hvd.load_model(path.format(epoch=3), compression=hvd.Compression.none).optimizer.report
    return model.get_weights()


def tensorflow2_mnist_elastic(hvd: Any, options: dict[str, Any], folder: str) -> list[np.ndarray]:
    """Elastic with a loop of one's own: state, commits, and a callback after a reset."""
    hvd.init()
    x, y = images()
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).repeat().shuffle(32, seed=hvd.rank()).batch(4)
    model, loss, lr = classifier(), tf.losses.SparseCategoricalCrossentropy(), 0.001
    opt = tf.optimizers.Adam(lr * hvd.size())
    if options:
        options = {**options, "optimizer": opt}

    @tf.function
    def training_step(images, labels, allreduce=True):
        with tf.GradientTape() as tape:
            loss_value = loss(labels, model(images, training=True))
        if allreduce:
            tape = hvd.DistributedGradientTape(tape, **options)
        grads = tape.gradient(loss_value, model.trainable_variables)
        opt.apply_gradients(zip(grads, model.trainable_variables, strict=True))
        return loss_value

    for rows, labels in dataset.take(1):
        training_step(rows, labels, allreduce=False)  # makes the variables

    @hvd.elastic.run
    def train(state):
        start = state.batch
        for batch, (rows, labels) in enumerate(dataset.skip(start).take(8 // hvd.size() - start)):
            state.batch = batch
            training_step(rows, labels)
            if state.batch % 2 == 0:
                state.commit()

    def on_state_reset():
        opt.lr.assign(lr * hvd.size())

    state = hvd.elastic.TensorFlowKerasState(model, opt, batch=0)
    state.register_reset_callbacks([on_state_reset])
    train(state)
    state.on_reset()
    assert abs(float(opt.learning_rate) - lr * hvd.size()) < 1e-9
    opt.variables()
    return model.get_weights()


def tensorflow2_keras_mnist_elastic(hvd: Any, options: dict[str, Any], folder: str) -> list[np.ndarray]:
    """Elastic with ``fit`` and Horovod's callbacks for it."""
    hvd.init()
    x, y = images()
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).repeat().shuffle(32, seed=hvd.rank()).batch(4)
    model = classifier()
    scaled_lr = 0.001 * hvd.size()
    opt = hvd.DistributedOptimizer(tf.optimizers.Adam(scaled_lr), backward_passes_per_step=1,
                                   average_aggregated_gradients=True, **options)
    model.compile(loss=tf.losses.SparseCategoricalCrossentropy(), optimizer=opt, metrics=["accuracy"],
                  experimental_run_tf_function=False)
    model.fit(dataset, steps_per_epoch=1, epochs=1, callbacks=None, verbose=0)  # makes the variables
    state = hvd.elastic.KerasState(model, batch=0, epoch=0)

    def on_state_reset():
        state.model.optimizer.lr.assign(0.001 * hvd.size())

    state.register_reset_callbacks([on_state_reset])
    seen = []

    class Seen(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append((state.epoch, state.batch))

    callbacks = [
        hvd.callbacks.MetricAverageCallback(),
        hvd.elastic.UpdateEpochStateCallback(state),
        hvd.elastic.UpdateBatchStateCallback(state),
        hvd.elastic.CommitStateCallback(state, batches_per_commit=2),
        Seen(),
    ]
    if hvd.rank() == 0:
        callbacks.append(keras.callbacks.ModelCheckpoint(os.path.join(folder, "elastic-{epoch}.h5")))

    @hvd.elastic.run
    def train(state):
        state.model.fit(dataset, steps_per_epoch=4, epochs=2 - state.epoch, callbacks=callbacks, verbose=0)

    train(state)
    assert seen == [(epoch, batch) for epoch in range(2) for batch in range(4)], seen
    assert (state.epoch, state.batch) == (2, 0)
    committed = model.get_weights()
    for weight in model.weights:
        weight.assign(weight + 1.0)
    state.restore()
    for one, other in zip(model.get_weights(), committed, strict=True):
        np.testing.assert_array_equal(one, other)
    on_state_reset()
    return model.get_weights()
