"""``op=hvd.DelayCompensated`` on real ranks against the float64 oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hvd_ext.torch as hvd
from tests.ranks import run_ranks
from tests.reference.delay_compensation import DelayOracle
from tests.torch.problems import UNEVEN, backward, bits, flat, make_parameters, named, worker_gradients

pytestmark = pytest.mark.distributed

RULES = {
    "adaptive": {},
    "constant": {"adaptive": False, "lam": 3.0},
    "by rank": {"order": "rank"},
    "local": {"displacement": "local"},
    "local constant": {"displacement": "local", "adaptive": False, "lam": 0.7},
    "forgetful": {"decay": 0.0},
}


def gradients_of_steps(rule, steps=4, lrs=(0.5, 0.2), dtype=torch.float32, compression=None,
                       groups=None):
    """Each step's reduced gradient and weights on this rank, two parameter groups, uneven sizes."""
    parameters = make_parameters(dtype=dtype)
    half = len(parameters) // 2
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD([{"params": parameters[:half], "lr": lrs[0]},
                         {"params": parameters[half:], "lr": lrs[1]}], lr=0.1),
        named_parameters=named(parameters), op=hvd.DelayCompensated(**rule),
        compression=compression or hvd.Compression.none,
        groups=[[parameters[i] for i in g] for g in groups] if groups else None,
    )
    seen = []
    for step in range(steps):
        optimizer.zero_grad()
        backward(parameters, worker_gradients(UNEVEN, worker=hvd.rank(), step=step))
        optimizer.synchronize()
        gradient = flat([p.grad for p in parameters])
        with optimizer.skip_synchronize():
            optimizer.step()
        seen.append((gradient, flat(parameters)))
    return seen, bits(parameters)


def oracle_steps(rule, workers, steps=4, lrs=(0.5, 0.2), dtype=torch.float32, weight=1.0):
    half = len(UNEVEN) // 2
    lr = np.concatenate([np.full(int(np.prod(s)), lrs[i >= half]) for i, s in enumerate(UNEVEN)])
    oracle = DelayOracle(**rule)
    weights = flat(make_parameters(dtype=dtype))
    for step in range(steps):
        gradients = [flat([torch.as_tensor(g).to(dtype) for g in
                           worker_gradients(UNEVEN, worker=w, step=step)]) * weight
                     for w in range(workers)]
        reduced = oracle.reduce(gradients, lr)
        weights = weights + oracle.landed
        yield reduced, weights


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_reduced_gradient_and_landing_point_are_the_oracles(ranks, rule):
    for seen, _ in ranks(2).run(gradients_of_steps, rule):
        for (gradient, weights), (expected, landed) in zip(seen, oracle_steps(rule, 2),
                                                           strict=True):
            np.testing.assert_allclose(gradient, expected, rtol=2e-5, atol=1e-6)
            # Plain SGD lands on w~_M: supplement, section H.
            np.testing.assert_allclose(weights, landed, rtol=2e-5, atol=2e-6)


def test_gloo_gives_the_same():
    for seen, _ in run_ranks(gradients_of_steps, 2, {}, launcher="gloo"):
        for (gradient, _), (expected, _) in zip(seen, oracle_steps({}, 2), strict=True):
            np.testing.assert_allclose(gradient, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("size", [2, 4])
def test_compensation_is_not_the_plain_average(ranks, size):
    """The oracle test above cannot pass by averaging."""
    (compensated, _), *_ = ranks(size).run(gradients_of_steps, {}, 1)
    plain = next(oracle_steps({"lam": 0.0}, size))[0]
    assert np.abs(compensated[0][0] - plain).max() > 0.05


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float16, 2e-3),
                                             (torch.bfloat16, 2e-2)], ids=str)


def test_other_dtypes_are_reduced_in_at_least_float32(ranks, dtype, rtol):
    rule = {"decay": 0.5}
    for seen, _ in ranks(2).run(gradients_of_steps, rule, 1, (0.5, 0.2), dtype):
        expected, _ = next(oracle_steps(rule, 2, dtype=dtype))
        np.testing.assert_allclose(seen[0][0], expected, rtol=rtol, atol=rtol / 10)


def fp16_wire(rule):
    return gradients_of_steps(rule, compression=hvd.Compression.fp16)


def test_fp16_compression_halves_the_wire_not_the_arithmetic(ranks):
    for seen, _ in ranks(2).run(fp16_wire, {}):
        for (gradient, _), (expected, _) in zip(seen[:1], oracle_steps({}, 2), strict=False):
            np.testing.assert_allclose(gradient, expected, rtol=5e-3, atol=2e-3)


def test_explicit_groups_give_the_same_gradients(ranks):
    plain = ranks(2).run(gradients_of_steps, {})
    grouped = ranks(2).run(gradients_of_steps, {}, 4, (0.5, 0.2), torch.float32, None,
                           [[0, 5], [1, 2, 3]])
    for (seen, _), (other, _) in zip(plain, grouped, strict=True):
        np.testing.assert_allclose(seen[-1][0], other[-1][0], rtol=1e-6, atol=1e-7)


def microbatches(passes, rule, missing=()):
    """The step's gradient where each micro-batch is a worker; losses divided by the passes."""
    parameters = make_parameters()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(parameters, lr=0.3), named_parameters=named(parameters),
        backward_passes_per_step=passes,
        op=hvd.DelayCompensated(virtual_workers="microbatch", **rule),
    )
    seen = []
    for step in range(3):
        for part in range(passes):
            if (hvd.rank(), part) in missing:
                continue
            worker = hvd.rank() * passes + part
            backward(parameters, worker_gradients(UNEVEN, worker=worker, step=step,
                                                  scale=1 / passes))
        optimizer.synchronize()
        seen.append(flat([p.grad for p in parameters]))
        with optimizer.skip_synchronize():
            optimizer.step()
        optimizer.zero_grad()
    return seen, bits(parameters)


