"""Whether a wrapped optimizer may run on a part of its variables: tried on small ones, in this process."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvd_ext.sharding import Server, Shard, separability
from hvd_ext.tensorflow.muon import Muon
from hvd_ext.tensorflow.sharding.shards import ELEMENTWISE, ProxyVariables, numel_of, put_back, row_of
from hvd_ext.tensorflow.variables import as_tf

# The update of each variable depends on nothing but its own gradient and state.
KNOWN = (*ELEMENTWISE, keras.optimizers.Adafactor, keras.optimizers.Lamb, keras.optimizers.Muon, Muon)
SHAPES = ((4, 3), (4,), (2, 2, 3))
# What ``Distributed`` or Keras does itself around the update.
SETTINGS = {"clipnorm": None, "clipvalue": None, "global_clipnorm": None, "use_ema": False,
            "loss_scale_factor": None, "gradient_accumulation_steps": None}


def check_separable(optimizer: Any, server: Server, *, cut: bool) -> None:
    """Refuse an optimizer whose update of what a rank owns is not what it is within the update of all.

    Args:
        cut: whether ranks own pieces of variables.

    Raises:
        ValueError: it names the optimizer and what to use.
    """
    kind = type(optimizer)
    if server.kind == "replicated" or kind in KNOWN or bool(vars(kind).get("separable", False)):
        return
    with tf.init_scope(), tf.device("CPU:0"):
        Trial(optimizer, server.kind, cut=cut).compare_updates()


class Trial:
    """Small variables in the place of a model's, and an optimizer's updates of all and of parts of them."""

    def __init__(self, optimizer: Any, where: str, *, cut: bool) -> None:
        self.optimizer = optimizer
        self.name = type(optimizer).__name__
        self.where = where
        self.cut = cut

    def compare_updates(self) -> None:
        """Compare the updates.

        Raises:
            ValueError: they differ, or the optimizer cannot be tried.
        """
        failures = []
        for precision in ("float64", "float32"):
            try:
                whole = Run(self._twin_optimizer(), precision, None)
            except Exception as error:
                failures.append(error)
                continue
            self._compare_parts(whole, precision)
            return
        if not self.cut:
            raise ValueError(separability.untested_message(self.name, self.where,
                                                           failures[0])) from failures[0]

    def _compare_parts(self, whole: Run, precision: str) -> None:
        """Compare the update of all with those of parts, "rank0" those of a rank that has none."""
        run = functools.partial(self._run_part, precision)
        if self.where == "rank0":
            run({})
            return
        differ, scalars = False, set()
        for number, shape in enumerate(SHAPES):
            numel = int(np.prod(shape))
            middle = row_of(shape) * (shape[0] // 2)
            for piece in ([Shard(number, 0, middle, 0), Shard(number, middle, numel, 0)] if self.cut
                          else [Shard(number, 0, numel, 0)]):
                part = run({number: piece})
                weights = [w[piece.start : piece.stop] for w in whole.weights[number]]
                differ |= separability.has_diverged(weights, part.weights[number], precision)
                scalars |= {*separability.differing_settings(whole.scalars, part.scalars)}
        if not (differ or scalars):
            return
        again = Run(self._twin_optimizer(), precision, None)
        if any(_is_unequal(number, whole, again) for number in whole.weights):
            raise ValueError(separability.untested_message(self.name, self.where, "it draws random numbers"))
        accepted = ["replicated", "rank0"] if self._runs_without_variables(precision) else ["replicated"]
        raise ValueError(separability.depends_on_others(self.name, self.cut, sorted(scalars),
                                                        accepted=accepted))

    def _runs_without_variables(self, precision: str) -> bool:
        """Whether "rank0" would accept the optimizer: all but one rank update nothing."""
        try:
            self._run_part(precision, {})
        except ValueError:
            return False
        return True

    def _run_part(self, precision: str, owned: dict[int, Shard]) -> Run:
        try:
            return Run(self._twin_optimizer(), precision, owned)
        except Exception as error:
            raise ValueError(separability.fails_in_part(self.name, self.where, error)) from error

    def _twin_optimizer(self) -> Any:
        """An optimizer of the same class with the same settings."""
        try:
            twin = type(self.optimizer).from_config(self.optimizer.get_config())
        except (TypeError, ValueError, KeyError, NotImplementedError):  # its configuration does not make one
            twin = copy.deepcopy(self.optimizer)
        for name, value in SETTINGS.items():
            setattr(twin, name, value)
        return twin


class Run:
    """A few steps of an optimizer on small variables.

    Args:
        optimizer: not built yet.
        precision: of the variables.
        owned: the pieces that are updated, by variable; None for all variables.

    Attributes:
        weights: of each variable, or of its piece 1-D, by number: at first, and after each step.
        scalars: the optimizer's variables that are numbers, by name.
    """

    def __init__(self, optimizer: Any, precision: str, owned: dict[int, Shard] | None) -> None:
        self.variables = [
            keras.Variable(separability.made_weights(number, shape), dtype=precision, name=f"tried{number}")
            for number, shape in enumerate(SHAPES)]
        self.owned = owned
        if owned is not None:
            object.__setattr__(optimizer, "share", Share(self.variables, owned))
            object.__setattr__(optimizer, "__class__", _sharing_class(type(optimizer)))
        optimizer.build(self.variables)
        self.weights = {number: [self._value_of(number)] for number in
                        (range(len(SHAPES)) if owned is None else owned)}
        for step in range(len(separability.SCALES)):
            optimizer.apply([tf.constant(separability.made_gradient(number, step, shape), precision)
                             for number, shape in enumerate(SHAPES)], self.variables)
            for number, values in self.weights.items():
                values.append(self._value_of(number))
        self.scalars = {one.name: one.numpy() for one in optimizer.variables if len(one.shape) == 0}

    def _value_of(self, number: int) -> Any:
        value = self.variables[number].numpy().reshape(-1)
        return value if self.owned is None else value[self.owned[number].start : self.owned[number].stop]


class Share:
    """What a rank owns of the variables that are tried, as ``ShardedUpdater`` has it."""

    def __init__(self, variables: Sequence[Any], owned: dict[int, Shard]) -> None:
        self.pieces = {id(as_tf(variables[number])): piece for number, piece in owned.items()}
        self.stand_ins = ProxyVariables()
        for number, piece in owned.items():
            if piece.numel < numel_of(variables[number]):
                self.stand_ins.make_proxy(variables[number], piece)

    def owns_variable(self, variable: Any) -> bool:
        """Whether the variable, or a piece of it, is updated here."""
        return id(as_tf(variable)) in self.pieces

    def update_owned(self, update: Any, gradients: Sequence[Any], variables: Sequence[Any],
                     rate: Any) -> None:
        """Update what is owned; its new values are the variables'."""
        mine = [(gradient, one) for gradient,
                one in zip(gradients, variables, strict=True) if self.owns_variable(one)]
        shown = [self.stand_ins.shard_view(gradient, one) for gradient, one in mine]
        if shown:
            update([gradient for gradient, _ in shown], [one for _, one in shown], rate)
        for _, one in mine:
            stand_in = self.stand_ins.proxy_of(one)
            if stand_in is not None:
                whole, piece = as_tf(one), self.pieces[id(as_tf(one))]
                whole.assign(put_back(whole, piece, tf.reshape(stand_in, [-1]), whole.shape.as_list()))


@functools.cache
def _sharing_class(kind: type) -> type:
    """A subclass whose state and update are of ``self.share`` only."""
    base: Any = kind

    class Sharing(base):
        def add_variable_from_reference(self, reference_variable: Any, name: str | None = None,
                                        initializer: Any = "zeros") -> Any:
            if not self.share.owns_variable(reference_variable):
                return self.add_variable(shape=(0,), dtype=reference_variable.dtype, name=name)
            stand_in = self.share.stand_ins.proxy_of(reference_variable)
            return super().add_variable_from_reference(
                reference_variable if stand_in is None else stand_in, name=name, initializer=initializer)

        def _var_key(self, variable: Any) -> Any:
            return super()._var_key(self.share.stand_ins.variable_of(variable))

        def _backend_update_step(self, grads: Sequence[Any], trainable_variables: Sequence[Any],
                                 learning_rate: Any) -> None:
            self.share.update_owned(super()._backend_update_step, grads, trainable_variables, learning_rate)

    return Sharing


def _is_unequal(number: int, one: Run, other: Run) -> bool:
    pairs = zip(one.weights[number], other.weights[number], strict=True)
    return not all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)
