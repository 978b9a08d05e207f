"""SENG, the sketchy empirical natural gradient: its decisions, for both front ends."""

from hvd_ext.seng.plan import LayerPlan, LayerShape, columns_kept, elements_held, plan_layer
from hvd_ext.seng.report import Report
from hvd_ext.seng.rows import generator, sample_batch, sample_rows
from hvd_ext.seng.schedules import (
    IMAGENET_RECIPES,
    Cosine,
    DampingDecay,
    ExpDecay,
    Recipe,
    WarmUp,
    imagenet_recipe,
)
from hvd_ext.seng.settings import DEFAULT_SKETCH_SIZE, Settings
from hvd_ext.seng.solve import JITTERS, jitters

__all__ = [
    "DEFAULT_SKETCH_SIZE", "IMAGENET_RECIPES", "JITTERS", "Cosine", "DampingDecay", "ExpDecay",
    "LayerPlan", "LayerShape", "Recipe", "Report", "Settings", "WarmUp", "columns_kept",
    "elements_held", "generator", "imagenet_recipe", "jitters", "plan_layer", "sample_batch",
    "sample_rows",
]
