"""Gradients that are applied one step late: the oracle, every reducer a step behind itself, state."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import hvd_ext.torch as hvd
from tests.reference.async_sgd import trajectory
from tests.torch.problems import backward, bits, flat, make_parameters, named, worker_gradients

SHAPES = [(12, 9), (5,), (10, 3, 4), (20, 21)]
N = sum(int(np.prod(shape)) for shape in SHAPES)

# A quadratic whose gradient at w is curvature * w plus noise of rank and step.


def curvature():
    return np.random.default_rng(1).uniform(0.2, 2.0, N)


def noise(rank, step):
    return np.random.default_rng([2, rank, step]).standard_normal(N)


def settings(rule):
    return {"constant": {"lam": 0.3, "adaptive": False}, "adaptive": {"lam": 1.5, "decay": 0.9},
            "none": {"lam": 0.0}}[rule]


def train_on_a_quadratic(rule, momentum, steps, dtype, zero_in_place=False, clip=None):
    """Weights after each update, flat, and their bytes."""
    parameters = make_parameters(SHAPES, dtype=dtype)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, 0.05, momentum=momentum),
                                         named(parameters), overlap=hvd.DelayedUpdate(**settings(rule)))
    seen = [flat(parameters)]
    for step in range(steps):
        optimizer.zero_grad(set_to_none=not zero_in_place)
        whole = curvature() * flat(parameters) + noise(hvd.rank(), step)
        pieces = np.split(whole, np.cumsum([p.numel() for p in parameters])[:-1])
        backward(parameters, [one.reshape(p.shape) for one, p in zip(pieces, parameters, strict=True)],
                 reverse=step % 2 == 1)
        if clip is not None:
            hvd.clip_grad_norm_(optimizer, clip)
        optimizer.step()
        seen.append(flat(parameters))
    optimizer.flush()
    optimizer.flush()  # there is nothing more
    seen.append(flat(parameters))
    return np.stack(seen), bits(parameters), optimizer.report()["overlap"]["updates"]


def quadratic_oracle(ranks, rule, momentum, steps):
    start = flat(make_parameters(SHAPES, dtype=torch.float64))
    rule = settings(rule)
    name = "dc-asgd-a" if rule.get("adaptive", True) else "dc-asgd-c"
    return trajectory(
        lambda w, k: curvature() * w + np.mean([noise(rank, k) for rank in range(ranks)], axis=0),
        start, [0] + [1] * (steps - 1), lr=0.05, momentum=momentum, rule=name, lam=rule["lam"],
        decay=rule.get("decay", 0.95))


@pytest.mark.distributed
@pytest.mark.parametrize(("size", "rule", "momentum", "in_place"), [
    (1, "adaptive", 0.5, False), (2, "constant", 0.0, False), (2, "adaptive", 0.5, True),
    (2, "none", 0.9, False), (4, "adaptive", 0.0, False)])


def test_every_weight_is_the_oracles(ranks, size, rule, momentum, in_place):
    results = ranks(size).run(train_on_a_quadratic, rule, momentum, 12, torch.float64, in_place)
    expected = quadratic_oracle(size, rule, momentum, 12)
    for seen, weights, updates in results:
        assert updates == 12
        np.testing.assert_array_equal(seen[0], seen[1])  # the first step changes nothing
        np.testing.assert_allclose(seen[1:], expected, rtol=1e-10, atol=1e-11)
        assert weights == results[0][1]


@pytest.mark.distributed
def test_float32(ranks):
    for seen, _, _ in ranks(2).run(train_on_a_quadratic, "adaptive", 0.5, 12, torch.float32):
        np.testing.assert_allclose(seen[1:], quadratic_oracle(2, "adaptive", 0.5, 12), rtol=2e-4, atol=2e-5)


@pytest.mark.distributed
def test_clipping_sees_what_is_applied(ranks):
    for seen, _, _ in ranks(2).run(train_on_a_quadratic, "constant", 0.0, 6, torch.float64, False, 1e-3):
        moved = np.linalg.norm(np.diff(seen, axis=0)[1:-1], axis=1)
        np.testing.assert_allclose(moved, 0.05 * 1e-3, rtol=1e-4)


# With gradients that do not depend on the weights, and no compensation, a run is late by one step in all.

REDUCERS = {
    "plain": lambda: {},
    "sum": lambda: {"op": hvd.Sum},
    "fp16": lambda: {"compression": hvd.Compression.fp16},
    "groups": lambda: {"groups": 2},
    "delay": lambda: {"op": hvd.DelayCompensated(1.0)},
    "delay_fp16": lambda: {"op": hvd.DelayCompensated(0.5, adaptive=False),
                           "compression": hvd.Compression.fp16},
    "topk": lambda: {"compression": hvd.Compression.topk(0.1, min_size=0)},
    "topk_sparse": lambda: {"compression": hvd.Compression.topk(
        0.1, min_size=0, exchange="sparse_allreduce")},
    "powersgd": lambda: {"compression": hvd.Compression.powersgd(rank=1, min_compression=1.0)},
    "rank0": lambda: {"server": "rank0"},
    "sharded": lambda: {"server": "sharded"},
    "topk_sharded": lambda: {"server": "sharded", "compression": hvd.Compression.topk(0.1, min_size=0)},
    "passes": lambda: {"backward_passes_per_step": 2},
}


def train_by_known_gradients(method, late, steps=7, change=None):
    """The bytes of the weights after each step and at the end, and what the reducer keeps."""
    parameters = make_parameters(SHAPES)
    options = REDUCERS[method]()
    if late:
        options["overlap"] = hvd.DelayedUpdate(0.0)
    optimizer = hvd.DistributedOptimizer(torch.optim.Adam(parameters, 0.01), named(parameters), **options)
    seen = [bits(parameters)]
    for step in range(steps):
        optimizer.zero_grad()
        for number in range(options.get("backward_passes_per_step", 1)):
            gradients = worker_gradients(SHAPES, worker=hvd.rank(), step=10 * number + step)
            if change == "nan" and step == 2 and hvd.rank() == 1:
                gradients[2].flat[0] = np.nan
            skip = [1] if change == "missing" and step % 3 == hvd.rank() else []
            backward(parameters, gradients, skip=skip)
        optimizer.step()
        seen.append(bits(parameters))
    optimizer.flush()
    hvd.assert_replicas_equal(named(parameters))
    seen.append(bits(parameters))
    return seen, flat(value for name, value in sorted(
        optimizer.state_dict()["hvd_ext"]["reducer"].get("residual", {}).items()))


def late_and_not(method, change=None):
    return train_by_known_gradients(method, True, change=change), \
        train_by_known_gradients(method, False, change=change)


@pytest.mark.distributed
@pytest.mark.parametrize(("method", "change"), [
    ("passes", None), ("delay_fp16", None), ("powersgd", "nan"), ("plain", "missing"), ("delay", "missing"),
    ("topk", "missing")])


def test_every_reducer_is_itself_one_step_late(ranks, method, change):
    for (late, left), (synchronous, same) in ranks(2).run(late_and_not, method, change):
        assert late[0] == late[1]
        assert late[1:] == synchronous[:-1]
        np.testing.assert_array_equal(left, same)


def parameters_that_join():
    parameters = make_parameters(SHAPES)
    parameters[3].requires_grad_(False)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, 0.1), named(parameters),
                                         overlap=hvd.DelayedUpdate())
    frozen = parameters[3].detach().clone()
    for step in range(5):
        if step == 2:
            parameters[3].requires_grad_(True)
        optimizer.zero_grad()
        backward(parameters, worker_gradients(SHAPES, worker=hvd.rank(), step=step),
                 skip=[3] if step < 2 else [])
        optimizer.step()
        assert torch.equal(parameters[3], frozen) == (step < 3)
    hvd.assert_replicas_equal(named(parameters))
    return bits(parameters)


@pytest.mark.distributed
def test_a_parameter_that_is_unfrozen_waits_its_step(ranks):
    assert len(set(ranks(2).run(parameters_that_join))) == 1


def scaled(late_settings):
    """A loss scale that changes, and a step whose gradients overflow."""
    parameters = make_parameters(SHAPES, dtype=torch.float64)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, 0.05), named(parameters),
                                         overlap=hvd.DelayedUpdate(**late_settings), grad_scaler=scaler)
    scales = []
    for step in range(9):
        optimizer.zero_grad()
        gradients = worker_gradients(SHAPES, worker=hvd.rank(), step=step)
        scale = float(scaler.scale(torch.ones(())))
        factor = np.inf if step == 4 and hvd.rank() == 1 else scale
        backward(parameters, [factor * (g + 0.1) for g in gradients])
        scales.append(scale)
        optimizer.synchronize()
        scaler.unscale_(optimizer)
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
    kept = optimizer.state_dict()["hvd_ext"]["reducer"]["late"]["mean_square"]
    assert all(bool(one.isfinite().all()) for one in kept.values())
    return flat(parameters), scales


@pytest.mark.distributed
@pytest.mark.parametrize("rule", ["constant", "adaptive"])
def test_a_loss_scale_that_changes_and_overflows(ranks, rule):
    rule = settings(rule)
    for weights, scales in ranks(2).run(scaled, rule):
        assert len(set(scales)) >= 3
        start = flat(make_parameters(SHAPES, dtype=torch.float64))
        updates = [step for step in range(8) if step != 4]  # the ninth step's is still on its way
        delays = [0, 1, 1, 1, 0, 1, 1]  # after the skipped update the weights have not moved

        def gradient(w, k, updates=updates):
            whole = [flat([g + 0.1 for g in worker_gradients(SHAPES, worker=rank, step=updates[k])])
                     for rank in range(2)]
            return np.mean(whole, axis=0)

        expected = trajectory(gradient, start, delays, lr=0.05, lam=rule["lam"],
                              rule="dc-asgd-a" if rule.get("adaptive", True) else "dc-asgd-c",
                              decay=rule.get("decay", 0.95))
        np.testing.assert_allclose(weights, expected[-1], rtol=1e-9, atol=1e-10)


# State


def build(method="topk", late=True):
    parameters = make_parameters(SHAPES)
    options = {**REDUCERS[method](), **({"overlap": hvd.DelayedUpdate(1.0)} if late else {})}
    return parameters, hvd.DistributedOptimizer(torch.optim.SGD(parameters, 0.05, momentum=0.5),
                                                named(parameters), **options)


def go_on(parameters, optimizer, first, last):
    for step in range(first, last):
        optimizer.zero_grad()
        backward(parameters, [g + 0.1 * p.detach().numpy() for g, p in zip(
            worker_gradients(SHAPES, worker=hvd.rank(), step=step), parameters, strict=True)])
        optimizer.step()


def resumed(method):
    parameters, optimizer = build(method)
    go_on(parameters, optimizer, 0, 5)
    saved = copy.deepcopy((optimizer.state_dict(), [p.detach().clone() for p in parameters]))
    go_on(parameters, optimizer, 5, 9)
    optimizer.flush()
    others, other = build(method)
    go_on(others, other, 0, 2)  # what is on its way then is dropped
    other.load_state_dict(saved[0])
    with torch.no_grad():
        for parameter, value in zip(others, saved[1], strict=True):
            parameter.copy_(value)
    go_on(others, other, 5, 9)
    other.flush()
    return bits(parameters) == bits(others), other.report()["overlap"]["updates"]


@pytest.mark.distributed
@pytest.mark.parametrize("method", ["plain", "delay", "topk", "topk_sparse", "powersgd", "sharded"])
def test_a_resumed_run_is_the_same_bit_for_bit(ranks, method):
    assert ranks(2).run(resumed, method) == [(True, 9)] * 2


def error_of(call, *args):
    """What the ValueError says that the call raises."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call(*args)
    return str(caught.value)


