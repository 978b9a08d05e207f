"""Several optimizers in one process: their collectives never meet, whatever their names and their order."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import hvd_ext.torch as hvd
from tests.torch.problems import backward, bits, flat, make_parameters, named, worker_gradients

pytestmark = pytest.mark.distributed
SHAPES = [(6, 4), (5,)]
EXACT = {  # methods whose result is a mean
    "plain": dict, "grouped": lambda: {"groups": 1}, "sharded": lambda: {"server": "sharded"},
    "late": lambda: {"overlap": hvd.DelayedUpdate(0.0, adaptive=False)},
    "topk": lambda: {"compression": hvd.Compression.topk(1.0, min_size=0)},
    "delay": lambda: {"op": hvd.DelayCompensated(0.0, adaptive=False)},
}


def wrap(method, parameters):
    return hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=0.1), named(parameters), **EXACT[method]())


def make_pair(method, names="same", shapes=SHAPES):
    """Two models and their optimizers; parameter names are the same, their own, or not given."""
    pair = []
    for number in range(2):
        parameters = make_parameters(shapes)
        given = None if names == "none" else [
            (f"head{number}.{name}" if names == "own" else name, p) for name, p in named(parameters)]
        pair.append((parameters, hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=0.1), given,
                                                          **EXACT[method]())))
    return pair


def gradients(number, step, rank):
    return worker_gradients(SHAPES, worker=rank + 10 * number, step=step)


def one_process(steps, ranks=2):
    """The weights of both models after steps with the ranks' mean gradients."""
    result = []
    for number in range(2):
        weights = [p.detach().numpy().copy() for p in make_parameters(SHAPES)]
        for step in range(steps):
            means = [np.mean(one, axis=0) for one in
                     zip(*(gradients(number, step, rank) for rank in range(ranks)), strict=True)]
            for weight, mean in zip(weights, means, strict=True):
                weight -= (0.1 * mean).astype(weight.dtype)
        result.append(np.concatenate([weight.ravel() for weight in weights]))
    return result


def train(method, names, order):
    """Backward passes of both models before both steps; ``order`` says whose passes and steps are first."""
    pair = make_pair(method, names)
    for step in range(3):
        for number in ((0, 1) if order == "same" or hvd.rank() == 0 else (1, 0)):
            backward(pair[number][0], gradients(number, step, hvd.rank()))
        steps = (0, 1) if order != "steps too" or hvd.rank() == 0 else (1, 0)
        for number in steps:
            pair[number][1].step()
        for parameters, _ in pair:
            for parameter in parameters:
                parameter.grad = None
    for _, optimizer in pair:
        optimizer.flush()
    return [flat(parameters) for parameters, _ in pair], [bits(parameters) for parameters, _ in pair]


@pytest.mark.parametrize("names", ["same", "own", "none"])
@pytest.mark.parametrize("method", EXACT)
def test_two_backward_passes_before_two_steps(ranks, method, names):
    found = ranks(2).run(train, method, names, "passes" if names == "own" else "same")
    assert found[0][1] == found[1][1]
    for mine, expected in zip(found[0][0], one_process(3), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["plain", "grouped"])
def test_ranks_may_step_in_another_order_where_gradients_travel_in_the_backward_pass(ranks, method):
    found = ranks(2).run(train, method, "own", "steps too")
    assert found[0][1] == found[1][1]
    for mine, expected in zip(found[0][0], one_process(3), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=0, atol=1e-6)


def groups_later(method):
    """Both optimizers get a group without names in mid-run."""
    pair = make_pair(method, "own")
    added = [torch.nn.Parameter(torch.ones(3)) for _ in pair]
    for step in range(3):
        if step == 1:
            for (_, optimizer), parameter in zip(pair, added, strict=True):
                optimizer.add_param_group({"params": [parameter]})
        for number, (parameters, optimizer) in enumerate(pair):
            optimizer.zero_grad()
            backward(parameters, gradients(number, step, hvd.rank()))
            if step:
                (added[number] * float(number + hvd.rank())).sum().backward()
        for _, optimizer in pair:
            optimizer.step()
    return [p.detach().tolist() for p in added]


@pytest.mark.parametrize("method", ["plain", "grouped", "sharded", "topk", "delay"])
def test_groups_that_join_both(ranks, method):
    for found in ranks(2).run(groups_later, method):
        np.testing.assert_allclose(found, [[1 - 2 * 0.1 * 0.5] * 3, [1 - 2 * 0.1 * 1.5] * 3], rtol=1e-6)


def train_in_threads(method):
    """Each model in a thread of its own."""
    pair, errors = make_pair(method, "own"), []

    def run(number):
        parameters, optimizer = pair[number]
        try:
            for step in range(5):
                optimizer.zero_grad()
                backward(parameters, gradients(number, step, hvd.rank()))
                optimizer.step()
        except BaseException as error:
            errors.append(repr(error))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [flat(parameters) for parameters, _ in pair], errors


