"""Checkpoints of synchronous training: what the ranks tell each other until one is whole, or loaded.

Each rank writes a file of its own and rank 0 the model; rank 0 seals the checkpoint
(:mod:`hvd_ext.checkpoint.files`) once all say that theirs is written. Whatever fails on one rank is an
error on all of them, and the checkpoint before stays. The front ends read and write the files.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from hvd_ext import checks
from hvd_ext.checkpoint import files
from hvd_ext.checkpoint.files import DamagedCheckpointError, FileDigest

FORMAT = 1
MAX_STEP = 10**12 - 1  # folders are in the order of their names, with twelve digits
NAME = "hvd_ext/checkpoint"
Result = TypeVar("Result")

# Folders that this process goes on writing to, because it has loaded from them or written the first
# checkpoint, with the run's identifier. Others' checkpoints must not be mixed up with this run's.
_RUNS: dict[Path, str] = {}


class CheckpointNotWrittenError(RuntimeError):
    """A checkpoint could not be written on some rank; the one before stays. Raised on all ranks."""


class Ranks(Protocol):
    """The ranks that train together; the front ends' ``Collectives``."""

    @property
    def rank(self) -> int:
        """This rank's number."""

    @property
    def size(self) -> int:
        """M, the number of ranks."""

    def allgather_object(self, thing: Any, name: str) -> list[Any]:
        """Every rank's ``thing``, by rank."""


@dataclass(frozen=True)
class LoadedCheckpoint:
    """What a checkpoint held beside the model and the optimizer.

    Attributes:
        step: as given to ``save_checkpoint``.
        more: its further arguments, by name.
    """

    step: int
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckpointFiles:
    """What a rank puts into a checkpoint: its files, by name, and what rank 0's manifest says."""

    files: Mapping[str, Callable[[IO[bytes]], None]]
    manifest: Mapping[str, Any]


@dataclass(frozen=True)
class CheckpointRef:
    """A checkpoint that rank 0 has chosen."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def ranks(self) -> int:
        """How many ranks wrote it."""
        return int(self.manifest["ranks"])


def rank_file(rank: int, suffix: str) -> str:
    """The name of one rank's file."""
    return f"rank{rank:04d}.{suffix}"


def save_together(ranks: Ranks, folder: str | os.PathLike[str], step: int, *, keep: int,
                  contents: Callable[[], CheckpointFiles]) -> None:
    """Write a checkpoint; a collective.

    Raises:
        ValueError, TypeError: on all ranks, for a bad argument on one of them, ranks that were given other
            ones, or a folder that holds another run's checkpoints.
        CheckpointNotWrittenError: on all ranks, when one could not write its part.
    """
    failure: Exception | None = None
    mine: CheckpointFiles | None = None
    given: tuple[Any, ...] = ()  # what cannot be pickled must not get into an exchange
    try:
        checks.check_int("step", step, low=0, high=MAX_STEP)
        checks.check_int("keep", keep, low=1, hint="the checkpoint that is written is one of them")
        parent = Path(folder).absolute()
        mine = contents()
        run = _claim_folder(parent, step) if ranks.rank == 0 else ""
        given = (os.fspath(folder), step, keep)
    except Exception as error:
        failure = error
    _require_equal_args("save_checkpoint", ("folder", "step", "keep"), _raise_on_all(
        ranks, failure, "cannot save a checkpoint", CheckpointNotWrittenError, given))
    assert mine is not None
    there = files.checkpoint_dir(parent, int(step))
    marks: dict[str, FileDigest] = {}
    try:
        marks = {name: files.write_atomically(there / name, put) for name, put in mine.files.items()}
    except Exception as error:
        failure = error
    written = ranks.allgather_object((failure is None, marks), NAME)
    if ranks.rank == 0:
        if all(whole for whole, _ in written):
            failure = _finalize(there, [one for _, one in written],
                                {**mine.manifest, "format": FORMAT, "step": int(step), "ranks": ranks.size},
                                run=run, keep=keep)
        if not (there / files.MANIFEST).exists():
            shutil.rmtree(there, ignore_errors=True)
    _raise_on_all(ranks, failure,
                  f"could not write its part of {there}, which does not count; the checkpoint "
                  "before stays", CheckpointNotWrittenError, None)


def find_checkpoint(ranks: Ranks, folder: str | os.PathLike[str], expected: Mapping[str, Any], *,
                    reset_per_rank_state: bool) -> CheckpointRef | None:
    """The newest checkpoint under ``folder``, as rank 0 sees it; None where there is none. A collective.

    Args:
        folder: as for ``save_checkpoint``, or one of its ``update-*`` folders.
        expected: what the manifest must say; see :func:`_check_fits`.

    Raises:
        DamagedCheckpointError: on all ranks; its manifest is damaged.
        ValueError: on all ranks; it does not fit this run.
    """
    failure: Exception | None = None
    told: tuple[str, dict[str, Any]] | None = None
    given: tuple[Any, ...] = ()
    try:
        checks.check_bool("reset_per_rank_state", reset_per_rank_state)
        path = Path(folder).absolute()
        if ranks.rank == 0:
            there = files.latest_checkpoint(path)
            if there is None:
                _RUNS.setdefault(path, secrets.token_hex(8))
            else:
                manifest = files.read_manifest(there)
                _check_fits(there, manifest, expected, ranks.size, reset_per_rank_state)
                _RUNS[there.parent] = manifest["run"]
                told = (str(there), manifest)
        given = (os.fspath(folder), reset_per_rank_state)
    except Exception as error:
        failure = error
    everyone = _raise_on_all(ranks, failure, "cannot load a checkpoint", RuntimeError, (told, given))
    _require_equal_args("load_checkpoint", ("folder", "reset_per_rank_state"), [one for _, one in everyone])
    told = everyone[0][0]
    return None if told is None else CheckpointRef(Path(told[0]), told[1])


