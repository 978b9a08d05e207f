"""Checkpoints of synchronous training: bit for bit, whole or not at all, and who is refused."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

import hvd_ext.torch as hvd
from hvd_ext.checkpoint import files
from tests.torch import checkpointed

pytestmark = pytest.mark.distributed
STEPS, EVERY = 13, 5


def resumed(method, folder):
    """(digest of a run to the end, first step and digest of one that went on from its checkpoint)."""
    return checkpointed.run(method, folder, STEPS, EVERY)[1], *checkpointed.run(method, folder, STEPS, EVERY)


@pytest.mark.parametrize("method", checkpointed.METHODS)
def test_a_run_goes_on_bit_for_bit(ranks, tmp_path, method):
    found = ranks(2).run(resumed, method, tmp_path)
    assert [first for _, first, _ in found] == [10, 10]
    for whole, _, again in found:
        assert again == whole
    assert sorted(path.name for path in (tmp_path / "update-000000000010").iterdir()) == [
        "manifest.json", "model.pt", "rank0000.pt", "rank0001.pt"]


def says(call, kind):
    """What a call that is refused says on this rank."""
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def state(method="plain"):
    model, optimizer, scheduler = checkpointed.build(method)
    checkpointed.train_step(model, optimizer, scheduler, 0)
    return {"model": model, "optimizer": optimizer}


def full_disk(folder, rank):
    """A rank's disk is full at the second checkpoint; the third is written."""
    given, write = state("topk"), files.write_atomically
    before = checkpointed.digest(**given)
    hvd.save_checkpoint(folder, 1, **given)

    def fail(path, save):
        def half(file):
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, half)

    if hvd.rank() == rank:
        files.write_atomically = fail
    try:
        said = says(lambda: hvd.save_checkpoint(folder, 2, **given), hvd.CheckpointNotWrittenError)
    finally:
        files.write_atomically = write
    names = sorted(path.name for path in Path(folder).iterdir())
    again = state("topk")
    checkpointed.train_step(again["model"], again["optimizer"],
                            torch.optim.lr_scheduler.StepLR(again["optimizer"], 7), 5)
    loaded = hvd.load_checkpoint(folder, **again)
    same = checkpointed.digest(**again) == before
    hvd.save_checkpoint(folder, 3, **given)
    return said, names, loaded.step, same


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_is_an_error_on_all_ranks_and_the_one_before_stays(ranks, tmp_path, rank):
    for said, names, step, same in ranks(2).run(full_disk, tmp_path, rank):
        assert f"rank {rank} could not write its part" in said
        assert "No space left on device" in said
        assert names == ["update-000000000001"]
        assert step == 1
        assert same
    assert len(files.complete_checkpoints(tmp_path)) == 2


def damaged(folder):
    """Each file cut, altered or gone: refused by name on both ranks, and nothing is changed."""
    hvd.save_checkpoint(folder, 1, **state("topk"))
    there = files.checkpoint_dir(Path(folder), 1)
    said = []
    for name in ("model.pt", "rank0000.pt", "rank0001.pt", "manifest.json"):
        whole = (there / name).read_bytes()
        half = len(whole) // 2
        for damage in (whole[:-1], b"", whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1:], None):
            if damage is None and name == "manifest.json":
                continue  # without it the checkpoint does not exist
            hvd.allreduce(torch.zeros(1), name="before")
            if hvd.rank() == 0:
                (there / name).write_bytes(damage) if damage is not None else (there / name).unlink()
            hvd.allreduce(torch.zeros(1), name="after")
            given = state("topk")
            before = checkpointed.digest(**given)
            text = says(lambda given=given: hvd.load_checkpoint(folder, **given),
                        hvd.DamagedCheckpointError)
            assert checkpointed.digest(**given) == before
            said.append((name, text))
            hvd.allreduce(torch.zeros(1), name="over")
            if hvd.rank() == 0:
                (there / name).write_bytes(whole)
    hvd.allreduce(torch.zeros(1), name="mended")
    assert hvd.load_checkpoint(folder, **state("topk")).step == 1
    return said


def test_a_damaged_file_is_refused_by_its_name_on_all_ranks(ranks, tmp_path):
    one, other = ranks(2).run(damaged, tmp_path)
    assert one == other
    assert len(one) == 15
    for name, text in one:
        assert name in text


class Unknown:
    """What weights_only=True refuses."""


