"""The digits example runs on real ranks with every option, and learns."""

from __future__ import annotations

import json

import pytest

from examples.digits import Deal
from tests.ranks import launch_command


def digits(options, json_path):
    from examples import torch_digits

    torch_digits.main([*options, "--quiet", "--epochs", "3", "--json", str(json_path)])


@pytest.mark.distributed
@pytest.mark.parametrize("options", [
    pytest.param(["--op", "delay", "--virtual-workers", "4"], marks=pytest.mark.smoke),
    ["--op", "average", "--virtual-workers", "1"],
    ["--op", "adasum"],
    ["--compression", "topk", "--ratio", "0.1", "--optimizer", "amsgrad", "--lr", "0.005",
     "--server", "sharded"],
    ["--preconditioner", "seng", "--lr", "0.02", "--update-freq", "20"],
], ids=" ".join)
def test_learns_on_two_ranks(ranks, tmp_path, options):
    path, plot = tmp_path / "out.json", tmp_path / "out.png"
    ranks(2).run(digits, [*options, "--plot", str(plot)], path, timeout=120)
    written = json.loads(path.read_text())
    assert written["ranks"] == 2
    assert written["runs"][0]["test_error"] < 40  # guessing is 90
    assert len(written["runs"][0]["test_errors"]) == 3
    assert plot.stat().st_size > 1000


def test_deal_covers_every_sample_once_over_all_ranks():
    for workers, ranks in [(16, 2), (1, 2), (4, 4), (8, 1)]:
        deal = Deal(workers, ranks)
        dealt = [deal.microbatches(1437, epoch=1, seed=0, rank=rank) for rank in range(ranks)]
        flat = sorted(sample for part in dealt for sample in part.ravel().tolist())
        assert len(flat) == len(set(flat)) == deal.steps(1437) * workers * 16
    with pytest.raises(ValueError, match="divide one another"):
        Deal(3, 2)


def test_launch_command_is_what_the_machine_needs():
    command = launch_command(3, ["true"])
    assert command[-3:] == ["-np", "3", "true"]
