"""``load_model``: a saved model with its optimizer distributed again."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import horovod.tensorflow as horovod
import keras

from hvd_ext.tensorflow.amsgrad import AMSGrad
from hvd_ext.tensorflow.keras_hooks import distributed_part, require_tensorflow_backend
from hvd_ext.tensorflow.optimizer import KerasDistributedOptimizer


def load_model(filepath: Any, custom_optimizers: Iterable[type] | None = None,
               custom_objects: dict[str, Any] | None = None,
               compression: Any = horovod.Compression.none, legacy_opts: bool = False,
               *, compile: bool = True, safe_mode: bool = True, **options: Any) -> Any:
    """Load a Keras model whose optimizer continues with its state, reducing gradients.

    Args:
        filepath: what ``keras.models.load_model`` takes.
        custom_optimizers: optimizer classes of one's own that the file may hold.
        custom_objects: further classes and functions by name.
        compression: as for ``DistributedOptimizer``.
        legacy_opts: must be False; Keras 3 has no legacy optimizers.
        compile: as ``keras.models.load_model`` takes it.
        safe_mode: as ``keras.models.load_model`` takes it.
        options: further arguments of ``DistributedOptimizer``. Give those that the saved
            optimizer was made with: their state is in the file.

    Raises:
        ValueError: ``legacy_opts`` is True.
        TypeError: ``DistributedOptimizer`` has no such argument.
    """
    require_tensorflow_backend("hvd.load_model")
    if legacy_opts:
        raise ValueError("legacy_opts=True: Keras 3 has no legacy optimizers; leave it out")
    unknown = set(options) - set(inspect.signature(KerasDistributedOptimizer).parameters)
    if unknown:
        raise TypeError(f"hvd.load_model has no argument {', '.join(sorted(unknown))}: it takes those of "
                        "keras.models.load_model and of hvd.DistributedOptimizer")
    with distributing_optimizers({"compression": compression, **options}, custom_optimizers) as wrapped:
        model = keras.models.load_model(filepath, custom_objects={**wrapped, **(custom_objects or {})},
                                        compile=compile, safe_mode=safe_mode)
    optimizer = distributed_part(getattr(model, "optimizer", None))  # none with compile=False
    if getattr(optimizer, "built", True) is False:  # an .h5 file: Keras built it without variables
        optimizer.build(model.trainable_variables)
    return model


@contextlib.contextmanager
def distributing_optimizers(options: dict[str, Any], custom_optimizers: Iterable[type] | None = None
                            ) -> Iterator[dict[str, type]]:
    """Optimizers that are read from files until the block ends are distributed with ``options``.

    Yields:
        what Keras is to take for ``custom_objects``.
    """
    known = {name: kind for name, kind in vars(keras.optimizers).items()
             if isinstance(kind, type) and issubclass(kind, keras.Optimizer)
             and kind not in (keras.Optimizer, keras.optimizers.LossScaleOptimizer)}
    known.update({keras.saving.get_registered_name(kind): kind
                  for kind in (AMSGrad, *(custom_optimizers or ()))})
    wrapped = {name: _distributed_class(kind, options) for name, kind in known.items()}
    wrapped.update({name.lower(): kind for name, kind in wrapped.items()})  # as Keras reads .h5 files
    # Classes that are registered come before custom_objects: theirs are exchanged while loading.
    registered = keras.saving.get_custom_objects()
    before = dict(registered)
    registered.update({name: kind for name, kind in wrapped.items() if name in before})
    try:
        yield wrapped
    finally:
        registered.clear()
        registered.update(before)


def _distributed_class(kind: type, options: dict[str, Any]) -> type:
    """A stand-in for ``kind`` while a file is read, whose ``from_config`` distributes."""

    class FromFile(kind):  # type: ignore[misc, valid-type]
        @classmethod
        def from_config(cls, config: dict[str, Any], **arguments: Any) -> Any:
            return KerasDistributedOptimizer(kind.from_config(config, **arguments), **options)

    FromFile.__name__ = kind.__name__
    return FromFile
