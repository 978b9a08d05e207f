"""Copies of a distributed optimizer: from its configuration, pickled, deep copied; alone or with its model.

Each is distributed again, with the same settings and state. What cannot be is an error that says what to do.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import horovod.tensorflow as horovod
import keras
import numpy as np
from keras.src.saving import saving_lib

from hvd_ext.tensorflow.keras_hooks import distributed_part
from hvd_ext.tensorflow.persistence import keras_checkpoint_layout


class Config(dict):
    """The wrapped optimizer's configuration, which files hold, with the settings beside it."""

    optimizer: Any = None


def config_of(optimizer: Any, config: dict[str, Any]) -> Config:
    """The configuration of a distributed optimizer, from that of the wrapped one."""
    found = Config(config)
    found.optimizer = optimizer
    return found


def from_config(kind: type, config: dict[str, Any], make: Callable[[dict[str, Any]], Any]) -> Any:
    """A distributed optimizer from a configuration that one gave.

    Raises:
        ValueError: the configuration says nothing of how gradients are reduced.
    """
    if not isinstance(config, Config):
        raise ValueError(
            f"{kind.__name__}.from_config of a distributed optimizer's class with a configuration that does "
            "not say how gradients are reduced: it would train each rank alone. Wrap a plain one, "
            f"hvd.DistributedOptimizer(keras.optimizers.{kind.__name__}.from_config(config))")
    from hvd_ext.tensorflow.optimizer import KerasDistributedOptimizer

    return KerasDistributedOptimizer(make(config), **settings_of(config.optimizer, "from_config"))


def settings_of(optimizer: Any, what: str) -> dict[str, Any]:
    """The arguments of ``DistributedOptimizer`` that a copy is made with.

    Raises:
        ValueError: some of them belong to this optimizer alone.
    """
    settings, wrapper = dict(optimizer._hvd_ext.given), optimizer._hvd_ext
    alone = [text for text, there in (
        ("preconditioner=", settings["preconditioner"] is not None), ("local variables", bool(wrapper.local)),
        ("process_set=", settings["process_set"] is not horovod.global_process_set)) if there]
    if alone:
        raise ValueError(
            f"{what} of an optimizer with {' and '.join(alone)}, which a copy cannot take over: copy the "
            "model with keras.models.clone_model and set_weights, and wrap an optimizer of its own with "
            "hvd.DistributedOptimizer")
    del settings["process_set"]
    return settings


def reduce_optimizer(optimizer: Any) -> tuple[Any, ...]:
    """What ``pickle`` and ``copy`` make a distributed optimizer from."""
    kind = type(optimizer).__bases__[1]
    values = [keras_checkpoint_layout.Saved(one.path, np.array(one)) for one in optimizer.variables] \
        if optimizer.built else None
    return _rebuild_optimizer, (kind, dict(optimizer.get_config()), settings_of(optimizer, "a copy"), values)


def _rebuild_optimizer(kind: Any, config: dict[str, Any], settings: dict[str, Any],
                       values: list[Any] | None) -> Any:
    from hvd_ext.tensorflow.optimizer import KerasDistributedOptimizer

    optimizer = KerasDistributedOptimizer(kind.from_config(config), **settings)
    if values is not None:  # taken when it is built
        optimizer.set_weights(values)
    return optimizer


@functools.cache
def install_copies() -> None:
    """Let copies of models with a distributed optimizer have one too. Does nothing when called again."""
    reduce = keras.Model.__reduce__

    @functools.wraps(reduce)
    def reduce_model(self: Any) -> Any:
        optimizer = distributed_part(getattr(self, "optimizer", None))
        made, arguments = reduce(self)
        if optimizer is None or self.optimizer is None:
            return made, arguments
        return _load_copy, (*arguments, type(optimizer).__bases__[1], settings_of(optimizer, "a copy"))

    keras.Model.__reduce__ = reduce_model
    trainer = next(kind for kind in keras.Model.__mro__ if "compile_from_config" in kind.__dict__)
    get_compile_config, compile_from_config = trainer.get_compile_config, trainer.compile_from_config

    @functools.wraps(get_compile_config)
    def get_config_and_optimizer(self: Any) -> Any:
        optimizer, config = distributed_part(getattr(self, "optimizer", None)), get_compile_config(self)
        return config if optimizer is None else config_of(optimizer, config)

    @functools.wraps(compile_from_config)
    def compile_distributed(self: Any, config: Any) -> None:
        if not isinstance(config, Config):
            compile_from_config(self, config)
            return
        try:
            settings = settings_of(config.optimizer, "a copy")
        except ValueError as error:
            warnings.warn(f"the copy of the model is not compiled: {error}", stacklevel=3)
            return
        with _distributed_class(settings, type(config.optimizer).__bases__[1]) as objects, \
                keras.saving.custom_object_scope(objects):
            compile_from_config(self, dict(config))

    trainer.get_compile_config = get_config_and_optimizer  # keras.models.clone_model calls both
    trainer.compile_from_config = compile_distributed


def _distributed_class(settings: dict[str, Any], kind: type) -> Any:
    from hvd_ext.tensorflow.keras.load import distributing_optimizers

    return distributing_optimizers(settings, [kind])


def _load_copy(file: Any, kind: type, settings: dict[str, Any]) -> Any:
    with _distributed_class(settings, kind) as objects:
        return saving_lib._load_model_from_fileobj(
            file, custom_objects=objects, compile=True, safe_mode=False)