def refusals(folder):
    given, other = state("topk"), state("plain")
    save, load = hvd.save_checkpoint, hvd.load_checkpoint
    said = [
        says(lambda: save(folder, -1, **given), ValueError),
        says(lambda: save(folder, 1, keep=0 if hvd.rank() else 3, **given), ValueError),
        says(lambda: save(folder, 1 + hvd.rank(), **given), ValueError),
        says(lambda: save(folder, (lambda: 1) if hvd.rank() == 1 else 1, **given), TypeError),
        says(lambda: save(folder, 1, **given, thing=Unknown()), TypeError),
    ]
    assert load(folder, **given) is None
    save(folder, 5, **given, epoch=3, text="a", parts={"x": torch.ones(2)}, keep=2)
    said += [
        says(lambda: save(folder, 5, **given), ValueError),
        says(lambda: load(folder, **other), ValueError),
        says(lambda: load(folder, model=torch.nn.Linear(2, 2), optimizer=given["optimizer"]), ValueError),
        says(lambda: load(folder, **given, reset_per_rank_state="yes"), TypeError),
    ]
    loaded = load(folder, **given)
    assert (loaded.step, loaded.more["epoch"], loaded.more["text"]) == (5, 3, "a")
    assert torch.equal(loaded.more["parts"]["x"], torch.ones(2))
    assert load(folder, **other, reset_per_rank_state=True).step == 5
    for step in (6, 7, 8):
        save(folder, step, **given, keep=2)
    model, optimizer, _ = checkpointed.build("plain")
    model(torch.ones(4, 6)).sum().backward()
    said.append(says(lambda: save(folder, 9, model=model, optimizer=optimizer), ValueError))
    return said


def test_who_is_refused_and_why(ranks, tmp_path):
    one, other = ranks(2).run(refusals, tmp_path)
    assert one == other
    for text, wanted in zip(one, [
            "step must be in [0, 999999999999], got -1",
            "rank 1 cannot save a checkpoint: keep must be at least 1, got 0",
            "step=2 on rank 1 and 1 on rank 0", "rank 1 cannot save a checkpoint: step must be a whole",
            "torch.load(weights_only=True) refuses: tests.torch.test_checkpoints.Unknown",
            "step must be above that of the newest checkpoint", "start what the extensions keep anew",
            "build the model that was saved", "reset_per_rank_state must be True or False",
            "save between two steps"], strict=True):
        assert wanted in text
    assert [path.name[-2:] for path in files.complete_checkpoints(tmp_path)] == ["07", "08"]


def saved_by(folder, method):
    checkpointed.run(method, folder, 5, 5)


def elsewhere(folder, method, server, reset):
    """The Adam moments that are loaded, of all parameters, and how many this rank has."""
    method = {None: "plain"}.get(server, method)
    model, optimizer, _ = checkpointed.build("sharded")
    if server is None:
        optimizer = hvd.DistributedOptimizer(torch.optim.Adam(model.parameters(), lr=0.01),
                                             named_parameters=model.named_parameters())
    hvd.load_checkpoint(folder, model=model, optimizer=optimizer, reset_per_rank_state=reset)
    whole = optimizer.gather_state_dict()["state"]
    return {n: one["exp_avg"].numpy() for n, one in whole.items()}, len(optimizer.state)


def test_moments_of_a_sharded_run_are_found_under_other_ranks_and_servers(ranks, tmp_path):
    ranks(4).run(saved_by, tmp_path, "sharded")
    found = []
    for size, server, reset in ((2, "sharded", False), (2, None, True), (1, "sharded", False)):
        for moments, held in ranks(size).run(elsewhere, tmp_path, "sharded", server, reset):
            found.append(moments)
            assert held == 8 if server is None or size == 1 else held < 8
    for moments in found:
        assert len(moments) == 8
        assert all((moments[n] == found[0][n]).all() for n in moments)


def other_run(folder):
    """A run that has not loaded from the folder."""
    from hvd_ext.checkpoint import protocol

    protocol._RUNS.clear()
    return says(lambda: hvd.save_checkpoint(folder, 99, **state()), ValueError)


def test_another_runs_folder_is_refused(ranks, tmp_path):
    ranks(2).run(saved_by, tmp_path, "plain")
    before = sorted(tmp_path.rglob("*"))
    for text in ranks(2).run(other_run, tmp_path):
        assert "holds the checkpoints of another run" in text
    assert sorted(tmp_path.rglob("*")) == before
