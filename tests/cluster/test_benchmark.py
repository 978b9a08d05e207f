"""The benchmark runs, and what the interfaces count is what is promised."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.ranks import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.ranks]


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
