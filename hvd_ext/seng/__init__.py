"""SENG, the sketchy empirical natural gradient: its decisions, for both front ends."""

from hvd_ext.seng.agreement import (
    check_same_layers,
    fingerprint,
    states_differ,
    strict_refusal,
)
from hvd_ext.seng.plan import LayerPlan, LayerShape, elements_held, plan_layer
from hvd_ext.seng.report import CurvatureReport, Held, layer_row, make_report
from hvd_ext.seng.rows import generator, sample_batch, sample_rows, usable_scores
from hvd_ext.seng.schedules import (
    IMAGENET_RECIPES,
    Cosine,
    DampingDecay,
    ExpDecay,
    Recipe,
    WarmUp,
    imagenet_recipe,
)
from hvd_ext.seng.settings import DEFAULT_SKETCH_SIZE, Settings, takes_settings
from hvd_ext.seng.solve import JITTERS, jitters

__all__ = [
    "DEFAULT_SKETCH_SIZE", "IMAGENET_RECIPES", "JITTERS", "Cosine", "CurvatureReport", "DampingDecay",
    "ExpDecay", "Held", "LayerPlan", "LayerShape", "Recipe", "Settings", "WarmUp", "check_same_layers",
    "elements_held", "fingerprint", "generator", "imagenet_recipe", "jitters", "layer_row",
    "make_report", "plan_layer", "sample_batch", "sample_rows", "states_differ", "strict_refusal",
    "takes_settings", "usable_scores",
]
