"""PowerSGD against the float64 oracle; replicas, bytes, bad gradients, checkpoints, the loss scale."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hvd_ext.torch as hvd
from hvd_ext.reducers.buckets import BucketKey, TensorSpec, plan_buckets
from hvd_ext.reducers.powersgd import first_q, plan_matrices
from tests.reference.powersgd import powersgd
from tests.torch.problems import backward, bits, make_parameters, named, worker_gradients

SHAPES = [(12, 9), (5,), (10, 3, 4), (20, 21)]
COMPRESSED = [0, 2, 3]


def build(settings=None, *, dtype=torch.float64, lr=1.0, **options):
    parameters = make_parameters(SHAPES, dtype=dtype)
    compression = hvd.Compression.powersgd(**{"rank": 2, **(settings or {})})
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr), named(parameters),
                                         compression=compression, **options)
    return parameters, optimizer


def train(parameters, optimizer, steps, *, first=0, poison=None):
    """The gradients that are applied at each step."""
    applied = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        gradients = worker_gradients(SHAPES, worker=hvd.rank(), step=step)
        if poison == step and hvd.rank() == 1:
            gradients[2].flat[1] = np.nan
        backward(parameters, gradients)
        optimizer.synchronize()
        applied.append([p.grad.detach().clone().numpy() for p in parameters])
        with optimizer.skip_synchronize():
            optimizer.step()
    return applied


def residuals(optimizer):
    return optimizer.state_dict()["hvd_ext"]["reducer"]["residual"]


def oracle(ranks, steps, settings):
    """The oracle's means and residuals by number of the parameter."""
    specs = [TensorSpec("", shape, 8, BucketKey("float64", route="powersgd" if k in COMPRESSED else "dense"))
             for k, shape in enumerate(SHAPES)]
    expected = {}
    for bucket in plan_buckets(specs):
        if bucket.kind.route == "dense":
            continue
        found = plan_matrices(bucket, specs, settings.get("rank", 2))
        for one in found:
            def first(step, one=one, found=found, index=bucket.index):
                return one.q.slice_of(first_q(found, (0, index, step))).reshape(one.m, one.r)

            def gradient(rank, step, one=one):
                whole = worker_gradients(SHAPES, worker=rank, step=step)[one.slot.index]
                return np.asarray(whole).reshape(one.n, one.m)

            expected[one.slot.index] = powersgd(
                gradient, first, ranks=ranks, steps=steps,
                feedback=settings.get("error_feedback", True),
                warm_start=settings.get("warm_start", True))
    return expected


def against_the_oracle(settings, steps, dtype):
    parameters, optimizer = build(settings, dtype=dtype)
    applied = train(parameters, optimizer, steps)
    return applied, {name: r.numpy() for name, r in residuals(optimizer).items()}, bits(parameters)


CASES = [{}, {"rank": 1}, {"warm_start": False}, {"error_feedback": False},
         {"rank": 3, "min_compression": 1.0}]