def states_that_do_not_fit():
    parameters, optimizer = build()
    go_on(parameters, optimizer, 0, 3)
    with_late = optimizer.state_dict()
    optimizer.flush()
    _, without = build(late=False)
    said = [error_of(without.load_state_dict, with_late)]
    without.load_state_dict(with_late, reset_per_rank_state=True)
    parameters, optimizer = build()
    go_on(parameters, optimizer, 0, 2)
    if hvd.rank() == 1:
        optimizer.load_state_dict(with_late)  # on one rank alone
    else:
        optimizer.load_state_dict({key: value for key, value in with_late.items() if key != "hvd_ext"})
    return [*said, error_of(go_on, parameters, optimizer, 2, 4)]


@pytest.mark.distributed
def test_a_gradient_that_waits_is_not_lost_silently(ranks):
    for plain, differs in ranks(2).run(states_that_do_not_fit):
        assert "saved with overlap=" in plain
        assert "overlap: one waits: " in differs


def begun_and_other_settings():
    parameters, optimizer = build("plain")
    backward(parameters, worker_gradients(SHAPES, worker=0, step=0))
    with pytest.raises(RuntimeError, match="between backward"):
        optimizer.flush()
    optimizer.step()
    optimizer.flush()
    parameters = make_parameters(SHAPES)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, 0.05), named(parameters),
                                         overlap=hvd.DelayedUpdate(1.0 + hvd.rank()))
    return error_of(go_on, parameters, optimizer, 0, 1)


