"""The five problems of the race: a model, its batches, its loss, and the value that is to be reached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from benchmarks.autoencoder_torch import autoencoder
from benchmarks.seng_race.data import drawn_digits, help_text

CONTEXT = 64
Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Problem:
    """A model to train: ``draw`` gives a batch, ``loss`` its mean loss, ``value`` what is measured."""

    model: nn.Module
    draw: Callable[[np.random.Generator], Batch]
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    measure: Batch

    def value(self) -> float:
        """The loss over all that is measured, in evaluation mode."""
        self.model.eval()
        with torch.no_grad():
            total = sum(len(x) * float(self.loss(self.model(x), y))
                        for x, y in zip(*(part.split(512) for part in self.measure), strict=True))
        self.model.train()
        return total / len(self.measure[0])


@dataclass(frozen=True)
class Workload:
    """A problem and the race's rules for it.

    Attributes:
        shows: what it is.
        measured: which loss is looked at.
        target: a run is done when this loss is at most so much.
        seconds: most time of a run on the clock, ``steps`` most steps; ``every`` so many the loss is looked
            at, off the clock.
        seng: SENG's settings that follow from the model and are not tuned.
    """

    shows: str
    measured: str
    target: float
    seconds: float
    steps: int
    every: int
    make: Callable[[int], Problem]
    seng: dict[str, Any] = field(default_factory=dict)


def squared_error(output: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Half the summed squared error of a sample, averaged."""
    return 0.5 * (output - wanted).square().sum() / len(output)


def fixed_rows(model: nn.Module, x: np.ndarray, y: np.ndarray, batch: int, loss: Any,
               measure: tuple[np.ndarray, np.ndarray]) -> Problem:
    """Batches of rows, drawn without replacement within an epoch."""
    tensors = torch.from_numpy(x), torch.from_numpy(y)
    order = np.empty(0, int)

    def draw(rng: np.random.Generator) -> Batch:
        nonlocal order
        if order.size < batch:
            order = rng.permutation(len(x))
        picked, order = order[:batch], order[batch:]
        return tensors[0][picked], tensors[1][picked]

    return Problem(model, draw, loss, (torch.from_numpy(measure[0]), torch.from_numpy(measure[1])))


def make_autoencoder(seed: int) -> Problem:
    """The deep autoencoder of ``seng_autoencoder``."""
    digits = (load_digits().data / 16.0).astype("float32")
    return fixed_rows(autoencoder(seed), digits, digits, 200, squared_error, (digits, digits))


def make_regression(seed: int) -> Problem:
    """A function with a slow and a fast part, from 512 points, all of them in each batch."""
    x = np.linspace(-1.0, 1.0, 512, dtype="float32")[:, None]
    y = np.sin(2.0 * np.pi * x) + 0.3 * np.sin(12.0 * np.pi * x)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    return fixed_rows(model, x, y, len(x), squared_error, (x, y))


def make_convolutions(seed: int) -> Problem:
    """Three convolutions with batch norm on the drawn digits."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False),
                   nn.BatchNorm2d(outputs), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return _images(model)


class ViT(nn.Module):
    """Patches of 8 × 8, two encoder layers before which a norm stands, the mean over patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 64, 8, stride=8)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 16, 64))
        self.encoder = nn.TransformerEncoder(_layer(), 2, nn.LayerNorm(64), enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(images).flatten(2).mT + self.positions
        return self.head(self.encoder(tokens).mean(1))


class Characters(nn.Module):
    """A language model of characters: two encoder layers under a causal mask."""

    def __init__(self, kinds: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(kinds, 64)
        self.positions = nn.Parameter(0.02 * torch.randn(1, CONTEXT, 64))
        self.encoder = nn.TransformerEncoder(_layer(), 2, nn.LayerNorm(64), enable_nested_tensor=False)
        self.head = nn.Linear(64, kinds)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        tokens = self.characters(numbers) + self.positions
        return self.head(self.encoder(tokens, mask=self.mask, is_causal=True)).mT


def _layer() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, activation="gelu", batch_first=True,
                                      norm_first=True)


def make_vit(seed: int) -> Problem:
    """A small vision transformer on the drawn digits."""
    torch.manual_seed(seed)
    return _images(ViT())


def _images(model: nn.Module) -> Problem:
    digits = drawn_digits()
    return fixed_rows(model, digits.x, digits.y, 64, functional.cross_entropy,
                      (digits.held_out_x, digits.held_out_y))


def make_text(seed: int) -> Problem:
    """A small language model on Python's help, 32 pieces of 64 characters a batch."""
    text = help_text()
    torch.manual_seed(seed)
    x, y = torch.from_numpy(text.x), torch.from_numpy(text.y)
    pieces = np.arange(CONTEXT)

    def draw(rng: np.random.Generator) -> Batch:
        picked = rng.integers(0, len(x) - CONTEXT, 32)[:, None] + pieces
        return x[picked], y[picked]

    starts = np.linspace(0, len(text.held_out_x) - CONTEXT, 256).astype(int)[:, None] + pieces
    measure = torch.from_numpy(text.held_out_x[starts]), torch.from_numpy(text.held_out_y[starts])
    return Problem(Characters(int(x.max()) + 1), draw, functional.cross_entropy, measure)


LINEAR_ONLY = {"explicit_threshold": 0, "sketch": None, "uc": "exact"}
WORKLOADS = {
    "autoencoder": Workload("deep autoencoder, digits 8 × 8, batch 200", "training loss", 0.5, 10, 4000, 10,
                            make_autoencoder, {**LINEAR_ONLY, "subsample": 50}),
    "regression": Workload("perceptron, a function of two scales, batch 512 of 512", "training loss",
                           1e-3, 8, 6000, 10, make_regression, {**LINEAR_ONLY, "subsample": 64}),
    "convolutions": Workload("three convolutions with batch norm, digits 32 × 32, batch 64",
                             "validation loss", 0.4, 10, 2000, 10, make_convolutions, {"subsample": 32}),
    "vit": Workload("vision transformer, two layers, digits 32 × 32, batch 64", "validation loss",
                    0.45, 15, 2000, 10, make_vit, {"subsample": 32}),
    "text": Workload("transformer, two layers, characters of Python's help, batch 32 × 64",
                     "validation loss", 1.9, 25, 1000, 10, make_text, {"subsample": 16}),
}
