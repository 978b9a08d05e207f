"""``hvd.register_reducer``: a way to reduce that comes from outside the package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

import hvd_ext.torch as hvd
from tests.torch.problems import backward, bits, make_parameters, named, worker_gradients
from tests.torch.sign_reducer import Sign, SignReducer

ROOT = Path(__file__).resolve().parents[2]
SHAPES = [(9, 5), (7,), ()]


def steps_with_signs():
    if not hasattr(hvd.Compression, "sign"):
        hvd.register_reducer(Sign, SignReducer)
    parameters = make_parameters(SHAPES, dtype=torch.float64)
    start = [p.detach().clone() for p in parameters]
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, 0.5), named(parameters),
                                         compression=hvd.Compression.sign(scale=0.25))
    for step in range(3):
        optimizer.zero_grad()
        backward(parameters, worker_gradients(SHAPES, worker=hvd.rank(), step=step))
        optimizer.step()
    moved = [(a - b).detach().numpy() for a, b in zip(start, parameters, strict=True)]
    return moved, bits(parameters), optimizer.report()


def means_of_signs(number, ranks=2, steps=3, scale=0.25):
    """Error feedback by hand: each step's mean over the ranks of ``scale * sign(g + e)``; the residuals."""
    residual = [0.0] * ranks
    means = []
    for step in range(steps):
        sent = []
        for rank in range(ranks):
            total = worker_gradients(SHAPES, worker=rank, step=step)[number] + residual[rank]
            sent.append(scale * np.sign(total))
            residual[rank] = total - sent[rank]
        means.append(sum(sent) / ranks)
    return means, residual


MEANS = [means_of_signs(number)[0] for number in range(len(SHAPES))]


@pytest.mark.distributed
def test_a_reducer_of_ones_own(ranks):
    results = ranks(2).run(steps_with_signs)
    assert results[0][1] == results[1][1]
    for moved, _, report in results:
        for number in range(len(SHAPES)):
            np.testing.assert_allclose(moved[number], 0.5 * np.sum(MEANS[number], axis=0), atol=1e-12)
        assert report["buckets"] == 1
        assert report["sent"]["gradients"] == 8 * (45 + 7 + 1)


def settings_that_differ():
    if not hasattr(hvd.Compression, "sign"):
        hvd.register_reducer(Sign, SignReducer)
    parameters = make_parameters(SHAPES)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, 0.5), named(parameters),
                                         compression=hvd.Compression.sign(1.0 + hvd.rank()))
    backward(parameters, worker_gradients(SHAPES, worker=hvd.rank(), step=0))
    with pytest.raises(ValueError, match=r"rank 1 does not have Compression.sign scale=1.0"):
        optimizer.step()
    return True


@pytest.mark.distributed
def test_its_settings_are_compared_between_ranks(ranks):
    assert ranks(2).run(settings_that_differ) == [True, True]


@dataclass(frozen=True)
class Impostor:
    slot: ClassVar[str] = "compression"
    label: ClassVar[str] = "topk"


def test_what_cannot_be_registered():
    with pytest.raises(ValueError, match="'topk' is registered already, for TopK"):
        hvd.register_reducer(Impostor, SignReducer)
    with pytest.raises(TypeError, match="reducer must be a subclass of Reducer"):
        hvd.register_reducer(Impostor, Impostor)
    with pytest.raises(TypeError, match="settings must be a dataclass type"):
        hvd.register_reducer(SignReducer, SignReducer)


def test_the_page_shows_this_reducer():
    code = (ROOT / "tests" / "torch" / "sign_reducer.py").read_text()
    page = (ROOT / "docs" / "own_reducer.md").read_text().replace("import hvd_ext.torch as hvd\n", "", 1)
    assert code[code.index("from collections"):].rstrip() in page
