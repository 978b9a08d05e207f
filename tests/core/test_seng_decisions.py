"""Settings, plans, schedules and jitters: what is decided without a framework."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from hvd_ext.seng import (
    IMAGENET_RECIPES,
    Cosine,
    DampingDecay,
    ExpDecay,
    LayerShape,
    Settings,
    WarmUp,
    elements_held,
    imagenet_recipe,
    jitter_sequence,
    plan_layer,
)
from hvd_ext.torch.seng.schedules import cosine_lr, exp_lr, recipe_lr


@pytest.mark.parametrize(("bad", "said"), [
    ({"damping": 0.0}, r"damping must be in \(0, inf\), got 0.0"),
    ({"damping": -1}, "damping must be in"),
    ({"damping": "much"}, "damping must be a number"),
    ({"damping": 1.0, "rank": 0}, "rank must be at least 1, got 0"),
    ({"damping": 1.0, "update_freq": 0}, "update_freq must be at least 1"),
    ({"damping": 1.0, "update_freq": 1.5}, "whole number"),
    ({"damping": 1.0, "coupling": "ring"}, "'block', 'lagged', 'full'; got 'ring'"),
    ({"damping": 1.0, "uc": "fast"}, "uc must be one of"),
    ({"damping": 1.0, "sketch": "gaussian"}, "sketch must be one of"),
    ({"damping": 1.0, "sketch_size": 0}, "sketch=None"),
    ({"damping": 1.0, "row_sketch": 0}, "row_sketch must be at least 1"),
    ({"damping": 1.0, "subsample": 0}, "pass None"),
    ({"damping": 1.0, "loss_reduction": "none"}, "mean or the sum over the rank's batch"),
    ({"damping": 1.0, "loss_scale": 0}, "loss_scale must be in"),
    ({"damping": 1.0, "curvature_dtype": "int8"}, "curvature_dtype must be one of"),
    ({"damping": 1.0, "replacement": 1}, "True or False"),
    ({"damping": 1.0, "stale_curvature": "drop"}, "stale_curvature must be one of"),
    ({"damping": 1.0, "stale_curvature": "rescale", "loss_reduction": "sum"}, "got loss_reduction='sum'"),
    ({"damping": 1.0, "explicit_threshold": -1}, "explicit_threshold must be at least 0"),
    ({"damping": 1.0, "rank": "all"}, "rank must be a whole number"),
    ({"damping": 1.0, "rank": "auto", "memory": "1GB"}, "rank must be a number with memory="),
    ({"damping": 1.0, "resample": "never"}, "resample must be one of"),
    ({"damping": 1.0, "resample": "step", "sketch": None}, 'resample must be "refresh" with sketch=None'),
    ({"damping": 1.0, "exclude": (1,)}, "names of modules"),
])
def test_bad_settings_say_value_limit_and_way_out(bad, said):
    with pytest.raises((ValueError, TypeError), match=said):
        Settings(**bad)


def test_damping_as_a_function_is_checked_when_used():
    settings = Settings(damping=lambda step: 1.0 - step)
    assert settings.damping_at(0) == 1.0
    with pytest.raises(ValueError, match="damping at step 1"):
        settings.damping_at(1)


def test_sketch_larger_than_every_layer_is_refused_only_when_chosen():
    Settings(damping=1.0).check_sketch([10, 20])
    Settings(damping=1.0, sketch_size=20).check_sketch([10, 20])
    with pytest.raises(ValueError, match="sketch_size must be at most 20"):
        Settings(damping=1.0, sketch_size=21).check_sketch([10, 20])
    Settings(damping=1.0, sketch_size=21, sketch=None).check_sketch([10, 20])


def test_plan():
    settings = Settings(damping=1.0, explicit_threshold=1000, sketch_size=100, row_sketch=30,
                        rank=4)
    conv = LayerShape("c", "Conv2d", 1000, 20, 50)
    plan = plan_layer(conv, settings)
    assert plan.implicit
    assert (plan.rank, plan.rows_g, plan.rows_a, plan.sketch) == (4, None, 30, None)
    assert elements_held(conv, plan, rho=8, r=4) == (20 + 50 + 30) * 4 * 8
    small = LayerShape("s", "Linear", 999, 9, 111)
    plan = plan_layer(small, settings)
    assert (plan.implicit, plan.sketch) == (False, 100)
    assert elements_held(small, plan, rho=8) == 8 * (999 + 100)
    assert plan_layer(LayerShape("t", "Linear", 100, 10, 10), settings).sketch is None
    norm = LayerShape("n", "BatchNorm2d", 5000, 5000, 1, product=False)
    assert not plan_layer(norm, settings).implicit
    assert plan_layer(conv, Settings(damping=1.0, sketch=None, explicit_threshold=0)).rows_a is None


def test_schedules_are_the_papers():
    exp = ExpDecay(max_epoch=60, decay=6)
    assert exp(0) == 1.0
    assert exp(30) == pytest.approx(0.5**6)
    assert exp(61) == 0.0
    cosine = Cosine(max_epoch=90, lr=0.1)
    assert cosine(0) == pytest.approx(1.0)
    assert cosine(90) * 0.1 == pytest.approx(0.001)
    assert cosine(45) * 0.1 == pytest.approx(0.001 + 0.5 * 0.099)
    warm = WarmUp(exp, epochs=5, start=0.1)
    assert [warm(0), warm(2.5)] == pytest.approx([0.1, 0.55])
    assert warm(5) == exp(5)
    damping = DampingDecay(0.3, steps_per_epoch=100, factor=0.7)
    assert damping(999) == pytest.approx(0.3 * 0.7 ** 0.9)
    assert damping(1000) == pytest.approx(0.21)
    assert DampingDecay(0.3, 100, 0.7, stepwise=False)(50) == pytest.approx(0.3 * 0.7**0.05)


def test_table_7():
    recipe = imagenet_recipe(4096)
    assert (recipe.warmup_lr, recipe.lr, recipe.decay, recipe.max_epoch) == (0.2, 2.2, 5, 55)
    assert recipe.damping_at_step(10)(100) == pytest.approx(0.21)
    assert recipe.lr_factor()(0) == pytest.approx(0.2 / 2.2)
    assert imagenet_recipe(256).damping_at_step(10) == 0.17
    assert imagenet_recipe(300) is IMAGENET_RECIPES[512]
    assert imagenet_recipe(10**6) is IMAGENET_RECIPES[4096]


def test_lr_factories():
    weight = torch.nn.Parameter(torch.zeros(1))
    for make, wanted in [
        (lambda o: exp_lr(o, max_epoch=60, decay=6, steps_per_epoch=10), 0.5 * (1 - 7.5 / 60) ** 6),
        (lambda o: exp_lr(o, max_epoch=60, decay=6, steps_per_epoch=10, warmup_epochs=15), 0.25),
        (lambda o: cosine_lr(o, max_epoch=15, steps_per_epoch=10), 0.001 + 0.499 / 2),
        (lambda o: recipe_lr(o, imagenet_recipe(512), steps_per_epoch=10),
         0.5 * (1 - 7.5 / 60) ** 6),
    ]:
        optimizer = torch.optim.SGD([weight], lr=0.5)
        schedule = make(optimizer)
        for _ in range(75):
            optimizer.step()
            schedule.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(wanted)
        assert math.isfinite(schedule.get_last_lr()[0])


def test_jitters_escalate_from_nothing():
    ladder = jitter_sequence(2.0)
    assert ladder[0] == 0.0
    assert list(ladder) == sorted(set(ladder))
    assert ladder[-1] == pytest.approx(0.02)


def test_decisions_import_no_framework():
    code = ("import sys, hvd_ext.seng; "
            "print([m for m in ('torch', 'tensorflow', 'horovod') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
