"""Where SENG takes its per-sample gradients: an identity between a layer's linear part and activation.

The gradient of that identity, on refresh steps only, adds this use's per-sample gradients to the
layer's U, or its columns to the layer's factors. Models stay what they are: nothing of their
structure, weights or config changes. What is added is traced once for all layers of a kind.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow.python.saved_model.save_context import in_save_context

from hvd_ext.seng import Settings
from hvd_ext.seng.sample_axes import CONSTANT, CONTIGUOUS, STRIDED
from hvd_ext.tensorflow.gradient_registry import release_with_graph
from hvd_ext.tensorflow.seng.kernels import choose_samples
from hvd_ext.tensorflow.seng.layer_discovery import Layer
from hvd_ext.tensorflow.seng.rules import Factors, Pick, Rows
from hvd_ext.tensorflow.seng.sample_axes import SampleAxisTracker, axis_first, group_rows, regroup_result
from hvd_ext.tensorflow.seng.shared_functions import SharedFunctions, read_handle, write_handle


def assign_any_shape(variable: tf.Variable, value: tf.Tensor) -> None:
    """Assign to a variable whose shape may change, which graphs must not take from one assignment.

    TensorFlow's optimizer of graphs infers the shape of every read from the values assigned.
    """
    if tf.executing_eagerly():
        variable.assign(value)
        return
    shape = tf.shape(value) + _zero_counter().read_value()  # known when it runs, and not before
    variable.assign(tf.ensure_shape(tf.reshape(value, shape), variable.shape))


@functools.cache
def _zero_counter() -> tf.Variable:
    with tf.init_scope():
        return tf.Variable(0, trainable=False)


class Captured:
    """What a pass gave a layer, scaled as in SENG eq. 5, until the refresh takes it.

    ``u`` (rho, n) are per-sample gradients, of an implicit layer those of the weights that its
    factors ``g`` (rho, groups, kappa, n_G) and ``a`` (rho, groups, kappa, n_A) do not stand for; of
    an embedding ``a`` (rho, 1, kappa, 1) are the numbers of the rows, int64. ``at`` is the pass they
    belong to: a layer that is used several times adds up. It is ``-2 - pass`` when the uses had
    different numbers of samples, or rows that do not belong to samples as they should.
    """

    def __init__(self, layer: Layer) -> None:
        groups, n_g, n_a = layer.groups or (1, 0, 0)
        rest = sum(layer.sizes[layer.together:])
        self.least = 1 << 30  # what kappa is at least
        self.taps = 0
        numbers = tf.int64 if layer.registered.rows else layer.dtype
        with tf.init_scope():
            self.u = self._empty_variable((0, rest), layer.dtype)
            self.g = self._empty_variable((0, groups, 0, n_g), layer.dtype)
            self.a = self._empty_variable((0, groups, 0, n_a), numbers)
            self.at = tf.Variable(-1, dtype=tf.int64, trainable=False)
            self.samples = tf.Variable(0, trainable=False)

    @staticmethod
    def _empty_variable(now: tuple[int, ...], dtype: tf.DType) -> tf.Variable:
        # Of one shape for all layers, so that they share functions.
        return tf.Variable(tf.zeros(now, dtype), trainable=False, shape=[None] * len(now))

    @property
    def held(self) -> list[tf.Variable]:
        """What is freed after a refresh; which pass it was stays known."""
        return [self.u, self.g, self.a]


    def read_handles(self, u: tf.Tensor, g: tf.Tensor, a: tf.Tensor) -> list[tf.Tensor]:
        """What is behind the handles of ``held``, of this or a layer of the same kind."""
        return [read_handle(handle, one.dtype, one.shape)
                for handle, one in zip((u, g, a), self.held, strict=True)]


class Capture:
    """Taps layers.

    Attributes:
        wanted: whether this pass is captured.
        number: which pass this is.
        unused: with a tape, whether the last pass was captured, the updates + 1 that there were when its
            gradients were reduced, and the updates that there are.

    Args:
        step: the optimizer's step, from which samples are chosen.
        scale: gives the factor of mixed precision in the loss of the pass that is under way.
        samples: the batch of the pass that is under way, and where layers have it.
    """

    def __init__(self, settings: Settings, step: tf.Variable, scale: Callable[[], Any],
                 traces: SharedFunctions, samples: SampleAxisTracker) -> None:
        self.settings = settings
        self._step = step
        self._scale = scale
        self._traces = traces
        self.samples = samples
        self.of: dict[Layer, Captured] = {}
        self.unused: tuple[tf.Variable, ...] = ()
        with tf.init_scope():
            self.wanted = tf.Variable(True, trainable=False, name="wanted")
            self.number = tf.Variable(0, dtype=tf.int64, trainable=False, name="pass")

    def capture_layers(self, layers: list[Layer]) -> None:
        """Capture these layers from the next forward pass on.

        Raises:
            ValueError: another SENG captures one of them.
        """
        for layer in layers:
            self.of[layer] = Captured(layer)
            for one in layer.owners:
                self._wrap_call(layer, one)

    def restore_calls(self) -> None:
        """Give the layers their own ``call`` back."""
        for layer in self.of:
            for one in layer.owners:
                one.__dict__.pop("call", None)

    def _wrap_call(self, layer: Layer, inside: Any) -> None:
        if "call" in inside.__dict__:
            raise ValueError(f"the layer {inside.path} is tapped already: one SENG a model; call "
                             "close() on the other one first")
        call = inside.call

        @functools.wraps(call)
        def tapped(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            context = layer.registered.context
            given = () if context is None else context(inside, kwargs.get("training") is True)
            if not layer.registered.activation:
                return self._tapped_identity(layer, inside, inputs, call(inputs, *args, **kwargs), given)
            activation = inside.activation

            def after_the_tap(z: Any) -> Any:
                z = self._tapped_identity(layer, inside, inputs, z, given)
                return z if activation is None else activation(z)

            # Only while this call runs, so that the layer's config names its own activation.
            object.__setattr__(inside, "activation", after_the_tap)
            try:
                return call(inputs, *args, **kwargs)
            finally:
                object.__setattr__(inside, "activation", activation)

        object.__setattr__(inside, "call", tapped)

    @tf.autograph.experimental.do_not_convert
    def _tapped_identity(self, layer: Layer, inside: Any, x: Any, z: Any, given: tuple[Any, ...]) -> Any:
        if not tf.is_tensor(z) or isinstance(z, tf.RaggedTensor) or isinstance(x, tf.SparseTensor):
            return z  # Keras is working out shapes; or there is no rule
        x = tf.stop_gradient(tf.convert_to_tensor(x))
        if self.samples.record_input(layer, x) or layer.samples == CONSTANT:
            return z
        batch = self._batch_for(layer)
        self.of[layer].taps += 1

        @tf.custom_gradient
        def tap(z: tf.Tensor) -> tuple[tf.Tensor, Any]:
            def gradient(gz: tf.Tensor) -> tf.Tensor:
                if in_save_context():  # a SavedModel takes the gradient along, and must not capture here
                    return gz
                self._store_use(layer, inside, x, gz, given, batch)
                return gz

            return tf.identity(z), gradient

        return release_with_graph(tap(z))

    def _batch_for(self, layer: Layer) -> tf.Tensor | None:
        """The samples of the pass under way, for a layer whose rows cannot be told apart without."""
        if layer.samples not in (CONTIGUOUS, STRIDED):
            return None
        batch = self.samples.current_samples()
        if batch is None:
            raise ValueError(f"the batch of which {layer.name} has {layer.samples} rows is not known; call "
                             "the model that SENG was given, not its parts, or give samples= a function")
        return batch

    def _store_use(self, layer: Layer, inside: Any, x: tf.Tensor, gz: tf.Tensor,
                   given: tuple[Any, ...], batch: Any) -> None:
        captured, registered = self.of[layer], layer.registered
        if x.dtype.is_floating:
            x = tf.cast(x, layer.dtype)
        gz = tf.stop_gradient(tf.cast(gz, layer.dtype))
        # No constants go in and nothing comes out: TensorFlow would make a function of its own of each call.
        scale = self._scale()
        varies = tf.is_tensor(scale) or isinstance(scale, tf.Variable)
        changing = [tf.cast(tf.convert_to_tensor(scale), gz.dtype)] if varies else []
        changing += [] if batch is None else [batch]
        shapes: list[Any] = [None, None]
        alike: Any = id(inside)
        if registered.alike is not None:
            alike, loose = registered.alike(inside)
            shapes = [[None, *one.shape[1:-1], None if loose else one.shape[-1]][:len(one.shape)]
                      for one in (x, gz)]
            axis = self._sample_axis(layer)
            if axis:
                shapes = [[one.shape[0], *own[1:axis], None, *own[axis + 1:]]
                          for one, own in zip((x, gz), shapes, strict=True)]
        key = (registered.rule, alike, layer.plan.implicit, layer.together, tuple(layer.weights),
               self._sample_axis(layer), layer.samples if layer.in_rows else None, len(given),
               layer.groups if layer.plan.implicit else None, None if varies else scale, batch is None)
        tensors = [x, gz, self.number, self._step, captured.at, captured.samples, *captured.held, *given,
                   *changing]
        kind = [str(one.shape if shape is None else shape)
                for one, shape in zip((x, gz), shapes, strict=True)]
        said = self._traces.said.setdefault((key, *kind), {})
        shapes += [None] * (len(tensors) - 2)

        def store(*tensors: tf.Tensor) -> tf.Tensor:
            last = list(tensors)
            rows = None if batch is None else last.pop()
            factor = last.pop() if varies else scale
            return self._add_use(layer, inside, said, rows, factor, *last)

        unused = self.unused
        kinds = [one.dtype for one in unused]

        def store_if_wanted(wanted: tf.Tensor, *tensors: tf.Tensor) -> None:
            def now() -> tf.Tensor:
                return self._traces.call_shared(store, ("store", *key), tensors[len(kinds):], shapes=shapes)

            captures = read_handle(wanted, tf.bool, ())
            if kinds:
                last, at, updates = (read_handle(one, kind, ()) for one, kind
                                     in zip(tensors, kinds, strict=False))
                again = tf.logical_and(last, tf.equal(at, tf.cast(updates, at.dtype) + 1))
                captures = tf.logical_or(captures, again)
            tf.cond(captures, now, lambda: tf.constant(False))

        self._traces.call_shared(store_if_wanted, ("tap", len(kinds), *key),
                                 [self.wanted, *unused, *tensors],
                                 shapes=[None] * (1 + len(kinds)) + shapes)
        if layer.plan.implicit:
            captured.least = min(captured.least, said["kappa"])

    def _add_use(self, layer: Layer, inside: Any, said: dict[str, Any], batch: Any, scale: Any, x: tf.Tensor,
                 gz: tf.Tensor, number: tf.Tensor, step: tf.Tensor, at: tf.Tensor, samples: tf.Tensor,
                 u: tf.Tensor, g: tf.Tensor, a: tf.Tensor, *given: tf.Tensor) -> tf.Tensor:
        """Add what a use of a layer gives to what is captured; traced once for a kind of layer.

        ``number`` to ``a`` are handles.
        """
        number, step = read_handle(number, tf.int64, ()), read_handle(step, tf.int64, ())
        scale = tf.cast(scale, gz.dtype) * self.settings.loss_scale
        x, gz = (axis_first(one, self._sample_axis(layer)) for one in (x, gz))
        group = group_rows(layer.samples if layer.in_rows else 0, tf.shape(gz)[0], batch)
        pick, factor = self._sample_selector(gz.dtype, group.samples, scale, step)
        through: Pick = tf.identity if layer.in_rows else pick
        result = layer.registered.rule(inside, x, gz, through, *given)
        if isinstance(result, Factors):
            said["kappa"] = result.g.shape[2] or 1
        if layer.in_rows:
            result = regroup_result(result, group, pick)
        dtype = layer.dtype
        new: list[tuple[tf.Tensor, tf.Tensor, int | None]]
        if isinstance(result, Factors) and layer.plan.implicit:
            new = [(g, result.g * factor, 2), (a, result.a, 2)]
            if layer.together < len(layer.weights):
                new.append((u, _flatten_gradients(layer, result, layer.together) * factor, None))
        elif isinstance(result, Rows):
            said["kappa"] = 0
            new = [(g, result.g[:, None] * factor, 2), (a, result.rows[:, None, :, None], 2)]
        else:
            new = [(u, _flatten_gradients(layer, result, 0) * factor, None)]
        last, kept = read_handle(at, tf.int64), tf.shape(new[0][1])[0]
        again = tf.equal(last, number)
        same = tf.logical_or(tf.logical_not(again), tf.equal(read_handle(samples, tf.int32), kept))
        more = tf.logical_and(again, same)
        for handle, value, axis in new:
            kind = tf.int64 if isinstance(result, Rows) and handle is a else dtype

            def joined(handle: tf.Tensor = handle, value: tf.Tensor = value, kind: tf.DType = kind,
                       axis: int | None = axis) -> tf.Tensor:
                old = read_handle(handle, kind, [None] * len(value.shape))
                return old + value if axis is None else tf.concat([old, value], axis)

            write_handle(handle, tf.cond(more, joined, functools.partial(tf.identity, value)))
        spoiled = tf.logical_or(tf.logical_not(tf.logical_and(same, group.fits)), tf.equal(last, -2 - number))
        write_handle(samples, kept)
        write_handle(at, tf.where(spoiled, -2 - number, number))
        return tf.constant(True)

    def _sample_axis(self, layer: Layer) -> int:
        """The axis of the samples, or of their rows, in the layer's input."""
        if layer.samples is None:
            return self.samples.axis
        return layer.samples if isinstance(layer.samples, int) else 0

    def _sample_selector(self, dtype: tf.DType, samples: tf.Tensor, scale: tf.Tensor, step: tf.Tensor
                         ) -> tuple[Pick, tf.Tensor]:
        """Keeps the chosen samples, and what gz is multiplied with to give ``G_i / sqrt(rho)``."""
        settings, kept, chosen = self.settings, samples, None
        if settings.subsample is not None:
            chosen = choose_samples(samples, settings, step)
            kept = tf.shape(chosen)[0]

        def pick(tensor: tf.Tensor) -> tf.Tensor:
            return tensor if chosen is None else tf.gather(tensor, chosen)

        whole = tf.cast(samples, dtype) if settings.loss_reduction == "mean" else 1.0
        return pick, whole / (scale * tf.sqrt(tf.cast(tf.maximum(kept, 1), dtype)))


def _flatten_gradients(layer: Layer, result: Any, first: int) -> tf.Tensor:
    """Per-sample gradients of the weights from number ``first`` on side by side: (rho, n)."""
    if isinstance(result, Factors):
        g, a, kernel = result.g, result.a, layer.registered.kernel
        found = dict(result.rest)
        if kernel in layer.weights and not first:
            product = tf.matmul(a, g, transpose_a=True)  # (rho, groups, n_A, n_G)
            found[kernel] = product if g.shape[1] == 1 else tf.transpose(product, (0, 2, 1, 3))
        if "bias" in layer.weights and "bias" not in found:
            found["bias"] = tf.reduce_sum(g, axis=2)
    else:
        found = result
    parts = [_flatten_rows(found[name]) for name in list(layer.weights)[first:]]
    return parts[0] if len(parts) == 1 else tf.concat(parts, axis=1)


def _flatten_rows(found: tf.Tensor) -> tf.Tensor:
    """(rho, ...) as (rho, n)."""
    shape = tf.shape(found)
    return tf.reshape(found, tf.stack([shape[0], tf.reduce_prod(shape[1:])]))
