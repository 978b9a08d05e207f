"""What stands between the two halves of a step: thrown-away gradients, closures, flushes, spikes."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import hvd_ext.torch as hvd
from tests.torch.problems import backward, bits, flat, make_parameters, named, worker_gradients
from tests.torch.seng_on_ranks import LAM, data, loss_of, network

pytestmark = pytest.mark.distributed
SHAPES = [(7, 3), (5,)]


def train_seng(settings, discarding, cleared_by):
    """Weights and state after six steps, with passes in between that are thrown away."""
    model = network()
    seng = hvd.SENG(model, damping=LAM, update_freq=2, **settings)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1),
                                         named_parameters=model.named_parameters(), preconditioner=seng)
    for step in range(6):
        if discarding:
            (1e3 * loss_of(model, data(hvd.rank(), 50 + step, 7))).backward()
            optimizer.synchronize()
            (model if cleared_by == "model" else optimizer).zero_grad()
            if cleared_by == "twice":
                (1e3 * loss_of(model, data(hvd.rank(), 70 + step, 4))).backward()
                optimizer.synchronize()
                optimizer.zero_grad()
        loss_of(model, data(hvd.rank(), step, 5)).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = seng.state_dict()
    return bits(model.parameters()), state["step"], state["skipped"], state["failures"]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("settings", [{}, {"coupling": "lagged"}, {"coupling": "full"}, {"resample": "step"}],
                         ids=str)
@pytest.mark.parametrize("cleared_by", ["once", "twice", "model"])
def test_seng_keeps_nothing_of_a_pass_that_is_thrown_away(ranks, size, settings, cleared_by):
    pool = ranks(size)
    if "resample" in settings:
        settings = {**settings, "sketch": "uniform", "sketch_size": 20}
    expected = pool.run(train_seng, settings, False, cleared_by)
    assert pool.run(train_seng, settings, True, cleared_by) == expected
    assert expected[0][1] == 6


def synchronize_often(method, times):
    """Weights after four steps with so many calls of ``synchronize()`` in each."""
    model, options = network(), {}
    if method == "seng":
        options["preconditioner"] = hvd.SENG(model, damping=LAM, update_freq=2)
    elif method == "sum":
        options["op"] = hvd.Sum
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1),
                                         named_parameters=model.named_parameters(), **options)
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, data(hvd.rank(), step, 5)).backward()
        for _ in range(times):
            optimizer.synchronize()
        with optimizer.skip_synchronize():
            optimizer.step()
    loss_of(model, data(hvd.rank(), 4, 5)).backward()  # onto reduced gradients that have been applied
    optimizer.synchronize()
    with pytest.raises(RuntimeError, match=r"a second time, which .* cannot do"):
        optimizer.step()
    return bits(model.parameters())


@pytest.mark.parametrize("method", ["seng", "sum"])
def test_what_is_not_idempotent_is_done_once(ranks, method):
    pool = ranks(2)
    once = pool.run(synchronize_often, method, 1)
    assert once[0] == once[1]
    assert pool.run(synchronize_often, method, 2) == once


def clip_after_zero_grad(options):
    """Clipping where ``zero_grad()`` has left nothing to clip, then a step without a pass on rank 1."""
    parameters = make_parameters(SHAPES, dtype=torch.float64)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=1.0), named(parameters), **options())
    before = flat(parameters)
    backward(parameters, worker_gradients(SHAPES, worker=hvd.rank(), step=0))
    optimizer.synchronize()
    optimizer.zero_grad()
    norm = float(hvd.clip_grad_norm_(optimizer, 0.1))
    optimizer.step()
    unmoved = bool((flat(parameters) == before).all())
    optimizer.zero_grad()
    backward(parameters, worker_gradients(SHAPES, worker=hvd.rank(), step=1))
    hvd.clip_grad_norm_(optimizer, 0.1)  # and skipped, on all ranks
    optimizer.zero_grad()
    if hvd.rank() == 0:
        backward(parameters, worker_gradients(SHAPES, worker=0, step=2))
    optimizer.step()
    return norm, unmoved, before - flat(parameters), bits(parameters)


def nothing():
    return {}


def sharded():
    return {"server": "sharded"}


def whole_topk():
    return {"compression": hvd.Compression.topk(1.0, min_size=0)}


@pytest.mark.parametrize("options", [nothing, sharded, whole_topk])
def test_clipping_without_gradients_and_a_rank_without_a_pass(ranks, options):
    expected = flat(worker_gradients(SHAPES, worker=0, step=2)) / 2
    found = ranks(2).run(clip_after_zero_grad, options)
    assert found[0][3] == found[1][3]
    for norm, unmoved, moved, _ in found:
        assert (norm, unmoved) == (0.0, True)
        np.testing.assert_allclose(moved, expected, rtol=0, atol=1e-6)  # TopK's values travel as float32


def skip_a_spike(options, skip):
    """Weights after eight steps; the gradient of step 3 is a spike, and is skipped where it is seen."""
    parameters = make_parameters(SHAPES, dtype=torch.float64)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=0.05), named(parameters), **options())
    seen, skipped = [], 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(8):
            gradients = worker_gradients(SHAPES, worker=hvd.rank(), step=step)
            backward(parameters, [g * (1e4 if step == 3 else 1.0) for g in gradients])
            optimizer.synchronize()
            norm = float(torch.nn.utils.get_total_norm([p.grad for p in parameters]))
            seen.append(norm)
            if norm > 100:
                getattr(optimizer, skip)()
                optimizer.zero_grad()
                skipped += 1
                continue
            with optimizer.skip_synchronize():
                optimizer.step()
            optimizer.zero_grad()
    return skipped, bits(parameters), float(np.abs(flat(parameters)).max())


def topk():
    return {"compression": hvd.Compression.topk(0.3, min_size=0)}


def late():
    return {"overlap": hvd.DelayedUpdate()}


@pytest.mark.parametrize(("options", "skip"), [(topk, "zero_grad"), (topk, "skip_step"), (late, "skip_step")])
def test_a_spike_is_skipped_once(ranks, options, skip):
    found = ranks(2).run(skip_a_spike, options, skip)
    assert [one[0] for one in found] == [1, 1]
    assert found[0][1] == found[1][1]
    assert found[0][2] < 10


def skip_forever():
    """A late spike that is thrown away again and again is named."""
    parameters = make_parameters(SHAPES)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=0.05), named(parameters),
                                         overlap=hvd.DelayedUpdate())
    backward(parameters, worker_gradients(SHAPES, worker=hvd.rank(), step=0))
    optimizer.step()
    for step in (1, 2):
        optimizer.zero_grad()
        backward(parameters, worker_gradients(SHAPES, worker=hvd.rank(), step=step))
        optimizer.synchronize()
    optimizer.zero_grad()
    backward(parameters, worker_gradients(SHAPES, worker=hvd.rank(), step=3))
    optimizer.synchronize()
    with pytest.warns(UserWarning, match=r"optimizer\.skip_step\(\)"):
        optimizer.zero_grad()


def test_a_late_gradient_that_is_never_taken_is_named(ranks):
    ranks(2).run(skip_forever)


def flush_scaled(scale, clip):
    """What flush() moves the weights by, and whether ``.grad`` is as it was."""
    parameters = make_parameters(SHAPES, dtype=torch.float64)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1.0)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=1.0), named(parameters),
                                         overlap=hvd.DelayedUpdate(0.0, adaptive=False), grad_scaler=scaler)
    for step in range(3):
        optimizer.zero_grad()
        gradients = worker_gradients(SHAPES, worker=hvd.rank(), step=step)
        scaler.scale(torch.zeros(()))  # as of the loss
        backward(parameters, [g * scale for g in gradients])
        optimizer.synchronize()
        scaler.unscale_(optimizer)
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
    before, held = flat(parameters), [p.grad for p in parameters]
    values = bits(held)
    optimizer.flush((lambda: torch.nn.utils.clip_grad_norm_(parameters, clip)) if clip else None)
    assert all(p.grad is one for p, one in zip(parameters, held, strict=True))
    assert bits([p.grad for p in parameters]) == values
    return before - flat(parameters)


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_a_flush_applies_the_gradient_without_the_losses_scale(ranks, scale):
    expected = sum(flat(worker_gradients(SHAPES, worker=w, step=2)) for w in range(2)) / 2
    for moved in ranks(2).run(flush_scaled, scale, None):
        np.testing.assert_allclose(moved, expected, rtol=1e-12)
    for moved in ranks(2).run(flush_scaled, scale, 0.01):
        assert np.linalg.norm(moved) == pytest.approx(0.01, rel=1e-3)


def closures(options):
    """Clipping in a closure, with a parameter that the loss does not reach, and an error in it."""
    parameters = make_parameters(SHAPES, dtype=torch.float64)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=1.0), named(parameters), **options())
    before = flat(parameters)

    def closure(skip=(), synchronize=False, error=None):
        optimizer.zero_grad()
        backward(parameters, worker_gradients(SHAPES, worker=hvd.rank(), step=0), skip=skip)
        if synchronize:
            optimizer.synchronize()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 0.01)
        if error is not None:
            raise error
        return norm

    norm = float(optimizer.step(closure))
    moved = float(np.linalg.norm(flat(parameters) - before))
    with pytest.raises(RuntimeError, match=r"call optimizer\.synchronize\(\) in the closure"):
        optimizer.step(lambda: closure(skip=(1,)))
    optimizer.zero_grad()
    before = flat(parameters)
    optimizer.step(lambda: closure(skip=(1,), synchronize=True))
    again = float(np.linalg.norm(flat(parameters) - before))
    with pytest.raises(KeyError):
        optimizer.step(lambda: closure(error=KeyError("the user's")))
    optimizer.zero_grad()
    backward(parameters, worker_gradients(SHAPES, worker=hvd.rank(), step=1))
    optimizer.step()
    return norm, moved, again, bits(parameters)


def clipped_in_closures(server):
    """Weights after four steps whose closures clip by the norm of all gradients."""
    parameters = make_parameters(SHAPES, dtype=torch.float64)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=1.0), named(parameters),
                                         server=server)
    for step in range(4):
        def closure(step=step):
            optimizer.zero_grad()
            backward(parameters, worker_gradients(SHAPES, worker=hvd.rank(), step=step))
            return torch.nn.utils.clip_grad_norm_(parameters, 0.1)

        optimizer.step(closure)
    return flat(parameters), bits(parameters)


def test_a_closure_clips_all_gradients_under_every_server(ranks):
    pool = ranks(2)
    expected = pool.run(clipped_in_closures, None)
    for server in ("replicated", "rank0", "sharded"):
        found = pool.run(clipped_in_closures, server)
        assert found[0][1] == found[1][1]
        np.testing.assert_allclose(found[0][0], expected[0][0], rtol=1e-12)


def plain():
    return {}


@pytest.mark.parametrize("options", [plain, topk])
def test_clipping_in_a_closure_sees_reduced_gradients(ranks, options):
    found = ranks(2).run(closures, options)
    mean = sum(flat(worker_gradients(SHAPES, worker=w, step=0)) for w in range(2)) / 2
    for norm, moved, again, _ in found:
        if options is plain:
            assert norm == pytest.approx(np.linalg.norm(mean), rel=1e-12)
        assert moved == pytest.approx(0.01, rel=1e-3)
        assert again == pytest.approx(0.01, rel=1e-3)
    assert found[0][3] == found[1][3]
