"""Which layers a Keras model has for SENG, and how the curvature of each is held."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import keras
import tensorflow as tf

from hvd_ext.seng import LayerPlan, LayerShape, Settings, plan_layer
from hvd_ext.seng.coverage_report import UncoveredParameters
from hvd_ext.seng.layer_discovery import EXCLUDED, NO_RULE, SHARES, Inventory, is_within
from hvd_ext.seng.memory import within_memory
from hvd_ext.seng.sample_axes import Placement, several_rows
from hvd_ext.tensorflow.seng.rules import Registered, rule_for
from hvd_ext.tensorflow.variables import as_tf


@dataclass(eq=False)
class Layer:
    """A Keras layer with a rule, and its trainable weights by their names in the layer.

    ``groups`` is (groups, n_G, n_A) of the kernel when it is trained and the rule gives factors,
    ``number`` the layer's among those of the model, ``others`` further layers with the same weights.
    ``samples`` says where the samples of the batch are, None while it is not known.
    """

    layer: Any
    registered: Registered
    weights: dict[str, Any]
    groups: tuple[int, int, int] | None = None
    plan: LayerPlan = field(default_factory=lambda: LayerPlan(implicit=False))
    number: int = 0
    samples: Placement | None = None
    others: list[Any] = field(default_factory=list)

    @property
    def owners(self) -> list[Any]:
        """The Keras layers whose weights these are."""
        return [self.layer, *self.others]

    @property
    def in_rows(self) -> bool:
        """Whether a sample has several rows of the first axis."""
        return several_rows(self.samples)

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
        return [_size(weight) for weight in self.weights.values()]

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
        return 1 + int(self.registered.ones and "bias" in self.weights)

    @property
    def shape(self) -> LayerShape:
        """What the plan needs to know."""
        if self.groups is None:
            return LayerShape(self.name, self.registered.kind, self.n, self.n, 1, product=False,
                              lookup=self.registered.rows)
        groups, n_g, n_a = self.groups
        ones = int(self.registered.ones and "bias" in self.weights)
        return LayerShape(self.name, self.registered.kind, self.n, n_g, n_a + ones, groups)


def take_inventory(model: keras.Model, settings: Settings) -> Inventory[Layer]:
    """Find the layers of ``model`` and plan each.

    Layers of one kind that own the same weights count as one that is used several times. A weight that
    belongs to layers of different kinds leaves all of them without curvature.
    """
    layers: list[Layer] = []
    orphans: set[int] = set()
    missing: list[UncoveredParameters] = []
    uses: dict[int, int] = {}

    def leave_out(layer: Any, kind: str, cause: str, weights: Iterable[Any]) -> None:
        fresh = {id(as_tf(weight)): weight for weight in weights if id(as_tf(weight)) not in orphans}
        orphans.update(fresh)
        if fresh:
            missing.append(UncoveredParameters(layer.path, kind, cause, sum(map(_size, fresh.values()))))

    for layer in model._flatten_layers(include_self=True):
        own = [weight for weight in layer._trainable_variables if weight.trainable]
        if not own:
            continue
        for weight in own:
            uses[id(as_tf(weight))] = uses.get(id(as_tf(weight)), 0) + 1
        registered = rule_for(layer)
        weights = {} if registered is None else _weights_of_rule(layer, registered)
        unusual = _unsupported_setting(layer)
        if is_within(layer.path, settings.excluded, "/"):
            leave_out(layer, type(layer).__name__, EXCLUDED, own)
            continue
        if registered is None or not weights or unusual:
            leave_out(layer, type(layer).__name__, unusual or NO_RULE, own)
            continue
        known = {id(as_tf(weight)) for weight in weights.values()}
        rest = [weight for weight in own if id(as_tf(weight)) not in known]
        names = " and ".join(weight.name for weight in rest)
        leave_out(layer, f"{names} of {type(layer).__name__}", NO_RULE, rest)
        product = registered.groups is not None and registered.kernel in weights
        groups = registered.groups(layer) if product and registered.groups else None
        layers.append(Layer(layer, registered, weights, groups))
    kept: dict[tuple[int, ...], Layer] = {}
    for one in layers:
        ids = tuple(id(as_tf(weight)) for weight in one.weights.values())
        if ids in kept and kept[ids].registered is one.registered:
            kept[ids].others.append(one.layer)
            continue
        kept[ids] = one
    good: list[Layer] = []
    for ids, one in kept.items():
        if any(number in orphans or uses[number] > len(one.owners) for number in ids):
            leave_out(one.layer, one.registered.kind, SHARES, one.weights.values())
            continue
        one.number = len(good)
        good.append(one)
    itemsize = max((one.dtype.size for one in good), default=4)
    settings = within_memory([one.shape for one in good], settings, itemsize)
    for one in good:
        one.plan = _plan_layer(one, settings)
    return Inventory(good, missing, settings)


def _size(weight: Any) -> int:
    return int(tf.TensorShape(weight.shape).num_elements())


def _plan_layer(layer: Layer, settings: Settings) -> LayerPlan:
    """How the curvature is held; of an embedding the gradients of the rows that a sample uses."""
    return LayerPlan(implicit=True) if layer.registered.rows else plan_layer(layer.shape, settings)


def _weights_of_rule(layer: Any, registered: Registered) -> dict[str, Any]:
    """The layer's trainable weights that the rule speaks of, by name."""
    trainable = {id(as_tf(weight)) for weight in layer.trainable_weights}
    found = {name: getattr(layer, name, None) for name in registered.weights}
    return {name: weight for name, weight in found.items()
            if weight is not None and id(as_tf(weight)) in trainable}


UNUSUAL = {"lora_enabled": "has LoRA weights", "rms_scaling": "scales by the RMS",
           "renorm": "is renormalised", "synchronized": "is synchronized",
           "quantization_mode": "is quantized"}


def _unsupported_setting(layer: Any) -> str | None:
    """What of the way in which the layer computes its output its rule does not know."""
    if any(getattr(one, "sparse", False) for node in layer._inbound_nodes for one in node.input_tensors):
        return "takes a sparse input"
    return next((why for name, why in UNUSUAL.items() if getattr(layer, name, None)), None)
