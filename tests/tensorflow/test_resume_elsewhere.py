"""Checkpoints loaded on another number of ranks: declared state is brought together, not lost."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import hvd_ext.tensorflow.keras as hvd
from hvd_ext.state import SHARED
from hvd_ext.tensorflow.keras_hooks import wrapper_of
from hvd_ext.tensorflow.variables import as_tf
from tests.tensorflow.checkpointed import train_step
from tests.tensorflow.sign_reducer import Sign, SignReducer

pytestmark = pytest.mark.distributed


def topk(**options):
    return {"compression": hvd.Compression.topk(0.2, min_size=0, **options)}


METHODS = {
    "plain": lambda model: {},
    "sign": lambda model: {"compression": hvd.Compression.sign(0.01)},
    "topk": lambda model: topk(),
    "sparse": lambda model: topk(exchange="sparse_allreduce"),
    "powersgd": lambda model: {"compression": hvd.Compression.powersgd(rank=1)},
    "delay": lambda model: {"op": hvd.DelayCompensated()},
    "overlap": lambda model: {**topk(), "overlap": hvd.DelayedUpdate()},
    "seng": lambda model: {"preconditioner": hvd.SENG(model, damping=0.2, update_freq=2)},
    "scaled": lambda model: topk(),
}


def build(method):
    if not hasattr(hvd.Compression, "sign"):
        hvd.register_reducer(Sign, SignReducer)
    keras.utils.set_random_seed(5)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(9, activation="tanh"),
                              keras.layers.Dense(3)])
    inner = keras.optimizers.SGD(0.05)
    if method == "scaled":
        inner = keras.optimizers.LossScaleOptimizer(inner, initial_scale=64.0, dynamic_growth_steps=4)
    optimizer = hvd.DistributedOptimizer(inner, **METHODS[method](model))
    model.compile(optimizer, "mse")
    optimizer.build(model.trainable_variables)
    return model, optimizer


def kept(optimizer):
    """By name, what this rank has of the reducer's state, and SENG's counters."""
    wrapper = wrapper_of(optimizer)
    state = {one.name: as_tf(one.variable).numpy() for one in wrapper.reducer.declared_state()}
    shared = {one.name for one in wrapper.reducer.declared_state() if one.part.scope == SHARED}
    return state, shared, wrapper.preconditioner and wrapper.preconditioner.shared_state()


def saved(folder, method):
    model, optimizer = build(method)
    for number in range(6):
        train_step(model, number)
    hvd.save_checkpoint(folder, 6, model=model, optimizer=optimizer)
    return kept(optimizer)


def resumed(folder, method):
    model, optimizer = build(method)
    assert hvd.load_checkpoint(folder, model=model, optimizer=optimizer).step == 6
    found = kept(optimizer)
    for number in range(6, 9):
        train_step(model, number)
    hvd.assert_replicas_equal(model)
    return found


def next_mean(states, name):
    """What all ranks' state adds to the next mean gradient: residuals count 1/M, an owner's whole."""
    mean = np.mean([one[name].astype(np.float64) for one in states], axis=0)
    owned = f"owner_{name}"
    return mean + sum(one[owned].astype(np.float64) for one in states if owned in one)


@pytest.mark.parametrize("method", METHODS)
def test_what_ranks_keep_is_brought_together(ranks, tmp_path, method):
    before = ranks(3, init="tensorflow").run(saved, tmp_path, method)
    first, shared, counters = before[0]
    states = [state for state, _, _ in before]
    for size in (2, 1):
        results = ranks(size, init="tensorflow").run(resumed, tmp_path, method)
        after = [state for state, _, _ in results]
        assert all(one == counters for _, _, one in results)
        for name in shared:
            assert all((one[name] == first[name]).all() for one in after), name
        for name in first:
            if name.startswith(("residual", "late_gradient")):
                assert np.abs(next_mean(states, name)).max() > 0
                np.testing.assert_allclose(next_mean(after, name), next_mean(states, name), rtol=1e-5,
                                           atol=1e-7)
            if name.startswith("mean_square"):
                whole, again = (np.concatenate([one[name] for one in them]) for them in (states, after))
                assert whole.max() > 0
                assert (whole == again).all()
    assert (method == "delay") == any(name.startswith("mean_square") for name in first)
    assert (method == "seng") == (counters is not None)
