"""What the race trains on: digits drawn larger and distorted, and the text of Python's own help."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pydoc_data import topics

import numpy as np
from scipy.ndimage import affine_transform
from sklearn.datasets import load_digits

SIZE = 32
DIGITS_TRAINED_ON = 1400
# Of Python 3.11.7. Other releases have other help, and other losses.
TEXT_SHA256 = "2a95af4ac93f5b719944030ce3769070ddf827d847cba42192afa8da989e5dc4"


@dataclass(frozen=True)
class Split:
    """Inputs and labels, to train on and to measure on."""

    x: np.ndarray
    y: np.ndarray
    held_out_x: np.ndarray
    held_out_y: np.ndarray


@functools.cache
def drawn_digits() -> Split:
    """scikit-learn's digits at 32 × 32, turned, sheared, scaled and moved; none is in both parts.

    Returns:
        float32 images (samples, 1, 32, 32) of mean 0 and variance 1, int64 labels: 5,600 to train on
        (four of each digit), 794 to measure on (two of each).
    """
    rng = np.random.default_rng(0)
    digits = load_digits()
    order = rng.permutation(len(digits.target))
    parts = []
    for rows, copies in ((order[:DIGITS_TRAINED_ON], 4), (order[DIGITS_TRAINED_ON:], 2)):
        rows = np.repeat(rows, copies)
        parts += [np.stack([_distorted(digits.images[row], rng) for row in rows]), digits.target[rows]]
    mean, deviation = parts[0].mean(), parts[0].std()
    x, held_out = (((part - mean) / deviation)[:, None].astype("float32") for part in parts[::2])
    return Split(x, parts[1].astype("int64"), held_out, parts[3].astype("int64"))


def _distorted(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    angle, shear = rng.uniform(-0.3, 0.3, 2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.array([[1.0, shear], [0.0, 1.0]]) * rng.uniform(0.9, 1.3) * len(image) / SIZE
    centre = (len(image) - 1) / 2
    offset = centre - matrix @ ((SIZE - 1) / 2 + rng.uniform(-3.0, 3.0, 2))
    drawn = affine_transform(image, matrix, offset, output_shape=(SIZE, SIZE), order=1)
    return drawn + rng.normal(0.0, 0.5, drawn.shape)


@functools.cache
def help_text() -> Split:
    """The topics of Python's ``help()`` as numbers of characters, in the order of their names.

    Returns:
        ``x`` and ``held_out_x``, int64: the first nine tenths and the last; ``y`` and ``held_out_y``
        the same one character on.
    """
    text = text_of_topics()
    kinds = sorted(set(text))
    numbers = np.array([kinds.index(one) for one in text])
    cut = len(numbers) * 9 // 10
    train, held_out = numbers[:cut], numbers[cut:]
    return Split(train[:-1], train[1:], held_out[:-1], held_out[1:])


def text_of_topics() -> str:
    """All topics, one after another."""
    return "\n".join(topics.topics[name] for name in sorted(topics.topics))


def is_the_measured_text() -> bool:
    """Whether this Python has the help that the figures in the docs were made with."""
    return hashlib.sha256(text_of_topics().encode()).hexdigest() == TEXT_SHA256
