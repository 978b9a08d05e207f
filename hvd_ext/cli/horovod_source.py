"""The Horovod release's source: fetched by pip, recognised by checksums, edited by checked patches.

The release does not build with today's frameworks as it is. The edits are few, and each is applied
only to the exact file it was made for: a source that differs is refused, never half edited.
"""

import hashlib
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from hvd_ext.cli.console import CliError
from hvd_ext.cli.horovod_patches import EDITS, Edit
from hvd_ext.versions import HOROVOD


def patch_id() -> str:
    """A short name of the edits, which changes whenever one of them does."""
    text = "".join(edit.path + (edit.before or "") + edit.after for edit in EDITS)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def fetch_source(folder: Path) -> Path:
    """Download the release's source archive with pip, from whatever index pip is set up for.

    Raises:
        Failure: pip could not get it.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary"]
    command += [":all:", "--no-build-isolation", "--dest", str(folder), f"horovod=={HOROVOD}"]
    done = subprocess.run(command, capture_output=True, text=True)
    archives = sorted(folder.glob(f"horovod-{HOROVOD}*.tar.gz"))
    if done.returncode or not archives:
        raise CliError(
            f"pip could not download the source of Horovod {HOROVOD}:\n{done.stderr.strip()}",
            "check the network and pip's index settings, or fetch the source archive elsewhere "
            f"(pip download --no-deps --no-binary :all: horovod=={HOROVOD}) and pass it with "
            "--source PATH",
        )
    return archives[0]


def unpack_source(archive: Path, folder: Path) -> Path:
    """The source folder that ``archive`` unpacks to inside ``folder``.

    Raises:
        Failure: it is no readable source archive of Horovod.
    """
    try:
        with tarfile.open(archive) as tar:
            if hasattr(tarfile, "data_filter"):  # Python 3.10 has it from 3.10.12 on
                tar.extractall(folder, filter="data")
            else:
                tar.extractall(folder)
    except (OSError, tarfile.TarError) as error:
        raise CliError(
            f"{archive} cannot be unpacked: {error}",
            f"pass the source archive of Horovod {HOROVOD} (horovod-{HOROVOD}.tar.gz)",
        ) from error
    roots = [path.parent for path in folder.glob("*/setup.py")]
    if len(roots) != 1:
        raise CliError(
            f"{archive} is not a source archive of Horovod: no setup.py in its top folder",
            f"pass the source archive of Horovod {HOROVOD} (horovod-{HOROVOD}.tar.gz)",
        )
    return roots[0]


def apply_patches(source: Path, edits: Sequence[Edit] = EDITS) -> None:
    """Edit the unpacked source in place, after every file has been recognised.

    Raises:
        Failure: a file is missing or is not the one the edit was made for; nothing is changed then.
    """
    texts = [_released_text(source, edit) for edit in edits]
    for edit, text in zip(edits, texts, strict=True):
        data = edit.edit_text(text).encode()
        if sha256_of(data) != edit.after:
            raise AssertionError(f"{edit.path}: edited to {sha256_of(data)}, expected {edit.after}")
        (source / edit.path).write_bytes(data)


def sha256_of(data: bytes) -> str:
    """SHA-256 of ``data`` as hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def _released_text(source: Path, edit: Edit) -> str:
    """The text of one file, when it is the released one; empty for a file that is added."""
    remedy = (
        f"use the unchanged source archive of Horovod {HOROVOD}, which this version of hvd-ext "
        "was made for (leave --source out to download it); for another Horovod release, "
        "upgrade hvd-ext or install that Horovod yourself: hvd-ext uses any that imports"
    )
    if edit.before is None:
        if (source / edit.path).exists():
            raise CliError(f"this source of Horovod is not recognised: it has {edit.path} already", remedy)
        return ""
    try:
        data = (source / edit.path).read_bytes()
    except OSError as error:
        raise CliError(
            f"this source of Horovod is not recognised: {edit.path} cannot be read ({error})", remedy
        ) from error
    if sha256_of(data) != edit.before:
        raise CliError(
            f"this source of Horovod is not recognised: {edit.path} differs from Horovod "
            f"{HOROVOD} (SHA-256 {sha256_of(data)}, expected {edit.before}); nothing was edited",
            remedy,
        )
    return data.decode()