@pytest.mark.distributed
def test_ranks_with_other_settings_all_say_so(ranks):
    for said in ranks(2).run(begun_and_other_settings):
        assert "overlap: lam=" in said


# Alone


def make(**options):
    parameters = make_parameters(SHAPES)
    return hvd.DistributedOptimizer(options.pop("inner", torch.optim.SGD)(parameters, 0.1),
                                    named(parameters), **options)


@pytest.mark.parametrize(("options", "error", "said"), [
    ({"overlap": True}, TypeError, "overlap must be hvd.DelayedUpdate"),
    ({"overlap": hvd.DelayedUpdate(), "inner": torch.optim.LBFGS}, ValueError, "LBFGS"),
    ({"overlap": hvd.DelayedUpdate(), "op": hvd.DelayCompensated(virtual_workers="microbatch")}, ValueError,
     "virtual_workers=\"rank\""),
    ({"overlap": hvd.DelayedUpdate(), "preconditioner": object()}, ValueError, "drop one of them"),
])


def test_what_cannot_be_combined(ranks, options, error, said):
    with pytest.raises(error, match=said):
        make(**options)


@pytest.mark.parametrize(("settings", "said"), [
    ({"lam": -1}, "lam"), ({"decay": 1.0}, "decay"), ({"eps": 0}, "eps"), ({"adaptive": 1}, "adaptive")])


