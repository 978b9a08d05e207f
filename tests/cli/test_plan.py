"""``hvd-ext plan``: its tables, its advice, what it refuses, and what it measures on two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hvd_ext.cli import plan
from hvd_ext.cli.main import main
from hvd_ext.planning import Cluster, ComputeCosts, Link, Workload
from hvd_ext.planning.backends import MpiBackend
from hvd_ext.planning.measure import Measured, measure_cluster
from hvd_ext.planning.methods import METHODS, Scenario, plan_exchanges
from tests.ranks import ROOT, environment_of_ranks, launch_command

COMMAND = ["plan", "--params", "25e6", "--ranks", "64", "--gbps", "10", "--ratio", "0.01"]


def figures(capsys: pytest.CaptureFixture[str], *more: str, command: list[str] = COMMAND) -> dict:
    assert main([*command, *more, "--json"]) == 0
    found: dict = json.loads(capsys.readouterr().out)
    return found


def refusal(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    assert main(["plan", "--params", "25e6", *command]) == 1
    return " ".join(capsys.readouterr().err.split())


def test_every_method_is_shown_with_a_recommendation(capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys)
    assert len(found["exchange"]) == len(METHODS)
    assert found["exchange"]["topk"]["bytes"] == 63 * (8 + 8 * 250_000)
    assert found["exchange"]["dense"]["bytes"] == 2 * 63 * 25_000_000 * 4 / 64
    assert found["break_even_ranks"] == {"dense": 100, "fp16": 50}
    assert found["best"] == found["recommendation"]["method"] == "fp16"
    assert main(COMMAND) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Quickest here: fp16." in said
    assert "Take fp16 (compression=hvd.Compression.fp16): an exchange takes" in said
    assert "TopK moves fewer bytes below 100 ranks" in said


def test_compute_and_stragglers_make_steps(capsys: pytest.CaptureFixture[str]) -> None:
    alone = figures(capsys, "--compute-ms", "500")
    slower = figures(capsys, "--compute-ms", "500", "--straggler", "lognormal:0.1")
    dense = alone["exchange"]["dense"]
    assert 0.5 < dense["step_seconds"] < 0.5 + dense["seconds"]  # part of it is hidden
    assert slower["exchange"]["dense"]["step_seconds"] > 1.2 * dense["step_seconds"]
    assert "hidden behind the backward pass" in alone["recommendation"]["reason"]
    assert main([*COMMAND, "--compute-ms", "500", "--method", "dense", "overlap"]) == 0
    said = capsys.readouterr().out
    assert "step, ms" in said
    assert "powersgd" not in said


def test_hosts_share_their_link(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["plan", "--params", "25e6", "--gbps", "10", "--hosts", "8", "--ranks-per-host", "8"]
    flat = figures(capsys, command=given)
    assert (flat["ranks"], flat["hosts"]) == (64, 8)
    moved = flat["exchange"]["delay"]
    assert moved["link_bytes"] > 4 * moved["bytes"]  # its alltoall: eight ranks through one link
    assert flat["exchange"]["dense"]["link_bytes"] == flat["exchange"]["dense"]["bytes"]
    hierarchical = figures(capsys, "--hierarchical", command=given)
    assert hierarchical["exchange"]["dense"]["link_bytes"] == pytest.approx(2 * 7 / 8 * 1e8)
    assert main(given) == 0
    assert "MB per link" in " ".join(capsys.readouterr().out.split())


def test_a_measured_cluster_is_taken_from_its_file(tmp_path: Path,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cluster.json"
    cluster = Cluster(4, Link(1.0), fixed_us=1000.0, measured={"allreduce": Link(0.5)})
    path.write_text(json.dumps({"cluster": cluster.to_dict(), "work": ComputeCosts.no_compute().to_dict()}))
    given = ["plan", "--params", "25e6", "--cluster", str(path), "--method", "dense"]
    here = figures(capsys, command=given)
    assert here["exchange"]["dense"]["seconds"] == pytest.approx(1e-3 + 2 * 3 / 4 * 8e8 / 0.5e9 + 6 * 20e-6)
    assert figures(capsys, "--ranks", "64", command=given)["ranks"] == 64
    assert "which says what the links are" in refusal(capsys, "--cluster", str(path), "--gbps", "1")
    path.write_text(json.dumps({"cluster": {}}))
    assert "is no file of hvd-ext plan --measure --save" in refusal(capsys, "--cluster", str(path))
    assert "No such file" in refusal(capsys, "--cluster", str(tmp_path / "none"))


@pytest.mark.parametrize(("given", "said"), [
    (["--ranks", "8"], "--gbps is missing"),
    (["--gbps", "10"], "--ranks is missing"),
    (["--gbps", "10", "--ranks", "6", "--ranks-per-host", "4"], "multiple of --ranks-per-host 4, got 6"),
    (["--gbps", "10", "--ranks", "6", "--hosts", "2"], "2 hosts with 1 ranks are 2, not --ranks 6"),
    (["--gbps", "10", "--ranks", "0"], "ranks must be at least 1"),
    (["--gbps", "10", "--ranks", "8", "--ratio", "1.5"], "pass ratio=0.01"),
    (["--gbps", "10", "--ranks", "8", "--straggler", "slow"], "straggler must be none, lognormal:AMOUNT"),
    (["--gbps", "10", "--ranks", "8", "--compute-ms", "-1"], "--compute-ms must be in"),
    (["--gbps", "10", "--ranks", "8", "--method", "nccl"], "no method has 'nccl' in its name"),
    (["--gbps", "10", "--ranks", "8", "--save", "x"], "--save writes what --measure has measured"),
    (["--measure", "--gbps", "10"], "--gbps cannot be used with --measure"),
    (["--measure", "--ranks", "8"], "--measure takes the ranks that it is started on"),
    (["--params", "0", "--ranks", "2", "--gbps", "1"], "--params must be at least 1"),
])
def test_what_cannot_be_planned_is_refused(given: list[str], said: str,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refusal(capsys, *given)


def test_one_process_is_told_how_to_measure(monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    for name in plan.RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    said = refusal(capsys, "--measure")
    assert "this is one process" in said
    assert "mpirun -np 4 hvd-ext plan --measure" in said


@pytest.mark.distributed
def test_two_ranks_measure_and_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cluster.json"
    command = launch_command(2, [sys.executable, "-m", "hvd_ext.cli.main", "plan", "--measure",
                                 "--params", "3e5", "--save", str(path)])
    done = subprocess.run(command, cwd=ROOT, env=environment_of_ranks(**os.environ), capture_output=True,
                          text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    said = " ".join(done.stdout.split())
    assert said.count("measured on 1 hosts with 2 ranks each") == 1  # rank 0 alone prints
    assert said.count("Quickest here:") == 1
    saved = json.loads(path.read_text())
    cluster = Cluster.from_dict(saved["cluster"])
    assert cluster.ranks == 2
    assert set(cluster.measured) == {"allreduce", "allreduce_half", "allgather", "alltoall", "broadcast"}
    assert all(0 < value < 1e6 for value in ComputeCosts(**saved["work"]).to_dict().values())
    again = figures(capsys, command=["plan", "--params", "3e5", "--cluster", str(path)])
    assert again["exchange"]["dense"]["seconds"] > 0


def test_the_benchmark_takes_one_speed_from_a_file(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from benchmarks.simulator import against

    path = tmp_path / "cluster.json"
    path.write_text(json.dumps({"hosts": 4, "rate": "1gbit", "parameters": 2e5, "compute_ms": 30.0, "rows": [
        {"name": "mpi4py Allreduce", "exchange_ms": 1.0}, {"name": "overlap", "step_ms": 40.0},
        {"name": "dense", "exchange_ms": 25.0, "step_ms": 50.0}]}))
    delayed, dense = against(path, cores=8)["rows"]
    assert dense["simulated_exchange_ms"] == pytest.approx(25.0)
    assert (dense["exchange_ms"], delayed["exchange_ms"]) == (None, None)  # what was fitted is no check
    assert (dense["step_ms"], delayed["step_ms"]) == (50.0, 40.0)
    assert 30.0 < delayed["simulated_step_ms"] < dense["simulated_step_ms"]


def measured_by_mpi() -> Measured:
    return measure_cluster(100_000, voice=MpiBackend())


@pytest.mark.distributed
def test_mpi_measures_where_there_is_no_horovod(ranks) -> None:
    first, second = ranks(2).run(measured_by_mpi, timeout=120)
    assert (first.first, second.first) == (True, False)
    assert first.cluster == second.cluster  # all ranks have the same figures
    assert first.work == second.work
    assert first.cluster.ranks == 2


def sent() -> dict[str, float]:
    """What this rank sends in the third step of each way, by the front end's own count."""
    import torch

    import hvd_ext.torch as hvd

    found = {}
    topk = hvd.Compression.topk(0.01)
    ways = {
        "dense": {"server": "replicated"}, "fp16": {"compression": hvd.Compression.fp16},
        "powersgd rank 4": {"compression": hvd.Compression.powersgd(4)},
        "topk": {"compression": topk}, "delay": {"op": hvd.DelayCompensated()},
        "topk sparse_allreduce": {"compression": hvd.Compression.topk(0.01, exchange="sparse_allreduce")},
        "rank0": {"server": "rank0"}, "sharded": {"server": "sharded"},
        "sharded, fp16": {"server": "sharded", "compression": hvd.Compression.fp16},
        "topk, rank0": {"server": "rank0", "compression": topk},
        "topk, sharded": {"server": "sharded", "compression": topk},
        "overlap": {"overlap": hvd.DelayedUpdate()},
    }
    for number, (name, options) in enumerate(ways.items()):
        parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(parameters, lr=0.1),
            named_parameters=[(f"p{number}.{i}", p) for i, p in enumerate(parameters)], **options)
        generator = torch.Generator().manual_seed(hvd.rank())
        for _ in range(3):
            sum((p * torch.randn(p.shape, generator=generator)).sum() for p in parameters).backward()
            optimizer.step()
            optimizer.zero_grad()
        sent = optimizer.report()["sent"]
        found[name] = sum(value for kind, value in sent.items() if kind != "agreement")
    return found


SHAPES = ((300, 500), (500,), (400, 700))


@pytest.mark.distributed
def test_bytes_are_those_that_the_front_end_counts(ranks) -> None:
    workload = Workload(SHAPES)
    ways = {one.name: one for one in plan_exchanges(Scenario(workload, 2))}
    here = Cluster.one_rank_per_host(2, Link(1.0))
    by_rank = ranks(2).run(sent, timeout=120)
    for name in by_rank[0]:
        counted = max(one[name] for one in by_rank)  # of weights from rank 0 the others send nothing
        assert counted == pytest.approx(ways[name].rank_bytes(here), rel=0.03), name
