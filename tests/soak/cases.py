"""The strikes: drawn from a seed, carried out, and judged."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hvd_ext.async_ps import Checkpoint
from hvd_ext.checkpoint import files
from tests.async_ps.program import run_program
from tests.async_ps.runs import flat
from tests.ranks import ROOT, command_of, environment_of_ranks, kill_tree, launch_command
from tests.soak.sync import EVERY, STEPS

METHODS = ("plain", "delay", "topk", "powersgd", "seng", "sharded")
ELASTIC = ("plain", "delay", "topk", "seng")
# Of ten strikes four are at PyTorch, one at Keras, one at Horovod elastic, four at parameter servers.
KINDS = ("torch", "servers 1", "torch", "servers 2", "tensorflow", "torch", "servers 1", "torch",
         "servers 2", "elastic")
SECONDS = 240.0  # of one run, with the start of its ranks on a busy machine
ASYNC = {"lr": 0.02, "rule": "dc-asgd-c", "lam": 0.3, "worker_timeout": 5.0, "server_timeout": 12.0}
ASYNC_STEPS = 120  # of each of two workers
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


@dataclass(frozen=True)
class Strike:
    """What is done to one training.

    Attributes:
        kind: which training, of ``KINDS``.
        method: its extension; "" for parameter servers.
        fault: "kill", "stop" or "full" (the disk, while a checkpoint is written).
        rank, step: who and when; ``share`` is the moment within the step, in [0, 1).
        room: bytes that the disk of parameter servers has. That of synchronous training has room for
            ``share`` of its checkpoints.
    """

    number: int
    kind: str
    method: str
    fault: str
    rank: int
    step: int
    share: float
    room: int

    def __str__(self) -> str:
        where = f"rank{self.rank}-{self.step}+{self.share:.3f}"
        if self.fault == "full":
            where = f"room{self.share:.3f}" if self.method else f"room{self.room}"
        return f"{self.number}-{self.kind.replace(' ', '')}-{self.method or 'async'}-{self.fault}-{where}"


def drawn(count: int, seed: int) -> list[Strike]:
    """The first ``count`` strikes of a seed. Without root there is no small disk to fill."""
    return [_draw(number, random.Random(f"{seed}/{number}")) for number in range(count)]


def _draw(number: int, rng: random.Random) -> Strike:
    kind = KINDS[number % len(KINDS)]
    turn = number + number // len(KINDS)  # each extension as often in every kind
    faults = ["kill", "kill", "stop", *(["full"] if os.geteuid() == 0 else [])]
    if kind == "elastic":
        return Strike(number, kind, ELASTIC[turn % len(ELASTIC)], "kill", rng.randrange(2),
                      rng.randrange(2, 14), rng.random(), 0)
    if kind.startswith("servers"):
        return Strike(number, kind, "", rng.choice(faults), rng.randrange(int(kind[-1]) + 2), 0,
                      rng.random(), rng.randrange(40_000, 160_000))
    return Strike(number, kind, METHODS[turn % len(METHODS)], rng.choice(faults), rng.randrange(2),
                  rng.randrange(1, STEPS - 2), rng.random(), 0)


@contextlib.contextmanager
def disk(folder: Path, room: int) -> Iterator[None]:
    """A disk of ``room`` bytes at ``folder``; enlarged when the block ends, and kept until the test does."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "none", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)


def carry_out(strike: Strike) -> None:
    """Strike, go on, compare.

    Raises:
        AssertionError: something was lost, differs or hangs.
    """
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    place = folder / "checkpoints"
    place.mkdir()
    full = strike.fault == "full"
    try:
        if strike.kind == "elastic":
            _elastic(strike, folder)
        elif strike.method:
            whole = _undisturbed(strike)
            small = disk(place, whole.part(strike.share)) if full else contextlib.nullcontext()
            _synchronous(strike, place, small, whole.ends)
        else:
            _servers(strike, folder, place, disk(place, strike.room) if full else contextlib.nullcontext())
    finally:
        if strike.fault == "full":
            subprocess.run(["umount", "--lazy", str(place)], check=True)
        shutil.rmtree(folder, ignore_errors=True)


