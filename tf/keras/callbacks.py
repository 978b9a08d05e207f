"""Horovod's Keras callbacks for Keras 3, and one that tells when replicas drift apart."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable
from typing import Any

import horovod.tensorflow as horovod
import keras
import tensorflow as tf
from horovod.tensorflow.keras.callbacks import *  # noqa: F403

from hvd_ext import checks
from hvd_ext.horovod_api import aliases
from hvd_ext.reporting.tensorboard import log_report, scalars
from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.consistency.replicas import assert_replicas_equal
from hvd_ext.tensorflow.keras_hooks import require_tensorflow_backend, wrapper_of
from hvd_ext.tensorflow.variables import as_tf, broadcast_variables

__all__ = [
    "AssertReplicasEqualCallback", "BestModelCheckpoint", "BroadcastGlobalVariablesCallback",
    "LearningRateScheduleCallback", "LearningRateWarmupCallback", "MetricAverageCallback", "ReportCallback",
]


class BroadcastGlobalVariablesCallback(keras.callbacks.Callback):
    """Copies the model's weights and the optimizer's variables from one rank to all.

    Before the first step when they exist by then, as they do in ``model.fit``, else after it.
    Seeds of random layers are left alone, so that ranks drop out different units.

    Args:
        root_rank: the rank to copy from.
        device: where to run the broadcasts.
        local_variables: variables that keep their values on each rank.
    """

    def __init__(self, root_rank: int, device: str = "", local_variables: Any = None) -> None:
        super().__init__()
        require_tensorflow_backend(type(self).__name__)
        self.root_rank = root_rank
        self.device = device
        self.broadcast_done = False
        self._local: set[int] = set()
        if isinstance(local_variables, tf.Variable | keras.Variable):
            local_variables = [local_variables]
        for variable in local_variables or ():
            if not isinstance(variable, tf.Variable | keras.Variable):
                raise ValueError(f"local_variables must be variables, got {variable!r}")
            self.register_local_var(variable)

    def register_local_var(self, variable: Any) -> None:
        """Leave a variable alone."""
        self._local.add(id(as_tf(variable)))

    def on_train_begin(self, logs: Any = None) -> None:
        if self.model.built:
            if not self.model.optimizer.built:
                self.model.optimizer.build(self.model.trainable_variables)
            self._broadcast()
        self._tell_reducer()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._broadcast()

    def _tell_reducer(self) -> None:
        """Say whether weights may still differ by rank."""
        wrapper = wrapper_of(self.model.optimizer)
        if wrapper is not None:
            wrapper.reducer.expect_broadcast(not self.broadcast_done)

    def _broadcast(self) -> None:
        if self.broadcast_done:
            return
        everything = [*self.model.weights, *self.model.optimizer.variables]
        with tf.device(self.device):
            broadcast_variables([one for one in everything if id(as_tf(one)) not in self._local],
                                root_rank=self.root_rank)
        self.broadcast_done = True
        self._tell_reducer()


class MetricAverageCallback(keras.callbacks.Callback):
    """Averages each epoch's metrics over the ranks, for callbacks that come after it in the list."""

    def __init__(self, device: str = "") -> None:
        super().__init__()
        require_tensorflow_backend(type(self).__name__)
        self.device = device
        self._collectives = Collectives(device_dense=device)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if not logs:
            return
        names = sorted(logs)
        by_rank = self._collectives.allgather_object(
            {name: float(logs[name]) for name in names}, "MetricAverageCallback")
        if any(sorted(rank) != names for rank in by_rank):
            shown = "; ".join(f"rank {number}: {', '.join(sorted(rank))}"
                             for number, rank in enumerate(by_rank))
            raise ValueError("the ranks have different metrics to average (" + shown + "); give "
                             "validation_data and metrics on every rank")
        for name in names:
            logs[name] = sum(rank[name] for rank in by_rank) / len(by_rank)


