"""Ranks that disagree, leave or die: an error on every rank within seconds, never a hang."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest
import torch

import hvd_ext.torch as hvd
from tests.ranks import run_ranks
from tests.torch.problems import backward, make_parameters, named

pytestmark = pytest.mark.distributed

SHAPES = [(6, 5), (7,)]


def delayed(parameters, **options):
    return hvd.DistributedOptimizer(
        torch.optim.SGD(parameters, lr=0.1), named_parameters=options.pop("names", named(parameters)),
        op=options.pop("op", hvd.DelayCompensated()), **options,
    )


def one_step(parameters, optimizer):
    backward(parameters, [torch.ones(p.shape).numpy() for p in parameters])
    optimizer.step()


def other_shape(rank):
    return delayed(make_parameters([(6, 5), (7 if rank == 0 else 9,)]))


def other_dtype(rank):
    return delayed(make_parameters(SHAPES, dtype=torch.float32 if rank == 0 else torch.float64))


def other_parameters(rank):
    return delayed(make_parameters(SHAPES + ([] if rank == 0 else [(4,)])))


def other_names(rank):
    parameters = make_parameters(SHAPES)
    return delayed(parameters, names=[(f"rank{rank}.{i}", p) for i, p in enumerate(parameters)])


def other_settings(rank):
    return delayed(make_parameters(SHAPES), op=hvd.DelayCompensated(lam=2.0 + rank))


def other_passes(rank):
    return delayed(make_parameters(SHAPES), backward_passes_per_step=1 + rank)


def other_kernels(rank):
    os.environ["HVD_EXT_KERNELS"] = ("auto", "triton")[rank]
    return delayed(make_parameters(SHAPES))


def error_of_a_step(build):
    """The error each rank meets; everything else fails the test."""
    optimizer = globals()[build](hvd.rank())
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        for _ in range(optimizer.backward_passes_per_step):
            backward(parameters, [torch.ones(p.shape).numpy() for p in parameters])
        optimizer.step()
    except (ValueError, hvd.HorovodInternalError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize(("size", "build", "said"), [
    (2, "other_shape", r"p1\[7\]"), (2, "other_dtype", "torch.float64"), (2, "other_parameters", r"p2\[4\]"),
    (2, "other_names", "rank1"), (2, "other_kernels", "kernels: .* and Triton"),
    (2, "other_settings", "lam=3"), (2, "other_passes", "backward passes"),
    (4, "other_shape", r"p1\[7\]"), (4, "other_parameters", r"p2\[4\]"),
])
def test_ranks_that_disagree_all_see_the_same_error(size, build, said):
    started = time.monotonic()
    outcomes = run_ranks(error_of_a_step, size, build, check=False, timeout=30)
    assert [outcome.state for outcome in outcomes] == ["returned"] * size, outcomes
    for outcome in outcomes:
        assert "do not train the same parameters in the same way" in outcome.value
    assert "rank 1" in outcomes[0].value
    assert re.search(said, outcomes[0].value), outcomes[0].value
    assert time.monotonic() - started < 120


def leave_early(how):
    """Rank 1 leaves after two steps; what the others meet."""
    parameters = make_parameters(SHAPES)
    optimizer = delayed(parameters)
    for step in range(50):
        if step == 2 and hvd.rank() == 1:
            if how == "shutdown":
                hvd.shutdown()
                return "left"
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            one_step(parameters, optimizer)
        except hvd.HorovodInternalError as error:
            return repr(error)
        optimizer.zero_grad()
    return "no error"


@pytest.mark.parametrize("launcher", ["mpirun", "gloo"])
def test_a_rank_that_leaves_is_an_error_on_the_others(launcher):
    outcomes = run_ranks(leave_early, 2, "shutdown", check=False, timeout=60, launcher=launcher,
                         env={"HVD_EXT_TIMEOUT": "15"})
    assert outcomes[1].value == "left"
    # Horovod can lose an exchange submitted while it shuts down: then the time limit ends the process.
    assert outcomes[0].state == "died" or "HorovodInternalError" in str(outcomes[0].value), str(outcomes[0])


@pytest.mark.parametrize("launcher", ["mpirun", "gloo"])
def test_a_rank_that_is_killed_ends_the_others(launcher):
    outcomes = run_ranks(leave_early, 2, "kill", check=False, timeout=30, launcher=launcher)
    assert outcomes[1].state == "died"
    # The launcher ends the job, or the survivor meets Horovod's error first.
    assert outcomes[0].state == "died" or "HorovodInternalError" in str(outcomes[0].value), outcomes
