"""``hvd.clip_grad_norm_`` under every server: as torch clips the mean gradients in one process."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import hvd_ext.torch as hvd
from tests.torch.problems import backward, bits, flat, make_parameters
from tests.torch.test_sharded import SHAPES, build, gradients, run

pytestmark = pytest.mark.distributed


def clipped(server, norm_type, options):
    norms = []

    def clip(parameters, optimizer):
        norms.append(float(hvd.clip_grad_norm_(optimizer, 0.7, norm_type)))

    parameters, _, _ = run("sgd", server, before_step=clip, **options)
    return norms, flat(parameters), bits(parameters)


def clipped_by_torch(norm_type, options):
    """One process's clipping, of the mean gradients of all ranks."""
    parameters, optimizer = build("sgd", "replicated", **options)
    norms, shapes = [], SHAPES
    for step in range(5):
        if step == 3:
            extra = make_parameters([(6, 5), (7,)], seed=9)
            optimizer.add_param_group({"params": extra, "lr": 0.02})
            parameters, shapes = parameters + extra, [*shapes, (6, 5), (7,)]
        optimizer.zero_grad()
        backward(parameters, gradients(step, shapes), reverse=bool(step % 2))
        optimizer.synchronize()
        some = [p for p in parameters if p.numel()]  # torch takes no largest magnitude of nothing
        norms.append(float(torch.nn.utils.clip_grad_norm_(some, 0.7, norm_type)))
        with optimizer.skip_synchronize():
            optimizer.step()
    return norms, flat(parameters)


def clip_all_ways():
    found = []
    for norm_type in (2.0, 1.0, math.inf):
        wanted = clipped_by_torch(norm_type, {})
        found += [(wanted, clipped(server, norm_type, {})) for server in (None, "rank0", "sharded")]
    topk = {"compression": hvd.Compression.topk(0.3, min_size=10)}
    found.append((clipped_by_torch(2.0, topk), clipped("sharded", 2.0, topk)))
    return found


def test_clipping_by_the_norm_of_all_gradients(ranks):
    results = ranks(2).run(clip_all_ways, timeout=120)
    for one, other in zip(*results, strict=True):
        (norms, weights), (found, after, exact) = one
        np.testing.assert_allclose(found, norms, rtol=1e-5)  # torch adds up in float32
        np.testing.assert_allclose(after, weights, rtol=1e-5, atol=1e-6)
        assert (found, exact) == (other[1][0], other[1][2])  # the same bits on both ranks


def clip_and_discard(server, clear):
    """Weights after a step in front of which clipped gradients are thrown away, from the second step on."""
    parameters, optimizer = build("sgd", server)
    for step in range(3):
        backward(parameters, gradients(step, SHAPES))
        if step:
            hvd.clip_grad_norm_(optimizer, 0.7)
            if clear == "optimizer":
                optimizer.zero_grad()
            for parameter in parameters:
                parameter.grad = None
            backward(parameters, gradients(10 + step, SHAPES))
        optimizer.step()
        optimizer.zero_grad()
    return flat(parameters), bits(parameters)


def test_gradients_that_follow_clipped_ones_are_whole(ranks):
    pool = ranks(2)
    for clear in ("optimizer", "model"):
        expected, _ = pool.run(clip_and_discard, "rank0", "optimizer")[0]
        first, second = pool.run(clip_and_discard, "sharded", clear)
        assert first[1] == second[1]
        np.testing.assert_allclose(first[0], expected, rtol=1e-5, atol=1e-6)


def clip_refusals():
    said = []
    _, optimizer = build("sgd", "sharded")
    plain = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], 0.1)
    for args in ((optimizer, -1.0), (optimizer, 1.0, 0.0), (plain, 1.0)):
        try:
            hvd.clip_grad_norm_(*args)
        except (TypeError, ValueError) as error:
            said.append(str(error))
    return said


def test_clipping_says_what_it_cannot_do(ranks):
    for said in ranks(2).run(clip_refusals):
        assert "max_norm must be at least 0, got -1.0" in said[0]
        assert "norm_type must be above 0, got 0.0" in said[1]
        assert "is not an optimizer of hvd.DistributedOptimizer" in said[2]
