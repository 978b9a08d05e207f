"""Whatever imports under ``horovod.torch`` imports under ``hvd_ext.torch``: Horovod's package is walked."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import horovod.torch
import pytest

import hvd_ext.torch

MODULES = ["horovod.torch", *(found.name for found in pkgutil.walk_packages(
    horovod.torch.__path__, "horovod.torch."))]
OURS = {"hvd_ext.torch", "hvd_ext.torch.compression", "hvd_ext.torch.elastic", "hvd_ext.torch.optimizer",
        "hvd_ext.torch.functions", "hvd_ext.torch.mpi_ops", "hvd_ext.torch.sync_batch_norm"}


def alias(name):
    return name.replace("horovod.torch", "hvd_ext.torch", 1)


def test_horovods_package_is_walked():
    assert {"horovod.torch.mpi_ops", "horovod.torch.functions", "horovod.torch.elastic.sampler",
            "horovod.torch.elastic.state"} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_every_module_and_name(name):
    if name.endswith("mpi_lib_v2"):
        pytest.skip("the compiled library is Horovod's alone")
    theirs = importlib.import_module(name)
    mine = importlib.import_module(alias(name))
    assert (mine is theirs) == (alias(name) not in OURS)
    assert theirs.__name__ == theirs.__spec__.name == name
    missing = [one for one in vars(theirs) if not one.startswith("__") and not hasattr(mine, one)]
    assert missing == []


LINES = """
import hvd_ext.torch.sync_batch_norm, hvd_ext.torch.functions as ours, horovod.torch.functions as theirs
assert ours.broadcast_object.__defaults__ == theirs.broadcast_object.__defaults__
from hvd_ext.torch.elastic.sampler import ElasticSampler
import hvd_ext.torch.elastic.state, horovod.torch.elastic.state as s
assert hvd_ext.torch.elastic.state is s and s.__spec__.name == 'horovod.torch.elastic.state'
from hvd_ext.torch.functions import broadcast_object
from hvd_ext.torch.optimizer import _DistributedOptimizer, DistributedOptimizer
from hvd_ext.torch import _check_has_gpu, mpi_ops
from hvd_ext.torch import compression; assert compression.__name__ == 'hvd_ext.torch.compression'
"""
ALONE = """
import sys
from hvd_ext import aliases
assert not any(name.startswith('horovod') for name in sys.modules)
"""


@pytest.mark.parametrize("lines", [LINES, ALONE], ids=["imports", "not before it is asked for"])
def test_in_a_process_of_its_own(lines):
    subprocess.run([sys.executable, "-c", lines], check=True, timeout=100)


def test_a_name_that_nobody_has():
    with pytest.raises(AttributeError, match="no attribute 'nonsense', nor has 'horovod"):
        _ = hvd_ext.torch.nonsense
    with pytest.raises(ImportError):
        importlib.import_module("hvd_ext.torch.nonsense")


def test_every_public_name_of_horovod_is_here():
    # Extended here, or modules that exist on both sides.
    replaced = {"DistributedOptimizer", "Compression", "compression", "elastic", "functions", "optimizer",
                "allgather_object", "broadcast_object", "broadcast_optimizer_state", "broadcast_parameters",
                "join", "shutdown", "SyncBatchNorm", "sync_batch_norm", "mpi_ops",
                *hvd_ext.torch.mpi_ops.__all__}  # the last: Horovod's functions, taking bfloat16 too
    assert replaced >= {"allreduce", "synchronize"}
    assert all(callable(getattr(hvd_ext.torch, name)) for name in hvd_ext.torch.mpi_ops.__all__)
    for name in (n for n in dir(horovod.torch) if not n.startswith("_")):
        if name not in replaced:
            assert getattr(hvd_ext.torch, name) is getattr(horovod.torch, name), name
    for name in ("Compressor", "NoneCompressor", "FP16Compressor"):
        assert getattr(hvd_ext.torch.compression, name) is getattr(horovod.torch.compression, name)
    for name in ("fp16", "none"):
        assert getattr(hvd_ext.torch.Compression, name) is getattr(horovod.torch.Compression, name)