@pytest.mark.parametrize(("size", "passes"), [(1, 16), (2, 8), (2, 3)])
@pytest.mark.parametrize("rule", [{}, {"adaptive": False, "lam": 1.5}], ids=["adaptive", "constant"])
def test_microbatches_are_workers(ranks, size, passes, rule):
    workers = size * passes
    results = ranks(size).run(microbatches, passes, rule)
    assert len({replica for _, replica in results}) == 1
    for seen, _ in results:
        oracle = DelayOracle(**rule)
        for step, gradient in enumerate(seen):
            gradients = [flat(worker_gradients(UNEVEN, worker=w, step=step))
                         for w in range(workers)]
            np.testing.assert_allclose(gradient, oracle.reduce(gradients, 0.3), rtol=3e-5,
                                       atol=3e-6)


def test_a_rank_may_have_fewer_microbatches(ranks):
    (seen, _), _ = ranks(2).run(microbatches, 3, {}, ((1, 2),))
    gradients = [flat(worker_gradients(UNEVEN, worker=w, step=0)) for w in range(5)]
    # Six workers' steps are lr/6 although only five came, as Horovod divides by the passes set.
    oracle = DelayOracle()
    expected = oracle.reduce([*gradients, np.zeros_like(gradients[0])], 0.3)
    # The absent worker must not age MeanSquare; on the first step that is all it could change.
    absent = DelayOracle()
    expected = absent.reduce(gradients, 0.3 * 5 / 6) * 5 / 6
    np.testing.assert_allclose(seen[0], expected, rtol=3e-5, atol=3e-6)


def poison(value, rule):
    """Three steps; in the second, one rank has a non-finite entry. What the reducer kept and gave."""
    parameters = make_parameters([(9, 4), (3,)])
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(parameters, lr=0.1), named_parameters=named(parameters),
        op=hvd.DelayCompensated(**rule),
    )
    kept, given = [], []
    for step in range(3):
        gradients = worker_gradients([(9, 4), (3,)], worker=hvd.rank(), step=step)
        if step == 1 and hvd.rank() == 1:
            gradients[0][2, 1] = value
        backward(parameters, gradients)
        optimizer.synchronize()
        given.append(flat([p.grad for p in parameters]))
        with optimizer.skip_synchronize():
            optimizer.step()
        kept.append(flat(optimizer._hvd_ext.reducer.mean_square.values()))
        optimizer.zero_grad()
    return kept, given, optimizer.report()["unusable_steps"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("order", ["norm", "rank"])
def test_a_value_that_is_not_finite_reaches_all_ranks_and_never_mean_square(ranks, value, order):
    results = ranks(2).run(poison, value, {"order": order})
    workers = [[flat(worker_gradients([(9, 4), (3,)], worker=w, step=step)) for w in range(2)]
               for step in range(2)]
    workers[1][1][2 * 4 + 1] = value
    expected = (workers[1][0] + workers[1][1]) / 2
    if order == "rank":  # buckets may have gone back before a rank knew of it: all are compensated
        oracle = DelayOracle(order="rank")
        oracle.reduce(workers[0], 0.1)
        with np.errstate(invalid="ignore"):
            expected = oracle.reduce(workers[1], 0.1)
    finite = np.isfinite(workers[1][1])
    for kept, given, unusable in results:
        # As under a plain allreduce: that entry is not finite everywhere, the others are.
        np.testing.assert_allclose(given[1][finite], expected[finite], rtol=2e-5, atol=1e-6)
        np.testing.assert_array_equal(np.isfinite(given[1]), finite)
        assert np.isfinite(given[0]).all()
        assert np.isfinite(given[2]).all()
        np.testing.assert_array_equal(kept[1], kept[0])
        assert np.isfinite(kept[2]).all()
        assert (kept[2] != kept[0]).any()
        assert unusable == 1


def scaled(scale):
    """A step under a GradScaler, and whether it was skipped after a rank's overflow."""
    parameters = make_parameters([(9, 4), (3,)])
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(parameters, lr=0.1), named_parameters=named(parameters),
        op=hvd.DelayCompensated(), grad_scaler=scaler,
    )
    results = []
    for step in range(3):
        gradients = worker_gradients([(9, 4), (3,)], worker=hvd.rank(), step=step)
        if step == 1 and hvd.rank() == 1:
            gradients[0][0, 0] = np.inf
        loss = sum((p * torch.as_tensor(g).float()).sum()
                   for p, g in zip(parameters, gradients, strict=True))
        scaler.scale(loss).backward()
        optimizer.synchronize()
        scaler.unscale_(optimizer)
        gradient = flat([p.grad for p in parameters])
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        results.append((gradient, flat(parameters), scaler.get_scale()))
    return results


def test_grad_scaler_is_undone_and_backs_off_everywhere(ranks):
    results = ranks(2).run(scaled, 1024.0)
    oracle = DelayOracle()
    shapes = [(9, 4), (3,)]
    first = oracle.reduce([flat(worker_gradients(shapes, worker=w, step=0)) for w in range(2)], 0.1)
    third = oracle.reduce([flat(worker_gradients(shapes, worker=w, step=2)) for w in range(2)], 0.1)
    for steps in results:
        np.testing.assert_allclose(steps[0][0], first, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(steps[2][0], third, rtol=2e-5, atol=1e-6)
        np.testing.assert_array_equal(steps[1][1], steps[0][1])
        assert [scale for _, _, scale in steps] == [1024.0, 512.0, 512.0]
