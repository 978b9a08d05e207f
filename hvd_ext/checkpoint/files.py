"""Folders of checkpoints that are whole or not there: written atomically, checked when read.

``parent/update-000000001000`` holds the files of all ranks and ``manifest.json``, which is written
last and names each file with its size and digest. Without its manifest a checkpoint does not exist, so
whoever dies while writing leaves the one before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

MANIFEST = "manifest.json"
PATTERN = "update-*"
READ_BLOCK_BYTES = 2**20


class DamagedCheckpointError(ValueError):
    """A file of a checkpoint is missing, cut short or altered."""


class FileDigest(NamedTuple):
    """What a file must be: its size in bytes, and 63 bits of a digest."""

    size: int
    digest: int


def checkpoint_dir(parent: Path, update: int) -> Path:
    """The folder of the checkpoint after ``update`` updates or steps."""
    return parent / f"update-{update:012d}"


def write_atomically(path: Path, save: Callable[[IO[bytes]], None]) -> FileDigest:
    """Write a file so that it is there whole or not at all, also when the machine loses power.

    Raises:
        OSError: it could not be written (the disk is full); nothing is left of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(path.name + ".part")
    try:
        with hidden.open("wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        mark = digest_of(hidden)
        hidden.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            hidden.unlink()
        raise
    _sync_folder(path.parent)
    return mark


def digest_of(path: Path) -> FileDigest:
    """The size and digest of a file as it is."""
    state, size = hashlib.blake2b(digest_size=8), 0
    with path.open("rb") as file:
        while block := file.read(READ_BLOCK_BYTES):
            state.update(block)
            size += len(block)
    return FileDigest(size, int.from_bytes(state.digest(), "big") >> 1)


def check_digest(path: Path, mark: FileDigest) -> None:
    """Refuse a file that is not what was written.

    Raises:
        DamagedCheckpointError: with the file's name, and what is wrong with it.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise _damaged_error(path, f"cannot be read ({error.strerror})") from None
    if size != mark.size:
        raise _damaged_error(path, f"has {size} bytes in place of {mark.size}")
    if digest_of(path) != mark:
        raise _damaged_error(path, "was altered after it was written")


def finalize_checkpoint(folder: Path, manifest: Mapping[str, Any], files: Mapping[str, FileDigest], *,
                        run: str,
                        keep: int) -> None:
    """Make a checkpoint valid once its files are written; then remove this run's surplus old ones.

    Args:
        manifest: what else it says, as JSON takes it.
        files: the marks of the checkpoint's files, by name.
        run: an identifier of the run; checkpoints of others are never removed.
        keep: how many of this run's are kept, at least 1, this one among them.
    """
    text = _text({**manifest, "run": run, "files": {name: list(mark) for name, mark in files.items()}})
    write_atomically(folder / MANIFEST, lambda file: _write_synced(file, text))
    _sync_folder(folder.parent)
    surplus = [old for old in complete_checkpoints(folder.parent) if _run_of(old) == run and old != folder]
    for old in surplus[: max(0, len(surplus) - keep + 1)]:
        (old / MANIFEST).unlink()  # from here on it does not exist, whatever is left of it
        shutil.rmtree(old, ignore_errors=True)


def remove_incomplete(folder: Path) -> None:
    """Remove what crashes before the sealed checkpoint ``folder`` have left beside it."""
    for old in folder.parent.glob(PATTERN):
        if old.name < folder.name and not (old / MANIFEST).is_file():
            shutil.rmtree(old, ignore_errors=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a sealed checkpoint says of itself.

    Raises:
        DamagedCheckpointError: the manifest was cut short or altered.
    """
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text())
        whole = _text({k: v for k, v in found.items() if k != "digest"}) == path.read_text()
    except (OSError, ValueError, AttributeError):
        whole = False
    if not whole:
        raise _damaged_error(path, "was cut short or altered")
    return dict(found)


def checked_file(folder: Path, manifest: Mapping[str, Any], name: str) -> Path:
    """A file of a checkpoint, after it was compared with the manifest.

    Raises:
        DamagedCheckpointError: it is not what was written, or the manifest does not name it.
    """
    path, mark = folder / name, manifest["files"].get(name)
    if mark is None:
        raise _damaged_error(path, "is not part of this checkpoint")
    check_digest(path, FileDigest(*mark))
    return path


def complete_checkpoints(parent: Path) -> list[Path]:
    """The sealed checkpoints in a folder, oldest first."""
    return [path for path in sorted(parent.glob(PATTERN)) if (path / MANIFEST).is_file()]


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest sealed checkpoint in a folder, or the folder itself if it is one; else None."""
    if (folder / MANIFEST).is_file():
        return folder
    found = complete_checkpoints(folder)
    return found[-1] if found else None


def check_writable(parent: Path, *, resumed: Path | None) -> None:
    """Refuse a folder whose checkpoints another run's would be mixed up with.

    Args:
        parent: where checkpoints are going to be written.
        resumed: the checkpoint that this run goes on from, if any.

    Raises:
        ValueError: the folder holds checkpoints that this run does not go on from.
    """
    found = complete_checkpoints(parent)
    if not found:
        return
    if resumed is None:
        raise ValueError(f"the folder {parent} holds the checkpoints of another run, the newest "
                         f"{found[-1].name}; pass resume= to go on from it, or an empty folder")
    if resumed.resolve() != found[-1].resolve():
        raise ValueError(f"the folder {parent} holds {found[-1].name}, which is not the checkpoint "
                         f"that this run resumes from, {resumed}; resume from it, or write to an empty "
                         "folder")


def _run_of(folder: Path) -> Any:
    try:
        return read_manifest(folder).get("run")
    except DamagedCheckpointError:
        return None


def _text(content: dict[str, Any]) -> str:
    body = json.dumps(content, sort_keys=True)
    digest = hashlib.blake2b(body.encode(), digest_size=8).hexdigest()
    return json.dumps({**content, "digest": digest}, sort_keys=True)


def _write_synced(file: IO[bytes], text: str) -> None:
    file.write(text.encode())


def _damaged_error(path: Path, what: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"{path} {what}; take another checkpoint of the folder "
                                  f"{path.parent.parent}")


def _sync_folder(folder: Path) -> None:
    """Make the rename itself last; not every file system can."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