def read_files(ranks: Ranks, found: CheckpointRef, names: Iterable[str],
               parse: Callable[[dict[str, Path]], Result]) -> Result:
    """What ``parse`` makes of files whose digests are right; nothing, on all ranks, where one's are not.

    Raises:
        DamagedCheckpointError: on all ranks, with the name of the file.
    """
    failure, result = None, None
    try:
        result = parse({name: files.checked_file(found.folder, found.manifest, name)
                        for name in names})
    except Exception as error:
        failure = error
    _raise_on_all(ranks, failure, f"cannot load {found.folder}", RuntimeError, None)
    return result  # type: ignore[return-value]


def load_together(ranks: Ranks, found: CheckpointRef, load: Callable[[], None]) -> None:
    """Load what was read; an error on all ranks where one cannot."""
    failure = None
    try:
        load()
    except Exception as error:
        failure = error
    _raise_on_all(ranks, failure, f"cannot take over what {found.folder} holds", RuntimeError, None)


def _claim_folder(parent: Path, step: int) -> str:
    """The identifier of the run that goes on writing to ``parent``.

    Raises:
        ValueError: it holds the checkpoints of another run, or later ones.
    """
    before = files.complete_checkpoints(parent)
    if before:
        newest = before[-1]
        run = files.read_manifest(newest).get("run")
        if _RUNS.get(parent) != run:
            raise ValueError(f"the folder {parent} holds the checkpoints of another run, the newest "
                             f"{newest.name}; go on from it with load_checkpoint, or pass an empty folder")
        if newest.name >= files.checkpoint_dir(parent, step).name:
            raise ValueError(f"step must be above that of the newest checkpoint, {newest}, got {step}; to "
                             "go on from an older one pass another folder, or remove the newer ones")
    return _RUNS.setdefault(parent, secrets.token_hex(8))


def _finalize(there: Path, written: list[dict[str, FileDigest]], manifest: Mapping[str, Any], *, run: str,
              keep: int) -> Exception | None:
    """Rank 0's last part; the reason where it fails."""
    try:
        marks = {name: FileDigest(*mark) for one in written for name, mark in one.items()}
        for rank, one in enumerate(written):
            for name in one:
                if not (there / name).is_file():
                    raise ValueError(f"rank 0 does not see {there / name}, which rank {rank} has written; "
                                     "pass a folder on a file system that all hosts share")
        files.finalize_checkpoint(there, manifest, marks, run=run, keep=keep)
        files.remove_incomplete(there)
    except Exception as error:
        return error
    return None


def _check_fits(there: Path, manifest: Mapping[str, Any], expected: Mapping[str, Any], size: int,
                reset: bool) -> None:
    """Refuse a checkpoint that this run cannot go on from.

    Args:
        expected: "front_end" and "optimizer" must be equal; "extensions" too, unless per-rank state is
            started anew. With "joins" the number of ranks may be another.

    Raises:
        ValueError: it is of something else.
    """
    if "ranks" not in manifest:
        raise ValueError(f"{there} is a checkpoint of ParameterServer; pass it as its resume=")
    if manifest["format"] != FORMAT:
        raise ValueError(f"{there} has format {manifest['format']}, this version reads {FORMAT}; load it "
                         "with the version that wrote it")
    for what in ("front_end", "optimizer"):
        if manifest[what] != expected[what]:
            raise ValueError(f"{there} was saved with {what.replace('_', ' ')} {manifest[what]}, this is "
                             f"{expected[what]}; load it with what it was saved with")
    if reset:
        return
    if manifest["extensions"] != expected["extensions"]:
        raise ValueError(f"{there} was saved with {manifest['extensions']}, this is "
                         f"{expected['extensions']}; pass reset_per_rank_state=True to start what the "
                         "extensions keep anew")
    if manifest["ranks"] != size and not expected.get("joins"):
        raise ValueError(f"{there} was saved by {manifest['ranks']} ranks and is loaded by {size}, but each "
                         "keeps state of its own; load it on as many, or pass reset_per_rank_state=True to "
                         "start that state anew")


ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (DamagedCheckpointError, ValueError, TypeError)}


def _raise_on_all(ranks: Ranks, failure: Exception | None, what: str, other: type[Exception],
                  mine: Any) -> list[Any]:
    """Every rank's ``mine``; where one has failed, an error on all ranks that says why.

    Raises:
        Exception: of the kind of the first failure if it is in ``ERRORS``, otherwise ``other``.
    """
    said = None if failure is None else (type(failure).__name__, str(failure))
    everyone = ranks.allgather_object((said, mine), NAME)
    for rank, (failed, _) in enumerate(everyone):
        if failed is not None:
            kind, text = failed
            known = ERRORS.get(kind)
            raise (known or other)(f"rank {rank} {what}: {text if known else f'{kind}: {text}'}") from failure
    return [one for _, one in everyone]


def _require_equal_args(function: str, names: Iterable[str], values: list[tuple[Any, ...]]) -> None:
    """Refuse arguments that must be equal on all ranks and are not."""
    for number, name in enumerate(names):
        for rank, one in enumerate(values):
            if one[number] != values[0][number]:
                raise ValueError(f"{function} was given {name}={one[number]!r} on rank {rank} and "
                                 f"{values[0][number]!r} on rank 0; pass the same on all ranks")
