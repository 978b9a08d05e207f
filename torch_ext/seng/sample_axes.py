"""Which rows of a layer's input belong to which sample, from what the model's own input shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hvd_ext.seng import Settings
from hvd_ext.seng.sample_axes import (
    CONTIGUOUS,
    ROWS,
    Placement,
    Signature,
    choose_placement,
    chosen_for,
    is_plain,
    rows_of,
)
from hvd_ext.torch.hooks import ModuleHook
from hvd_ext.torch.seng.probe import axis_signature, batch_of, two_passes
from hvd_ext.torch.seng.rules import Factors, Lookup, PerSample

Result = Factors | Lookup | PerSample
Choose = Callable[[int, torch.device], "torch.Tensor | None"]


class SampleAxisTracker:
    """The batch of the pass under way and where each module has it.

    A model that sees its batch in axis 0 of every layer and nowhere else needs no more than a look
    at the shapes; any other is probed once, after the forward pass in which a module is first seen.

    Args:
        names: of the modules whose inputs matter.
    """

    def __init__(self, model: nn.Module, settings: Settings, names: Mapping[nn.Module, str]) -> None:
        self._model = model
        self._axis = settings.samples if isinstance(settings.samples, int) else 0
        given = settings.samples if isinstance(settings.samples, Mapping) else {}
        known = {name for name, _ in model.named_modules()}
        for name in given:
            if name not in known:
                raise ValueError(f"samples names the module {name!r}, which {type(model).__name__} does "
                                 "not have; take a name from model.named_modules()")
        said = {module: chosen_for(name, given) for module, name in names.items()}
        self.placements: dict[nn.Module, Placement] = {
            module: placement for module, placement in said.items() if placement is not None}
        self._given = set(self.placements)
        self.batch: int | None = None
        self.called = False  # since the start
        self.trouble = ""  # why the probe did not work, if so
        self._probing: dict[nn.Module, list[Signature]] | None = None
        self._seen: dict[nn.Module, list[tuple[int, ...]]] = {}
        self._input: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._handles: list[Any] = []
        self.hooks: set[int] = set()  # ids of the forward hooks that run in a probe

    def watch_input(self) -> None:
        """Watch the model's own input."""
        self.batch, self.called = None, False
        if not self._handles:
            self._handles = [
                self._model.register_forward_pre_hook(ModuleHook(self._before_forward), with_kwargs=True),
                self._model.register_forward_hook(ModuleHook(self._after_forward))]

    def remove_hooks(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._input, self._seen = [], None, {}

    def record_input(self, module: nn.Module, x: torch.Tensor) -> bool:
        """Take note of a module's input; True when the pass is a probe and of no other use."""
        if self._probing is not None:
            assert self.batch is not None
            self._probing.setdefault(module, []).append(axis_signature(x, self.batch))
            return True
        if self._input is not None and module not in self.placements:
            self._seen.setdefault(module, []).append(tuple(x.shape))
        return False

    def find_placement(self, module: nn.Module, batch: int | None) -> Placement:
        """Where a module has the samples of a batch; on the model's axis as long as nothing is known."""
        if module not in self.placements and batch == 1:
            return CONTIGUOUS
        return self.placements.get(module, self._axis)

    def found_rows(self, module: nn.Module) -> bool:
        """Whether a module's samples could not be told apart, and nobody said that they need not be."""
        return self.placements.get(module) == ROWS and module not in self._given

    def _before_forward(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        backward = torch._C._current_graph_task_id() != -1
        if self._probing is None and torch.is_grad_enabled() and not backward:
            self.batch, self.called = batch_of(args, kwargs, self._axis), True
            self._input, self._seen = (args, kwargs), {}

    def _after_forward(self, _model: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        if self._probing is not None or not torch.is_grad_enabled():
            return
        given, self._input = self._input, None
        seen, self._seen = self._seen, {}
        if given is None or self.batch is None or self.batch == 1 or not seen:
            return
        batch = self.batch
        if all(is_plain(shape, batch, self._axis) for shapes in seen.values() for shape in shapes):
            self.placements.update(dict.fromkeys(seen, self._axis))
            return
        one, other = self._run_probe(*given)
        for module, shapes in seen.items():
            self.placements[module] = choose_placement(shapes, one.get(module, []), other.get(module, []),
                                                       batch,
                                                       self._axis)

    def _run_probe(self, args: tuple[Any, ...], kwargs: dict[str, Any]
                   ) -> list[dict[nn.Module, list[Signature]]]:
        assert self.batch is not None
        passes: list[dict[nn.Module, list[Signature]]] = []

        def begin() -> None:
            self._probing = {}
            passes.append(self._probing)

        try:
            two_passes(self._model, args, kwargs, batch=self.batch, axis=self._axis,
                       keep=self.hooks, begin=begin)
        except Exception as error:  # the model's own code in evaluation mode: anything can come
            self.trouble = f"{type(error).__name__}: {error}"
            return [{}, {}]
        finally:
            self._probing = None
        return passes


class SampleSelector:
    """What a rule passes its tensors through: samples that are kept, in order, in the right precision.

    Args:
        placement: where the module has its samples.
        batch: samples of the model's input; None when not known.
        choose: which samples are kept; None for all.
        rows: of the input, along the axis that holds the samples.

    Raises:
        ValueError: the placement does not fit.
    """

    def __init__(self, placement: Placement, batch: int | None, choose: Choose | None,
                 dtype: torch.dtype, rows: int) -> None:
        self.axis = placement if isinstance(placement, int) else 0
        self._choose = choose
        self._dtype = dtype
        index = rows_of(placement, rows, batch)
        self._index = None if index is None else torch.from_numpy(index.copy())
        self._in_order = index is not None and placement == CONTIGUOUS
        self.samples = self.kept = rows if index is None else len(index)
        self._joined = False

    def samples_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """With the axis that holds the samples first."""
        return tensor.movedim(self.axis, 0) if self.axis else tensor

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._index is None:
            self.samples = tensor.shape[0]
        chosen = None if self._choose is None else self._choose(self.samples, tensor.device)
        self.kept = self.samples if chosen is None else chosen.numel()
        if self._index is None:
            tensor = tensor if chosen is None else tensor.index_select(0, chosen)
        elif not (self._in_order and chosen is None):
            index = self._index.to(tensor.device)
            rows = (index if chosen is None else index[chosen]).flatten()
            tensor = tensor.index_select(0, rows.clamp_min(0))
            missing = rows < 0
            if bool(missing.any()):
                tensor[missing] = 0
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def rows_per_sample(self) -> int:
        """Rows of each sample, of a rule whose result has them joined already."""
        self._joined = True
        return 1 if self._index is None else self._index.shape[1]

    def regroup_result(self, result: Result) -> Result:
        """A rule's result with the rows of each sample joined."""
        if self._index is None or self._joined:
            return result
        m = self._index.shape[1]
        if isinstance(result, Factors):
            g, a = (_join_columns(t, m) for t in (result.g, result.a))
            return Factors(g, a, None if result.bias is None else _sum_rows(result.bias, m))
        if isinstance(result, Lookup):
            return replace(result, index=result.index.reshape(-1, m * result.index.shape[1]),
                           g=result.g.reshape(-1, m * result.g.shape[1], result.g.shape[2]))
        return {name: _sum_rows(one, m) for name, one in result.items()}


def _join_columns(factor: torch.Tensor, m: int) -> torch.Tensor:
    """(B m, groups, kappa, n) as (B, groups, m kappa, n)."""
    if factor.shape[2] * factor.shape[1] == 1:
        return factor.reshape(-1, 1, m, factor.shape[3])
    return factor.unflatten(0, (-1, m)).transpose(1, 2).flatten(2, 3)


def _sum_rows(values: torch.Tensor, m: int) -> torch.Tensor:
    """(B m, ...) as (B, ...), summed."""
    return values.unflatten(0, (-1, m)).sum(1)
