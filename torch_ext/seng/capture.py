"""Hooks that catch a layer's input and the gradient of its output, installed while a refresh is due."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from hvd_ext.seng import Settings, sample_batch, seeded_generator
from hvd_ext.seng.plan import negligible_error
from hvd_ext.seng.sample_axes import CONSTANT
from hvd_ext.torch.hooks import ModuleHook
from hvd_ext.torch.seng.attention import Arrange, hook_projections
from hvd_ext.torch.seng.check import GradientCheck, add_up
from hvd_ext.torch.seng.functional_hooks import patch_embedding, patch_linear
from hvd_ext.torch.seng.layer_curvature import NOT_FINITE, LayerCurvature, build_curvature
from hvd_ext.torch.seng.layer_discovery import Layer
from hvd_ext.torch.seng.per_sample import Call
from hvd_ext.torch.seng.rules import Registered, Rule, look_up
from hvd_ext.torch.seng.sample_axes import Result, SampleAxisTracker, SampleSelector

NO_PROOF = "it had no gradient that a rule could be tried on"
WRONG_SUM = "its samples' gradients do not add up to its gradient"
NO_RULE_HOLDS = "no rule reproduces its gradient"
PAST_FORWARD = "it has a gradient but no call on a tensor was seen"
NOT_BY_SAMPLE = "its input is the same for all samples, which share its output"


def in_backward() -> bool:
    """Whether a backward pass is under way in this thread."""
    return bool(torch._C._current_graph_task_id() != -1)


@dataclass(eq=False)
class _Use:
    """One call of a module in a forward pass. ``rule`` and ``arrange`` are those of a projection in
    attention; ``call`` has the whole call where a rule wants it, ``slots`` the parameters where they are
    not all of the module's."""

    module: nn.Module
    x: torch.Tensor
    batch: int | None
    gz: torch.Tensor | None = None
    rule: Rule | None = None
    arrange: Arrange | None = None
    call: Call | None = None
    slots: dict[str, int] | None = None

    @property
    def reached(self) -> bool:
        """Whether the backward pass has come here."""
        return self.gz is not None or (self.call is not None and bool(self.call.states))


def _on_gradient(z: torch.Tensor, caught: Callable[[torch.Tensor], None], *, own_base: bool) -> None:
    """Call ``caught`` with the gradient by z.

    A linear layer of more than two dimensions returns a view. What changes a view in place, as a ReLU may,
    loses the hooks that it had, so that its base is asked (``own_base``: which no one else uses).
    """
    base = z._base
    whole = base is not None and base.numel() == z.numel() and z.is_contiguous() and base.is_contiguous()
    if not (own_base and whole) or base is None or base.grad_fn is None:
        z.register_hook(caught)
        return
    shape, place = z.shape, base.output_nr

    def before(gradients: tuple[torch.Tensor, ...]) -> None:
        if gradients[place] is not None:
            caught(gradients[place].reshape(shape))

    base.grad_fn.register_prehook(before)


def _keep_gradient(states: dict[int, torch.Tensor], place: int, gradient: torch.Tensor) -> None:
    states[place] = gradient.detach()


@dataclass
class RuleStatus:
    """What the gradient check has said: which rule a layer has, and which layers have none that holds."""

    accepted: dict[Layer, int] = field(default_factory=dict)
    refused: dict[Layer, str] = field(default_factory=dict)


@dataclass
class CaptureResult:
    """Each caught layer's curvature, or what is wrong with it, and what the gradient check says now."""

    found: dict[Layer, LayerCurvature | str] = field(default_factory=dict)
    trust: RuleStatus = field(default_factory=RuleStatus)


