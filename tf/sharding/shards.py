"""Pieces of variables: which optimizers take them, and the variables that stand in for them.

Matrices are cut between rows, so that a sparse gradient can be cut too; a piece of one is a matrix. Pieces
of all else are 1-D.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm, prod
from typing import Any

import keras
import tensorflow as tf

from hvd_ext.sharding import Server, Shard, orthogonalising_cost
from hvd_ext.sharding.shards import ALIGNED
from hvd_ext.tensorflow.amsgrad import AMSGrad
from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.muon import matrix_shape
from hvd_ext.tensorflow.variables import as_tf, name_of

# What these do to an element depends on nothing but that element's gradient and state, and on numbers.
ELEMENTWISE = (
    keras.optimizers.SGD, keras.optimizers.Adam, keras.optimizers.AdamW, keras.optimizers.Nadam,
    keras.optimizers.Adamax, keras.optimizers.RMSprop, keras.optimizers.Adagrad, keras.optimizers.Adadelta,
    keras.optimizers.Ftrl, keras.optimizers.Lion, AMSGrad,
)


def is_elementwise(optimizer: type) -> bool:
    """Whether the update of a class of optimizers may run on a piece of a variable.

    A class of yours, also one derived from these, says so with the attribute ``elementwise = True``.
    """
    return optimizer in ELEMENTWISE or bool(vars(optimizer).get("elementwise", False))


def cuts_variables(server: Server, optimizer: Any, collectives: Collectives) -> bool:
    """Whether variables are cut into pieces under a server.

    Not for what is of whole variables: ``clipnorm``, averages of weights, compressed replies, and the
    state that any number of ranks must be able to take over under Horovod elastic.
    """
    return (server.kind == "sharded" and server.downlink is None and is_elementwise(type(optimizer))
            and not optimizer.clipnorm and not optimizer.use_ema and not collectives.is_elastic)


def update_cost(optimizer: Any, variable: Any) -> int:
    """What owners are balanced by: elements; the cost of orthogonalising where Muon does that."""
    if isinstance(optimizer, keras.optimizers.Muon) and not optimizer._should_use_adamw(variable):
        return orthogonalising_cost(matrix_shape(variable.shape))
    return numel_of(variable)


def numel_of(variable: Any) -> int:
    """How many elements a variable has."""
    return int(tf.TensorShape(variable.shape).num_elements())


def row_of(shape: Sequence[int]) -> int:
    """How many elements a row has, of which the first axis counts."""
    return max(1, prod(shape[1:]))


def unit_of(shape: Sequence[int]) -> int:
    """The number of elements at whose multiples a matrix is cut: whole rows, and aligned."""
    return lcm(row_of(shape), ALIGNED)


class ProxyVariables:
    """Of variables that this rank owns a piece of, variables that the wrapped optimizer sees instead."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Shard, tf.Variable]] = {}
        self._whole: dict[int, Any] = {}  # what a stand-in stands for, by the stand-in

    def make_proxy(self, variable: Any, piece: Shard) -> None:
        """Let a variable of its own hold the piece while it is updated."""
        name = name_of(variable).replace("/", "_").replace(":", "_")
        shape = tuple(variable.shape)
        rows = (piece.numel // row_of(shape), *shape[1:]) if len(shape) == 2 else (piece.numel,)
        made = tf.Variable(tf.zeros(rows, as_tf(variable).dtype), trainable=False, name=name)
        self._made[id(as_tf(variable))] = piece, made
        self._whole[id(made)] = variable

    def proxy_of(self, variable: Any) -> tf.Variable | None:
        """The variable's stand-in, if it has one."""
        return self._made.get(id(as_tf(variable)), (None, None))[1]

    def shard_of(self, variable: Any) -> Shard | None:
        """The piece that the variable's stand-in holds."""
        return self._made.get(id(as_tf(variable)), (None, None))[0]

    def variable_of(self, variable: Any) -> Any:
        """What a stand-in stands for; anything else as it is."""
        return self._whole.get(id(as_tf(variable)), variable)

    def shard_view(self, gradient: Any, variable: Any) -> tuple[Any, Any]:
        """What the wrapped optimizer is to see of a gradient and its variable, with the weights of now."""
        if id(as_tf(variable)) not in self._made:
            # Keras refuses tensors of several graphs, as in the branch of a step that may be skipped.
            return tf.nest.map_structure(tf.identity, gradient, expand_composites=True), variable
        piece, stand_in = self._made[id(as_tf(variable))]
        stand_in.assign(tf.reshape(of_flat(as_tf(variable).read_value(), piece), stand_in.shape))
        if isinstance(gradient, tf.IndexedSlices):
            return _rows_of(gradient, piece, variable, stand_in), stand_in
        return tf.reshape(of_flat(gradient, piece), stand_in.shape), stand_in


def _rows_of(gradient: tf.IndexedSlices, piece: Shard, variable: Any, stand_in: tf.Variable
             ) -> tf.IndexedSlices:
    """Of a sparse gradient the rows that are the piece's.

    Raises:
        ValueError: the variable is not cut between rows.
    """
    if len(variable.shape) > 2:
        raise ValueError(f"the gradient of {name_of(variable)} is a tf.IndexedSlices of more than two "
                         "axes, which server='sharded' cannot cut; pass sparse_as_dense=True")
    first = piece.start // row_of(variable.shape)
    own = tf.logical_and(gradient.indices >= first, gradient.indices < first + stand_in.shape[0])
    return tf.IndexedSlices(tf.boolean_mask(gradient.values, own),
                            tf.boolean_mask(gradient.indices, own) - first,
                            tf.constant(stand_in.shape.as_list(), gradient.indices.dtype))


def of_flat(tensor: tf.Tensor, piece: Shard) -> tf.Tensor:
    """A piece's elements of a tensor of the variable's shape, 1-D."""
    return tf.reshape(tensor, [-1])[piece.start : piece.stop]


def put_back(tensor: tf.Tensor, piece: Shard, values: tf.Tensor, shape: Sequence[int]) -> tf.Tensor:
    """A tensor of a variable's ``shape``, which it need not know, with other elements in a piece of it."""
    if piece.numel == prod(shape):
        return tf.reshape(values, shape)
    flat = tf.reshape(tensor, [-1])
    return tf.reshape(tf.concat([flat[: piece.start], values, flat[piece.stop :]], axis=0), shape)
