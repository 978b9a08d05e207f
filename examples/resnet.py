"""Residual networks (He et al. 2015) for examples and benchmarks where torchvision is not installed.

``resnet50`` has the stride in the 3 × 3 convolution ("v1.5"), as the SENG paper's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class Block(nn.Module):
    """A residual block: two 3 × 3 convolutions, or 1 × 1, 3 × 3, 1 × 1 when ``expansion`` is 4."""

    def __init__(self, inputs: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        outputs = width * expansion
        if expansion == 1:
            plan = [(inputs, width, 3, stride), (width, outputs, 3, 1)]
        else:
            plan = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        parts: list[nn.Module] = []
        for source, target, size, step in plan:
            parts += [nn.Conv2d(source, target, size, step, size // 2, bias=False),
                      nn.BatchNorm2d(target), nn.ReLU(inplace=True)]
        self.body = nn.Sequential(*parts[:-1])
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                                          nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class ResNet(nn.Module):
    """Four stages of blocks.

    Args:
        depths: blocks a stage.
        expansion: 1 for basic blocks, 4 for bottlenecks.
        classes: number of outputs.
        stem: "imagenet" (7 × 7 with stride 2, then pooling) or "cifar" (3 × 3, for small images).
    """

    def __init__(self, depths: Sequence[int], expansion: int, classes: int,
                 stem: str = "imagenet", width: int = 64) -> None:
        super().__init__()
        if stem == "imagenet":
            self.stem = nn.Sequential(nn.Conv2d(3, width, 7, 2, 3, bias=False),
                                      nn.BatchNorm2d(width), nn.ReLU(inplace=True),
                                      nn.MaxPool2d(3, 2, 1))
        else:
            self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False),
                                      nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        blocks: list[nn.Module] = []
        inputs = width
        for stage, depth in enumerate(depths):
            for number in range(depth):
                stride = 2 if stage and number == 0 else 1
                blocks.append(Block(inputs, width << stage, stride, expansion))
                inputs = (width << stage) * expansion
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def resnet18(classes: int = 1000, stem: str = "imagenet", width: int = 64) -> ResNet:
    """11.2 million parameters at ten classes."""
    return ResNet((2, 2, 2, 2), 1, classes, stem, width)


def resnet50(classes: int = 1000, stem: str = "imagenet", width: int = 64) -> ResNet:
    """25.6 million parameters at a thousand classes."""
    return ResNet((3, 4, 6, 3), 4, classes, stem, width)
