"""Checkpoints: one file a server, and a manifest that is written last and makes them valid.

``folder/update-000000001000/shard-0-of-2.npz`` holds server 0's slices, ``recording.npz`` the
delays so far, ``manifest.json`` the books. Without its manifest a checkpoint does not exist, so a
server that dies while writing leaves the one before.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_ext.async_ps.config import ServerSettings
from hvd_ext.async_ps.plan import Plan
from hvd_ext.delay.sequences import Recorded

Array = NDArray[Any]
MANIFEST = "manifest.json"


def place(folder: Path, update: int) -> Path:
    """The folder of the checkpoint after ``update`` updates."""
    return folder / f"update-{update:012d}"


def save_shard(folder: Path, server: int, servers: int, state: dict[str, Array]) -> None:
    """Writes one server's slices into a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"shard-{server}-of-{servers}.npz"
    hidden = path.with_suffix(".part")
    with hidden.open("wb") as file:
        np.savez(file, allow_pickle=False, **state)
        file.flush()
        os.fsync(file.fileno())
    hidden.replace(path)


def seal(folder: Path, plan: Plan, settings: ServerSettings, books: dict[str, Any],
         recording: Recorded, *, dtype: str, shapes: list[tuple[int, ...]]) -> None:
    """Makes a checkpoint valid once all servers have written theirs; removes surplus old ones."""
    recording.save(folder / "recording.npz")
    manifest = {
        "servers": plan.servers, "workers": plan.workers, "numel": plan.numel, "dtype": dtype,
        "shapes": shapes, "rule": settings.rule.name, "depth": settings.depth,
        "adaptive": settings.rule.adaptive, "moves": settings.moves, "books": books,
    }
    hidden = folder / (MANIFEST + ".part")
    with hidden.open("w") as file:
        json.dump(manifest, file)
        file.flush()
        os.fsync(file.fileno())
    hidden.replace(folder / MANIFEST)
    for old in sorted(folder.parent.glob("update-*"))[: -settings.keep]:
        shutil.rmtree(old)


def latest(folder: Path) -> Path | None:
    """The newest valid checkpoint in a folder, or the folder itself if it is one; else None."""
    if (folder / MANIFEST).is_file():
        return folder
    valid = [path for path in sorted(folder.glob("update-*")) if (path / MANIFEST).is_file()]
    return valid[-1] if valid else None


class Checkpoint:
    """A valid checkpoint, opened.

    Raises:
        FileNotFoundError: there is none under ``folder``.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        found = latest(Path(folder))
        if found is None:
            raise FileNotFoundError(
                f"no valid checkpoint in {folder}; pass the folder given as checkpoint_dir or "
                "one of its update-* folders"
            )
        self.folder = found
        self.manifest: dict[str, Any] = json.loads((found / MANIFEST).read_text())

    @property
    def update(self) -> int:
        """How many updates had been applied."""
        return int(self.manifest["books"]["update"])

    def recording(self) -> Recorded:
        """The delays up to this checkpoint."""
        return Recorded.load(self.folder / "recording.npz")

    def state(self, part: slice | None = None) -> dict[str, Array]:
        """The state's arrays over ``part`` of the flat parameters, from all servers' files."""
        servers = int(self.manifest["servers"])
        files = [np.load(self.folder / f"shard-{s}-of-{servers}.npz") for s in range(servers)]
        part = slice(0, int(self.manifest["numel"])) if part is None else part
        try:
            return {name: np.concatenate([file[name] for file in files])[part]
                    for name in files[0].files}
        finally:
            for file in files:
                file.close()

    def weights(self) -> list[Array]:
        """The weights, one array per parameter, in the model's order."""
        flat = self.state()["w"]
        shapes = [tuple(shape) for shape in self.manifest["shapes"]]
        cuts = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
        return [part.reshape(shape)
                for part, shape in zip(np.split(flat, cuts), shapes, strict=True)]

    def check(self, plan: Plan, settings: ServerSettings, *, dtype: str,
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
