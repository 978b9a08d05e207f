"""Horovod's PyTorch examples: the same bits after the change of import, and each with an extension."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from hvd_ext.torch import broadcast_optimizer_state
from tests.torch import horovod_examples as examples

pytestmark = pytest.mark.distributed

EXTENSIONS = {
    "none": lambda hvd, model: {},
    "delay": lambda hvd, model: {"op": hvd.DelayCompensated(lam=0.5)},
    "topk": lambda hvd, model: {"compression": hvd.Compression.topk(0.25, min_size=0)},
    "powersgd": lambda hvd, model: {"compression": hvd.Compression.powersgd(rank=2)},
    "seng": lambda hvd, model: {"preconditioner": hvd.SENG(model, damping=0.5, update_freq=4)},
}


def example(name, module, extension, folder, options):
    hvd = importlib.import_module(module)
    Path(folder).mkdir(parents=True, exist_ok=True)
    theirs = hvd.broadcast_optimizer_state
    # Horovod's takes a step with gradients of zero, in which weight decay moves the weights.
    hvd.broadcast_optimizer_state = broadcast_optimizer_state
    try:
        return getattr(examples, name)(hvd, EXTENSIONS[extension], folder, **options)
    finally:
        hvd.broadcast_optimizer_state = theirs


@pytest.mark.parametrize(("name", "options"), [
    ("mnist", {}), ("mnist", {"use_adasum": True}), ("mnist", {"fp16": True}),
    ("mnist", {"mixed_precision": True}), ("synthetic_benchmark", {}), ("imagenet", {}),
    ("mnist_elastic", {}),
], ids=lambda value: value if isinstance(value, str) else "-".join(value) or "as it is")
def test_the_same_bits(ranks, tmp_path, name, options):
    pool = ranks(2)
    theirs = pool.run(example, name, "horovod.torch", "none", str(tmp_path / "a"), options)
    mine = pool.run(example, name, "hvd_ext.torch", "none", str(tmp_path / "b"), options)
    assert mine == theirs
    assert mine[0][0] == mine[1][0]


@pytest.mark.parametrize(("name", "extension"), [
    ("mnist", "topk"), ("synthetic_benchmark", "delay"), ("imagenet", "seng"), ("imagenet", "topk"),
    ("mnist_elastic", "powersgd"),
])
def test_with_an_extension(ranks, tmp_path, name, extension):
    found = ranks(2).run(example, name, "hvd_ext.torch", extension, str(tmp_path), {})
    assert found[0] == found[1]
    assert found[0][1] > 0.3  # of four classes; where it is over all steps of training


def test_imagenet_goes_on_from_rank_0s_checkpoint(ranks, tmp_path):
    """With weight decay Horovod itself leaves replicas that differ: its fresh ranks take a step alone."""
    pool = ranks(2)
    whole = pool.run(example, "imagenet", "hvd_ext.torch", "none", str(tmp_path), {})
    (tmp_path / "checkpoint-2.pt").unlink()
    again = pool.run(example, "imagenet", "hvd_ext.torch", "none", str(tmp_path), {})
    assert again[0][0] == again[1][0]
    assert [one[0] for one in again] == [one[0] for one in whole]
