"""Checkpoints of synchronous training under Keras: bit for bit, whole or not at all, and who is refused."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras

import hvd_ext.tensorflow.keras as hvd
from hvd_ext.checkpoint import files
from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.variables import as_tf
from tests.tensorflow import checkpointed

pytestmark = pytest.mark.distributed
STEPS, EVERY = 13, 5


def resumed(methods, folder):
    """By method: the digest of a whole run, first step and digest of one that went on from its checkpoint."""
    found = {}
    for method in methods:
        place = Path(folder) / method
        found[method] = (checkpointed.run(method, place, STEPS, EVERY)[1],
                         *checkpointed.run(method, place, STEPS, EVERY))
    return found


def test_a_run_goes_on_bit_for_bit(ranks, tmp_path):
    """With a schedule, batch statistics, dropout and a loss scale; every method is in tests/conformance."""
    methods = ("plain", "scaled", "seng", "rank0")
    for found in ranks(2, init="tensorflow").run(resumed, methods, tmp_path, timeout=200):
        for method, (whole, first, again) in found.items():
            assert first == 10, method
            assert again == whole, method


def says(call, kind):
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def state(method="plain"):
    model, optimizer = checkpointed.build(method)
    checkpointed.train_step(model, 0)
    return {"model": model, "optimizer": optimizer}


def faults(folder):
    """A full disk on rank 1, then each file damaged; what is said, and that nothing changed."""
    given, write = state("topk"), files.write_atomically
    hvd.save_checkpoint(folder, 1, **given, epoch=3, text="a", parts={"x": [1.5, None]})

    def fail(path, save):
        def half(file):
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, half)

    if hvd.rank() == 1:
        files.write_atomically = fail
    try:
        said = [says(lambda: hvd.save_checkpoint(folder, 2, **given), hvd.CheckpointNotWrittenError)]
    finally:
        files.write_atomically = write
    names = sorted(path.name for path in Path(folder).iterdir())
    together, there = Collectives(), files.checkpoint_dir(Path(folder), 1)
    for name in ("model.npz", "rank0000.npz", "rank0001.npz", "manifest.json"):
        whole = (there / name).read_bytes()
        half = len(whole) // 2
        for damage in (whole[:-1], whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1:]):
            together.allgather_object(0, "before")
            if hvd.rank() == 0:
                (there / name).write_bytes(damage)
            together.allgather_object(0, "after")
            before = checkpointed.digest(**given)
            text = says(lambda: hvd.load_checkpoint(folder, **given), hvd.DamagedCheckpointError)
            assert name in text
            assert checkpointed.digest(**given) == before
            said.append(text)
            together.allgather_object(0, "over")
            if hvd.rank() == 0:
                (there / name).write_bytes(whole)
    together.allgather_object(0, "mended")
    loaded = hvd.load_checkpoint(folder, **given)
    return said, names, loaded.step, loaded.more


def test_a_full_disk_and_damaged_files_are_errors_on_all_ranks(ranks, tmp_path):
    one, other = ranks(2, init="tensorflow").run(faults, tmp_path)
    assert one == other
    said, names, step, more = one
    assert "rank 1 could not write its part" in said[0]
    assert "No space left on device" in said[0]
    assert names == ["update-000000000001"]
    assert (step, more) == (1, {"epoch": 3, "text": "a", "parts": {"x": [1.5, None]}})


def refusals(folder):
    given, other = state("topk"), state("plain")
    save, load = hvd.save_checkpoint, hvd.load_checkpoint
    tiny = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    said = [
        says(lambda: save(folder, -1, **given), ValueError),
        says(lambda: save(folder, 1, **given, thing=(1, 2) if hvd.rank() == 0 else 1), TypeError),
    ]
    assert load(folder, **given) is None
    save(folder, 5, **given)
    said += [
        says(lambda: save(folder, 6 + hvd.rank(), **given), ValueError),
        says(lambda: load(folder, **other), ValueError),
        says(lambda: load(folder, model=tiny, optimizer=given["optimizer"]), ValueError),
    ]
    assert load(folder, **other, reset_per_rank_state=True).step == 5
    scaled, unlike = state("scaled"), state("scaled, plain")
    save(Path(folder) / "scaled", 1, **scaled)
    assert load(Path(folder) / "scaled", **unlike, reset_per_rank_state=True).step == 1
    for one, same in zip(unlike["optimizer"].variables, scaled["optimizer"].variables, strict=False):
        np.testing.assert_array_equal(as_tf(one).numpy(), as_tf(same).numpy())
    return said


def test_who_is_refused_and_why(ranks, tmp_path):
    one, other = ranks(2, init="tensorflow").run(refusals, tmp_path)
    assert one == other
    for text, wanted in zip(one, [
            "step must be in [0, 999999999999], got "
            "-1", "JSON does not give back", "step=7 on rank 1 and 6 on rank 0",
            "start what the extensions keep anew", "build the model that was saved"], strict=True):
        assert wanted in text


def saved_by(folder, method):
    checkpointed.run(method, folder, 5, 5)


def elsewhere(folder, server):
    """Adam's moments that this rank holds after loading, by number."""
    keras.utils.set_random_seed(1)
    model, optimizer = checkpointed.build(server)
    hvd.load_checkpoint(folder, model=model, optimizer=optimizer)
    held = {number: as_tf(one).numpy() for number, one in enumerate(optimizer.variables)
            if one.path.endswith(("momentum", "velocity")) and np.prod(one.shape)}
    hvd.assert_replicas_equal(model)
    return held


def test_moments_of_a_sharded_run_are_found_on_another_number_of_ranks(ranks, tmp_path):
    ranks(2, init="tensorflow").run(saved_by, tmp_path, "sharded")
    whole = ranks(1, init="tensorflow").run(elsewhere, tmp_path, "sharded")[0]
    assert len(whole) == 16  # two moments of each of 8 variables
    assert all(np.abs(one).max() > 0 for number, one in whole.items() if number >= 2)
    with np.load(tmp_path / "update-000000000005" / "rank0000.npz") as one, \
            np.load(tmp_path / "update-000000000005" / "rank0001.npz") as other:
        for number, moment in whole.items():
            kept = [file[f"optimizer/{number}"] for file in (one, other)]
            assert any(array.shape == moment.shape and (array == moment).all() for array in kept)