class Capture:
    """Per-sample curvature of one forward and backward pass.

    A layer's curvature is built in the backward pass, as soon as the gradients of all its uses are there, so
    that its input can be freed. With gradient accumulation it is that of the last micro-batch.

    Args:
        amp_scale: gives the loss scale of the pass under way.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], settings: Settings,
                 amp_scale: Callable[[], float]) -> None:
        self.layers = list(layers)
        self._model = model
        self._settings = settings
        self._amp_scale = amp_scale
        self._layer_of = {module: layer for layer in self.layers for module in layer.slots}
        self._attentions = [module for module in model.modules()
                            if isinstance(module, nn.MultiheadAttention)
                            and (module in self._layer_of or module.out_proj in self._layer_of)]
        self._linears: dict[int, list[nn.Linear]] = {}
        for module, layer in self._layer_of.items():
            if isinstance(module, nn.Linear) and not layer.tried and "weight" in layer.slots[module]:
                self._linears.setdefault(id(module.weight), []).append(module)
        names = {module: name for name, module in model.named_modules() if module in self._layer_of}
        self.samples = SampleAxisTracker(model, settings, names)
        self._check = GradientCheck()
        self._trust = RuleStatus()
        self._handles: list[Any] = []
        self._step = 0
        self._scale: float | None = None
        self._open: dict[Layer, list[_Use]] = {}
        self._waiting: dict[Layer, int] = {}
        self._done: dict[Layer, dict[int, LayerCurvature | str]] = {}
        self._chosen: dict[tuple[int, torch.device], torch.Tensor | None] = {}

    @property
    def active(self) -> bool:
        """Whether hooks are installed."""
        return bool(self._handles)

    def install_hooks(self, step: int, trust: RuleStatus) -> None:
        """Install the hooks for the refresh of this step; forget what was caught before.

        Args:
            trust: layers that are in it are not checked again, refused ones not caught.
        """
        self._step, self._trust = step, trust
        self._drop_captured()
        if self._settings.check_gradients:
            self._check.install_hooks([layer for layer in self.layers if self._needs_check(layer)])
        if self._handles:
            return
        self.samples.watch_input()
        self._hook_around(self._model, lambda: patch_linear(self._linears, self._used_apart))
        for module, layer in self._layer_of.items():
            if isinstance(module, nn.Embedding) and type(module).forward is not nn.Embedding.forward:
                self._hook_around(module, partial(patch_embedding, module, self._looked_up))
            elif not isinstance(module, nn.MultiheadAttention):
                hook = ModuleHook(partial(self._forward, layer))
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
                self.samples.hooks.add(self._handles[-1].id)
        for module in self._attentions:
            self._hook_around(module, partial(hook_projections, module, self._on_projection))

    def remove_hooks(self) -> None:
        """Remove the hooks and everything caught."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.samples.remove_hooks()
        self.samples.hooks.clear()
        self._check.remove_hooks()
        self._drop_captured()

    def _needs_check(self, layer: Layer) -> bool:
        return layer not in self._trust.accepted and layer not in self._trust.refused

    def collect_captured(self) -> CaptureResult:
        """What was caught since the start; layers not used are left out."""
        for layer in list(self._open):
            self._finish_layer(layer)
        caught = CaptureResult()
        for layer, found in self._done.items():
            if self._settings.check_gradients and self._needs_check(layer):
                self._choose_rule(layer, found, caught)
            else:
                caught.found[layer] = next(iter(found.values()))
        for layer in self._check.is_single_use():
            # Only a forward pass that began with the hooks in place shows that a call is missing.
            if layer not in self._done and self.samples.called:
                caught.trust.refused[layer] = PAST_FORWARD
        self._drop_captured()
        return caught

    def by_rows(self) -> list[Layer]:
        """Layers of which no one knows which rows belong to a sample."""
        return [layer for layer in self.layers if layer not in self._trust.refused
                and any(self.samples.found_rows(module) for module in layer.slots)]

    def _choose_rule(self, layer: Layer, found: dict[int, LayerCurvature | str],
                     caught: CaptureResult) -> None:
        """Compare each rule's sum over samples with the gradient; the first that holds is the layer's."""
        if found[0] == NOT_BY_SAMPLE:
            caught.trust.refused[layer] = NOT_BY_SAMPLE
            return
        usable = [k for k, one in found.items() if isinstance(one, LayerCurvature)]
        verdicts = dict(zip(usable, self._check.read_verdicts(layer), strict=False))
        for k, verdict in verdicts.items():
            if verdict.passed and (verdict.proved or not layer.tried):
                caught.found[layer], caught.trust.accepted[layer] = found[k], k
                return
        if not layer.tried:
            verdict = verdicts.get(0)
            if verdict is not None and verdict.passed is False:
                caught.trust.refused[layer] = f"{WRONG_SUM} (relative error {verdict.error:.1e})"
            else:
                caught.found[layer] = found[0]
        elif NOT_FINITE in found.values():
            caught.found[layer] = NOT_FINITE
        elif any(verdict.passed is None or verdict.passed for verdict in verdicts.values()):
            caught.found[layer] = NO_PROOF
        else:
            reasons = [one for one in found.values() if isinstance(one, str)]
            caught.trust.refused[layer] = reasons[-1] if len(reasons) == len(found) else NO_RULE_HOLDS

    def _drop_captured(self) -> None:
        self._scale = None
        self._open, self._waiting, self._done, self._chosen = {}, {}, {}, {}

    def _hook_around(self, module: nn.Module, begin: Callable[[], Callable[[], None]]) -> None:
        """Call ``begin`` before each of the module's forward passes, and what it gives behind it."""
        stops: list[Callable[[], None]] = []

        def before(_module: nn.Module, _args: tuple[Any, ...]) -> None:
            stops.append(begin())

        def after(_module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
            if stops:
                stops.pop()()

        self._handles.append(module.register_forward_pre_hook(ModuleHook(before)))
        self._handles.append(module.register_forward_hook(ModuleHook(after), always_call=True))
        self.samples.hooks.add(self._handles[-1].id)

    def _on_projection(self, part: nn.Module, x: torch.Tensor, z: torch.Tensor, rule: Rule,
                       arrange: Arrange) -> None:
        if part in self._layer_of:
            self._record_use(self._layer_of[part], _Use(part, x, None, None, rule, arrange), z)

    def _used_apart(self, module: nn.Module, x: torch.Tensor, z: torch.Tensor) -> None:
        layer = self._layer_of[module]
        self._record_use(layer, _Use(module, x, None, slots={"weight": layer.slots[module]["weight"]}), z)

    def _looked_up(self, module: nn.Module, x: torch.Tensor, z: torch.Tensor) -> None:
        self._record_use(self._layer_of[module], _Use(module, x, None, rule=look_up), z)

    def _forward(self, layer: Layer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
                 output: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()), None)
        called = any(one.called for one in layer.rules)
        z = output[0] if called and isinstance(output, tuple) and output else output
        if isinstance(x, torch.Tensor) and isinstance(z, torch.Tensor):
            self._record_use(layer, _Use(module, x, None, rule=layer.lookups.get(module),
                                         call=Call(args, kwargs) if called else None), z,
                             states=pytree.tree_leaves(output[1:]) if isinstance(module, nn.RNNBase) else ())

    def _record_use(self, layer: Layer, use: _Use, z: torch.Tensor,
                    states: Sequence[torch.Tensor] = ()) -> None:
        if not (use.x.numel() and z.numel()):
            return  # an expert that was given no token: not used in this pass
        use.x = use.x.detach()
        if self.samples.record_input(use.module, use.x if use.arrange is None else use.arrange(use.x)):
            return
        if not (torch.is_grad_enabled() and z.requires_grad) or layer in self._trust.refused:
            return
        if in_backward() and (layer in self._open or layer in self._done):
            # Activation checkpointing runs a forward pass again that was caught before.
            return
        use.batch = self.samples.batch
        if any(one.reached for one in self._open.get(layer, ())):
            del self._open[layer], self._waiting[layer]  # a pass whose end could not be told
        if layer not in self._open:
            self._done.pop(layer, None)
            self._check.forget_layer(layer)
        self._open.setdefault(layer, []).append(use)
        self._waiting[layer] = self._waiting.get(layer, 0) + 1

        def caught(gz: torch.Tensor) -> None:
            if use not in self._open.get(layer, ()) or use.gz is not None or not self._handles:
                return
            use.gz = gz.detach()
            self._waiting[layer] -= 1
            if self._waiting[layer] == 0:
                self._finish_layer(layer)

        _on_gradient(z, caught, own_base=layer.product)
        if states and use.call is not None:
            # Which of its outputs are used shows at the end of the pass only.
            self._waiting[layer] += 1
            for place, state in enumerate(states, 1):
                state.register_hook(partial(_keep_gradient, use.call.states, place))

    # In the backward pass

    @torch.no_grad()
    def _finish_layer(self, layer: Layer) -> None:
        uses = [use for use in self._open.pop(layer) if use.reached]
        self._waiting.pop(layer, None)
        if not uses:
            return
        if self._scale is None or not self._done:  # what was done before was another pass's
            self._scale = self._amp_scale() * self._settings.loss_scale
        checked = self._settings.check_gradients and self._needs_check(layer)
        rules = layer.rules if checked else (layer.rules[self._trust.accepted.get(layer, 0)],)
        done: dict[int, LayerCurvature | str] = {}
        sums = []
        for k, registered in enumerate(rules):
            try:
                done[k], everything = self._apply_rule(layer, registered, uses, whole=checked)
            except Exception as error:  # a rule that is only tried may fail anyhow
                if not layer.tried and not isinstance(error, ValueError):
                    raise
                done[k] = str(error)
                continue
            if checked and isinstance(done[k], LayerCurvature):
                sums.append(add_up(layer, everything))
        self._done[layer] = done
        if sums:
            self._check.expect_gradients(layer, sums, {t.dtype for use in uses for t in (use.x, use.gz)
                                                       if t is not None and t.is_floating_point()})

    def _apply_rule(self, layer: Layer, registered: Registered, uses: Sequence[_Use], *, whole: bool
                    ) -> tuple[LayerCurvature | str, list[tuple[dict[str, int], Result]]]:
        """A layer's curvature by one rule, and with ``whole`` what the rule gives for all samples."""
        dtype, name = layer.dtype, self._settings.curvature_dtype
        stored = dtype if name is None else getattr(torch, name)
        few = self._settings.subsample is not None
        captured, everything = [], []
        for use in uses:
            pick, result = self._rule_result(use, registered, dtype, few=few)
            slots = layer.slots[use.module] if use.slots is None else use.slots
            captured.append((slots, pick.regroup_result(result)))
            if whole:
                full = self._rule_result(use, registered, dtype, few=False)[1] if few else result
                everything.append((slots, full))
        scale = self._scale_of(pick.samples, pick.kept)
        least = negligible_error(self._settings.damping_at(self._step)) if layer.plan.adaptive else 0.0
        return build_curvature(layer, captured, scale=scale, dtype=stored, step=self._step,
                               least=least), everything

    def _scale_of(self, samples: int, kept: int) -> float:
        """What gz is multiplied with to give ``G_i / sqrt(samples)``."""
        assert self._scale is not None
        count = samples if self._settings.loss_reduction == "mean" else 1
        return count / (self._scale * kept ** 0.5)

    def _rule_result(self, use: _Use, registered: Registered, dtype: torch.dtype, *,
                     few: bool) -> tuple[SampleSelector, Result]:
        x, gz = use.x, use.gz
        if use.arrange is not None and gz is not None:
            x, gz = use.arrange(x), use.arrange(gz)
        placement = self.samples.find_placement(use.module, use.batch)
        if placement == CONSTANT:
            raise ValueError(NOT_BY_SAMPLE)
        axis = placement if isinstance(placement, int) else 0
        choose = self._choose_samples if few else None
        pick = SampleSelector(placement, use.batch, choose, dtype, x.shape[axis])
        given = use.call if registered.called else pick.samples_first(x)
        rule = registered.rule if use.rule is None else use.rule
        gz = None if gz is None else pick.samples_first(gz)
        return pick, rule(use.module, given, gz, pick)  # type: ignore[arg-type]

    def _choose_samples(self, rho: int, device: torch.device) -> torch.Tensor | None:
        if (key := (rho, device)) not in self._chosen:
            rng = seeded_generator(self._settings.seed, self._step, "samples")
            rows = sample_batch(rho, self._settings.subsample, rng)
            self._chosen[key] = None if rows is None else torch.as_tensor(rows, device=device)
        return self._chosen[key]