def run(command: list[str], **environment: str) -> tuple[int | None, str]:
    """The exit status, None where it hangs, and what was printed."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True,
        env=environment_of_ranks(**environment))
    try:
        output, _ = process.communicate(timeout=SECONDS)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        return None, process.communicate()[0]


# Synchronous training

PAGE = 4096  # what a tmpfs gives a file is a multiple of it
_WHOLE: dict[tuple[str, str], Whole] = {}


@dataclass(frozen=True)
class Whole:
    """An undisturbed run: what each rank ended with, and the bytes that its checkpoints took."""

    ends: dict[int, str]
    room: int

    def part(self, share: float) -> int:
        """Bytes of a disk for ``share`` of them; never for all, and not 0, which would be without a limit."""
        return max(PAGE, int(share * (self.room - PAGE)))


def _sync_command(strike: Strike, place: Path, *struck: object) -> list[str]:
    return launch_command(2, command_of(strike.kind, "tests.soak.sync", strike.kind, strike.method,
                                        str(place), *map(str, struck), environment=environment_of_ranks()))


def _ends(output: str) -> dict[int, tuple[int, str]]:
    """(first step, digest) by rank."""
    found = {}
    for line in output.splitlines():
        match line.split():
            case ["rank", rank, "from", first, "to", digest]:
                found[int(rank)] = int(first), digest
    return found


def _undisturbed(strike: Strike) -> Whole:
    key = strike.kind, strike.method
    if key not in _WHOLE:
        with tempfile.TemporaryDirectory() as other:
            status, output = run(_sync_command(strike, Path(other)))
            files = [one for one in Path(other).rglob("*") if one.is_file()]
            room = sum(-(-one.stat().st_size // PAGE) * PAGE for one in files)
        assert status == 0, output[-4000:]
        ends = {rank: digest for rank, (_, digest) in _ends(output).items()}
        assert len(ends) == 2, output[-4000:]
        _WHOLE[key] = Whole(ends, room)
    return _WHOLE[key]


def _synchronous(strike: Strike, place: Path, small: contextlib.AbstractContextManager[None],
                 whole: dict[int, str]) -> None:
    struck = [] if strike.fault == "full" else [strike.rank, strike.step, strike.share,
                                                int(SIGNALS[strike.fault])]
    with small:
        status, output = run(_sync_command(strike, place, *struck), HVD_EXT_TIMEOUT="10,60")
    assert status is not None, f"hung\n{output[-4000:]}"
    assert status != 0, f"nothing happened\n{output[-4000:]}"
    if strike.fault == "full":
        assert "No space left on device" in output, output[-4000:]
        assert output.count("CheckpointNotWrittenError: rank ") >= 2, output[-4000:]  # each rank's traceback
    valid = files.complete_checkpoints(place)
    for one in valid:
        manifest = files.read_manifest(one)
        for name in manifest["files"]:
            files.checked_file(one, manifest, name)
    newest = int(valid[-1].name[-12:]) if valid else 0
    if strike.fault != "full":  # the last one is at most one period old
        assert newest >= strike.step // EVERY * EVERY - EVERY, (newest, strike)
    status, output = run(_sync_command(strike, place))
    assert status == 0, output[-4000:]
    ends = _ends(output)
    assert {rank: first for rank, (first, _) in ends.items()} == {0: newest, 1: newest}, output[-4000:]
    assert {rank: digest for rank, (_, digest) in ends.items()} == whole, "the end differs"


# Horovod elastic


def _elastic(strike: Strike, folder: Path) -> None:
    from tests.soak.elastic import HOSTS

    script = folder / "discover"
    script.write_text("#!/bin/sh\nprintf '" + HOSTS.replace("\n", "\\n") + "'\n")
    script.chmod(0o755)
    program = [sys.executable, "-m", "tests.soak.elastic", strike.method, str(folder)]
    host = HOSTS.splitlines()[strike.rank].split(":")[0]
    status, output = run(
        [str(Path(sys.executable).parent / "horovodrun"), "--gloo", "-np", "2", "--min-np", "1", "--max-np",
         "2", "--host-discovery-script", str(script), "--network-interface", "lo", *program, host,
         str(strike.step), str(strike.share)], HOROVOD_GLOO_TIMEOUT_SECONDS="5")
    assert status == 0, f"{status}\n{output[-4000:]}"
    other = HOSTS.splitlines()[1 - strike.rank].split(":")[0]
    lines = (folder / f"committed.{other}").read_text().splitlines()
    committed = {"0": None}
    restored = (folder / "restored").read_text().split()
    for line in lines:  # up to the commit that was gone back to: the step after it was made twice
        step, digest = line.split()
        committed.setdefault(step, digest)
    assert int(restored[0]) in (strike.step, strike.step + 1), (restored, strike)
    assert restored[1] == committed[restored[0]], "what was restored is not what was committed"
    status, output = run(launch_command(1, program))
    assert status == 0, output[-4000:]
    assert (folder / "end").read_text() == (folder / "expected").read_text(), "the end differs"


# Parameter servers


def _servers(strike: Strike, folder: Path, place: Path,
             small: contextlib.AbstractContextManager[None]) -> None:
    from tests.async_ps.test_faults import replayed

    servers = int(strike.kind[-1])
    size = servers + 2
    options = {**ASYNC, "servers": servers, "checkpoint_dir": place, "checkpoint_every": 20, "keep": 99}
    full, others = strike.fault == "full", [rank for rank in range(size) if rank != strike.rank]
    number = 0 if full else int(SIGNALS[strike.fault])
    with small:
        ended = run_program(folder / "struck", "struck", size, options, ASYNC_STEPS,
                            -1 if full else strike.rank, 0.5 * strike.share, number, timeout=SECONDS,
                            until=others if strike.fault == "stop" else ())
    said = "\n".join(map(str, ended.outcomes.values())) + ended.output[-3000:]
    assert full or ended.outcomes[strike.rank].state == "died", said
    if not full and strike.rank >= servers:  # a worker: the others finish
        assert all(ended.outcomes[rank].state == "returned" for rank in others), said
        told = ended.outcomes[0].value
        np.testing.assert_array_equal(told["weights"], replayed(told["recording"]))
        return
    for rank in range(size) if full else others:
        assert ended.outcomes[rank].state == "raised", said
        assert ("No space left" if full else "ServerLost") in ended.outcomes[rank].value, said
    found = files.complete_checkpoints(place)
    if found:
        saved = Checkpoint(place)
        np.testing.assert_array_equal(flat(saved.read_weights()), replayed(saved.read_recording()))
        options["resume"] = place
    again = run_program(folder / "again", "struck", size, options, ASYNC_STEPS, -1, 0.0, 0, timeout=SECONDS)
    said = "\n".join(map(str, again.outcomes.values())) + again.output[-3000:]
    assert all(outcome.state == "returned" for outcome in again.outcomes.values()), said
    told = again.outcomes[0].value
    assert told["report"].updates == 2 * ASYNC_STEPS, said
    np.testing.assert_array_equal(told["weights"], replayed(told["recording"]))
    if found:  # the run went on from there, and not from anywhere else
        before = len(saved.read_recording())
        np.testing.assert_array_equal(told["recording"].senders[:before], saved.read_recording().senders)