def test_settings_outside_their_limits(settings, said):
    with pytest.raises((TypeError, ValueError), match=said):
        hvd.DelayedUpdate(**settings)


def with_an_embedding(sparse=True, **options):
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(5, 2, sparse=sparse)
    return embedding, hvd.DistributedOptimizer(torch.optim.SGD(embedding.parameters(), 0.1),
                                               embedding.named_parameters(), overlap=hvd.DelayedUpdate(),
                                               **options)


def made_dense(method):
    """The weights when sparse gradients are made dense, and when they are dense to begin with."""
    found = []
    for sparse in (True, False):
        embedding, optimizer = with_an_embedding(sparse, sparse_as_dense=True, **REDUCERS[method]())
        for step in range(4):
            optimizer.zero_grad()
            (embedding(torch.tensor([step, 1 + hvd.rank()])) ** 2).sum().backward()
            optimizer.step()
        optimizer.flush()
        found.append(embedding.weight.detach().tolist())
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("method", ["plain", "topk"])
def test_sparse_gradients_made_dense(ranks, method):
    (sparse, dense), other = ranks(2).run(made_dense, method)
    assert sparse == dense
    assert [sparse, dense] == other


def refused():
    optimizer = make(overlap=hvd.DelayedUpdate())
    said = error_of(hvd.uneven_inputs(optimizer).__enter__)
    embedding, sparse = with_an_embedding()
    embedding(torch.tensor([1, 3])).sum().backward()
    make().flush()  # without overlap= there is nothing to do
    return said, error_of(sparse.step)


@pytest.mark.distributed
def test_what_is_refused_when_it_is_met(ranks):
    for uneven, sparse in ranks(2).run(refused):
        assert "drop overlap=" in uneven
        assert "sparse_as_dense=True" in sparse
