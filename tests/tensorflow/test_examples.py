"""The digits examples run on real ranks with every option, and learn."""

from __future__ import annotations

import importlib
import json

import pytest

pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

OPTIONS = [
    ["--op", "delay", "--virtual-workers", "4"],
    ["--op", "average", "--virtual-workers", "1"],
    ["--compression", "topk", "--ratio", "0.1", "--optimizer", "amsgrad", "--lr", "0.005"],
    ["--preconditioner", "seng", "--lr", "0.02", "--update-freq", "20"],
]


def digits(example, options, json_path):
    module = importlib.import_module(f"examples.{example}")
    module.main([*options, "--quiet", "--epochs", "3", "--json", str(json_path)])


@pytest.mark.distributed
@pytest.mark.parametrize(("example", "options"), [
    *[("tf_digits", options) for options in [*OPTIONS, ["--op", "adasum"]]],
    *[("keras_digits", options) for options in [*OPTIONS, ["--server", "sharded"]]],
], ids=str)
def test_learns_on_two_ranks(ranks, tmp_path, example, options):
    path, plot = tmp_path / "out.json", tmp_path / "out.png"
    ranks(2, init="tensorflow").run(digits, example, [*options, "--plot", str(plot)], path,
                                    timeout=150)
    written = json.loads(path.read_text())
    assert written["ranks"] == 2
    assert written["runs"][0]["test_error"] < 40  # guessing is 90
    assert len(written["runs"][0]["test_errors"]) == 3
    assert plot.stat().st_size > 1000