@pytest.mark.parametrize("method", ["plain", "sharded", "topk", "delay"])
def test_two_threads_that_train(ranks, method):
    for found, errors in ranks(2).run(train_in_threads, method):
        assert errors == []
        for mine, expected in zip(found, one_process(5), strict=True):
            np.testing.assert_allclose(mine, expected, rtol=0, atol=1e-6)


def other_order_of_twins():
    """Rank 1 makes two models, whose parameters have the same names, in the other order."""
    models = [make_parameters(SHAPES), make_parameters(SHAPES)]
    with torch.no_grad():
        for parameter in models[1]:
            parameter.add_(1.0)
    order = (0, 1) if hvd.rank() == 0 else (1, 0)
    optimizers = {number: hvd.DistributedOptimizer(torch.optim.SGD(models[number], lr=0.1),
                                                   named(models[number])) for number in order}
    backward(models[0], gradients(0, 0, hvd.rank()))
    with pytest.raises(ValueError, match="differ from rank 0's"):
        optimizers[0].step()
    return True


def test_optimizers_that_cannot_be_told_apart_need_one_order(ranks):
    assert ranks(2).run(other_order_of_twins) == [True, True]


def made_again():
    """The same parameters get one optimizer after another, of which rank 0 keeps what is left."""
    parameters, kept = make_parameters(SHAPES), []
    for method in ("topk", "delay", "plain"):
        optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=0.1), named(parameters),
                                             **EXACT[method]())
        backward(parameters, gradients(0, 0, hvd.rank()))
        optimizer.step()
        optimizer.zero_grad()
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})  # not compared yet
        if hvd.rank() == 0:
            optimizer._hvd_ext.remove_hooks()
            kept.append(optimizer)
    return bits(parameters)


def test_optimizers_made_again_over_the_same_parameters(ranks):
    first, second = ranks(2).run(made_again)
    assert first == second != bits(make_parameters(SHAPES))


def dropped_in_flight(folder, method, again):
    """Weights after a step of an optimizer that follows one dropped between backward() and step().

    Rank 1 begins after rank 0 has begun both steps, so that the first one's messages are in flight.
    """
    begun = Path(folder) / "begun"
    deadline = time.monotonic() + 60
    while hvd.rank() == 1 and not begun.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first, second = make_parameters(SHAPES), make_parameters(SHAPES)
    optimizer = wrap(method, first)
    backward(first, gradients(1, 0, hvd.rank()))
    del optimizer
    if again:
        second = first
        for parameter in first:
            parameter.grad = None
    optimizer = wrap(method, second)
    try:
        backward(second, gradients(0, 0, hvd.rank()))
    finally:
        begun.touch()
    optimizer.step()
    return flat(second)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("method", ["plain", "sharded", "topk"])
def test_an_optimizer_dropped_while_its_messages_are_in_flight(ranks, tmp_path, method, again):
    first, second = ranks(2).run(dropped_in_flight, str(tmp_path), method, again)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, one_process(1)[0], rtol=0, atol=1e-6)


def start_apart(method, broadcast):
    """Weights that are other ones on rank 1."""
    parameters = make_parameters(SHAPES)
    if hvd.rank() == 1:
        with torch.no_grad():
            parameters[1][2] += 1e-6
    before = bits(parameters)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=0.1), named(parameters),
                                         broadcast_weights=broadcast, **EXACT[method]())
    try:
        for step in range(2):
            optimizer.zero_grad()
            backward(parameters, gradients(0, step, hvd.rank()))
            optimizer.step()
    except ValueError as error:
        return str(error), bits(parameters) == before
    return flat(parameters), bits(parameters)


@pytest.mark.parametrize("method", EXACT)
def test_replicas_that_begin_with_different_weights_are_an_error(ranks, method):
    for said, unchanged in ranks(2).run(start_apart, method, False):
        assert "p1 on rank 1 differ from rank 0's" in said
        assert "hvd.broadcast_parameters(model.state_dict(), root_rank=0)" in said
        assert unchanged


@pytest.mark.parametrize("method", ["plain", "sharded", "topk"])
def test_broadcast_weights_brings_them_together(ranks, method):
    first, second = ranks(2).run(start_apart, method, True)
    assert first[1] == second[1]
    np.testing.assert_allclose(first[0], one_process(2)[0], rtol=0, atol=1e-6)


def different_on_purpose():
    os.environ["HVD_EXT_CHECK_WEIGHTS"] = "0"
    try:
        return start_apart("plain", False)[1]
    finally:
        del os.environ["HVD_EXT_CHECK_WEIGHTS"]


def test_weights_that_are_meant_to_differ(ranks):
    first, second = ranks(2).run(different_on_purpose)
    assert first != second


def objects():
    shared = hvd.broadcast_object({"a": 1} if hvd.rank() == 0 else None, 0)
    return shared, hvd.allgather_object("text" if hvd.rank() == 0 else 3)


def test_objects_of_different_types(ranks):
    assert ranks(2).run(objects) == [({"a": 1}, ["text", 3])] * 2
