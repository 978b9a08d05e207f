"""Horovod's packages under our name, beside the front ends."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys

import pytest

import hvd_ext
from hvd_ext.horovod_api import aliases

HOROVOD = importlib.util.find_spec("horovod") is not None
needs_horovod = pytest.mark.skipif(not HOROVOD, reason="Horovod is not installed")

LINES = [
    "from hvd_ext import run; import horovod; assert run is horovod.run",
    "from hvd_ext.runner import run; import horovod.runner; assert run is horovod.runner.run",
    "from hvd_ext import runner; import horovod.runner; assert runner is horovod.runner",
    "import hvd_ext.runner.launch; import horovod.runner.launch as l; assert hvd_ext.runner.launch is l",
    "from hvd_ext.runner.common.util import hosts as h; assert h.__name__.startswith('horovod.')",
    "import hvd_ext.common.util; import horovod.common.util as u; assert hvd_ext.common.util is u",
    "from hvd_ext.common.exceptions import HorovodInternalError as E; "
    "from horovod.common.exceptions import HorovodInternalError as F; assert E is F",
    "from hvd_ext.data.data_loader_base import AsyncDataLoaderMixin",
    "import hvd_ext.common; import hvd_ext; assert hvd_ext.common.__name__ == 'horovod.common'",
]


@needs_horovod
def test_horovods_packages_are_the_same_modules():
    # One process: each line starts without the modules of the line before.
    program = "import sys\nimport hvd_ext\nfor line in sys.argv[1:]:\n" \
        "    exec(line, {})\n" \
        "    for name in [n for n in sys.modules if n.startswith(('horovod', 'hvd_ext.')) \n" \
        "                 and n != 'hvd_ext.horovod_api.aliases']: del sys.modules[name]\n" \
        "    for name in ('runner', 'common', 'data'): vars(hvd_ext).pop(name, None)\n"
    done = subprocess.run([sys.executable, "-c", program, *LINES], capture_output=True, text=True,
                          timeout=100, check=False)
    assert done.returncode == 0, done.stderr


@needs_horovod
@pytest.mark.parametrize(("package", "needs"), [("spark", "pyspark"), ("ray", "ray")])
def test_a_package_that_needs_more_says_what(package, needs):
    if importlib.util.find_spec(needs) is not None:
        assert importlib.import_module(f"hvd_ext.{package}").__name__ == f"horovod.{package}"
        return
    for line in (f"hvd_ext.{package}", f"hvd_ext.{package}.torch"):
        with pytest.raises(ImportError, match=rf"hvd_ext\.{package} is horovod\.{package}, and `import "
                           rf"horovod\.{package}` fails here: .*{needs}"):
            importlib.import_module(line)
    with pytest.raises(ImportError, match=f"fails here: .*{needs}"):
        getattr(hvd_ext, package)


def test_other_names_are_not_horovods():
    for name in ("torch_", "keras_", "nonsense", "_keras"):
        with pytest.raises(AttributeError, match=f"module 'hvd_ext' has no attribute '{name}'"):
            getattr(hvd_ext, name)
    with pytest.raises(ImportError):
        importlib.import_module("hvd_ext.nonsense")


@needs_horovod
def test_the_front_ends_are_never_horovods():
    lookup = aliases.offer_packages("hvd_ext", "horovod", packages=[], names=["run"])
    importlib.import_module("horovod")
    for name in ("torch", "tensorflow", "keras"):
        with pytest.raises(AttributeError):
            lookup(name)


def test_hvd_ext_imports_no_horovod():
    lines = "import sys, hvd_ext; assert not [n for n in sys.modules if n.startswith('horovod')]; " \
        "assert hvd_ext.__version__"
    subprocess.run([sys.executable, "-c", lines], check=True, timeout=100)


def test_modules_of_ours_win(tmp_path, monkeypatch):
    (tmp_path / "common.py").write_text("MINE = True")
    monkeypatch.setattr(hvd_ext, "__path__", [str(tmp_path), *hvd_ext.__path__])
    monkeypatch.delitem(sys.modules, "hvd_ext.common", raising=False)
    monkeypatch.delitem(vars(hvd_ext), "common", raising=False)
    assert importlib.import_module("hvd_ext.common").MINE
    monkeypatch.delitem(sys.modules, "hvd_ext.common")
    monkeypatch.delitem(vars(hvd_ext), "common", raising=False)
