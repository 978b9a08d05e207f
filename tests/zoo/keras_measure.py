"""One SENG step of a family of ``keras.applications``, against the dense solve and against a plain step."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import hvd_ext.tensorflow.keras as hvd
from tests.zoo.keras_models import CLASSES, FAMILIES
from tests.zoo.table import Measured

LAM = 0.3
B = 2
LIMIT = 1e-9  # of the error
ONE_STEP = """
import json, sys
import hvd_ext.tensorflow.keras as hvd
from benchmarks.seng_first_step import first_steps
hvd.init()
print(json.dumps(first_steps(sys.argv[1], int(sys.argv[2]), 4, sys.argv[3] == "seng")[1]))
"""


def build(name: str) -> keras.Model:
    """The model in float64, without a last activation, with weights that are not at their start."""
    before = keras.config.dtype_policy().name, keras.config.floatx()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    try:
        keras.utils.set_random_seed(0)
        side = FAMILIES[name]
        model = getattr(keras.applications, name)(weights=None, input_shape=(side, side, 3), classes=CLASSES,
                                                  classifier_activation=None)
    finally:
        keras.config.set_dtype_policy(before[0])
        keras.config.set_floatx(before[1])
    rng = np.random.default_rng(0)
    for weight in model.trainable_weights:
        weight.assign_add(0.02 * rng.standard_normal(weight.shape))
    return model


def gradients(model: keras.Model, x: np.ndarray) -> list[tf.Tensor]:
    """Of a mean over the samples, each pulled towards its own size; batch norms evaluate."""
    with tf.GradientTape() as tape:
        out = model(x, training=False)
        loss = tf.reduce_sum((out + tf.tanh(out) ** 2) ** 2) / (len(x) * CLASSES**0.5)
    return list(tape.gradient(loss, model.trainable_variables))


def measure(name: str) -> Measured:
    """The step in float64, nothing sketched or cut.

    What a pass over the batch rounds otherwise than passes over its samples counts |u|^2 / lam times in a
    direction, so that large gradients get a larger damping.
    """
    model = build(name)
    x = np.random.default_rng(1).standard_normal((B, FAMILIES[name], FAMILIES[name], 3))
    variables = model.trainable_variables
    shares = [gradients(model, x[i:i + 1]) for i in range(B)]
    largest = max(float(tf.reduce_sum(tf.square(one))) for share in shares for one in share)
    lam = max(LAM, 1e-3 * largest)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        seng = hvd.SENG(model, damping=lam, sketch=None, rank=10**6, uc="exact")
        g = gradients(model, x)
        found = seng.step(g)
    report = seng.report()
    place = {id(variable.value): k for k, variable in enumerate(variables)}
    error, worst = 0.0, ""
    for state in seng.states:
        if not bool(state.ready):
            continue
        mine = [place[id(weight.value)] for weight in state.layer.weights.values()]

        def flat(tensors: Any, mine: list[int] = mine) -> np.ndarray:
            return np.concatenate([np.asarray(tensors[k], np.float64).ravel() for k in mine])

        u = np.stack([flat(share) for share in shares], axis=1) / B**0.5
        wanted = flat(g)
        wanted = (wanted - u @ np.linalg.solve(lam * np.eye(B) + u.T @ u, u.T @ wanted)) / lam
        size = np.linalg.norm(wanted)
        off = float(np.linalg.norm(flat(found) - wanted) / (size if size > 0 else 1.0))
        if off > error:
            error, worst = off, state.layer.name
    seng.close()
    return Measured(model.count_params() - sum(int(np.prod(w.shape)) for w in model.non_trainable_weights),
                    report["coverage"], error, worst,
                    tuple(sorted({row["samples"] or "not known" for row in report["layers"]})),
                    report["coverage_line"],
                    tuple((cause, one["parameters"]) for cause, one in report["without_rule"].items()),
                    tuple(str(one.message) for one in said))


def first_step(name: str) -> float:
    """CPU time to the end of the first batch of ``model.fit``, over that without SENG; one rank."""
    plain, with_seng = (
        json.loads(subprocess.run([sys.executable, "-c", ONE_STEP, name, str(FAMILIES[name]), how],
                                  check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        for how in ("plain", "seng"))
    return float(with_seng / plain)
