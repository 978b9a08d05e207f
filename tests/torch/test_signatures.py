"""Every public callable takes Horovod's arguments, by position and by name, with Horovod's defaults."""

from __future__ import annotations

import importlib
import inspect

import horovod.torch
import pytest
import torch

import hvd_ext.torch as hvd
from tests.signatures import compared, differences, modules_below

MODULES = modules_below("horovod.torch", left_out=("mpi_lib_v2",))
COLLECTIVES = [name for name in hvd.mpi_ops.__all__ if name != "synchronize"]


@pytest.mark.parametrize("name", MODULES)
def test_signatures_are_horovods(name):
    ours = importlib.import_module(name.replace("horovod.", "hvd_ext.", 1))
    assert differences(importlib.import_module(name), ours) == {}


def test_what_is_compared():
    found = compared(horovod.torch, hvd)
    assert {*COLLECTIVES, "DistributedOptimizer", "SyncBatchNorm", "broadcast_parameters", "join",
            "broadcast_optimizer_state"} <= set(found)
    assert len(COLLECTIVES) == 23


def arguments(function):
    """A value for each parameter of a collective, on ranks that are alone."""
    given = {}
    for name, parameter in inspect.signature(function).parameters.items():
        tensor = torch.ones(2, 3, dtype=torch.bfloat16)
        given[name] = {"tensor": tensor, "tensors": [tensor, tensor], "root_rank": 0, "name": f"a.{name}",
                       "op": hvd.Sum, "average": None, "splits": None}.get(name, parameter.default)
    return given


def call_each_by_name_and_by_position():
    seen = []
    for name in COLLECTIVES:
        function = getattr(hvd, name)
        for dtype in (torch.float32, torch.bfloat16):
            given = arguments(function)
            first = next(iter(given))
            given[first] = [one.to(dtype) for one in given[first]] if first == "tensors" \
                else given[first].to(dtype)
            if name == "sparse_allreduce_async":
                given[first] = given[first].to_sparse()
            for call in (lambda: function(**given), lambda: function(*given.values())):  # noqa: B023
                answer = call()
                result = answer() if callable(answer) else \
                    hvd.synchronize(answer) if isinstance(answer, int) else answer
                seen.append((name, _tensors(result)[0].dtype == dtype))
    return seen


def _tensors(result):
    return list(result) if isinstance(result, (tuple, list)) else [result]


@pytest.mark.distributed
def test_each_collective_by_name_and_by_position(ranks):
    for seen in ranks(2).run(call_each_by_name_and_by_position):
        assert {name for name, _ in seen} == set(COLLECTIVES)
        assert [name for name, right in seen if not right] == []


def test_what_a_collective_misses_is_named():
    with pytest.raises(TypeError, match=r"allreduce\(\) missing a required argument: 'tensor'"):
        hvd.allreduce(name="x")
    with pytest.raises(TypeError, match=r"broadcast\(\) got an unexpected keyword argument 'root'"):
        hvd.broadcast(torch.ones(1), 0, root=0)


def patched_defaults():
    before = hvd.allreduce.__defaults__
    names = list(inspect.signature(hvd.allreduce).parameters)[-len(before):]
    patched = list(before)
    patched[names.index("op")] = hvd.Sum
    hvd.allreduce.__defaults__ = tuple(patched)
    try:
        return float(hvd.allreduce(torch.ones(()))), float(hvd.allreduce(torch.ones(()), op=hvd.Average))
    finally:
        hvd.allreduce.__defaults__ = before


@pytest.mark.distributed
def test_patched_defaults_have_effect(ranks):
    assert ranks(2).run(patched_defaults) == [(2.0, 1.0)] * 2
