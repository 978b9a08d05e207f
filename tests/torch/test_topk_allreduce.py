"""TopK by sparse allreduce on real ranks: the oracle, mass, bytes, replicas, checkpoints, faults."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

import hvd_ext.torch as hvd
from hvd_ext.reducers.topk import keep_count
from tests.reference.sparse_allreduce import SparseAllreduce
from tests.torch.problems import backward, bits, flat, make_parameters, named, worker_gradients

pytestmark = pytest.mark.distributed

SHAPES = [(60, 50), (37,), (11, 13, 7)]
NUMEL = 60 * 50 + 37 + 11 * 13 * 7
RATIO = 0.05


def build(lr=0.05, server=None, scaler=None, **settings):
    parameters = make_parameters(SHAPES)
    settings = {"ratio": RATIO, "min_size": 0, "exchange": "sparse_allreduce", **settings}
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr), named(parameters), server=server,
                                         compression=hvd.Compression.topk(**settings), grad_scaler=scaler)
    return parameters, optimizer


def gradients_of(worker, step):
    """Large entries crowd at the bucket's beginning, so that even ranges are uneven."""
    made = worker_gradients(SHAPES, worker=worker, step=step)
    return [g.astype(np.float32) * np.float32(6.0 if i == 2 else 1.0) for i, g in enumerate(made)]


def step_once(parameters, optimizer, step, poison=None):
    optimizer.zero_grad()
    made = gradients_of(hvd.rank(), step)
    if poison is not None:
        made[0].flat[3] = poison
    backward(parameters, made, reverse=bool(hvd.rank() % 2))
    optimizer.step()


def in_bucket_order(arrays):
    """The bucket is filled from the last parameter on."""
    return np.concatenate([np.asarray(a, np.float64).ravel() for a in reversed(arrays)])


def against_the_oracle(steps):
    """Largest errors of the reduced gradients and of e, order, entries, moves of ranges, mass, bits."""
    parameters, optimizer = build()
    reducer = optimizer._hvd_ext.reducer
    oracle = SparseAllreduce(hvd.size(), NUMEL)
    k = keep_count(NUMEL, RATIO)
    worst, counts, moves, order = 0.0, [], 0, 0.0
    for step in range(steps):
        before = reducer.sparse.owned[0].ranges.bounds.tolist() if step else None
        step_once(parameters, optimizer, step)
        got = in_bucket_order([p.grad.numpy() for p in parameters])
        means = oracle.finish_exchange([in_bucket_order(gradients_of(w, step)) for w in range(hvd.size())], k)
        places = np.flatnonzero(got)
        worst = max(worst, float(np.abs(oracle.apply(means, places) - got).max()))
        others = np.delete(np.abs(means), places)
        order = max(order, float(others.max() / np.abs(means[places]).min()))
        counts.append(len(places))
        after = reducer.sparse.owned[0].ranges.bounds.tolist()
        if before is not None and before != after:
            moves += 1
            oracle.fold(before)
        if before is None and reducer.sparse.owned[0].residual is None:
            moves += 1
            oracle.fold([int(b) for b in np.linspace(0, NUMEL, hvd.size() + 1)])
        e = reducer.residual[0].double().numpy()
        worst = max(worst, float(np.abs(e - oracle.e[hvd.rank()]).max()))
    lost = reducer.residual[0].double()
    owned = torch.zeros(NUMEL, dtype=torch.float64)
    kept, (low, high) = reducer.sparse.owned[0], reducer.sparse.owned[0].ranges.bounds_of(hvd.rank())
    if kept.residual is not None:
        owned[low:high] = kept.residual.double()
    total = hvd.allreduce(lost + hvd.size() * owned, op=hvd.Sum).numpy()
    mass = np.abs(total + hvd.size() * oracle.applied - oracle.seen).max()
    return worst, order, counts, moves, float(mass), float(np.abs(oracle.mass()).max()), bits(parameters)


@pytest.mark.parametrize("size", [2, 4])
def test_equals_the_oracle_and_loses_nothing(ranks, size):
    results = ranks(size).run(against_the_oracle, 40, timeout=120)
    k = keep_count(NUMEL, RATIO)
    for worst, order, counts, moves, mass, exact, _ in results:
        assert worst < 2e-5
        assert order <= 1.0 + 1e-6
        assert np.mean(counts) == pytest.approx(k, rel=0.05)
        assert moves >= 1
        assert exact < 1e-9
        assert mass < 1e-3  # float32 sums of 40 gradients of up to 20
    assert len({result[-1] for result in results}) == 1


def every_option(steps):
    found = []
    for settings in ({"values": "float16"}, {"selection": "sampled", "bucket_bytes": 4000},
                     {"per_tensor": True, "ratio": lambda step: 0.02 + 0.1 / (step + 1)},
                     {"error_feedback": False}, {"exchange": "auto"}, {"server": "sharded"},
                     {"values": "bfloat16", "server": "rank0"}):
        parameters, optimizer = build(**settings)
        for step in range(steps):
            step_once(parameters, optimizer, step)
        assert all(bool(p.isfinite().all()) for p in parameters)
        found.append(bits(parameters))
    return found


