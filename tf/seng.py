"""SENG, the sketchy empirical natural gradient, as a preconditioner for Keras models.

``optimizer.py`` and ``tape.py`` call ``precondition`` with the reduced gradients.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import horovod.tensorflow as horovod
import keras
import numpy as np
import tensorflow as tf

from hvd_ext.seng import DEFAULT_SKETCH_SIZE, LayerShape, Settings, plan_layer
from hvd_ext.seng.settings import Damping
from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.keras_hooks import require_tensorflow_backend
from hvd_ext.tensorflow.reduce import Gradient
from hvd_ext.tensorflow.seng_capture import Capture, Layer, find_weights
from hvd_ext.tensorflow.seng_implicit import ImplicitState
from hvd_ext.tensorflow.seng_layers import kernel_matrix, rule_for
from hvd_ext.tensorflow.seng_state import ExplicitState, LayerState
from hvd_ext.tensorflow.variables import as_tf, name_of


class SENG(tf.Module):
    """Replaces gradients by ``p = (U U^T + lam I)^{-1} g`` (SENG eq. 8-9), layer by layer.

    Dense, convolution (1-3 dimensions, grouped, depthwise, transposed), batch, layer and group
    norm layers get their empirical Fisher matrix, any other variable ``g/(1 + lam)``. U is taken
    from the forward and backward pass of every ``update_freq``-th step, in ``model.fit`` as with a
    tape. The loss must be the mean or sum over the rank's batch, the first axis of every layer's
    input, and not be scaled (mixed_float16). Track it in a ``tf.train.Checkpoint`` to keep the
    curvature; without, it is taken anew at the first step.

    Args:
        model: a built Keras model: functional, sequential or subclassed.
        name: prefix of the names in Horovod's timeline; one each when there are several.

    The other arguments are those of :class:`hvd_ext.seng.Settings`; names in ``exclude`` are
    paths of layers.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument outside its limits, a model that is not built or has no layer with
            a rule, or one that another SENG has already.
        NotImplementedError: what only the PyTorch front end has: transposed convolutions of
            ``explicit_threshold`` parameters and more, another ``curvature_dtype`` than float32,
            mixed_float16.
    """

    def __init__(self, model: keras.Model, *, damping: Damping, update_freq: int = 200,
                 coupling: str = "block", uc: str = "factored", explicit_threshold: int = 700_000,
                 sketch: str | None = "uniform", sketch_size: int = DEFAULT_SKETCH_SIZE,
                 replacement: bool = False, rank: int = 16, row_sketch: int = 512,
                 subsample: int | None = None, loss_reduction: str = "mean",
                 loss_scale: float = 1.0, curvature_dtype: str | None = None,
                 exclude: Iterable[str] | None = None, seed: int = 0, name: str = "seng") -> None:
        require_tensorflow_backend("hvd.SENG")
        if not isinstance(model, keras.Model):
            raise TypeError(f"model must be a keras.Model, got {model!r}")
        if isinstance(exclude, str):
            raise TypeError(f"exclude must be a list of layers' paths, got {exclude!r}; pass "
                            f"[{exclude!r}]")
        super().__init__(name=name)
        self.settings = Settings(
            damping=damping, update_freq=update_freq, coupling=coupling, uc=uc,
            explicit_threshold=explicit_threshold, sketch=sketch, sketch_size=sketch_size,
            replacement=replacement, rank=rank, row_sketch=row_sketch, subsample=subsample,
            loss_reduction=loss_reduction, loss_scale=loss_scale, curvature_dtype=curvature_dtype,
            exclude=tuple(exclude or ()), seed=seed)
        if curvature_dtype not in (None, "float32"):
            raise NotImplementedError(f"curvature_dtype={curvature_dtype!r} is not available in "
                                      "the TensorFlow front end; leave it out for float32")
        if model.dtype_policy.name == "mixed_float16":
            raise NotImplementedError(
                "SENG cannot unscale what it captures of a mixed_float16 model in the TensorFlow "
                "front end; use the policy mixed_bfloat16 or float32")
        if not model.built:
            raise ValueError(f"the model {model.name!r} has no weights yet; call it on a batch, or "
                             "model.build(input_shape), before hvd.SENG")
        layers = self._find(model)
        self.states = [self._state_of(layer) for layer in layers]
        self.settings.check_sketch(layer.n for layer in layers if not layer.implicit)
        self.capture = Capture(layers)
        with tf.init_scope():
            self.step = tf.Variable(0, dtype=tf.int64, trainable=False, name="step")
            self.skipped = tf.Variable(0, dtype=tf.int64, trainable=False, name="skipped")
            self._wanted, self._pass = self.capture.wanted, self.capture.step

    def _find(self, model: keras.Model) -> list[Layer]:
        layers, without, seen = [], [], set()
        for layer in model._flatten_layers(include_self=True):
            own = [weight for weight in layer._trainable_variables if weight.trainable]
            if not own or any(layer.path == one or layer.path.startswith(f"{one}/")
                              for one in self.settings.exclude):
                continue
            registered = rule_for(layer)
            weights, picked = ([], []) if registered is None else find_weights(layer, registered)
            ids = {id(as_tf(weight)) for weight in weights}
            if registered is None or not weights or ids & seen or _unusual(layer):
                without.append(f"{layer.path} ({type(layer).__name__})")
                continue
            seen |= ids
            layers.append(Layer(layer, registered, weights, picked))
        if without:
            warnings.warn("SENG has no rule for " + ", ".join(without) + "; their weights get "
                          "g/(1 + damping). Name them in exclude= to agree", stacklevel=3)
        if not layers:
            raise ValueError(
                f"{model.name!r} has no trainable layer that SENG has a rule for (dense, "
                "convolution, batch, layer or group norm); precondition another model, unfreeze "
                "layers, or shorten exclude=")
        return layers

    def _state_of(self, layer: Layer) -> LayerState:
        registered = layer.registered
        groups, n_g, n_a = 1, layer.n, 1
        product = registered.weights[0] == "kernel" and 0 in layer.picked
        if product and registered.product:
            groups, n_g, n_a = kernel_matrix(layer.layer)
            n_a += len(layer.weights) - 1
        plan = plan_layer(LayerShape(layer.name, registered.kind, layer.n, n_g, n_a, groups,
                                     product=product), self.settings)
        if not plan.implicit:
            return ExplicitState(layer, plan.sketch)
        if not registered.product:
            raise NotImplementedError(
                f"{layer.name}, a {registered.kind}, has {layer.n} parameters and "
                f"explicit_threshold is {self.settings.explicit_threshold}: the TensorFlow front "
                "end has no factors of such layers; raise explicit_threshold, or name the layer "
                "in exclude=")
        layer.implicit = True
        return ImplicitState(layer, plan, groups, n_g, n_a)

    def close(self) -> None:
        """Give the model's layers back as they were. The object is of no use afterwards."""
        self.capture.close()

    def precondition(self, gradients: Sequence[Gradient | None], variables: Sequence[Any],
                     collectives: Collectives) -> list[Gradient | None]:
        """The directions p for gradients that are reduced and the same on all ranks.

        Where one of them is not finite all are returned as they are, and nothing else changes.
        """
        dense = [tf.convert_to_tensor(g) if isinstance(g, tf.IndexedSlices) else g
                 for g in gradients]
        given = {id(as_tf(variable)): g for variable, g in zip(variables, dense, strict=True)
                 if g is not None}
        good = tf.reduce_all([tf.reduce_all(tf.math.is_finite(g)) for g in given.values()])
        lam = self._damping()
        due = tf.logical_and(self._wanted, good)
        tf.cond(due, lambda: self._refresh(lam, collectives), lambda: tf.constant(False))
        directions: dict[int, tf.Tensor] = {}
        for state in self.states:
            missing = [name_of(weight) for weight in state.layer.weights
                       if id(as_tf(weight)) not in given]
            if missing and len(missing) < len(state.layer.weights):
                raise ValueError(f"{', '.join(missing)} has no gradient, other weights of its "
                                 "layer have; freeze the layer or name it in exclude=")
            if not missing:
                directions.update(self._direct(state, given, lam, good, collectives))
        result = []
        for variable, gradient in zip(variables, dense, strict=True):
            if gradient is None:
                result.append(None)
                continue
            lam_here = tf.cast(lam, gradient.dtype)
            direction = directions.get(id(as_tf(variable)), gradient / (1.0 + lam_here))
            result.append(tf.where(good, tf.cast(direction, gradient.dtype), gradient))
        self.step.assign_add(tf.cast(good, tf.int64))
        self.skipped.assign_add(1 - tf.cast(good, tf.int64))
        self._pass.assign_add(1)
        again = tf.equal(self.step % self.settings.update_freq, 0)
        self._wanted.assign(tf.logical_or(again, tf.logical_and(self._wanted,
                                                                tf.logical_not(good))))
        return result

    def _damping(self) -> tf.Tensor:
        if not callable(self.settings.damping):
            return tf.constant(self.settings.damping_at(0), tf.float64)
        lam = tf.numpy_function(lambda step: np.float64(self.settings.damping_at(int(step))),
                                [self.step.read_value()], tf.float64)
        return tf.ensure_shape(lam, ())

    def _refresh(self, lam: tf.Tensor, collectives: Collectives) -> tf.Tensor:
        """New curvature of the layers that have one on every rank; others keep what they had."""
        made = [state.candidate(self.settings, self.step, self._pass, lam, collectives, self.name)
                for state in self.states]
        fine = tf.stack([tf.cast(candidate["good"], tf.int32) for candidate in made])
        name = f"{self.name}.refresh"
        agreed = collectives.if_many(
            lambda: collectives.allreduce(fine, name, op=horovod.Min), lambda: fine)
        for number, (state, candidate) in enumerate(zip(self.states, made, strict=True)):
            tf.cond(tf.equal(agreed[number], 1), lambda s=state, c=candidate: s.commit(c, self.step),
                    lambda s=state: s.fail())
        return tf.constant(True)

    def _direct(self, state: LayerState, given: dict[int, tf.Tensor], lam: tf.Tensor,
                good: tf.Tensor, collectives: Collectives) -> dict[int, tf.Tensor]:
        parts = [given[id(as_tf(weight))] for weight in state.layer.weights]
        g = tf.concat([tf.reshape(tf.cast(part, tf.float32), [-1]) for part in parts], axis=0)
        if callable(self.settings.damping):
            state.follow(lam)
        direction = tf.cond(
            state.ready, lambda: state.direction(g, lam, self.settings, collectives, self.name),
            lambda: g / (1.0 + tf.cast(lam, g.dtype)))
        if self.settings.coupling == "lagged":
            state.remember(g, good)
        result, start = {}, 0
        for weight, part in zip(state.layer.weights, parts, strict=True):
            size = int(part.shape.num_elements())
            result[id(as_tf(weight))] = tf.reshape(direction[start:start + size], part.shape)
            start += size
        return result

    def report(self) -> list[dict[str, Any]]:
        """A dict a layer: name, kind, n, rho, sketch, bytes held, age in steps, failures."""
        return [state.report(int(self.step)) for state in self.states]


def _unusual(layer: Any) -> bool:
    """Whether the layer computes its output in a way that its rule does not know."""
    return bool(getattr(layer, "lora_enabled", False) or getattr(layer, "rms_scaling", False)
                or getattr(layer, "renorm", False) or getattr(layer, "synchronized", False)
                or getattr(layer, "quantization_mode", None))
