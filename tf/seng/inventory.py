"""Which layers a Keras model has for SENG, and how the curvature of each is held."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import keras
import tensorflow as tf

from hvd_ext.seng import LayerPlan, LayerShape, Settings, plan_layer
from hvd_ext.tensorflow.seng.rules import Registered, rule_for
from hvd_ext.tensorflow.variables import as_tf


@dataclass(eq=False)
class Layer:
    """A Keras layer with a rule, and its trainable weights by their names in the layer.

    ``groups`` is (groups, n_G, n_A) of the kernel when it is trained and the rule gives factors,
    ``number`` the layer's among those of the model.
    """

    layer: Any
    registered: Registered
    weights: dict[str, Any]
    groups: tuple[int, int, int] | None = None
    plan: LayerPlan = field(default_factory=lambda: LayerPlan(implicit=False))
    number: int = 0

    @property
    def key(self) -> str:
        """A name that is the same in every process: paths hang on what was made before or loaded."""
        return f"{self.number}.{self.registered.kind.replace(' ', '_')}"

    @property
    def name(self) -> str:
        """The layer's path."""
        return str(self.layer.path)

    @property
    def sizes(self) -> list[int]:
        """The number of parameters of each weight."""
        return [int(tf.TensorShape(weight.shape).num_elements())
                for weight in self.weights.values()]

    @property
    def n(self) -> int:
        """The number of its trainable parameters."""
        return sum(self.sizes)

    @property
    def dtype(self) -> tf.DType:
        """The precision it is computed in: float64 for float64 weights, else float32."""
        kinds = {tf.as_dtype(weight.dtype) for weight in self.weights.values()}
        return tf.float64 if tf.float64 in kinds else tf.float32

    @property
    def together(self) -> int:
        """How many weights the factors stand for: none, the kernel, or its bias too."""
        if not self.plan.implicit:
            return 0
        return len(self.weights) if self.registered.ones else 1

    @property
    def shape(self) -> LayerShape:
        """What the plan needs to know."""
        if self.groups is None:
            return LayerShape(self.name, self.registered.kind, self.n, self.n, 1, product=False)
        groups, n_g, n_a = self.groups
        ones = len(self.weights) - 1 if self.registered.ones else 0
        return LayerShape(self.name, self.registered.kind, self.n, n_g, n_a + ones, groups)


@dataclass
class Inventory:
    """A model's layers, and the names of layers that have weights but no rule."""

    layers: list[Layer]
    without_rule: list[str]


def take_inventory(model: keras.Model, settings: Settings) -> Inventory:
    """Find the layers of ``model`` and plan each.

    A weight that several layers own leaves all of them on the identity rule.
    """
    layers: list[Layer] = []
    orphans: set[int] = set()
    nameless: list[str] = []
    uses: dict[int, int] = {}
    for layer in model._flatten_layers(include_self=True):
        own = [weight for weight in layer._trainable_variables if weight.trainable]
        for weight in own:
            uses[id(as_tf(weight))] = uses.get(id(as_tf(weight)), 0) + 1
        if not own or _within(layer.path, settings.excluded):
            orphans.update(id(as_tf(weight)) for weight in own)
            continue
        registered = rule_for(layer)
        weights = {} if registered is None else _weights(layer, registered)
        if registered is None or not weights or _unusual(layer):
            orphans.update(id(as_tf(weight)) for weight in own)
            nameless.append(f"{layer.path} ({type(layer).__name__})")
            continue
        product = registered.groups is not None and "kernel" in weights
        groups = registered.groups(layer) if product and registered.groups else None
        layers.append(Layer(layer, registered, weights, groups))
    kept = []
    for one in layers:
        ids = [id(as_tf(weight)) for weight in one.weights.values()]
        if any(number in orphans or uses[number] > 1 for number in ids):
            nameless.append(f"{one.name} ({one.registered.kind}, shares a weight)")
            continue
        one.plan, one.number = plan_layer(one.shape, settings), len(kept)
        kept.append(one)
    return Inventory(kept, nameless)


def _weights(layer: Any, registered: Registered) -> dict[str, Any]:
    """The layer's trainable weights that the rule speaks of, by name."""
    trainable = {id(as_tf(weight)) for weight in layer.trainable_weights}
    found = {name: getattr(layer, name, None) for name in registered.weights}
    return {name: weight for name, weight in found.items()
            if weight is not None and id(as_tf(weight)) in trainable}


def _unusual(layer: Any) -> bool:
    """Whether the layer computes its output in a way that its rule does not know."""
    return bool(getattr(layer, "lora_enabled", False) or getattr(layer, "rms_scaling", False)
                or getattr(layer, "renorm", False) or getattr(layer, "synchronized", False)
                or getattr(layer, "quantization_mode", None))


def _within(path: str, excluded: Iterable[str]) -> bool:
    return any(path == one or path.startswith(f"{one}/") for one in excluded)
