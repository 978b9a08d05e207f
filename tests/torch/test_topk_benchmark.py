"""The benchmark of the paper's claim runs, writes what it says, and repeats itself."""

from __future__ import annotations

import json

from benchmarks import topk_digits


def test_digits(tmp_path):
    arguments = ["--seeds", "1", "--steps", "20", "--every", "4", "--hidden", "16"]
    files = ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    result = topk_digits.main([*arguments, *files])
    assert set(result["final"]) == set(topk_digits.METHODS)
    assert all(len(curves[0]) == 5 for curves in result["curves"].values())
    assert json.loads((tmp_path / "out.json").read_text())["final"] == result["final"]
    assert (tmp_path / "out.png").stat().st_size > 0
    assert topk_digits.main(arguments)["curves"] == result["curves"]
