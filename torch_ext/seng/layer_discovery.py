"""Which layers a model has for SENG: modules with a rule, joined where they share a weight."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from hvd_ext.seng import LayerPlan, LayerShape, Settings, plan_layer
from hvd_ext.seng.coverage_report import UncoveredParameters
from hvd_ext.seng.layer_discovery import EXCLUDED, NO_RULE, SHARES, Inventory, is_within
from hvd_ext.seng.memory import within_memory
from hvd_ext.torch.seng.attention import attention_rule
from hvd_ext.torch.seng.per_sample import candidate_rules, parameters_of
from hvd_ext.torch.seng.rules import Registered, Rule, rule_for


@dataclass(eq=False)
class Layer:
    """Parameters that share one curvature matrix, and the modules that use them.

    ``registered`` is its rule; with ``tried``, it and ``others`` are rules that may hold, of which the
    gradient check takes the first that does. ``parameters`` are the trainable ones; with a trainable
    weight of a rule that returns factors (``product``) the weight is the first and biases follow.
    ``slots[module]`` maps the rule's names of the module's parameters to places in it. ``groups`` is
    (groups, n_G, n_A) of the weight. ``lookups`` are embeddings whose table is a linear layer's weight too,
    with their own rule.
    """

    name: str
    registered: Registered
    product: bool
    groups: tuple[int, int, int]
    parameters: list[nn.Parameter] = field(default_factory=list)
    slots: dict[nn.Module, dict[str, int]] = field(default_factory=dict)
    plan: LayerPlan = field(default_factory=lambda: LayerPlan(implicit=False))
    others: tuple[Registered, ...] = ()
    tried: bool = False
    lookups: dict[nn.Module, Rule] = field(default_factory=dict)

    @property
    def rules(self) -> tuple[Registered, ...]:
        """The rules that may be its own."""
        return self.registered, *self.others

    @property
    def dtype(self) -> torch.dtype:
        """The precision it is computed in: float64 for float64 parameters, else float32."""
        return torch.float64 if self.parameters[0].dtype == torch.float64 else torch.float32

    def add_module(self, module: nn.Module, trainable: dict[str, nn.Parameter]) -> None:
        """Take in a module, its parameters by name."""
        slots = {}
        for name, parameter in trainable.items():
            places = [k for k, known in enumerate(self.parameters) if known is parameter]
            if not places:
                self.parameters.append(parameter)
            slots[name] = places[0] if places else len(self.parameters) - 1
        self.slots[module] = slots

    @property
    def shape(self) -> LayerShape:
        """What the plan needs to know."""
        n = sum(parameter.numel() for parameter in self.parameters)
        if not self.product:
            return LayerShape(self.name, self.registered.kind, n, n, 1, product=False,
                              lookup=self.registered.lookup)
        groups, n_g, n_a = self.groups
        ones = len(self.parameters) - 1 if self.registered.ones else 0
        return LayerShape(self.name, self.registered.kind, n, n_g, n_a + ones, groups,
                          lookup=bool(self.lookups))


def take_inventory(model: nn.Module, settings: Settings) -> Inventory[Layer]:
    """Find the layers of ``model`` and plan each.

    A weight used by several modules of one kind is one layer. A parameter shared with a module
    that has no rule, or between layers of different kinds, leaves all of its layers without curvature.
    """
    layer_of: dict[int, Layer] = {}
    layers: list[Layer] = []
    orphans: set[int] = set()
    missing: list[UncoveredParameters] = []
    sealed: list[str] = []

    def leave_out(name: str, kind: str, cause: str, parameters: Iterable[nn.Parameter]) -> None:
        fresh = [p for p in parameters if id(p) not in orphans]
        orphans.update(id(p) for p in fresh)
        if fresh:
            missing.append(UncoveredParameters(name, kind, cause, sum(p.numel() for p in fresh)))

    for name, module in model.named_modules():
        if "parametrizations" in name.split("."):
            continue  # the module whose parameter is computed there has them
        own_parameters = parameters_of(module)
        trainable = {key: p for key, p in own_parameters.items() if p.requires_grad and p.numel()}
        kind = type(module).__name__
        empty = any(not p.numel() for p in own_parameters.values())  # no inputs, or no outputs
        rules, tried = ((), False) if empty else _rules_for(
            module, settings, sealed=name.startswith(tuple(sealed)))
        if isinstance(module, nn.MultiheadAttention) and not rules:
            sealed.append(f"{name}.")
        if is_within(name, settings.excluded, "."):
            leave_out(name, kind, EXCLUDED, trainable.values())
        elif trainable and not rules:
            # Of a module with others inside it only what it holds itself is meant.
            own = "" if not list(module.children()) else f"{' and '.join(trainable)} of "
            leave_out(name, f"{own}{kind}", NO_RULE, trainable.values())
        elif trainable:
            known = rules[0].names or tuple((key, key) for key in trainable)
            mine = {ours: trainable[theirs] for ours, theirs in known if theirs in trainable}
            rest = {key: p for key, p in trainable.items() if not any(p is one for one in mine.values())}
            if rest:
                leave_out(name, f"{' and '.join(rest)} of {kind}", NO_RULE, rest.values())
            layer = _layer_of(name, module, rules, tried, mine, layer_of) if mine else None
            if layer is None:
                leave_out(name, kind, SHARES, mine.values())
                continue
            if module not in layer.slots:
                layer.add_module(module, mine)
            if layer not in layers:
                layers.append(layer)
            layer_of.update((id(p), layer) for p in mine.values())
    kept = []
    for layer in layers:
        if any(id(p) in orphans for p in layer.parameters):
            fresh = sum(p.numel() for p in layer.parameters if id(p) not in orphans)
            orphans.update(id(p) for p in layer.parameters)
            missing.append(UncoveredParameters(layer.name, layer.registered.kind, SHARES, fresh))
            continue
        kept.append(layer)
    itemsize = max((layer.dtype.itemsize for layer in kept), default=4)
    settings = within_memory([layer.shape for layer in kept], settings, itemsize)
    for layer in kept:
        layer.plan = plan_layer(layer.shape, settings)
    return Inventory(kept, missing, settings)


def _rules_for(module: nn.Module, settings: Settings, *, sealed: bool
               ) -> tuple[tuple[Registered, ...], bool]:
    """The rules that may hold for a module, and whether it must be seen first that one does."""
    if sealed:
        return (), False
    if isinstance(module, nn.MultiheadAttention):
        same = type(module).forward is nn.MultiheadAttention.forward
        return ((attention_rule(module),) if same else ()), False
    registered, same = rule_for(module)
    if registered is not None and same and _has_plain_weight(module, registered):
        return (registered,), False
    if not settings.check_gradients or getattr(module, "sparse", False):
        return (), False
    return candidate_rules(module, settings.explicit_threshold), True


def _layer_of(name: str, module: nn.Module, rules: tuple[Registered, ...], tried: bool,
              trainable: dict[str, nn.Parameter], layer_of: dict[int, Layer]) -> Layer | None:
    """The layer the module belongs to, a new one, or None when its parameters belong to several."""
    registered = rules[0]
    product = registered.groups is not None and "weight" in trainable
    groups = registered.groups(module) if product and registered.groups else (1, 0, 0)
    found = {id(layer_of[id(p)]): layer_of[id(p)] for p in trainable.values() if id(p) in layer_of}
    if not found:
        return Layer(name or "model", registered, product, groups, others=rules[1:], tried=tried)
    layer = next(iter(found.values()))
    if len(found) == 1 and layer.parameters[0] is trainable.get("weight"):
        if registered.lookup and layer.product and _one_matrix(layer):
            layer.lookups[module] = registered.rule
            return layer
        if layer.registered.lookup and product and registered.ones:
            layer.lookups = dict.fromkeys(layer.slots, layer.registered.rule)
            layer.registered, layer.others, layer.tried = registered, (), False
            layer.product, layer.groups = True, groups
            return layer
    same = (len(found) == 1 and layer.rules == rules and layer.product == product
            and layer.groups == groups)
    if same and product:
        # Only a shared weight joins modules: a bias alone does not.
        return layer if trainable["weight"] is layer.parameters[0] else None
    return layer if same and {id(p) for p in trainable.values()} == {
        id(p) for p in layer.parameters} else None


def _one_matrix(layer: Layer) -> bool:
    """Whether the weight is one matrix applied as W x."""
    return layer.groups[0] == 1 and layer.registered.ones and not layer.tried


def _has_plain_weight(module: nn.Module, registered: Registered) -> bool:
    """Whether a weight that the rule needs is a parameter itself, not computed from others."""
    if registered.lookup and getattr(module, "sparse", False):
        return False
    return (registered.groups is None and not registered.lookup) or isinstance(
        module._parameters.get("weight"), nn.Parameter)
