"""The two Horovods that are attacked: Python files of the release, as they are and edited."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from hvd_ext.cli.console import CliError
from hvd_ext.cli.horovod_source import apply_patches, fetch_source, unpack_source


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders for PYTHONPATH, by "released" and "edited"; pytest's parallel workers share them."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "horovods"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            try:
                archive = fetch_source(folder)
            except CliError as error:
                pytest.skip(f"the release's source is not here: {error}")
            for name in ("released", "edited"):
                unpack_source(archive, folder / name)
            apply_patches(next((folder / "edited").glob("horovod-*")))
            (folder / "done").touch()
    return {name: next((folder / name).glob("horovod-*")) for name in ("released", "edited")}
