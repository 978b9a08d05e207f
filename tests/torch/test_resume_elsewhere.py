"""Checkpoints loaded on another number of ranks: declared state is brought together, not lost."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hvd_ext.torch as hvd
from tests.torch.sign_reducer import Sign, SignReducer

pytestmark = pytest.mark.distributed

METHODS = {
    "plain": dict,
    "sign": lambda: {"compression": hvd.Compression.sign(0.01)},
    "topk": lambda: {"compression": hvd.Compression.topk(0.2, min_size=0)},
    "sparse": lambda: {"compression": hvd.Compression.topk(0.2, min_size=0, exchange="sparse_allreduce")},
    "powersgd": lambda: {"compression": hvd.Compression.powersgd(rank=1)},
    "delay": lambda: {"op": hvd.DelayCompensated()},
    "overlap": lambda: {"compression": hvd.Compression.topk(0.2, min_size=0), "overlap": hvd.DelayedUpdate()},
}


def build(method):
    if not hasattr(hvd.Compression, "sign"):
        hvd.register_reducer(Sign, SignReducer)
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3)).double()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.05),
                                         model.named_parameters(), **METHODS[method]())
    return model, optimizer


def train(model, optimizer, first, steps):
    for number in range(first, first + steps):
        rng = np.random.default_rng([hvd.rank(), number])
        x, y = (torch.from_numpy(rng.normal(size=(8, n))) for n in (6, 3))
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


def kept(optimizer):
    """The shared numbers; what this rank's residuals add to the next mean, by parameter; MeanSquare whole."""
    reducer = optimizer._hvd_ext.reducer
    state = reducer.elastic_state()
    numbers = {part.name: state[part.name] for part in reducer.state_parts
               if part.scope == "shared" and part.layout == "number"}
    residual = {name: piece.numpy() / hvd.size() for name, piece in state.get("residual", {}).items()}
    owned = [(one["bounds"][one["rank"]], one["bounds"][one["rank"] + 1], one["residual"].numpy())
             for one in state.get("owned", {}).values() if one["residual"] is not None]
    squares = {index: one.numpy() for index, one in state.get("mean_square", {}).items()}
    factors = {index: one.numpy() for index, one in state.get("q", {}).items()}
    return numbers, residual, owned, squares, factors


def saved(folder, method):
    model, optimizer = build(method)
    train(model, optimizer, 0, 6)
    hvd.save_checkpoint(folder, 6, model=model, optimizer=optimizer)
    return kept(optimizer)


def resumed(folder, method):
    model, optimizer = build(method)
    assert hvd.load_checkpoint(folder, model=model, optimizer=optimizer).step == 6
    found = kept(optimizer)
    train(model, optimizer, 6, 3)
    hvd.assert_replicas_equal(model)
    return found, optimizer._hvd_ext.reducer.state_dict().get("steps")


def mean_residual(results):
    """What all ranks together add to the next mean gradient: residuals count 1/M, an owner's whole."""
    names = results[0][1]
    flat = np.concatenate([sum(one[1][name] for one in results).reshape(-1) for name in names]) \
        if names else np.zeros(0)
    for _, _, owned, _, _ in results:
        for low, high, piece in owned:
            flat[low:high] += piece
    return flat


@pytest.mark.parametrize("method", METHODS)
def test_what_ranks_keep_is_brought_together(ranks, tmp_path, method):
    before = ranks(3).run(saved, tmp_path, method)
    for size in (2, 1):
        results = ranks(size).run(resumed, tmp_path, method)
        after = [one for one, _ in results]
        assert after[0][0] == before[0][0]
        np.testing.assert_allclose(mean_residual(after), mean_residual(before), rtol=1e-12, atol=1e-15)
        if method not in ("plain", "delay"):
            assert np.abs(mean_residual(before)).max() > 0
        assert all(set(one[3]) == set(before[0][3]) for one in after)
        assert (method == "delay") == bool(before[0][3])
        for index, whole in before[0][3].items():
            assert all((one[3][index] == whole).all() for one in after)
        assert (method == "powersgd") == bool(before[0][4])
        for index, q in before[0][4].items():
            assert np.abs(q).max() > 0
            assert all((one[4][index] == q).all() for one in after)
        if method != "plain":
            assert all(steps >= 8 for _, steps in results)