class LearningRateScheduleCallback(keras.callbacks.Callback):
    """Sets the learning rate to ``initial_lr * multiplier`` in a range of epochs.

    Args:
        initial_lr: the learning rate that ``multiplier`` scales.
        multiplier: a number, raised to the epochs since ``start_epoch``, or a function of the
            epoch; of a fractional epoch unless ``staircase``.
        start_epoch: the first epoch of the range.
        end_epoch: the first epoch after it, or None.
        staircase: change at the start of an epoch rather than of every batch.
        momentum_correction: when the learning rate changes by a factor, scale the momentum
            buffers of SGD and RMSprop by it too (Goyal et al. 2017, section 3.1); those of other
            optimizers do not contain it.
        steps_per_epoch: batches in an epoch, where Keras cannot tell.
    """

    def __init__(self, initial_lr: float, multiplier: float | Callable[[float], float],
                 start_epoch: int = 0, end_epoch: int | None = None, staircase: bool = True,
                 momentum_correction: bool = True, steps_per_epoch: int | None = None) -> None:
        super().__init__()
        require_tensorflow_backend(type(self).__name__)
        if initial_lr is None:
            raise ValueError("initial_lr is required: the learning rate that is scaled")
        self.initial_lr = checks.check_float("initial_lr", initial_lr, low=0.0)
        self.multiplier = multiplier if callable(multiplier) else (
            lambda epoch: multiplier ** (epoch - start_epoch))
        self.start_epoch = start_epoch
        self.end_epoch = end_epoch
        self.staircase = staircase
        self.momentum_correction = momentum_correction
        self.steps_per_epoch = steps_per_epoch
        self.current_epoch = 0

    def on_train_begin(self, logs: Any = None) -> None:
        if not self.staircase and not self.steps_per_epoch:
            self.steps_per_epoch = self.params.get("steps")
            if not self.steps_per_epoch:
                raise ValueError(f"Keras does not know the number of batches in an epoch; give "
                                 f"steps_per_epoch to {type(self).__name__}")

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.current_epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        after = self.end_epoch is not None and self.current_epoch >= self.end_epoch
        if self.current_epoch < self.start_epoch or after:
            return
        if self.staircase and batch == 0:
            self._adjust_rate(self.current_epoch)
        elif not self.staircase:
            self._adjust_rate(self.current_epoch + batch / self.steps_per_epoch)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if logs is not None:
            logs["lr"] = float(self.model.optimizer.learning_rate)

    def _adjust_rate(self, epoch: float) -> None:
        optimizer = self.model.optimizer
        before = float(optimizer.learning_rate)
        after = self.initial_lr * self.multiplier(epoch)
        optimizer.learning_rate = after
        if self.momentum_correction and before > 0.0 and after != before:
            for buffer in _momentum_buffers(optimizer):
                buffer.assign(buffer * (after / before))


class LearningRateWarmupCallback(LearningRateScheduleCallback):
    """Raises the learning rate from ``initial_lr / hvd.size()`` to ``initial_lr``, batch by batch.

    Goyal et al. 2017, "Accurate, Large Minibatch SGD", section 2.2.

    Args:
        initial_lr: the learning rate at the end of the warm-up.
        warmup_epochs: its length in epochs.
        momentum_correction: as for ``LearningRateScheduleCallback``.
        steps_per_epoch: as for ``LearningRateScheduleCallback``.
        verbose: 1 to print a line on rank 0 at the end.
    """

    def __init__(self, initial_lr: float, warmup_epochs: float = 5,
                 momentum_correction: bool = True, steps_per_epoch: int | None = None,
                 verbose: int = 0) -> None:
        checks.check_float("warmup_epochs", warmup_epochs, low=0.0, open_low=True)

        def multiplier(epoch: float) -> float:
            # The batch that is about to begin counts, so that the last one meets initial_lr.
            epoch += 1.0 / self.steps_per_epoch
            return (epoch * (horovod.size() - 1) / warmup_epochs + 1) / horovod.size()

        super().__init__(initial_lr, multiplier, start_epoch=0, end_epoch=warmup_epochs,
                         staircase=False, momentum_correction=momentum_correction,
                         steps_per_epoch=steps_per_epoch)
        self.verbose = verbose

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        super().on_epoch_end(epoch, logs)
        if epoch == self.end_epoch - 1 and self.verbose > 0 and horovod.rank() == 0:
            rate = float(self.model.optimizer.learning_rate)
            print(f"\nEpoch {epoch + 1}: finished gradual learning rate warmup to {rate:g}.")


class BestModelCheckpoint(keras.callbacks.ModelCheckpoint):
    """``keras.callbacks.ModelCheckpoint`` of the best model; set its ``filepath`` before training.

    The arguments are those of ``ModelCheckpoint``, in the order of ``horovod.tensorflow.keras`` or, where the
    third is a mode, in that of ``horovod.keras``: monitor, verbose, mode, save_freq.

    Raises:
        ValueError: when training begins without a ``filepath``.
    """

    def __init__(self, monitor: str = "val_loss", verbose: int = 0, save_weights_only: bool | str = False,
                 mode: Any = "auto", save_freq: Any = "epoch") -> None:
        if isinstance(save_weights_only, str):
            if mode != "auto":
                save_freq = mode
            save_weights_only, mode = False, save_weights_only
        super().__init__("best.weights.h5" if save_weights_only else "best.keras", monitor=monitor,
                         verbose=verbose, save_best_only=True, save_weights_only=save_weights_only,
                         mode=mode, save_freq=save_freq)
        self.filepath = None  # Keras 3 takes none, Horovod's class leaves it open

    def on_train_begin(self, logs: Any = None) -> None:
        if self.filepath is None:
            raise ValueError("BestModelCheckpoint has no file: set its filepath, to a name that ends in "
                             ".keras or .h5 (.weights.h5 with save_weights_only), before training")
        super().on_train_begin(logs)


