"""Libraries that import ``horovod.torch`` themselves, and whole models that are saved."""

from __future__ import annotations

import copy

import pytest
import torch

import hvd_ext.torch as hvd
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed


def as_a_library():
    import sys

    import horovod
    import torch

    import hvd_ext.torch

    horovod.torch = sys.modules["horovod.torch"] = hvd_ext.torch
    import horovod.torch as library
    from horovod.torch import DistributedOptimizer

    library.init()
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    optimizer = DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), named_parameters=model.named_parameters(),
        compression=library.Compression.topk(0.5, min_size=0))
    model(torch.full((3, 4), 1.0 + library.rank())).sum().backward()
    optimizer.step()
    library.assert_replicas_equal(model)
    return DistributedOptimizer is hvd_ext.torch.DistributedOptimizer, optimizer.report()["steps"]


def test_a_library_is_given_ours():
    assert run_ranks(as_a_library, 2, init=None) == [(True, 1)] * 2


def whole_models(folder):
    """By extension: whether what is saved, and a copy, give what the model gives."""
    found = {}
    for name in ("plain", "topk", "seng"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
        options = {"topk": lambda model: {"compression": hvd.Compression.topk(0.5, min_size=0)},
                   "seng": lambda model: {"preconditioner": hvd.SENG(model, damping=0.5)}
                   }.get(name, lambda model: {})(model)
        optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1),
                                             named_parameters=model.named_parameters(), **options)
        x = torch.ones(3, 4)
        model(x).sum().backward()
        optimizer.step()
        torch.save(model, f"{folder}/{name}{hvd.rank()}.pt")
        again = torch.load(f"{folder}/{name}{hvd.rank()}.pt", weights_only=False)
        twin = copy.deepcopy(model)
        twin(x).sum().backward()  # reduces nothing: no rank answers
        found[name] = torch.equal(again(x), model(x)), torch.equal(twin(x), model(x))
    return found


def test_whole_models_are_saved_and_copied(ranks, tmp_path):
    for found in ranks(2).run(whole_models, str(tmp_path)):
        assert all(pair == (True, True) for pair in found.values()), found
