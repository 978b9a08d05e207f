"""What ranks run for test_keras_applications.py; every function is called on all ranks at once."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

import hvd_ext.tensorflow.keras as hvd

BATCH = 4


def one_batch(name: str, side: int) -> dict[str, Any]:
    """What became of a model of ``keras.applications`` in one step of ``model.fit``."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    model = getattr(keras.applications, name)(weights=None, input_shape=(side, side, 3), classes=5)
    rng = np.random.default_rng(hvd.rank())
    x = rng.standard_normal((BATCH, side, side, 3)).astype("float32")
    before = [np.asarray(weight) for weight in model.trainable_weights]
    seng = hvd.SENG(model, damping=1.0)
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.01), preconditioner=seng),
                  "sparse_categorical_crossentropy")
    model.fit(x, np.arange(BATCH) % 5, batch_size=BATCH, verbose=0)
    hvd.assert_replicas_equal(model)
    after = [np.asarray(weight) for weight in model.trainable_weights]
    report = seng.report()
    seng.close()
    whole = sum(weight.size for weight in after)
    return {
        "finite": all(np.isfinite(weight).all() for weight in after),
        "moved": any((old != new).any() for old, new in zip(before, after, strict=True)),
        "digest": np.array([np.asarray(weight, np.float64).sum() for weight in after]),
        "covered": 1.0 - report["identity_parameters"] / whole,
        "failures": report["failures"],
        "refused": [row["layer"] for row in report["layers"] if row["refused"]],
    }
