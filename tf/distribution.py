"""What a distributed optimizer knows beyond the wrapped one, and which optimizers can be one."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from hvd_ext.tensorflow import keras_hooks
from hvd_ext.tensorflow.checkpoint import ACCUMULATOR
from hvd_ext.tensorflow.reducers.base import Reducer, divide_by_ranks
from hvd_ext.tensorflow.report import report
from hvd_ext.tensorflow.server import Server, state_bytes
from hvd_ext.tensorflow.variables import as_tf, mark_per_rank

BASE = keras.Optimizer
# What a class must not override for its gradients to be met between accumulation and clipping.
PASSED_THROUGH = ("apply", "_backend_apply_gradients", "_clip_gradients")


class Distribution:
    """What a distributed optimizer knows beyond the wrapped one."""

    def __init__(self, optimizer: Any, reducer: Reducer, *, passes: int, average_passes: bool,
                 scale_local: bool, sparse_as_dense: bool, preconditioner: Any,
                 server: Server | None, where: str | None, reset_per_rank_state: bool) -> None:
        self.reducer = reducer
        self.collectives = reducer.collectives
        self.prefix = reducer.prefix
        self.passes = passes
        self.average_passes = average_passes
        self.scale_local = scale_local
        self.sparse_as_dense = sparse_as_dense
        self.preconditioner = preconditioner
        self.server = server
        self.where = where
        self.server_stamp: Any = None
        self.reset_per_rank_state = reset_per_rank_state
        self.local: set[int] = set()
        self.counter: Any = None
        self.sums: dict[str, Any] = {}
        self.standard = passes_through(optimizer)
        self.applying: list[Any] | None = None
        self.good: Any = None  # of the update under way: whether it may be taken, None if it may
        self.reduced = False
        self.plain_count: int | None = None  # variables that the wrapped optimizer has itself
        self.references: dict[int, tuple[Any, str]] = {}  # of the optimizer's variables, by id
        self.gathered: dict[str, Any] | None = None  # what is being saved in place of them

    def build(self, optimizer: Any, variables: Sequence[Any]) -> None:
        """Make the state that reduction and accumulation over passes need, in the optimizer."""
        self.plain_count = len(optimizer.variables)
        make = functools.partial(make_state, optimizer)
        shared = [variable for variable in variables if id(as_tf(variable)) not in self.local]
        self.reducer.build(shared, make)
        if self.server is not None:
            self.server_stamp = make((2,), "int64", "rank_and_ranks_of_server", True)
        self.stamp_rank()
        accumulated = getattr(optimizer, "_accumulated_gradients", ())
        for total, variable in zip(accumulated, variables, strict=False):
            self.references[id(as_tf(total))] = variable, ACCUMULATOR
        if self.passes > 1:
            parts = self.reducer.parts_shape()
            self.counter = make((), "int64", "passes_done", False)
            for number, variable in enumerate(variables):
                key = optimizer._var_key(variable)
                self.sums[key] = make((*parts, *variable.shape), variable.dtype,
                                      f"passes_{number}", True)

    def stamp_rank(self) -> None:
        """Say in the state that it is this rank's."""
        for stamp in (self.server_stamp, self.reducer.stamp):
            if stamp is not None:
                stamp.assign([self.collectives.rank, self.collectives.size])

    def reduce(self, optimizer: Any, gradients: Sequence[Any],
               variables: Sequence[Any]) -> tuple[list[Any], Any]:
        """The gradients over all ranks, and whether the step may be taken (None: always).

        Those of local variables stay, scaled by 1/M if asked.
        """
        keras_hooks.refuse_xla("hvd.DistributedOptimizer")
        self.reduced = True
        result = list(gradients)
        far = [index for index, variable in enumerate(variables)
               if id(as_tf(variable)) not in self.local]
        owners = [variables[index] for index in far]
        inputs = self.reducer.inputs(optimizer)
        reduced, good = self.reducer([gradients[index] for index in far], owners, **inputs)
        reduced = precondition(self.preconditioner, reduced, owners, self.reducer)
        for index, gradient in zip(far, reduced, strict=True):
            result[index] = gradient
        if self.scale_local and self.local:
            for index in set(range(len(result))) - set(far):
                result[index] = divide_by_ranks(result[index], self.collectives)
        return result, good

    def report(self, optimizer: Any) -> dict[str, Any]:
        """Figures of the last step; "server" where the argument was given."""
        found = report(self.reducer, self.preconditioner)
        if self.where is None:
            return found
        held = [as_tf(variable) for variable in optimizer.variables
                if id(as_tf(variable)) in self.references]
        if self.server is not None:
            return {**found, "server": self.server.report(held)}
        elements = sum(int(tf.TensorShape(variable.shape).num_elements())
                       for variable in self.reducer.variables)
        return {**found, "server": {"where": self.where, "owned_elements": elements,
                                    "elements": elements, "largest_share": elements,
                                    **state_bytes(held)}}

    def loss_scaled_by(self, optimizer: Any) -> None:
        """Tell the preconditioner whose ``scale_loss`` the loss goes through."""
        if self.preconditioner is not None:
            self.preconditioner.scaled_by(optimizer)

    def pass_over(self, over: Any = True) -> None:
        """Tell the preconditioner that a pass is over (if ``over``), applied or not."""
        if self.preconditioner is not None:
            self.preconditioner.pass_over(over)

    def if_good(self, change: Callable[[], None]) -> None:
        """Change weights, unless the step of gradients that Keras accumulated is to be skipped."""
        if self.good is None:
            change()
        else:
            keras.ops.cond(self.good, change, lambda: None)

    @contextlib.contextmanager
    def application(self) -> Iterator[None]:
        """Around the wrapped ``apply``: an optimizer that reduced nothing is an error."""
        self.reduced = False
        yield
        if not self.reduced:
            raise RuntimeError("the wrapped optimizer updated its variables without passing the "
                               "gradients on to be reduced; please report this optimizer")


def precondition(preconditioner: Any, gradients: list[Any], variables: Sequence[Any],
                 reducer: Reducer) -> list[Any]:
    """Reduced gradients turned into directions; as they are without a preconditioner."""
    if preconditioner is None:
        return gradients
    collectives = reducer.collectives
    with collectives.traffic.section():
        return list(preconditioner.precondition(gradients, variables,
                                                collectives.counted_as("curvature")))


def passes_through(optimizer: Any) -> bool:
    """Whether its class leaves the way of a gradient from ``apply`` to clipping as Keras has it."""
    return all(getattr(type(optimizer), name) is getattr(BASE, name) for name in PASSED_THROUGH)


def make_state(optimizer: Any, shape: Sequence[int], dtype: Any, name: str,
               per_rank: bool) -> tf.Variable:
    """A variable of zeros that the optimizer's checkpoints hold."""
    variable = optimizer.add_variable(shape=tuple(shape), name=name,
                                      dtype=tf.as_dtype(dtype).name)
    return as_tf(mark_per_rank(variable) if per_rank else variable)


def check_extension(optimizer: Any, what: str) -> None:
    """Refuse optimizers that the extension ``what`` cannot serve.

    Raises:
        NotImplementedError: the optimizer has its own way of a gradient.
    """
    if not passes_through(optimizer):
        raise NotImplementedError(
            f"{what} with {type(optimizer).__name__}, which handles gradients in a way of its own: "
            "wrap a plain optimizer, or leave the extension out")
