"""Hooks that catch a layer's input and the gradient of its output, installed only while a refresh is due."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hvd_ext.seng import Settings, generator, sample_batch
from hvd_ext.torch.seng.inventory import Layer
from hvd_ext.torch.seng.system import LayerSystem, take


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


@dataclass(eq=False)
class _Use:
    """One call of a module in a forward pass."""

    module: nn.Module
    x: torch.Tensor
    gz: torch.Tensor | None = None


class _Pick:
    """Keeps the chosen samples, casts, and remembers how many samples there were."""

    def __init__(self, choose: Callable[[int, torch.device], torch.Tensor | None],
                 dtype: torch.dtype) -> None:
        self._choose = choose
        self._dtype = dtype
        self.samples = 1
        self.kept = 1

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        chosen = self._choose(tensor.shape[0], tensor.device)
        self.samples = tensor.shape[0]
        tensor = tensor if chosen is None else tensor.index_select(0, chosen)
        self.kept = tensor.shape[0]
        return tensor.to(self._dtype)


class Capture:
    """Per-sample curvature of one forward and backward pass.

    A layer's curvature is built as soon as the gradients of all its uses in the pass are there, in
    the backward pass itself, so that its input can be freed. A forward pass that begins after that
    (the next micro-batch) replaces it: with gradient accumulation the curvature is that of the
    last micro-batch.

    Args:
        amp_scale: gives the factor of mixed precision in the loss of the pass under way.
    """

    def __init__(self, layers: Sequence[Layer], settings: Settings,
                 amp_scale: Callable[[], float]) -> None:
        self.layers = list(layers)
        self._settings = settings
        self._amp_scale = amp_scale
        self._handles: list[Any] = []
        self._step = 0
        self._scale: float | None = None
        self._open: dict[Layer, list[_Use]] = {}
        self._waiting: dict[Layer, int] = {}
        self._done: dict[Layer, LayerSystem | str] = {}
        self._chosen: dict[tuple[int, torch.device], torch.Tensor | None] = {}

    @property
    def active(self) -> bool:
        """Whether hooks are installed."""
        return bool(self._handles)

    def start(self, step: int) -> None:
        """Install the hooks for the refresh of this step; forget what was caught before."""
        self._step = step
        self._forget()
        if self._handles:
            return
        for layer in self.layers:
            for module in layer.slots:
                def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
                         output: Any, layer: Layer = layer) -> None:
                    self._forward(layer, module, args, kwargs, output)

                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def stop(self) -> None:
        """Remove the hooks and everything caught."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._forget()

    def collect(self) -> dict[Layer, LayerSystem | str]:
        """Each caught layer's curvature, or what is wrong with it; layers not used are left out."""
        for layer in list(self._open):
            self._finish(layer)
        done, self._done = self._done, {}
        self._forget()
        return done

    def _forget(self) -> None:
        self._scale = None
        self._open, self._waiting, self._done, self._chosen = {}, {}, {}, {}

    def _forward(self, layer: Layer, module: nn.Module, args: tuple[Any, ...],
                 kwargs: dict[str, Any], output: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()), None)
        usable = isinstance(output, torch.Tensor) and isinstance(x, torch.Tensor)
        if usable and not (x.numel() and output.numel()):  # type: ignore[union-attr]
            return  # an expert that was given no token: not used in this pass
        if not (usable and torch.is_grad_enabled() and output.requires_grad):
            return
        if _in_backward() and (layer in self._open or layer in self._done):
            # Activation checkpointing runs a forward pass again that was caught before.
            return
        self._done.pop(layer, None)
        use = _Use(module, x.detach())
        self._open.setdefault(layer, []).append(use)
        self._waiting[layer] = self._waiting.get(layer, 0) + 1

        def caught(gz: torch.Tensor) -> None:
            if self._open.get(layer) is None or use.gz is not None or not self._handles:
                return
            use.gz = gz.detach()
            self._waiting[layer] -= 1
            if self._waiting[layer] == 0:
                self._finish(layer)

        output.register_hook(caught)

    @torch.no_grad()
    def _finish(self, layer: Layer) -> None:
        uses = [use for use in self._open.pop(layer) if use.gz is not None]
        self._waiting.pop(layer, None)
        if not uses:
            return
        if self._scale is None:
            self._scale = self._amp_scale() * self._settings.loss_scale
        dtype = layer.dtype
        name = self._settings.curvature_dtype
        stored = dtype if name is None else getattr(torch, name)
        picks = [_Pick(self._choose, dtype) for _ in uses]
        captured = []
        for use, pick in zip(uses, picks, strict=True):
            assert use.gz is not None
            result = layer.registered.rule(use.module, use.x, use.gz, pick)
            captured.append((layer.slots[use.module], result))
        pick = picks[0]
        whole = pick.samples if self._settings.loss_reduction == "mean" else 1
        scale = whole / (self._scale * pick.kept ** 0.5)
        self._done[layer] = take(layer, captured, scale=scale, dtype=stored, step=self._step)

    def _choose(self, rho: int, device: torch.device) -> torch.Tensor | None:
        key = (rho, device)
        if key not in self._chosen:
            rng = generator(self._settings.seed, self._step, "samples")
            rows = sample_batch(rho, self._settings.subsample, rng)
            self._chosen[key] = None if rows is None else torch.as_tensor(rows, device=device)
        return self._chosen[key]
