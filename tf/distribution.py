"""What a distributed optimizer knows beyond the wrapped one, and which optimizers can be one."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvd_ext.tensorflow import keras_hooks
from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.reduce import Reducer, divide_by_ranks
from hvd_ext.tensorflow.server import Server
from hvd_ext.tensorflow.variables import as_tf, mark_per_rank

BASE = keras.Optimizer
# What a class must not override for its gradients to be met between accumulation and clipping.
PASSED_THROUGH = ("apply", "_backend_apply_gradients", "_clip_gradients")


class Distribution:
    """What a distributed optimizer knows beyond the wrapped one."""

    def __init__(self, optimizer: Any, reducer: Reducer, *, passes: int, average_passes: bool,
                 scale_local: bool, sparse_as_dense: bool, preconditioner: Any,
                 server: Server | None, reset_per_rank_state: bool) -> None:
        self.reducer = reducer
        self.collectives = reducer.collectives
        self.prefix = reducer.prefix
        self.passes = passes
        self.average_passes = average_passes
        self.scale_local = scale_local
        self.sparse_as_dense = sparse_as_dense
        self.preconditioner = preconditioner
        self.server = server
        self.server_stamp: Any = None
        self.reset_per_rank_state = reset_per_rank_state
        self.local: set[int] = set()
        self.counter: Any = None
        self.sums: dict[str, Any] = {}
        self.standard = passes_through(optimizer)
        self.applying: list[Any] | None = None
        self.reduced = False

    def build(self, optimizer: Any, variables: Sequence[Any]) -> None:
        """Make the state that reduction and accumulation over passes need, in the optimizer."""
        make = functools.partial(make_state, optimizer)
        shared = [variable for variable in variables if id(as_tf(variable)) not in self.local]
        self.reducer.build(shared, make)
        if self.server is not None:
            self.server_stamp = make((2,), "int64", "rank_and_ranks_of_server", True)
            self.server_stamp.assign([self.collectives.rank, self.collectives.size])
        if self.passes > 1:
            parts = self.reducer.parts_shape()
            self.counter = make((), "int64", "passes_done", False)
            for number, variable in enumerate(variables):
                key = optimizer._var_key(variable)
                self.sums[key] = make((*parts, *variable.shape), variable.dtype,
                                      f"passes_{number}", True)

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
        if self.preconditioner is not None:
            reduced = self.preconditioner.precondition(reduced, owners, self.collectives)
        for index, gradient in zip(far, reduced, strict=True):
            result[index] = gradient
        if self.scale_local and self.local:
            for index in set(range(len(result))) - set(far):
                result[index] = divide_by_ranks(result[index], self.collectives)
        return result, good

    def loss_scaled_by(self, optimizer: Any) -> None:
        """Tell the preconditioner whose ``scale_loss`` the loss goes through."""
        if self.preconditioner is not None:
            self.preconditioner.scaled_by(optimizer)

    def pass_over(self, over: Any = True) -> None:
        """Tell the preconditioner that a pass is over (if ``over``), applied or not."""
        if self.preconditioner is not None:
            self.preconditioner.pass_over(over)

    @contextlib.contextmanager
    def application(self) -> Iterator[None]:
        """Around the wrapped ``apply``: an optimizer that reduced nothing is an error."""
        self.reduced = False
        yield
        if not self.reduced:
            raise RuntimeError("the wrapped optimizer updated its variables without passing the "
                               "gradients on to be reduced; please report this optimizer")


def passes_through(optimizer: Any) -> bool:
    """Whether its class leaves the way of a gradient from ``apply`` to clipping as Keras has it."""
    return all(getattr(type(optimizer), name) is getattr(BASE, name) for name in PASSED_THROUGH)


def make_state(optimizer: Any, shape: Sequence[int], dtype: Any, name: str,
               per_rank: bool) -> tf.Variable:
    """A variable of zeros that the optimizer's checkpoints hold."""
    variable = optimizer.add_variable(shape=tuple(shape), name=name,
                                      dtype=tf.as_dtype(dtype).name)
    return as_tf(mark_per_rank(variable) if per_rank else variable)


def check_stamp(saved: Any, collectives: Collectives, what: str = "") -> None:
    """Refuse state that was saved by another rank, or on another number of ranks.

    Args:
        saved: the (rank, ranks) that the file holds.
        what: the argument whose state cannot be started anew, if that is so.

    Raises:
        ValueError: the state is another rank's.
    """
    rank, ranks = (int(number) for number in np.asarray(saved))
    if (rank, ranks) == (collectives.rank, collectives.size):
        return
    way = "load the model's weights alone" if what else "start that state anew with " \
        "reset_per_rank_state=True"
    raise ValueError(
        f"the optimizer's state in the file is that of rank {rank} of {ranks}, this is rank "
        f"{collectives.rank} of {collectives.size}: save and load one file a rank, or {way}")


def check_extension(optimizer: Any, what: str, *, takes_accumulated: bool) -> None:
    """Refuse optimizers that the extension ``what`` cannot serve.

    Raises:
        NotImplementedError: the optimizer has its own way of a gradient.
        ValueError: it accumulates gradients where the extension needs each.
    """
    if not passes_through(optimizer):
        raise NotImplementedError(
            f"{what} with {type(optimizer).__name__}, which handles gradients in a way of its own: "
            "wrap a plain optimizer, or leave the extension out")
    if optimizer.gradient_accumulation_steps and not takes_accumulated:
        raise ValueError(
            f"{what} with gradient_accumulation_steps={optimizer.gradient_accumulation_steps}: "
            "leave it out and pass backward_passes_per_step to DistributedOptimizer")
