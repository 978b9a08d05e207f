"""A host is cut off at a random moment: its peers end, and the next run goes on from the last checkpoint."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path

import pytest

from hvd_ext.checkpoint import files
from tests.cluster.hosts import Cluster, missing

pytestmark = [pytest.mark.distributed, pytest.mark.soak]
METHODS = ("plain", "delay", "topk", "powersgd", "seng", "sharded")
STEPS, EVERY = 200, 10
LONGEST = 0.15  # seconds from the beginning of the step that was drawn to the cut: some steps
COUNT, SEED = int(os.environ.get("HVD_EXT_CUTS", "12")), int(os.environ.get("HVD_EXT_SEED", "0"))


def drawn():
    """(method, step, seconds) of each cut."""
    found = []
    for number in range(COUNT):
        rng = random.Random(f"cut {SEED}/{number}")
        found.append((METHODS[number % len(METHODS)], rng.randrange(20, STEPS // 2), rng.random() * LONGEST))
    return found


def train(method, folder, begun, step):
    """The first step and what this rank ends with; rank 1 tells when ``step`` begins."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    from tests.torch import checkpointed

    def before(number):
        if number == step and checkpointed.hvd.rank() == 1:
            Path(begun).touch()

    return checkpointed.run(method, folder, STEPS, EVERY, before_step=before, keep=99)


@pytest.fixture(scope="module")
def hosts():
    reason = missing()
    if reason:
        pytest.skip(reason)
    with Cluster(2, rate="1gbit") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(hosts, tmp_path_factory):
    """What a run of a method ends with, made when first asked for."""
    ends = {}

    def end(method):
        if method not in ends:
            folder = tmp_path_factory.mktemp(method)
            with hosts.ranks() as ranks:
                ends[method] = [digest for _, digest in ranks.run(
                    train, method, str(folder), str(folder / "begun"), -1, timeout=120)]
        return ends[method]
    return end


@pytest.mark.parametrize(("method", "step", "seconds"), drawn())
def test_training_goes_on_from_the_last_checkpoint(hosts, undisturbed, tmp_path, method, step, seconds):
    expected = undisturbed(method)
    begun, folder, cut = tmp_path / "begun", tmp_path / "checkpoints", threading.Event()

    def strike():
        while not begun.exists():
            time.sleep(0.001)
        time.sleep(seconds)
        hosts.cut("node2")
        cut.set()

    threading.Thread(target=strike, daemon=True).start()
    ranks = hosts.ranks(env={"HVD_EXT_TIMEOUT": "4,20"})
    try:
        ended = ranks.run(train, method, str(folder), str(begun), step, timeout=90, check=False)
    finally:
        ranks.close(kill=True)
        hosts.mend("node2")
    assert cut.is_set()
    assert ended[0].state in ("raised", "died"), str(ended[0])  # neither a hang nor the end of the training
    newest = int(files.complete_checkpoints(folder)[-1].name[-12:])
    assert newest >= step // EVERY * EVERY - EVERY
    with hosts.ranks() as ranks:
        again = ranks.run(train, method, str(folder), str(begun), -1, timeout=120)
    assert [first for first, _ in again] == [newest] * 2
    assert [digest for _, digest in again] == expected