def check_against_the_oracle(results, settings, steps, tolerance):
    expected = oracle(len(results), steps, settings)
    assert len({weights for *_, weights in results}) == 1
    for rank, (applied, kept, _) in enumerate(results):
        for index, (means, left) in expected.items():
            for step in range(steps):
                np.testing.assert_allclose(applied[step][index].reshape(means[step].shape),
                                           means[step], rtol=tolerance, atol=tolerance)
            if settings.get("error_feedback", True):
                np.testing.assert_allclose(kept[f"p{index}"].reshape(left[rank].shape), left[rank],
                                           rtol=tolerance, atol=tolerance)
        whole = np.mean([worker_gradients(SHAPES, worker=r, step=steps - 1)[1]
                         for r in range(len(results))], axis=0)
        np.testing.assert_allclose(applied[-1][1], whole, rtol=1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize("settings", CASES, ids=str)
def test_six_steps_are_the_oracles(ranks, settings):
    check_against_the_oracle(ranks(2).run(against_the_oracle, settings, 6, torch.float64), settings, 6,
                             1e-9)


@pytest.mark.distributed
def test_float32_and_four_ranks(ranks):
    check_against_the_oracle(ranks(4).run(against_the_oracle, {}, 4, torch.float32), {}, 4, 2e-4)


@pytest.mark.distributed
def test_a_single_process(ranks):
    check_against_the_oracle(ranks(1).run(against_the_oracle, {}, 4, torch.float64), {}, 4, 1e-9)


def bytes_and_figures():
    parameters, optimizer = build(dtype=torch.float32)
    train(parameters, optimizer, 1)
    return optimizer.report()


@pytest.mark.distributed
def test_bytes_are_those_of_the_factors(ranks):
    numbers = 2 * ((12 + 9) + (10 + 12) + (20 + 21))
    for report in ranks(2).run(bytes_and_figures):
        assert report["sent"]["factors"] == 4 * numbers  # 2 (M-1)/M of P and Q
        assert report["sent"]["dense"] == 4 * 5
        assert report["sent_fraction"] == numbers / (12 * 9 + 10 * 12 + 20 * 21)
        assert report["residual_norm"] > 0


def one_bad_gradient():
    parameters, optimizer = build()
    seen = []
    for step in range(4):
        before = bits(parameters), bits(residuals(optimizer).values())
        train(parameters, optimizer, 1, first=step, poison=2)
        after = bits(parameters), bits(residuals(optimizer).values())
        seen.append([a == b for a, b in zip(before, after, strict=True)])
    report = optimizer.report()
    return seen, report["steps"], report["skipped_steps"], bits(parameters)


@pytest.mark.distributed
def test_a_bad_gradient_on_one_rank_is_skipped_by_all(ranks):
    first, second = ranks(2).run(one_bad_gradient)
    assert first == second
    assert first[0] == [[False, False], [False, False], [True, True], [False, False]]
    assert first[1:3] == (3, 1)


def resume():
    parameters, optimizer = build()
    train(parameters, optimizer, 3)
    weights, state = [p.detach().clone() for p in parameters], optimizer.state_dict()
    train(parameters, optimizer, 3, first=3)
    again, other = build()
    with torch.no_grad():
        for p, w in zip(again, weights, strict=True):
            p.copy_(w)
    other.load_state_dict(state)
    train(again, other, 3, first=3)
    _, refused = build({"rank": 1})
    with pytest.raises(ValueError, match="PowerSGD factors do not fit"):
        refused.load_state_dict(state)
    return bits(parameters) == bits(again)


@pytest.mark.distributed
def test_a_checkpoint_continues_bit_for_bit(ranks):
    assert ranks(2).run(resume) == [True, True]


def scaled(factors):
    """The weights when the loss is scaled by another factor at each step."""
    scaler = torch.amp.GradScaler("cpu")
    parameters, optimizer = build(grad_scaler=scaler)
    for step, factor in enumerate(factors):
        scaler.scale(torch.zeros(()))  # makes the scaler's own tensors
        scaler.update(factor)
        optimizer.zero_grad()
        gradients = worker_gradients(SHAPES, worker=hvd.rank(), step=step, scale=factor)
        backward(parameters, gradients)
        optimizer.synchronize()
        with torch.no_grad():
            for p in parameters:
                p.grad.div_(factor)
        with optimizer.skip_synchronize():
            optimizer.step()
    return np.concatenate([p.detach().numpy().ravel() for p in parameters])


@pytest.mark.distributed
def test_residuals_follow_the_loss_scale(ranks):
    plain, rescaled = ranks(2).run(scaled, [1.0] * 4)[0], ranks(2).run(scaled, [1.0, 8.0, 0.5, 4.0])[0]
    np.testing.assert_allclose(rescaled, plain, rtol=1e-10)


@pytest.mark.distributed
def test_ranks_that_disagree_are_told(ranks):
    messages = ranks(2).run(other_rank)
    assert all("rank 1 does not have Compression.powersgd rank=2" in message for message in messages)


def other_rank():
    parameters, optimizer = build({"rank": 2 + hvd.rank(), "min_compression": 1.0})
    try:
        train(parameters, optimizer, 1)
    except Exception as error:
        return str(error)
    return "no error"
