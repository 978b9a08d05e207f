"""Horovod elastic with ranks that really come and go: 2, 3 and 2 again."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hvd_ext.torch as hvd
from tests.ranks import ROOT, kill_tree
from tests.torch.elastic_program import STEPS, TWO
from tests.torch.problems import backward, make_parameters, named

pytestmark = [pytest.mark.ranks, pytest.mark.slow]


def run_elastic(method, folder, seconds=150):
    script = folder / "discover"
    (folder / "hosts").write_text(TWO)
    script.write_text(f"#!/bin/sh\ncat {folder}/hosts\n")
    script.chmod(0o755)
    command = [str(Path(sys.executable).parent / "horovodrun"), "--gloo", "-np", "2", "--min-np", "1",
               "--max-np", "3", "--host-discovery-script", str(script), "--network-interface", "lo",
               sys.executable, "-m", "tests.torch.elastic_program", method, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
                   "HOROVOD_GLOO_TIMEOUT_SECONDS": "5"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
                                   stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        status = None
    return status, (folder / "log").read_text(errors="replace")


@pytest.mark.parametrize("method", ["plain", "delay", "topk", "seng"])
def test_ranks_come_and_go(method, tmp_path):
    status, log = run_elastic(method, tmp_path)
    assert status == 0, log[-6000:]
    seen = [line.split() for line in (tmp_path / "seen.localhost.0").read_text().splitlines()]
    sizes = [int(size) for _, size, _ in seen]
    assert sizes[0] == 2, sizes
    assert 3 in sizes, sizes
    assert sizes[-1] == 2, sizes
    assert int(seen[-1][0]) == STEPS
    result = ast.literal_eval((tmp_path / "result").read_text())
    calm = tmp_path / "calm"
    calm.mkdir()
    (calm / "calm").touch()
    assert run_elastic(method, calm)[0] == 0
    undisturbed = ast.literal_eval((calm / "result").read_text())["loss"]
    assert result["loss"] == pytest.approx(undisturbed, rel=0.1)
    if method == "topk":
        assert result["report"]["lost_residuals"] == 1


def join_later():
    """Rank 1's optimizer starts when rank 0's has made three steps, as one that has joined."""
    rank = hvd.rank()
    parameters = make_parameters([(6, 5), (7,)])

    def make():
        return hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=0.1),
                                        named_parameters=named(parameters),
                                        compression=hvd.Compression.topk(0.3, min_size=0))

    def step(optimizer, number):
        rng = torch.Generator().manual_seed(10 * number + rank)
        backward(parameters, [torch.randn(p.shape, generator=rng).numpy() for p in parameters])
        optimizer.step()
        optimizer.zero_grad()

    optimizer = make()
    for number in range(3):
        step(optimizer, number)
    if rank == 1:
        optimizer._hvd_ext.unhook()
        optimizer = make()
    state = hvd.elastic.TorchState(optimizer=optimizer)
    state.sync()
    for number in range(3, 6):
        step(optimizer, number)
    hvd.assert_replicas_equal(zip("ab", parameters, strict=True))
    return optimizer.report()["steps"]


def test_rank_that_joins_takes_over_the_step(ranks):
    assert ranks(2).run(join_later) == [6, 6]
