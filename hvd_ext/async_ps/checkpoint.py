"""Checkpoints of the parameter server: one file a server, and the primary's books in the manifest.

``folder/update-000000001000/shard-0-of-2.npz`` holds server 0's slices, ``recording.npz`` the
delays so far, ``manifest.json`` the books. :mod:`hvd_ext.checkpoint.files` says when one is valid.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_ext.async_ps.config import ServerSettings
from hvd_ext.async_ps.plan import Plan
from hvd_ext.checkpoint import files as checkpoint_files
from hvd_ext.checkpoint.files import FileDigest, checked_file
from hvd_ext.reducers.delay_compensation.sequences import Recorded

Array = NDArray[Any]
RECORDING = "recording.npz"


def shard_name(server: int, servers: int) -> str:
    """The name of one server's file."""
    return f"shard-{server}-of-{servers}.npz"


def save_shard(folder: Path, server: int, servers: int, state: dict[str, Array]) -> FileDigest:
    """Writes one server's slices into a checkpoint; what the file must be from now on."""
    return checkpoint_files.write_atomically(folder / shard_name(server, servers),
                                             lambda file: np.savez(file, allow_pickle=False, **state))


def finalize_checkpoint(folder: Path, plan: Plan, settings: ServerSettings, books: dict[str, Any],
                        recording: Recorded, shards: Mapping[int, FileDigest], *, run: str, dtype: str,
                        shapes: list[tuple[int, ...]]) -> None:
    """Makes a checkpoint valid once all servers have written theirs; removes surplus old ones."""
    files = {shard_name(server, plan.servers): mark for server, mark in shards.items()}
    files[RECORDING] = checkpoint_files.write_atomically(folder / RECORDING, recording.save)
    manifest = {
        "servers": plan.servers, "workers": plan.workers, "numel": plan.numel, "dtype": dtype,
        "shapes": shapes, "rule": settings.rule.name, "depth": settings.depth,
        "adaptive": settings.rule.adaptive, "moves": settings.moves, "books": books,
    }
    checkpoint_files.finalize_checkpoint(folder, manifest, files, run=run, keep=settings.keep)


class Checkpoint:
    """A valid checkpoint, opened.

    Raises:
        FileNotFoundError: there is none under ``folder``.
        DamagedCheckpointError: its manifest is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        found = checkpoint_files.latest_checkpoint(Path(folder))
        if found is None:
            raise FileNotFoundError(
                f"no valid checkpoint in {folder}; pass the folder given as checkpoint_dir or "
                "one of its update-* folders"
            )
        self.folder = found
        self.manifest: dict[str, Any] = checkpoint_files.read_manifest(found)

    @property
    def update(self) -> int:
        """How many updates had been applied."""
        return int(self.manifest["books"]["update"])

    def read_recording(self) -> Recorded:
        """The delays up to this checkpoint."""
        return Recorded.load(checked_file(self.folder, self.manifest, RECORDING))

    def read_state(self, part: slice | None = None) -> dict[str, Array]:
        """The state's arrays over ``part`` of the flat parameters, from all servers' files.

        Raises:
            DamagedCheckpointError: a file is missing, cut short or altered.
        """
        servers = int(self.manifest["servers"])
        paths = [checked_file(self.folder, self.manifest, shard_name(s, servers))
                 for s in range(servers)]
        files = [np.load(path) for path in paths]
        part = slice(0, int(self.manifest["numel"])) if part is None else part
        try:
            return {name: np.concatenate([file[name] for file in files])[part]
                    for name in files[0].files}
        finally:
            for file in files:
                file.close()

    def read_weights(self) -> list[Array]:
        """The weights, one array per parameter, in the model's order."""
        flat = self.read_state()["w"]
        shapes = [tuple(shape) for shape in self.manifest["shapes"]]
        cuts = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
        return [part.reshape(shape)
                for part, shape in zip(np.split(flat, cuts), shapes, strict=True)]

    def check_compatible(self, plan: Plan, settings: ServerSettings, *, dtype: str,
                         shapes: list[tuple[int, ...]]) -> None:
        """Whether a run with this plan and these settings can go on from here.

        Raises:
            ValueError: it cannot; the message says why and what to change.
        """
        saved = self.manifest
        if [tuple(shape) for shape in saved["shapes"]] != list(shapes) or saved["dtype"] != dtype:
            raise ValueError(
                f"{self.folder} holds a {saved['dtype']} model of {saved['numel']} parameters in "
                f"{len(saved['shapes'])} tensors, this one is {dtype} with {plan.numel} in "
                f"{len(shapes)}; build the model that was saved"
            )
        if saved["moves"] and not settings.moves:
            raise ValueError(
                f"{self.folder} holds a momentum that momentum=0 would drop; pass the momentum it "
                "was trained with"
            )
        now = {"workers": plan.workers, "rule": settings.rule.name, "depth": settings.depth,
               "adaptive": settings.rule.adaptive}
        differ = {name: value for name, value in now.items() if saved[name] != value}
        if differ and not settings.reset_workers:
            changes = ", ".join(f"{name} {saved[name]}, now {value}" for name, value in differ.items())
            raise ValueError(
                f"{self.folder} holds state per worker that does not fit ({changes}); start as it was "
                "saved, or pass reset_workers=True to drop w_bak and MeanSquare"
            )
