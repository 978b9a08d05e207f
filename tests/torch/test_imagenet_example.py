"""The ImageNet example on a tiny folder of made images in ImageNet's layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.ranks import Ranks


def make_folder(root: Path) -> Path:
    """Two classes, one reddish and one bluish: 8 training and 4 test images each, of odd sizes."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 4)):
        for channel, name in ((0, "n01440764"), (2, "n01443537")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 80, (40 + number, 50, 3), dtype=np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(folder / f"{name}_{number}.JPEG")
    return root


def run_example(arguments: list[str]) -> dict:
    from examples.torch_imagenet_resnet50 import main

    torch.set_num_threads(1)
    return main(arguments)


SMALL = ["--model", "resnet18", "--batch-size", "4", "--size", "32", "--workers", "0",
         "--update-freq", "3", "--lr", "0.02", "--amp"]


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2])
def test_trains_saves_and_goes_on(tmp_path, ranks, size):
    folder = make_folder(tmp_path / "imagenet")
    arguments = [str(folder), *SMALL, "--checkpoint", str(tmp_path / "kept")]
    first = ranks(size).run(run_example, [*arguments, "--epochs", "1"])
    assert {one["epoch"] for one in first} == {1}
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["update-000000000001"]
    second = ranks(size).run(run_example, [*arguments, "--epochs", "2"])
    for one in second:
        assert (one["started_at"], one["epoch"]) == (1, 2)
        assert np.isfinite(one["loss"])
        assert 0.0 <= one["top1"] <= 1.0
        assert one["loss"] == second[0]["loss"]
    assert isinstance(ranks(size), Ranks)


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2])
def test_trains_without_a_preconditioner_too(tmp_path, ranks, size):
    folder = make_folder(tmp_path / "imagenet")
    figures = ranks(size).run(run_example, [str(folder), *SMALL, "--preconditioner", "none",
                                            "--epochs", "1"])
    assert all(np.isfinite(one["loss"]) for one in figures)


def test_folder_without_classes_is_refused(tmp_path):
    from examples.torch_imagenet_resnet50 import Images

    with pytest.raises(FileNotFoundError, match=r"train/<class>/"):
        Images(tmp_path, 32, training=True)
