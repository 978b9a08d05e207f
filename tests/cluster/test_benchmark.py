"""The benchmark runs, and what the interfaces count is what is promised."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks.simulator import ROWS
from tests.ranks import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.distributed]


def test_sharded_sends_what_an_allreduce_sends(tmp_path):
    out = tmp_path / "cluster.json"
    command = [sys.executable, "-m", "benchmarks.cluster", "--hosts", "3", "--rate", "10gbit", "--turns", "2",
               "--steps", "1", "--only", "sharded", "TopK 1 %", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    assert set(rows) == {"mpi4py Allreduce", "dense", "TopK 1 %", "sharded"}
    assert rows["sharded"]["sent_mb"] <= 1.02 * rows["dense"]["sent_mb"]
    assert rows["TopK 1 %"]["sent_mb"] < 0.1 * rows["dense"]["sent_mb"]
    assert "step_ms" in rows["sharded"]


def test_the_simulator_is_compared_with_every_row(tmp_path):
    out = tmp_path / "simulator.json"
    command = [sys.executable, "-m", "benchmarks.simulator", "--hosts", "2", "--rates", "10gbit",
               "--turns", "1", "--steps", "1", "--params", "2e5", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads(out.read_text())["checks"]
    assert {row["row"] for row in result["rows"]} == set(ROWS)
    assert all(row["simulated_step_ms"] >= result["compute_ms"] > 0 for row in result["rows"])
    assert f"of {2 * len(ROWS)} within 20%" in done.stdout


def test_curvature_sends_what_the_docs_say(tmp_path):
    out = tmp_path / "seng_hosts.json"
    command = [sys.executable, "-m", "benchmarks.seng_hosts", "--hosts", "2", "--rate", "10gbit",
               "--steps", "20", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    sent = {row["way"]: row["bytes"] for row in json.loads(out.read_text())["rows"]}
    assert sent["SGD"] > 0
    for way in ("SENG, block", "SENG, lagged"):  # as many numbers again as the gradient has
        assert sent[way] == pytest.approx(2 * sent["SGD"], rel=0.1)
    assert sent["SENG, full"] > sent["SENG, block"]