class AssertReplicasEqualCallback(keras.callbacks.Callback):
    """Stops training with an error on every rank as soon as the replicas are not the same bits.

    Args:
        batches: check after every so many batches; None for the end of each epoch only.
        statistics: as for :func:`hvd_ext.tensorflow.assert_replicas_equal`.
        optimizer: compare the optimizer's variables too.
    """

    def __init__(self, batches: int | None = None, *, statistics: bool = False,
                 optimizer: bool = True) -> None:
        super().__init__()
        require_tensorflow_backend(type(self).__name__)
        self.batches = None if batches is None else checks.check_int("batches", batches, low=1)
        self.statistics = checks.check_bool("statistics", statistics)
        self.optimizer = checks.check_bool("optimizer", optimizer)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.batches is not None and (batch + 1) % self.batches == 0:
            self._check_replicas()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._check_replicas()

    def _check_replicas(self) -> None:
        assert_replicas_equal(self.model, statistics=self.statistics,
                              optimizer=self.model.optimizer if self.optimizer else None)


class ReportCallback(keras.callbacks.Callback):
    """Writes the figures of ``optimizer.report()`` for TensorBoard: bytes, steps skipped, residuals.

    The figures are of one rank and of its last step, with ``hvd_ext/`` before their names; what each
    extension has is on its page. Only ranks that have this callback write.

    Args:
        writer: a folder, in which each rank writes into ``rank<R>``; a writer of ``tf.summary``; or
            anything with ``add_scalar(tag, value, step)``.
        batches: write after every so many batches; None for the end of each epoch.
        prefix: what comes before the names.

    Raises:
        TypeError: ``writer`` is nothing of that, or the model's optimizer is not distributed.
        ModuleNotFoundError: TensorFlow cannot write without TensorBoard, which is not installed.
    """

    def __init__(self, writer: Any, *, batches: int | None = None, prefix: str = "hvd_ext") -> None:
        super().__init__()
        require_tensorflow_backend(type(self).__name__)
        self.batches = None if batches is None else checks.check_int("batches", batches, low=1)
        self.prefix = prefix
        self._own = isinstance(writer, (str, os.PathLike))
        if not (self._own or isinstance(writer, tf.summary.SummaryWriter)
                or callable(getattr(writer, "add_scalar", None))):
            raise TypeError("writer must be a folder, a writer of tf.summary, or have add_scalar(tag, "
                            f"value, step); got {writer!r}")
        if (self._own or isinstance(writer, tf.summary.SummaryWriter)) \
                and importlib.util.find_spec("tensorboard") is None:
            raise ModuleNotFoundError("ReportCallback writes for TensorBoard, which is not installed: "
                                      "pip install tensorboard, or pass a writer with add_scalar(tag, "
                                      "value, step)")
        self._writer = writer

    def on_train_begin(self, logs: Any = None) -> None:
        if not callable(getattr(self.model.optimizer, "report", None)):
            raise TypeError(f"the optimizer {self.model.optimizer.name!r} has no report(): compile the "
                            "model with a hvd.DistributedOptimizer, or leave ReportCallback out")
        if self._own:
            folder = os.path.join(self._writer, f"rank{horovod.rank()}")
            self._writer, self._own = tf.summary.create_file_writer(folder), False

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.batches is not None and (batch + 1) % self.batches == 0:
            self._write_report()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self.batches is None:
            self._write_report()

    def on_train_end(self, logs: Any = None) -> None:
        if callable(getattr(self._writer, "flush", None)):
            self._writer.flush()

    def _write_report(self) -> None:
        optimizer = self.model.optimizer
        step = int(optimizer.iterations)
        if not isinstance(self._writer, tf.summary.SummaryWriter):
            log_report(self._writer, optimizer, step, prefix=self.prefix)
            return
        with self._writer.as_default():
            for name, value in scalars(optimizer.report(), self.prefix).items():
                tf.summary.scalar(name, value, step=step)


def _momentum_buffers(optimizer: Any) -> Iterable[Any]:
    """The momentum buffers of SGD and RMSprop, which hold steps and so carry the learning rate.

    Those of other optimizers hold gradients (Muon, Adam): they stay as they are.
    """
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if not isinstance(optimizer, keras.optimizers.SGD | keras.optimizers.RMSprop):
        return ()
    if not optimizer.momentum or not optimizer.built:
        return ()
    buffers = optimizer.momentums if isinstance(optimizer, keras.optimizers.SGD) else optimizer._momentums
    return [buffer for buffer in buffers if buffer is not None]


__getattr__ = aliases.module_getattr(__name__, "horovod.tensorflow.keras.callbacks")
