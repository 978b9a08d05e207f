"""``save_model`` brings the optimizer's state together in a few messages, however many variables."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras

import hvd_ext.tensorflow.keras as hvd
from hvd_ext.tensorflow.collectives import Collectives
from tests.tensorflow import training

pytestmark = pytest.mark.distributed
MESSAGES = ("allreduce", "allgather", "allgather_object", "broadcast", "alltoall")
CASES = {
    "sharded": (lambda: keras.optimizers.Adam(0.01), {"server": "sharded"}),
    "rank0": (lambda: keras.optimizers.Adam(0.01), {"server": "rank0"}),
    "whole variables": (lambda: keras.optimizers.Adafactor(0.01), {"server": "sharded"}),
    "accumulated": (lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=4),
                    {"server": "sharded"}),
}


def deep_model():
    keras.utils.set_random_seed(5)
    return keras.Sequential([keras.Input((5,)), *(keras.layers.Dense(6) for _ in range(4)),
                             keras.layers.Dense(3)])


def count_messages(sent):
    """Note each collective in ``sent``; gives back what undoes it."""
    kept = {name: getattr(Collectives, name) for name in MESSAGES}

    def counting(name):
        def call(self, *args, **options):
            sent.append(name)
            return kept[name](self, *args, **options)

        return call

    for name in MESSAGES:
        setattr(Collectives, name, counting(name))
    return lambda: [setattr(Collectives, name, kept[name]) for name in MESSAGES]


def values_in(path):
    return [np.array(one) for one in keras.models.load_model(path).optimizer.variables]


def saved_each_way(folder):
    found = {}
    for name, (make, options) in CASES.items():
        trained = []
        for given in (options, {}):
            model = deep_model()
            model.compile(hvd.DistributedOptimizer(make(), **given), "mse")
            x, y = training.data()
            for step in range(2):
                rows = slice(8 * step, 8 * step + 8)
                model.train_on_batch(x[rows][hvd.rank()::2], y[rows][hvd.rank()::2])
            sent, path = [], f"{folder}/{name}-{len(trained)}.keras"
            undo = count_messages(sent)
            try:
                hvd.save_model(model, path)
            finally:
                undo()
            trained.append((values_in(path) if hvd.rank() == 0 else [], sent))
        found[name] = trained
    return found


def test_few_messages_bring_the_whole_state(ranks, tmp_path):
    by_rank = ranks(2, init="tensorflow").run(saved_each_way, str(tmp_path), timeout=250)
    for name, ((values, sent), (expected, _)) in by_rank[0].items():
        assert len(sent) <= 4, (name, sent)
        assert sent == by_rank[1][name][0][1]
        assert len(values) == len(expected) > 20
        for mine, wanted in zip(values, expected, strict=True):
            np.testing.assert_array_equal(mine, wanted, err_msg=name)
