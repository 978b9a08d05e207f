"""Models, data and small helpers of the SENG tests under Keras."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf

from hvd_ext.tensorflow.collectives import Collectives

L = keras.layers
LAM = 0.25
EXACT = {"damping": LAM, "sketch": None}
IMPLICIT = {**EXACT, "explicit_threshold": 0, "rank": 10**6, "uc": "exact"}


class Alone(Collectives):
    """One rank, in a process where Horovod was not initialised."""

    size, rank, elastic = 1, 0, False

    def if_distributed(self, communicate, alone):
        return alone()


class Shared(keras.Model):
    """A subclassed model that uses one layer twice."""

    def __init__(self):
        super().__init__()
        self.twice = L.Dense(5, activation="tanh")
        self.out = L.Dense(3)

    def call(self, x):
        return self.out(self.twice(self.twice(x)))


class Evaluating(keras.Model):
    """A subclassed model whose batch norm is trained and normalises with its moving averages."""

    def __init__(self):
        super().__init__()
        self.norm = L.BatchNormalization(moving_mean_initializer="ones", moving_variance_initializer=(
            keras.initializers.Constant(2.5)))
        self.out = L.Dense(2)

    def call(self, x):
        return self.out(tf.reduce_mean(self.norm(x, training=False), axis=1))


class Tokens(keras.Layer):
    """Numbers as few different integers."""

    def call(self, x):
        return keras.ops.cast(keras.ops.abs(x) * 3, "int32")


class Attention(keras.Layer):
    """Attention of a sequence to itself, and what makes it."""

    def __init__(self):
        super().__init__()
        self.attention = L.MultiHeadAttention(2, 3)

    def build(self, shape):
        self.attention.build(shape, shape)

    def call(self, x):
        return self.attention(x, x)


class TiedEmbeddingBlock(L.Dense):
    """A dense layer with the kernel of another."""

    def __init__(self, other):
        super().__init__(other.units, use_bias=False, activation="tanh")
        self.__dict__["other"] = other

    def build(self, shape):
        self._kernel, self.bias, self.built = self.other._kernel, None, True


def tied():
    first = L.Dense(5, use_bias=False, activation="tanh")
    return sequential((5,), first, TiedEmbeddingBlock(first))


def moved(there, back, *between):
    """Layers that see a sequence (3, 5) in another arrangement, and the way back."""
    return sequential((3, 5), L.Lambda(there), *between, L.Lambda(back))


def contiguous(*between):
    return moved(lambda x: keras.ops.reshape(x, (-1, 5)), lambda x: keras.ops.reshape(x, (-1, 3, 4)),
                 *between)


def strided(*between):
    return moved(lambda x: keras.ops.reshape(keras.ops.transpose(x, (1, 0, 2)), (-1, 5)),
                 lambda x: keras.ops.transpose(keras.ops.reshape(x, (3, -1, 4)), (1, 0, 2)), *between)


def time_major(*between):
    return moved(lambda x: keras.ops.transpose(x, (1, 0, 2)), lambda x: keras.ops.transpose(x, (1, 0, 2)),
                 *between)


def einsum(shape, equation, out, bias=None):
    return sequential(shape, L.EinsumDense(equation, out, bias_axes=bias, activation="tanh")), shape


def sequential(shape, *layers):
    return keras.Sequential([keras.Input(shape), *layers, L.Flatten(), L.Dense(2)])


MODELS = {
    "dense": lambda: (sequential((5,), L.Dense(4, activation="tanh")), (5,)),
    "dense of sequences": lambda: (sequential((3, 5), L.Dense(4, use_bias=False)), (3, 5)),
    "conv1d": lambda: (sequential((7, 2), L.Conv1D(4, 3, strides=2, activation="relu")), (7, 2)),
    "conv2d same": lambda: (sequential((5, 5, 2), L.Conv2D(4, 3, padding="same")), (5, 5, 2)),
    "conv2d dilated": lambda: (sequential((6, 6, 2), L.Conv2D(3, 2, dilation_rate=2)), (6, 6, 2)),
    "conv2d grouped": lambda: (sequential((5, 5, 4), L.Conv2D(6, 3, groups=2)), (5, 5, 4)),
    "conv3d": lambda: (sequential((3, 3, 3, 2), L.Conv3D(2, 2)), (3, 3, 3, 2)),
    "depthwise": lambda: (sequential((5, 5, 3), L.DepthwiseConv2D(2, depth_multiplier=2)),
                          (5, 5, 3)),
    "transposed": lambda: (sequential((3, 3, 2), L.Conv2DTranspose(3, 3, strides=2)), (3, 3, 2)),
    "transposed, padded": lambda: (sequential((3, 2, 2), L.Conv2DTranspose(
        2, 3, strides=2, padding="same", output_padding=1)), (3, 2, 2)),
    "transposed, dilated": lambda: (sequential((4, 2), L.Conv1DTranspose(3, 2, dilation_rate=2)),
                                    (4, 2)),
    "layer norm": lambda: (sequential((6, 4), L.LayerNormalization()), (6, 4)),
    "layer norm of two axes": lambda: (sequential((3, 4), L.LayerNormalization(axis=[1, 2])),
                                       (3, 4)),
    "group norm": lambda: (sequential((3, 3, 4), L.GroupNormalization(2)), (3, 3, 4)),
    "batch norm, evaluating": lambda: (_built(Evaluating(), (4, 3)), (4, 3)),
    "shared": lambda: (_built(Shared(), (5,)), (5,)),
    "rms norm": lambda: (sequential((6, 4), L.RMSNormalization()), (6, 4)),
    "separable": lambda: (sequential((5, 5, 2), L.SeparableConv2D(4, 3, depth_multiplier=2,
                                                                  activation="relu")), (5, 5, 2)),
    "separable 1d": lambda: (sequential((7, 2), L.SeparableConv1D(3, 3, strides=2, padding="same",
                                                                  use_bias=False)), (7, 2)),
    "embedding": lambda: (sequential((4,), Tokens(), L.Embedding(9, 3)), (4,)),
    "embedding of one": lambda: (sequential((), Tokens(), L.Embedding(9, 3)), ()),
    "einsum dense": lambda: einsum((3, 5), "abc,cd->abd", (3, 4), "d"),
    "einsum dense, to heads": lambda: einsum((3, 5), "abc,cde->abde", (3, 2, 3), "de"),
    "einsum dense, from heads": lambda: einsum((3, 2, 4), "abcd,cde->abe", (3, 5), "e"),
    "einsum dense, out first": lambda: einsum((5,), "ab,cb->ac", 4),
    "einsum dense, a kernel each": lambda: einsum((3, 5), "abc,bcd->abd", (3, 4), "bd"),
    "einsum dense, any rank": lambda: einsum((3, 2, 5), "...x,xy->...y", 4, "y"),
    "attention": lambda: (sequential((4, 5), Attention()), (4, 5)),
    "tied": lambda: (tied(), (5,)),
    "rows": lambda: (contiguous(L.Dense(4, activation="tanh"), L.LayerNormalization()), (3, 5)),
    "strided rows": lambda: (strided(L.Dense(4, activation="tanh"), L.RMSNormalization()), (3, 5)),
    "time-major": lambda: (time_major(L.Dense(5, activation="tanh"), L.LayerNormalization()), (3, 5)),
}


def _built(model, shape):
    model(tf.zeros((1, *shape)))
    return model


def batch(shape, rho=6, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rho, *shape)).astype("float32"),
            rng.integers(0, 2, rho))


def loss_of(model, x, y):
    scores = model(x, training=True)
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)(y, scores)


def gradient(model, x, y):
    with tf.GradientTape() as tape:
        loss = loss_of(model, x, y)
    return [tf.convert_to_tensor(g) for g in tape.gradient(loss, model.trainable_variables)]


def per_sample(model, x, y):
    """Each variable's gradient of each sample's own loss: no use of any layer's structure."""
    rows = [[g.numpy() for g in gradient(model, x[i:i + 1], y[i:i + 1])] for i in range(len(x))]
    return [np.stack(of_variable) for of_variable in zip(*rows, strict=True)]


def places(seng, variables):
    """Each layer's variables by number."""
    number = {id(v.value): k for k, v in enumerate(variables)}
    return [[number[id(w.value)] for w in state.layer.weights.values()]
            for state in seng.states]


def flat(arrays):
    return np.concatenate([np.asarray(a, np.float64).ravel() for a in arrays])


def u_of(state):
    """U (n, rho) that a layer's curvature stands for."""
    parts = []
    for block in state.blocks:
        if hasattr(block, "u"):
            parts.append(np.asarray(block.u, np.float64))
            continue
        u = np.einsum("gori,gari->iago", np.asarray(block.g, np.float64), np.asarray(block.a))
        parts += [part.reshape(len(u), -1) for part in (u[:, :block.width], u[:, block.width:])]
    return np.concatenate(parts, axis=1).T


def as_torch(weight):
    """A kernel in PyTorch's layout."""
    order = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}[weight.ndim]
    return np.ascontiguousarray(weight.transpose(order))
