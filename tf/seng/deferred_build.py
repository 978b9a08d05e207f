"""When SENG finds a model's layers: at once, or at the first batch of a model that is not built yet."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import horovod.tensorflow as horovod
import keras
import tensorflow as tf

from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.seng.sample_axes import SampleAxisTracker
from hvd_ext.tensorflow.variables import as_tf, create_without_lifting


class NullCollectives(Collectives):
    """One rank, in a process where Horovod is not initialised."""

    size = 1
    rank = 0
    is_elastic = False

    def if_distributed(self, communicate: Callable[[], Any], alone: Callable[[], Any]) -> Any:
        return alone()


def own_collectives() -> Collectives:
    """Those of all ranks, or of this one where Horovod is not initialised."""
    return Collectives() if horovod.is_initialized() else NullCollectives()


class DeferredBuild:
    """Wraps the model's ``call``, so that the batch is known in it, and begins when there are layers.

    Where these have their samples is found out at once where the model's input is described, else from what
    the model is first called with.

    Args:
        begin: takes the layers of the built model.
        found: called when it is known at once where they have their samples.
    """

    def __init__(self, model: keras.Model, samples: SampleAxisTracker, begin: Callable[[keras.Model], None],
                 found: Callable[[], None]) -> None:
        self.model = model
        self.done = False
        self._samples = samples
        self._busy = False
        self._probed = False
        self._begin = begin
        if "call" in model.__dict__:
            raise ValueError(f"the model {model.name!r} is tapped already: one SENG a model; call close() "
                             "on the other one first")
        if self._is_built():
            self._start_now()
            given = getattr(model, "_inputs_struct", None)  # as the model's call takes them
            if given is None:
                given = getattr(model, "inputs", None)
                given = given[0] if given and len(given) == 1 else given
            if given is not None and tf.executing_eagerly():
                self._probe_samples(given)
            if self._probed:
                found()
        call = samples.wrap_call(model.call)

        @functools.wraps(model.call)
        def started(*args: Any, **kwargs: Any) -> Any:
            if not self.done and not self._busy:
                self._build_layers(*args, **kwargs)
            if self.done and not self._probed and not self._busy:
                self._probe_samples(*args, **kwargs)
                self._probed = True  # once is enough
            return call(*args, **kwargs)

        object.__setattr__(model, "call", started)

    def restore_call(self) -> None:
        """Give the model its own ``call`` back."""
        self.model.__dict__.pop("call", None)

    def _is_built(self) -> bool:
        """Whether all layers have their weights, which Keras may put off until it knows all shapes."""
        return self.model.built and all(layer.built for layer in self.model._flatten_layers()) and all(
            isinstance(as_tf(weight), tf.Variable) for weight in self.model.weights)

    def _build_layers(self, *args: Any, **kwargs: Any) -> None:
        """Let the layers make their weights, which a subclassed model's do when they are first called."""
        if not all(layer.built for layer in self.model._flatten_layers(include_self=False)):
            def shape_of(given: Any) -> Any:
                return keras.KerasTensor(given.shape, given.dtype.name) if tf.is_tensor(given) else given

            self._busy = True
            try:
                keras.Operation.compute_output_spec(
                    self.model, *keras.tree.map_structure(shape_of, args),
                    **keras.tree.map_structure(shape_of, kwargs))
            finally:
                self._busy = False
        if self._is_built():
            self._start_now()

    def _probe_samples(self, *args: Any, **kwargs: Any) -> None:
        """See where the layers have their samples; later again, of another call, if that did not work."""
        self._busy = True
        try:
            self._probed = self._samples.run_probe(self.model, args, kwargs)
        finally:
            self._busy = False

    def _start_now(self) -> None:
        self.done = True
        try:
            with create_without_lifting():
                self._begin(self.model)
        except BaseException:
            self.done = False
            raise
