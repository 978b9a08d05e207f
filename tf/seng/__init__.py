"""SENG, the sketchy empirical natural gradient, as a preconditioner for Keras models.

``optimizer.py`` and ``tape.py`` call ``precondition`` with the reduced gradients, ``scaled_by`` with
what scales the loss, and ``pass_over`` after each pass.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import horovod.tensorflow as horovod
import keras
import numpy as np
import tensorflow as tf

from hvd_ext.agreement import digest
from hvd_ext.seng import DEFAULT_SKETCH_SIZE, Report, Settings
from hvd_ext.seng.settings import Damping
from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.keras_hooks import require_tensorflow_backend
from hvd_ext.tensorflow.loss_scale import loss_scale
from hvd_ext.tensorflow.reducers.base import Gradient
from hvd_ext.tensorflow.seng import kernels
from hvd_ext.tensorflow.seng import state as saved
from hvd_ext.tensorflow.seng.blocks import Product, Run
from hvd_ext.tensorflow.seng.capture import Capture
from hvd_ext.tensorflow.seng.inventory import take_inventory
from hvd_ext.tensorflow.seng.messages import mean_over_ranks
from hvd_ext.tensorflow.seng.state import LayerState
from hvd_ext.tensorflow.variables import as_tf, name_of


class SENG(tf.Module):
    """Replaces gradients by ``p = (U U^T + lam I)^{-1} g`` (SENG eq. 8-9), layer by layer.

    Dense, convolution (1-3 dimensions, grouped, depthwise, transposed), batch, layer and group
    norm layers get their empirical Fisher matrix, any other variable ``g/(1 + lam)``. U is taken
    from the forward and backward pass of every ``update_freq``-th step, in ``model.fit`` as with a
    tape; of several passes that are accumulated from the last. The loss must be the mean or sum
    over the rank's batch, the first axis of every layer's input. What the optimizer's
    ``scale_loss`` multiplies it with (``mixed_float16``, ``loss_scale_factor``) is divided out; a
    tape is told by its ``optimizer=``. Track it in a ``tf.train.Checkpoint`` to keep the curvature,
    a file a rank; without, it is taken anew at the first step.

    Args:
        model: a built Keras model: functional, sequential or subclassed.
        name: prefix of the names in Horovod's timeline; one each when there are several.

    The other arguments are those of :class:`hvd_ext.seng.Settings`; names in ``exclude`` are
    paths of layers.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument outside its limits, a model that is not built or has no layer with
            a rule, or one that another SENG has already.
    """

    def __init__(self, model: keras.Model, *, damping: Damping, update_freq: int = 200,
                 coupling: str = "block", uc: str = "factored", explicit_threshold: int = 700_000,
                 sketch: str | None = "uniform", sketch_size: int = DEFAULT_SKETCH_SIZE,
                 replacement: bool = False, rank: int = 16, row_sketch: int = 512,
                 subsample: int | None = None, loss_reduction: str = "mean",
                 loss_scale: float = 1.0, curvature_dtype: str | tf.DType | None = None,
                 exclude: Iterable[str] | None = None, seed: int = 0, name: str = "seng") -> None:
        require_tensorflow_backend("hvd.SENG")
        if not isinstance(model, keras.Model):
            raise TypeError(f"model must be a keras.Model, got {model!r}")
        if isinstance(exclude, str):
            raise TypeError(f"exclude must be a list of layers' paths, got {exclude!r}; pass "
                            f"[{exclude!r}]")
        super().__init__(name=name)
        if isinstance(curvature_dtype, tf.DType):
            curvature_dtype = curvature_dtype.name
        self.settings = Settings(
            damping=damping, update_freq=update_freq, coupling=coupling, uc=uc,
            explicit_threshold=explicit_threshold, sketch=sketch, sketch_size=sketch_size,
            replacement=replacement, rank=rank, row_sketch=row_sketch, subsample=subsample,
            loss_reduction=loss_reduction, loss_scale=loss_scale, curvature_dtype=curvature_dtype,
            exclude=exclude, seed=seed)
        if not model.built:
            raise ValueError(f"the model {model.name!r} has no weights yet; call it on a batch, or "
                             "model.build(input_shape), before hvd.SENG")
        self._half = model.dtype_policy.name == "mixed_float16"
        inventory = take_inventory(model, self.settings)
        if inventory.without_rule:
            warnings.warn("SENG has no rule for " + ", ".join(inventory.without_rule) + "; their "
                          "weights get g/(1 + damping). Name them in exclude= to agree",
                          stacklevel=2)
        layers = inventory.layers
        if not layers:
            raise ValueError(
                f"{model.name!r} has no trainable layer that SENG has a rule for (dense, "
                "convolution, batch, layer or group norm); precondition another model, unfreeze "
                "layers, or shorten exclude=")
        self.settings.check_sketch(layer.n for layer in layers if not layer.plan.implicit)
        self._parameters = sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)
        self._scale_of: Any = None
        self._still_scaled = False
        self._ranks = 0
        self._functions: dict[Any, Any] = {}
        with tf.init_scope():
            self.step = tf.Variable(0, dtype=tf.int64, trainable=False, name="step")
            self.skipped = tf.Variable(0, dtype=tf.int64, trainable=False, name="skipped")
            # What the small systems are factored with, and the (rank, ranks) that the state is of.
            self.lam = tf.Variable(0.0, dtype=tf.float64, trainable=False, name="lam")
            self.stamp = tf.Variable([-1, -1], dtype=tf.int64, trainable=False, name="stamp")
        self.capture = Capture(layers, self.settings, self.step, self._loss_scale)
        self._wanted = self.capture.wanted
        self.states = [LayerState(layer, captured, self.settings)
                       for layer, captured in self.capture.of.items()]
        self._fresh = [tf.identity(variable) for variable in self.variables]

    def close(self) -> None:
        """Give the model's layers back as they were. The object is of no use afterwards."""
        self.capture.close()

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

    def _loss_scale(self) -> Any:
        return loss_scale(self._scale_of)

    def pass_over(self, over: Any = True) -> None:
        """What is captured from here on belongs to another pass (if ``over``)."""
        self.capture.number.assign_add(tf.cast(over, tf.int64))

    @tf.autograph.experimental.do_not_convert
    def precondition(self, gradients: Sequence[Gradient | None], variables: Sequence[Any],
                     collectives: Collectives) -> list[Gradient | None]:
        """The directions p for gradients that are reduced and the same on all ranks.

        Where one of them is not finite all are returned as they are, and nothing else changes.
        """
        present = [k for k, gradient in enumerate(gradients) if gradient is not None]
        if not present:
            return list(gradients)
        owners = [variables[k] for k in present]
        dense = [tf.convert_to_tensor(gradients[k]) for k in present]
        self._check_states(owners)
        self._agree(collectives)
        # p is linear in g: only what is kept from step to step must have the same scale at each.
        unscale = self._still_scaled and self.settings.coupling == "lagged"
        scale = tf.convert_to_tensor(self._loss_scale() if unscale else 1.0, tf.float32)
        run = Run(self.settings, collectives, self.name)
        if tf.executing_eagerly():
            key = (type(collectives), collectives.process_set, unscale,
                   *(id(as_tf(owner)) for owner in owners))
            if key not in self._functions:
                def compiled(dense: list[tf.Tensor], scale: tf.Tensor) -> list[tf.Tensor]:
                    return self._turn(dense, owners, run, scale if unscale else None)

                self._functions[key] = tf.function(compiled, autograph=False)
            turned = self._functions[key](dense, scale)
        else:
            turned = self._turn(dense, owners, run, scale if unscale else None)
        result = list(gradients)
        for k, direction in zip(present, turned, strict=True):
            result[k] = direction
        return result

    def _check_states(self, owners: Sequence[Any]) -> None:
        given = {id(as_tf(owner)) for owner in owners}
        for state in self.states:
            missing = [name_of(weight) for weight in state.layer.weights.values()
                       if id(as_tf(weight)) not in given]
            if missing and len(missing) < len(state.layer.weights):
                raise ValueError(f"{', '.join(missing)} has no gradient, other weights of its "
                                 "layer have; freeze the layer or name it in exclude=")

    def _agree(self, collectives: Collectives) -> None:
        """At the first step: see that the ranks are alike, and that the state is theirs."""
        if self._ranks:
            return
        here = (collectives.rank, collectives.size)
        described = {key: value for key, value in vars(self.settings).items() if key != "damping"}
        layers = [(dataclasses.replace(state.layer.shape, name=state.layer.key), state.layer.plan)
                  for state in self.states]
        with tf.init_scope():
            stamp = tuple(int(number) for number in self.stamp.numpy())
            mine = (digest(sorted(described.items()), layers),
                    None if stamp in (here, (-1, -1)) else stamp,
                    (int(self.step.numpy()), bool(self._wanted.numpy())))
            everyone = collectives.allgather_object(mine, f"{self.name}.state")
            odd = [rank for rank, one in enumerate(everyone) if one[0] != everyone[0][0]]
            if odd:
                raise RuntimeError(
                    f"SENG has other layers or settings on rank {odd[0]} than on rank 0 (and on "
                    f"{len(odd)} ranks in all); construct the same model with the same arguments "
                    "of SENG on every rank")
            for rank, one in enumerate(everyone):
                if one[1] is not None:
                    raise ValueError(
                        f"the state restored into SENG on rank {rank} of {len(everyone)} is that of "
                        f"rank {one[1][0]} of {one[1][1]}: save and restore one file a rank, or "
                        "call reset_state() on all of them to take the curvature anew")
            if any(one[2] != everyone[0][2] for one in everyone):
                raise RuntimeError(
                    f"SENG's state differs between ranks: they are at the steps "
                    f"{[one[2][0] for one in everyone]} (by rank); restore every rank's own state, "
                    "or call reset_state() on all of them")
            self.stamp.assign(here)
        self._ranks = collectives.size

    def _turn(self, dense: list[tf.Tensor], owners: Sequence[Any], run: Run,
              scale: tf.Tensor | None) -> list[tf.Tensor]:
        """The directions, in a graph being traced."""
        number = {id(as_tf(owner)): k for k, owner in enumerate(owners)}
        places = {state: [number[id(as_tf(weight))] for weight in state.layer.weights.values()]
                  for state in self.states
                  if all(id(as_tf(weight)) in number for weight in state.layer.weights.values())}
        good = tf.reduce_all(tf.stack([tf.reduce_all(tf.math.is_finite(g)) for g in dense]))
        at = self.step.read_value()
        lam = self._damping(at)
        due = tf.logical_and(self._wanted, good)
        if scale is not None:
            dense = [g / tf.cast(scale, g.dtype) for g in dense]
        parts = {state: [tf.reshape(tf.cast(dense[k], state.layer.dtype), [-1]) for k in mine]
                 for state, mine in places.items()}
        if self.settings.coupling == "lagged":
            # Waits for no gradient, so that it is under way during the backward pass.
            early = tf.cond(
                self._wanted,
                lambda: [block.nothing(run) for state in places for block in state.blocks],
                lambda: mean_over_ranks([(state, state.kept()) for state in places], run))
            made = tf.cond(due, lambda: self._refresh(at, lam, run), lambda: tf.constant(False))
            means = tf.cond(
                due, lambda: mean_over_ranks(
                    [(state, state.kept_or(mine)) for state, mine in parts.items()], run),
                lambda: early)
            tf.cond(good, lambda: _all(state.keep(mine) for state, mine in parts.items()),
                    lambda: tf.constant(False))
        else:
            made = tf.cond(due, lambda: self._refresh(at, lam, run), lambda: tf.constant(False))
            means = mean_over_ranks(list(parts.items()), run)
        means = [tf.where(good, mean, tf.zeros_like(mean)) for mean in means]
        factors = _factors(good, lam)
        back = tf.constant(1.0) if scale is None else scale
        owned = {k for mine in places.values() for k in mine}
        result = [g if k in owned else g * tf.cast(factors[0] * tf.cast(back, tf.float64), g.dtype)
                  for k, g in enumerate(dense)]
        for state, mine in parts.items():
            own, means = means[:len(state.blocks)], means[len(state.blocks):]
            factor = tf.where(state.ready, factors[1], factors[0]) * tf.cast(back, tf.float64)
            turned = state.directions(mine, own, tf.cast(factor, state.layer.dtype), run)
            for k, direction in zip(places[state], turned, strict=True):
                result[k] = tf.cast(tf.reshape(direction, dense[k].shape), dense[k].dtype)
        self.step.assign_add(tf.cast(good, tf.int64))
        self.skipped.assign_add(1 - tf.cast(good, tf.int64))
        self.pass_over()
        again = tf.equal(self.step % self.settings.update_freq, 0)
        self._wanted.assign(tf.logical_or(again, tf.logical_and(self._wanted,
                                                                tf.logical_not(made))))
        return result

    def _damping(self, at: tf.Tensor) -> tf.Tensor:
        """lam at this step; the small systems are factored with it from here on."""
        if not callable(self.settings.damping):
            return tf.constant(self.settings.damping_at(0), tf.float64)
        lam = tf.numpy_function(lambda step: np.float64(self.settings.damping_at(int(step))),
                                [at], tf.float64)
        lam = tf.ensure_shape(lam, ())
        tf.cond(tf.not_equal(self.lam, lam),
                lambda: _all(state.factor_again(lam) for state in self.states),
                lambda: tf.constant(False))
        self.lam.assign(lam)
        return lam

    def _refresh(self, at: tf.Tensor, lam: tf.Tensor, run: Run) -> tf.Tensor:
        """New curvature of the layers that have one on every rank; others keep what they had.

        Returns whether there is one of any layer.
        """
        taken = [state.take(self.capture.number) for state in self.states]
        factors = [parts for state, (blocks, _) in zip(self.states, taken, strict=True)
                   for block, parts in zip(state.blocks, blocks, strict=True)
                   if isinstance(block, Product)]
        if factors and run.collectives.size > 1:  # as many columns on all ranks
            counts = tf.stack([tf.shape(parts["g"])[2] for parts in factors])
            most = run.collectives.allreduce(counts, f"{self.name}.columns", op=horovod.Max)
            for k, parts in enumerate(factors):
                parts.update(g=kernels.pad_columns(parts["g"], most[k]),
                             a=kernels.pad_columns(parts["a"], most[k]))
        made = [state.candidate(blocks, good, at, lam, run)
                for state, (blocks, good) in zip(self.states, taken, strict=True)]
        fine = tf.stack([tf.cast(candidate.good, tf.int32) for candidate in made])
        agreed = run.collectives.if_many(
            lambda: run.collectives.allreduce(fine, f"{self.name}.refresh", op=horovod.Min),
            lambda: fine)
        for k, (state, candidate) in enumerate(zip(self.states, made, strict=True)):
            tf.cond(tf.equal(agreed[k], 1), lambda s=state, c=candidate: s.commit(c),
                    lambda s=state: s.fail())
            state.captured.clear()
        self.lam.assign(lam)
        return tf.reduce_any(tf.equal(agreed, 1))

    def reset_state(self) -> None:
        """Start anew: no curvature, step 0, a refresh at the next step."""
        for variable, value in zip(self.variables, self._fresh, strict=True):
            variable.assign(value)
        self._ranks = 0

    def report(self) -> Report:
        """Per layer: kind, sizes, bytes, coefficient norm, jitter, age; prints as a table."""
        ready = sum(state.layer.n for state in self.states if bool(state.ready))
        return saved.report(
            self.states, self.settings, step=int(self.step), skipped=int(self.skipped),
            ranks=max(1, self._ranks), identity_parameters=self._parameters - ready)


def _factors(good: tf.Tensor, lam: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """What gradients without and with curvature are multiplied with: 1/(1 + lam) and 1/lam.

    Both are 1 where the gradients are not finite and are to stay as they are.
    """
    one = tf.ones((), tf.float64)
    return tf.where(good, 1.0 / (1.0 + lam), one), tf.where(good, 1.0 / lam, one)


def _all(done: Iterable[Any]) -> tf.Tensor:
    """Run through a generator within a branch of a graph."""
    for _ in done:
        pass
    return tf.constant(True)
