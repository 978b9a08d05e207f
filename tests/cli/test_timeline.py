"""Timelines: a real one of two ranks, cut anywhere; and what the figures of a made-up one must be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hvd_ext.cli.console import CliError
from hvd_ext.cli.main import main
from hvd_ext.cli.timeline import THEIRS, group_of, read_timeline, summarize_events
from tests.ranks import run_ranks

# One tensor of ours and one of the user's; the times are those that the test below expects.
MADE_UP = [
    {"name": "process_name", "ph": "M", "pid": 0, "args": {"start_time_since_epoch_in_micros": 7}},
    {"name": "process_name", "ph": "M", "pid": 1, "args": {"name": "allgather.topk/bucket0@37fa21"}},
    {"name": "process_name", "ph": "M", "pid": 2, "args": {"name": "allreduce.weight"}},
    {"ph": "B", "name": "NEGOTIATE_ALLGATHER", "ts": 1000, "pid": 1},
    {"ph": "X", "name": "1", "ts": 1100, "pid": 1, "dur": 0},
    {"ph": "B", "name": "NEGOTIATE_ALLREDUCE", "ts": 1200, "pid": 2},
    {"ph": "E", "ts": 2000, "pid": 1},
    {"ph": "B", "name": "ALLGATHER", "ts": 2000, "pid": 1},
    {"ph": "B", "name": "MPI_ALLGATHER", "ts": 2500, "pid": 1},
    {"ph": "E", "ts": 2900, "pid": 1},
    {"ph": "E", "ts": 3000, "pid": 1, "args": {"dtype": "int32", "shape": "[76]"}},
    {"ph": "B", "name": "ALLGATHER", "ts": 4000, "pid": 1},
    {"ph": "E", "ts": 7000, "pid": 1},
]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks wrote that trained with TopK, and with plain reduction."""
    path = tmp_path_factory.mktemp("timeline") / "timeline.json"
    run_ranks(train, 2, env={"HOROVOD_TIMELINE": str(path)})
    return path


def train() -> None:
    import torch

    import hvd_ext.torch as hvd

    for more in ({"compression": hvd.Compression.topk(ratio=0.5, min_size=1)}, {}):
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 4)
        optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1),
                                             named_parameters=model.named_parameters(), **more)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 8)).sum().backward()
            optimizer.step()


def test_figures_of_a_made_up_timeline() -> None:
    summary = summarize_events(MADE_UP)
    topk = summary.phases["topk"]
    figures = {name: (phase.depth, phase.count, phase.micros, phase.longest) for name, phase in topk.items()}
    assert figures == {
        "NEGOTIATE_ALLGATHER": (0, 1, 1000, 1000), "ALLGATHER": (0, 2, 4000, 3000),
        "MPI_ALLGATHER": (1, 1, 400, 400),
    }
    assert THEIRS not in summary.phases  # begun and never ended
    assert summary.unended == 1
    assert summary.seconds == pytest.approx(0.006)


@pytest.mark.parametrize(
    ("tensor", "part"),
    [
        ("allgather.topk/bucket0@37fa21", "topk"), ("allgather.topk/agree@37fa21.1", "topk"),
        ("alltoall.delay/bucket0@37fa21", "delay"), ("allgather.delay/bucket0/reduced@37fa21", "delay"),
        ("allreduce.powersgd/bucket0/p@37fa21", "powersgd"), ("allreduce.seng.uc/layer1.0.conv1", "seng"),
        ("broadcast.server/rank1/bucket0", "server"), ("allreduce.hvd_ext/consistency", "hvd_ext"),
        ("DistributedSGD/topk/bucket0", "topk"),
        ("allreduce.weight", THEIRS), ("allreduce.topk.weight", THEIRS), ("allreduce.server.weight", THEIRS),
        ("", THEIRS),
    ],
)
def test_names_by_whose_they_are(tensor: str, part: str) -> None:
    assert group_of(tensor) == part


@pytest.mark.distributed
def test_timeline_of_two_ranks(real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["timeline", str(real), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    found = {(row["group"], row["phase"]): row for row in report["phases"]}
    assert found["topk", "ALLGATHER"]["count"] >= 3
    assert found[THEIRS, "NEGOTIATE_ALLREDUCE"]["count"] == 6  # weight and bias, three steps
    assert found["topk", "MPI_ALLGATHER"]["part_of_operation"]
    assert found["topk", "MPI_ALLGATHER"]["seconds"] <= found["topk", "ALLGATHER"]["seconds"]
    assert report["complete"]
    assert main(["timeline", str(real)]) == 0
    assert "NEGOTIATE_ALLREDUCE" in capsys.readouterr().out


@pytest.mark.distributed
def test_cut_anywhere_it_is_mended(real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = real.read_text()
    whole, complete = read_timeline(text)
    assert complete
    cut, mended = tmp_path / "cut.json", tmp_path / "mended.json"
    for length in [*range(300, len(text) - 1, len(text) // 40), text.rindex("]"), text.rindex("}")]:
        cut.write_text(text[:length])
        assert main(["timeline", str(cut), "--repair", str(mended)]) == 0
        events = json.loads(mended.read_text())  # valid JSON, as Perfetto wants it
        assert events == whole[: len(events)]
        assert len(events) >= text.count("\"ph\"", 0, length) - 1  # at most the cut one is missing
    assert len(events) == len(whole) - 1  # without the last brace, the last event is dropped
    assert "Begun and never ended" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("no timeline", "does not begin with"),
        ("", "does not begin with"),
        ("[", "no whole event"),
        ('[{"ph": "B", "ts": 1}] [', "behind the closing bracket"),
        ('[{"ph": "B", "ts": 1}, {"ph": "B", "t {"ph": "E"},{"ph": "E", "ts": 2}]', "broken at character 23"),
        ('[{"name": 1}]', "no event of a timeline"),
    ],
)
def test_what_is_no_timeline_is_refused(tmp_path: Path, text: str, problem: str,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file"
    path.write_text(text)
    assert main(["timeline", str(path)]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert problem in told
    assert "What to do" in told


def test_the_timeline_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text(json.dumps(MADE_UP))
    assert main(["timeline", str(path), "--repair", str(path)]) == 1
    assert json.loads(path.read_text()) == MADE_UP
    assert main(["timeline", str(tmp_path / "missing")]) == 1
    with pytest.raises(CliError, match="behind the closing bracket"):
        read_timeline(json.dumps(MADE_UP) * 2)
