"""SENG, the sketchy empirical natural gradient, as a preconditioner for Keras models.

``step.py`` and ``tape.py`` call ``before_reduce`` with this rank's gradients, ``precondition`` with
the reduced ones, ``scaled_by`` with what scales the loss, and ``end_pass`` after each pass. The
equations are in ``step.py``, the refresh of the curvature in ``refresh.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvd_ext.seng import CurvatureReport, Settings, strict_refusal, takes_settings
from hvd_ext.seng.once_warnings import OnceWarnings
from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.keras_hooks import require_tensorflow_backend
from hvd_ext.tensorflow.loss_scale import loss_scale
from hvd_ext.tensorflow.reducers.base import Gradient
from hvd_ext.tensorflow.seng.blocks import Context
from hvd_ext.tensorflow.seng.capture import Capture
from hvd_ext.tensorflow.seng.check import check_sums
from hvd_ext.tensorflow.seng.deferred_build import DeferredBuild, own_collectives
from hvd_ext.tensorflow.seng.layer_curvature import LayerCurvature
from hvd_ext.tensorflow.seng.layer_discovery import take_inventory
from hvd_ext.tensorflow.seng.pending import PendingCurvature
from hvd_ext.tensorflow.seng.refresh import check_ranks, refresh_curvature, resample_rows
from hvd_ext.tensorflow.seng.sample_axes import SampleAxisTracker
from hvd_ext.tensorflow.seng.shared_functions import SharedFunctions, outside_trace
from hvd_ext.tensorflow.seng.state import Coverage, report
from hvd_ext.tensorflow.seng.step import compute_directions, direction_factors, run_all
from hvd_ext.tensorflow.variables import as_tf, name_of


class SENG(tf.Module):
    """Replaces gradients by ``p = (U U^T + lam I)^{-1} g`` (SENG eq. 8-9), layer by layer.

    Dense, einsum dense (multi-head attention is made of them), embedding, convolution (1-3 dimensions,
    grouped, depthwise, separable, transposed), batch, layer, group and RMS norm layers get their
    empirical Fisher matrix, any other variable what ``other`` says. U is taken from the forward and
    backward pass of every ``update_freq``-th step, in ``model.fit`` as with a tape; of several passes
    that are accumulated from the last. The loss must be the mean or sum over the rank's batch. At the
    first refresh the samples of each layer are summed and compared with this rank's gradient; a layer
    where they differ gets what ``other`` says, on all ranks. Where layers have the samples is found out
    (``samples``). What the optimizer's ``scale_loss`` multiplies
    the loss with (``mixed_float16``, ``loss_scale_factor``) is divided out; a tape learns it from its
    ``optimizer=``. Track it in a ``tf.train.Checkpoint`` to keep the curvature, one file per rank;
    without, it is taken anew at the first step.

    Args:
        model: a Keras model: functional, sequential or subclassed. Of one that is not built yet the
            layers are taken at its first batch.
        name: prefix of the names in Horovod's timeline; one each when there are several.

    The other arguments are those of :class:`hvd_ext.seng.Settings`; names in ``exclude`` are
    paths of layers, those in ``samples`` paths or names.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument outside its limits, a model without a layer that has a rule, or one
            that another SENG has already.
    """

    @takes_settings
    def __init__(self, model: keras.Model, *, name: str = "seng", **settings: Any) -> None:
        require_tensorflow_backend("hvd.SENG")
        if not isinstance(model, keras.Model):
            raise TypeError(f"model must be a keras.Model, got {model!r}")
        super().__init__(name=name)
        self.settings = Settings(**settings)
        self._half = model.dtype_policy.name == "mixed_float16"
        self._scale_of: Any = None
        self._still_scaled = False
        self._ranks = 0
        self._collectives: Any = None
        self._coverage: Coverage | None = None
        self._functions: dict[Any, Any] = {}
        self._traces = SharedFunctions()
        with tf.init_scope():
            self.steps = tf.Variable(0, dtype=tf.int64, trainable=False, name="step")
            self.skipped = tf.Variable(0, dtype=tf.int64, trainable=False, name="skipped")
            # What the small systems are factored with, and the (rank, ranks) that the state is of.
            self.lam = tf.Variable(0.0, dtype=tf.float64, trainable=False, name="lam")
            self.stamp = tf.Variable([-1, -1], dtype=tf.int64, trainable=False, name="stamp")
            self.checked = tf.Variable(not self.settings.check_gradients, trainable=False, name="checked")
        self._samples = samples = SampleAxisTracker(self.settings)
        self._notices = OnceWarnings(self.settings)
        self.capture = Capture(self.settings, self.steps, lambda: loss_scale(self._scale_of), self._traces,
                               samples)
        self._wanted = self.capture.wanted
        self.states: list[LayerCurvature] = []
        self._fresh: list[tf.Tensor] = []
        self._pending: PendingCurvature | None = None  # with a tape
        self._start = DeferredBuild(model, samples, self._take_layers, self._report_placements)

    def _take_layers(self, model: keras.Model) -> None:
        """Take the layers of a model that is built."""
        inventory = take_inventory(model, self.settings)
        self._notices.without_rule(inventory.without_rule)
        layers = inventory.layers
        if not layers and not inventory.without_rule:
            raise ValueError(
                f"{model.name!r} has no trainable layer that SENG has a rule for (dense, "
                "convolution, embedding, batch, layer, group or RMS norm); precondition another model, "
                "unfreeze layers, or shorten exclude=")
        self.settings = self.capture.settings = inventory.settings
        self._notices.print_memory(self.settings, [layer.plan for layer in layers],
                                   rank=own_collectives().rank)
        self.settings.check_sketch(layer.n for layer in layers if not layer.plan.implicit)
        self._coverage = Coverage(inventory.missing, model)
        self._samples.watch_layers(model, layers)
        self.capture.capture_layers(layers)
        # Checkpoints know these layers' curvature under this name.
        self.states = [LayerCurvature(layer, captured, self.settings, self._traces)
                       for layer, captured in self.capture.of.items()]
        # Not those of which pass it was: by these TensorFlow knows that a layer is captured before a refresh.
        self._traces.pack_handles([*self._of_layers(), *(
            one for captured in self.capture.of.values() for one in captured.held)])
        self._fresh = [variable.first if hasattr(variable, "first") else tf.identity(variable)
                       for variable in self.variables]

    def _report_placements(self) -> None:
        """Say or refuse, once it is known, that samples of layers cannot be told apart.

        Raises:
            ValueError: ``strict`` and there are such layers.
        """
        names = [layer.name for layer in self._samples.by_rows]
        if names and self.settings.strict:
            self.capture.restore_calls()
            raise ValueError(strict_refusal(names))
        self._notices.by_rows(names, self._samples.trouble)

    def _of_layers(self) -> list[tf.Variable]:
        """The variables of the curvature."""
        return [variable for one in self.states for variable in one.variables]

    def join_transaction(self, transaction: Any, updates: tf.Variable) -> None:
        """Let a tape take back what a gradient has changed that no update uses.

        Args:
            transaction: the tape's.
            updates: how many the optimizer has made.
        """
        self._pending = PendingCurvature(self.states, self._traces)
        lagged = [variable for one in self.states for variable in one.lagged_variables]
        transaction.add_variables([self.steps, self.skipped, self.lam, self.checked, self._wanted, *lagged],
                                  self.steps, self._pending)
        # A pass after gradients that were not used is captured again if theirs was.
        self.capture.unused = (transaction.value_before(self._wanted), transaction.reduced_at, updates)

    def close(self) -> None:
        """Give the model's layers back as they were. The object is of no use afterwards."""
        self._start.restore_call()
        self.capture.restore_calls()

    def scaled_by(self, optimizer: Any, *, still: bool = False) -> None:
        """Say whose ``scale_loss`` the losses of the passes from now on go through.

        Args:
            optimizer: a Keras optimizer, or None for none.
            still: the gradients that ``precondition`` gets have that factor still, as a tape's do.

        Raises:
            ValueError: a tape of a mixed_float16 model does not say what scales its loss.
        """
        if self._half and optimizer is None:
            raise ValueError(
                "SENG must know what scales the loss of a mixed_float16 model: pass optimizer= to "
                "hvd.DistributedGradientTape, the Keras optimizer whose scale_loss is used")
        # Not tracked: the optimizer is no part of what a checkpoint of SENG holds.
        object.__setattr__(self, "_scale_of", optimizer)
        self._still_scaled = still

    def end_pass(self, ended: Any = True) -> None:
        """What is captured from here on belongs to another pass (if ``ended``)."""
        self.capture.number.assign_add(tf.cast(ended, tf.int64))

    @tf.autograph.experimental.do_not_convert
    def before_reduce(self, gradients: Sequence[Gradient | None], variables: Sequence[Any]) -> None:
        """At the first refresh: see that what was captured sums to these gradients, of this rank's last
        pass and not yet reduced. Layers where it does not are left out by ``precondition``."""
        given = {id(as_tf(variable)): (gradient, variable)
                 for gradient, variable in zip(gradients, variables, strict=True) if gradient is not None}
        systems = {one: [given[id(as_tf(weight))] for weight in one.layer.weights.values()]
                   for one in self.states
                   if all(id(as_tf(weight)) in given for weight in one.layer.weights.values())}
        scale = loss_scale(self._scale_of) if self._still_scaled else 1.0

        def check() -> tf.Tensor:
            with self._traces.unpacked_handles():
                check_sums(systems, self.capture.number, scale, self.settings)
            return tf.constant(True)

        if systems:
            due = tf.logical_and(self._wanted, tf.logical_not(self.checked))
            if tf.executing_eagerly():
                tf.cond(due, check, lambda: tf.constant(False))
            else:
                outside_trace(lambda: tf.cond(due, check, lambda: tf.constant(False)))

    def step(self, gradients: Sequence[Gradient | None], variables: Sequence[Any] | None = None
             ) -> list[Gradient | None]:
        """The directions p without a distributed optimizer or tape, in a loop of one's own.

        Args:
            gradients: of the loss without its scale, already averaged over ranks where there are
                several (each rank calls it).
            variables: what they are the gradients of; the model's trainable weights unless given.

        Returns:
            As many, None where the gradient is None.

        Raises:
            ValueError: gradients and variables do not match, or the model is not built.
        """
        if variables is None:
            variables = self._start.model.trainable_weights
        if len(gradients) != len(variables):
            raise ValueError(f"got {len(gradients)} gradients for {len(variables)} variables; pass one "
                             "gradient, or None, for each variable")
        collectives = self._collectives or own_collectives()
        self._collectives = collectives
        if collectives.size == 1:
            self.before_reduce(gradients, variables)
        return self.precondition(gradients, variables, collectives)

    @tf.autograph.experimental.do_not_convert
    def precondition(self, gradients: Sequence[Gradient | None], variables: Sequence[Any],
                     collectives: Collectives) -> list[Gradient | None]:
        """The directions p for gradients that are reduced and the same on all ranks.

        Where one of them is not finite all are returned as they are, and nothing else changes.
        """
        present = [k for k, gradient in enumerate(gradients) if gradient is not None]
        if not present:
            return list(gradients)
        if not self._start.done:
            raise ValueError(f"the model {self._start.model.name!r} has no weights yet, and SENG no layers; "
                             "call the model on a batch before its gradients are preconditioned")
        given = [variables[k] for k in present]
        dense = [tf.convert_to_tensor(gradients[k]) for k in present]
        self._check_weights(given)
        self._check_ranks(collectives)
        # p is linear in g: only what is kept from step to step, or compared, must have the same scale.
        compares = self.settings.coupling == "lagged" or self.settings.stale_curvature == "rescale"
        unscale = self._still_scaled and compares
        scale = tf.convert_to_tensor(loss_scale(self._scale_of) if unscale else 1.0, tf.float32)
        context = Context(self.settings, collectives, self.name)
        if tf.executing_eagerly():
            key = (type(collectives), collectives.process_set, unscale,
                   *(id(as_tf(one)) for one in given))
            if key not in self._functions:
                def compiled(dense: list[tf.Tensor], scale: tf.Tensor) -> list[tf.Tensor]:
                    return self._compute_directions(dense, given, context, scale if unscale else None)

                self._functions[key] = tf.function(compiled, autograph=False)
            turned = self._functions[key](dense, scale)
        elif self.settings.coupling == "lagged":  # part of it is to run during the backward pass
            turned = self._compute_directions(dense, given, context, scale if unscale else None)
        else:
            turned = outside_trace(lambda: self._compute_directions(dense, given, context,
                                                                    scale if unscale else None))
        result = list(gradients)
        for k, direction in zip(present, turned, strict=True):
            result[k] = direction
        return result

    def _compute_directions(self, dense: list[tf.Tensor], variables: Sequence[Any], context: Context,
                            scale: tf.Tensor | None) -> list[tf.Tensor]:
        """The directions, in a graph being traced: of layers that have all their gradients by their
        curvature, of all other variables what ``other`` says."""
        number = {id(as_tf(one)): k for k, one in enumerate(variables)}
        places = {one: [number[id(as_tf(weight))] for weight in one.layer.weights.values()]
                  for one in self.states
                  if all(id(as_tf(weight)) in number for weight in one.layer.weights.values())}
        good = tf.reduce_all(tf.stack([tf.reduce_all(tf.math.is_finite(g)) for g in dense]))
        at = self.steps.read_value()
        lam = self._current_damping(at)
        if scale is not None:
            dense = [g / tf.cast(scale, g.dtype) for g in dense]
        flat = {one: [tf.reshape(tf.cast(dense[k], one.layer.dtype), [-1]) for k in mine]
                for one, mine in places.items()}

        def take_curvature() -> tf.Tensor:
            if self._pending is not None:
                self._pending.keep_before()
            made = refresh_curvature(self.states, self.capture.number, at, lam, context, self._notices)
            self.lam.assign(lam)
            self.checked.assign(tf.logical_or(self.checked, made))
            return made

        def redrawn() -> tf.Tensor:
            draws = self.settings.resample == "step"
            return resample_rows(self.states, at, lam, context) if draws else tf.constant(False)

        turned, made = compute_directions(flat, at, lam, good, tf.logical_and(self._wanted, good),
                                          self._wanted,
                                          take_curvature, redrawn, context)
        without, _ = direction_factors(good, lam, self.settings)
        covered = {k for mine in places.values() for k in mine}
        result = [g if k in covered else g * tf.cast(without, g.dtype) for k, g in enumerate(dense)]
        for one, mine in places.items():
            for k, direction in zip(mine, turned[one], strict=True):
                result[k] = tf.cast(tf.reshape(direction, dense[k].shape), dense[k].dtype)
        self.steps.assign_add(tf.cast(good, tf.int64))
        self.skipped.assign_add(1 - tf.cast(good, tf.int64))
        self.end_pass()
        again = tf.equal(self.steps % self.settings.update_freq, 0)
        self._wanted.assign(tf.logical_or(again, tf.logical_and(self._wanted,
                                                                tf.logical_not(made))))
        return result if scale is None else [p * tf.cast(scale, p.dtype) for p in result]

    def _current_damping(self, at: tf.Tensor) -> tf.Tensor:
        """lam at this step; the small systems are factored with it from here on."""
        if not callable(self.settings.damping):
            return tf.constant(self.settings.damping_at(0), tf.float64)
        lam = tf.numpy_function(lambda step: np.float64(self.settings.damping_at(int(step))),
                                [at], tf.float64)
        lam = tf.ensure_shape(lam, ())

        def factor() -> tf.Tensor:
            with self._traces.unpacked_handles():
                return run_all(one.refactor(lam) for one in self.states)

        tf.cond(tf.not_equal(self.lam, lam), factor, lambda: tf.constant(False))
        self.lam.assign(lam)
        return lam

    def _check_weights(self, variables: Sequence[Any]) -> None:
        given = {id(as_tf(one)) for one in variables}
        for one in self.states:
            missing = [name_of(weight) for weight in one.layer.weights.values()
                       if id(as_tf(weight)) not in given]
            if missing and len(missing) < len(one.layer.weights):
                raise ValueError(f"{', '.join(missing)} has no gradient, other weights of its "
                                 "layer have; freeze the layer or name it in exclude=")

    def _check_ranks(self, collectives: Collectives) -> None:
        """At the first step: the ranks compare layers, settings and states."""
        if self._ranks:
            return
        with tf.init_scope():
            stamp = tuple(int(number) for number in self.stamp.numpy())
            by_rows = check_ranks(
                self.states, self.settings, collectives, prefix=self.name, stamp=stamp,
                step=int(self.steps.numpy()), due=bool(self._wanted.numpy()),
                by_rows=[layer.name for layer in self._samples.by_rows])
            self._notices.by_rows(by_rows, self._samples.trouble)
            self.stamp.assign((collectives.rank, collectives.size))
        self._ranks = collectives.size

    def reset_state(self) -> None:
        """Start anew: no curvature, step 0, a refresh at the next step."""
        if self._fresh:  # a model that is not built yet has nothing to forget
            for variable, value in zip(self.variables, self._fresh, strict=True):
                variable.assign(value)
        if self._pending is not None:
            self._pending.forget_before()
        self._ranks = 0

    def shared_state(self) -> list[int]:
        """The counters, which are the same on every rank."""
        return [int(self.steps), int(self.skipped)]

    def load_shared_state(self, state: Sequence[int]) -> None:
        """Take over other counters; the curvature is taken anew at the next step."""
        self.reset_state()
        self.steps.assign(state[0])
        self.skipped.assign(state[1])
        self._functions.clear()

    def report(self) -> CurvatureReport:
        """Per layer: kind, sizes, bytes, coefficient norm, jitter, age; prints as a table.

        Its first line says how much of the model has a rule, and why the rest has none.
        """
        return report(self.states, self.settings, self._coverage, step=int(self.steps),
                      skipped=int(self.skipped), ranks=max(1, self._ranks))

