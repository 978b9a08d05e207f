"""SENG, the sketchy empirical natural gradient: its decisions, for both front ends."""

from hvd_ext.seng.fingerprint import check_same_layers, layers_fingerprint, states_differ, strict_refusal
from hvd_ext.seng.plan import LayerPlan, LayerShape, elements_held, plan_layer
from hvd_ext.seng.report import CurvatureReport, LayerStats, layer_row, make_report
from hvd_ext.seng.row_sampling import sample_batch, sample_rows, seeded_generator, usable_scores
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
from hvd_ext.seng.solve import JITTERS, jitter_sequence
from hvd_ext.seng.state import CURVATURE, STATE

__all__ = [
    "CURVATURE",
    "DEFAULT_SKETCH_SIZE",
    "IMAGENET_RECIPES",
    "JITTERS",
    "STATE",
    "Cosine",
    "CurvatureReport",
    "DampingDecay",
    "ExpDecay",
    "LayerPlan",
    "LayerShape",
    "LayerStats",
    "Recipe",
    "Settings",
    "WarmUp",
    "check_same_layers",
    "elements_held",
    "imagenet_recipe",
    "jitter_sequence",
    "layer_row",
    "layers_fingerprint",
    "make_report",
    "plan_layer",
    "sample_batch",
    "sample_rows",
    "seeded_generator",
    "states_differ",
    "strict_refusal",
    "takes_settings",
    "usable_scores",
]
