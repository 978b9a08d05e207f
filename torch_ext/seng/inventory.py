"""Which layers a model has for SENG: modules with a rule, joined where they share a weight."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from hvd_ext.seng import LayerPlan, LayerShape, Settings, plan_layer
from hvd_ext.torch.seng.rules import Registered, rule_for


@dataclass(eq=False)
class Layer:
    """Parameters that share one curvature matrix, and the modules that use them.

    ``parameters`` are the trainable ones; with a trainable weight of a rule that returns factors
    (``product``) the weight is the first and biases follow. ``slots[module]`` maps the module's
    parameter names to places in it. ``groups`` is (groups, n_G, n_A) of the weight.
    """

    name: str
    registered: Registered
    product: bool
    groups: tuple[int, int, int]
    parameters: list[nn.Parameter] = field(default_factory=list)
    slots: dict[nn.Module, dict[str, int]] = field(default_factory=dict)
    plan: LayerPlan = field(default_factory=lambda: LayerPlan(implicit=False))

    @property
    def dtype(self) -> torch.dtype:
        """The precision it is computed in: float64 for float64 parameters, else float32."""
        return torch.float64 if self.parameters[0].dtype == torch.float64 else torch.float32

    def add(self, module: nn.Module, trainable: dict[str, nn.Parameter]) -> None:
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
            return LayerShape(self.name, self.registered.kind, n, n, 1, product=False)
        groups, n_g, n_a = self.groups
        ones = len(self.parameters) - 1 if self.registered.ones else 0
        return LayerShape(self.name, self.registered.kind, n, n_g, n_a + ones, groups)


@dataclass
class Inventory:
    """A model's layers, and the names of modules that have parameters but no rule."""

    layers: list[Layer]
    without_rule: list[str]


def take_inventory(model: nn.Module, settings: Settings) -> Inventory:
    """Find the layers of ``model`` and plan each.

    A weight used by several modules of one kind is one layer. A parameter shared with a module
    that has no rule, or between layers of different kinds, leaves all of its layers on the
    identity rule. Modules inside ``nn.MultiheadAttention`` are called by no forward pass of their
    own and have no rule.
    """
    layer_of: dict[int, Layer] = {}
    layers: list[Layer] = []
    orphans: set[int] = set()
    nameless: list[str] = []
    sealed: list[str] = []
    for name, module in model.named_modules():
        trainable = {key: p for key, p in module._parameters.items()
                     if p is not None and p.requires_grad}
        if isinstance(module, nn.MultiheadAttention):
            sealed.append(f"{name}.")
        if not trainable or _within(name, settings.excluded):
            orphans.update(id(p) for p in trainable.values())
            continue
        registered = None if name.startswith(tuple(sealed)) else rule_for(module)
        if registered is None or not _plain(module, registered):
            orphans.update(id(p) for p in trainable.values())
            nameless.append(f"{name or 'model'} ({type(module).__name__})")
            continue
        layer = _layer_of(name, module, registered, trainable, layer_of)
        if layer is None:
            orphans.update(id(p) for p in trainable.values())
            nameless.append(f"{name} ({type(module).__name__}, shares a parameter)")
            continue
        if module not in layer.slots:
            layer.add(module, trainable)
        if layer not in layers:
            layers.append(layer)
        layer_of.update((id(p), layer) for p in trainable.values())
    kept = []
    for layer in layers:
        if any(id(p) in orphans for p in layer.parameters):
            nameless.append(f"{layer.name} ({layer.registered.kind}, shares a parameter)")
            continue
        layer.plan = plan_layer(layer.shape, settings)
        kept.append(layer)
    return Inventory(kept, nameless)


def _layer_of(name: str, module: nn.Module, registered: Registered,
              trainable: dict[str, nn.Parameter], layer_of: dict[int, Layer]) -> Layer | None:
    """The layer the module belongs to, a new one, or None when its parameters belong to several."""
    product = registered.groups is not None and "weight" in trainable
    groups = registered.groups(module) if product and registered.groups else (1, 0, 0)
    found = {id(layer_of[id(p)]): layer_of[id(p)] for p in trainable.values() if id(p) in layer_of}
    if not found:
        return Layer(name or "model", registered, product, groups)
    layer = next(iter(found.values()))
    same = (len(found) == 1 and layer.registered is registered and layer.product == product
             and layer.groups == groups)
    if same and product:
        # Only a shared weight joins modules: a bias alone does not.
        return layer if trainable["weight"] is layer.parameters[0] else None
    return layer if same and {id(p) for p in trainable.values()} == {
        id(p) for p in layer.parameters} else None


def _plain(module: nn.Module, registered: Registered) -> bool:
    """Whether a weight that the rule needs is a parameter itself, not computed from others."""
    return registered.groups is None or isinstance(module._parameters.get("weight"), nn.Parameter)


def _within(name: str, excluded: Iterable[str]) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in excluded)