def test_replicas_hold_the_same_bits(ranks):
    first, *others = ranks(4).run(every_option, 40, timeout=200)
    assert all(other == first for other in others)
    assert len(set(first)) == len(first)


def bytes_of_steps(steps):
    parameters, optimizer = build()
    seen = []
    for step in range(steps):
        step_once(parameters, optimizer, step)
        report = optimizer.report()
        seen.append((report["sent"], report["received"], report["owner_imbalance"]))
    return seen


def test_bytes_do_not_grow_with_the_ranks(ranks):
    k, size = keep_count(NUMEL, RATIO), 4
    results = ranks(size).run(bytes_of_steps, 12)
    for step in range(4, 12):
        sent = [sum(r[step][0][kind] for kind in ("values", "indices")) for r in results]
        got = [sum(r[step][1][kind] for kind in ("values", "indices")) for r in results]
        assert sum(sent) == sum(got)
        padding = 4 * 4 * (size + 1)
        assert np.mean(sent) <= 4 * 4.2 * k * (size - 1) / size + padding
        assert all(r[step][2] < 2.0 for r in results)


def kept(optimizer):
    """All that this rank keeps, as bytes."""
    state = optimizer.state_dict()["hvd_ext"]["reducer"]
    owned = {number: {**one, "residual": one["residual"].numpy().tobytes()}
             for number, one in state["owned"].items() if one["residual"] is not None}
    return owned, {name: piece.numpy().tobytes() for name, piece in state["residual"].items()}


def poisoned(value):
    parameters, optimizer = build()
    seen = []
    for step in range(5):
        before = bits(parameters), kept(optimizer)
        step_once(parameters, optimizer, step, value if step == 3 and hvd.rank() == 1 else None)
        after = bits(parameters), kept(optimizer)
        seen.append([a == b for a, b in zip(before, after, strict=True)])
    return seen, bits(parameters), optimizer.report()["skipped_steps"]


def test_a_step_that_is_not_finite_is_skipped_by_all(ranks):
    for value in (float("nan"), float("inf")):
        first, second = ranks(2).run(poisoned, value)
        assert first == second
        assert first[0] == [[False, False]] * 3 + [[True, True], [False, False]]
        assert first[2] == 1


def resumed(steps, at):
    results = []
    for stop in (None, at):
        parameters, optimizer = build(values="float16")
        for step in range(steps):
            if step == stop:
                saved = pickle.dumps(([p.detach() for p in parameters], optimizer.state_dict()))
                parameters, optimizer = build(values="float16")
                weights, state = pickle.loads(saved)
                with torch.no_grad():
                    for p, w in zip(parameters, weights, strict=True):
                        p.copy_(w)
                optimizer.load_state_dict(state)
            step_once(parameters, optimizer, step)
        results.append((bits(parameters), kept(optimizer)))
    state = optimizer.state_dict()
    plain, other = build(exchange="allgather")
    other.load_state_dict(state)  # the owner's residual goes back into e, nothing is lost
    before = mass_of(other)
    step_once(plain, other, steps)
    k_of = float(torch.tensor([p.grad.double().sum() for p in plain]).sum())
    after = mass_of(other)
    own = float(sum(g.astype(np.float64).sum() for g in gradients_of(hvd.rank(), steps)))
    given = float(hvd.allreduce(torch.tensor([own], dtype=torch.float64), op=hvd.Sum)[0])
    return results[0] == results[1], before + given - after - hvd.size() * k_of


def mass_of(optimizer):
    """Of all ranks' residuals: one number."""
    reducer = optimizer._hvd_ext.reducer
    own = float(reducer.residual[0].double().sum())
    own += hvd.size() * sum(float(o.double().sum()) for o in reducer.sparse.state_tensors())
    return float(hvd.allreduce(torch.tensor([own], dtype=torch.float64), op=hvd.Sum)[0])


def test_checkpoints_go_on_bit_for_bit_and_into_the_other_exchange(ranks):
    for same, lost in ranks(2).run(resumed, 12, 7):
        assert same
        assert abs(lost) < 1e-3


def scaled_loss():
    """A loss scale that changes, by powers of two, changes no bit."""
    class Scaler:
        def __init__(self):
            self.scale = 1.0

        def get_scale(self):
            return self.scale

        def is_enabled(self):
            return True

    found = []
    for scales in ([1.0] * 8, [1.0, 4.0, 4.0, 0.5, 8.0, 8.0, 1.0, 2.0]):
        scaler = Scaler()
        parameters, optimizer = build(scaler=scaler)
        for step, scale in enumerate(scales):
            scaler.scale = scale
            optimizer.zero_grad()
            backward(parameters, [scale * g for g in gradients_of(hvd.rank(), step)])
            optimizer.synchronize()
            for p in parameters:
                p.grad /= scale
            with optimizer.skip_synchronize():
                optimizer.step()
        found.append(flat(parameters))
    return bool(np.array_equal(*found))


def test_owners_residual_follows_the_loss_scale(ranks):
    assert all(ranks(2).run(scaled_loss))
