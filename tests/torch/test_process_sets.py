"""Ranks outside of an optimizer's process set train alone, and its calls work there or name the set."""

from __future__ import annotations

import pytest
import torch

import hvd_ext.torch as hvd
from tests.ranks import run_ranks
from tests.torch.problems import backward, bits, flat, make_parameters, named, worker_gradients

pytestmark = pytest.mark.distributed
SHAPES = [(6, 4), (5,)]
OPTIONS = {
    "plain": dict, "sharded": lambda: {"server": "sharded"},
    "topk": lambda: {"compression": hvd.Compression.topk(0.5, min_size=1)},
    "delay": lambda: {"op": hvd.DelayCompensated()}, "late": lambda: {"overlap": hvd.DelayedUpdate()},
}


def outside_of_a_set(folder):
    """What rank 2 of 3 gets, outside of the set of ranks 0 and 1."""
    members = hvd.add_process_set([0, 1])
    found = {}
    for name, options in OPTIONS.items():
        parameters, alone = make_parameters(SHAPES), make_parameters(SHAPES)
        model = torch.nn.ParameterList(parameters)
        optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
                                             named(parameters), process_set=members, **options())
        plain = torch.optim.SGD(alone, lr=0.1, momentum=0.9)
        for step in range(2):
            for some, one in ((parameters, optimizer), (alone, plain)):
                one.zero_grad()
                backward(some, worker_gradients(SHAPES, worker=hvd.rank(), step=step))
                one.step()
        state = optimizer.state_dict()
        optimizer.load_state_dict(optimizer.gather_state_dict())
        optimizer.load_state_dict(state)
        optimizer.report()
        optimizer.flush()
        hvd.broadcast_optimizer_state(optimizer, 0)
        try:
            hvd.save_checkpoint(folder / name, 1, model=model, optimizer=optimizer)
            hvd.load_checkpoint(folder / name, model=model, optimizer=optimizer)
            said = ""
        except ValueError as error:
            said = str(error)
        found[name] = bool((flat(parameters) == flat(alone)).all()), said, bits(parameters)
    hvd.remove_process_set(members)
    return found


def test_ranks_outside_of_the_set(tmp_path):
    by_rank = run_ranks(outside_of_a_set, 3, tmp_path, env={"HOROVOD_DYNAMIC_PROCESS_SETS": "1"})
    for name in OPTIONS:
        assert by_rank[2][name][:2] == (True, (
            "hvd.save_checkpoint on rank 2, outside of the process set of ranks [0, 1] that the optimizer "
            "reduces over: call it on those ranks only"))
        assert [by_rank[rank][name][1] for rank in range(2)] == ["", ""]
        assert by_rank[0][name][2] == by_rank[1][name][2] != by_rank[2][name][2]  # members train together


def train_after_an_error_in_a_set(method):
    """An optimizer of all ranks, after an error that only the ranks of a set have raised together."""
    members = hvd.add_process_set([0, 1])
    parameters = make_parameters(SHAPES)
    rate = 0.1 * (1 + hvd.rank())  # differs, which DelayCompensated refuses
    inside = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=rate), named(parameters),
                                      process_set=members, op=hvd.DelayCompensated())
    backward(parameters, worker_gradients(SHAPES, worker=hvd.rank(), step=0))
    said = ""
    try:
        inside.step()
    except ValueError as error:
        said = str(error)
    everywhere = make_parameters(SHAPES)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(everywhere, lr=0.1), named(everywhere),
                                         **OPTIONS[method]())
    for step in range(2):
        optimizer.zero_grad()
        backward(everywhere, worker_gradients(SHAPES, worker=hvd.rank(), step=step))
        optimizer.step()
    hvd.remove_process_set(members)
    others = hvd.add_process_set([1, 2])  # which may get the number of the set before
    again = make_parameters(SHAPES)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(again, lr=0.1), named(again), process_set=others,
                                         **OPTIONS[method]())
    backward(again, worker_gradients(SHAPES, worker=hvd.rank(), step=0))
    optimizer.step()
    hvd.remove_process_set(others)
    return said, bits(everywhere), bits(again)


@pytest.mark.parametrize("method", ["plain", "topk"])
def test_an_error_in_a_set_does_not_stop_the_ranks_outside(method):
    results = run_ranks(train_after_an_error_in_a_set, 3, method, env={"HOROVOD_DYNAMIC_PROCESS_SETS": "1"})
    assert all("learning rates differ" in said for said, _, _ in results[:2])
    assert results[2][0] == ""
    assert len({weights for _, weights, _ in results}) == 1
    assert results[0][2] != results[1][2] == results[2][2]


def broadcast_in_a_set():
    """What ranks 1 and 2 of 3 have after broadcasts from global rank 2, which is member 1 of their set."""
    members = hvd.add_process_set([1, 2])
    parameters = make_parameters(SHAPES, seed=hvd.rank())
    model, found = torch.nn.ParameterList(parameters), {"own": bits(parameters)}
    if hvd.rank():
        for name, parameter in model.named_parameters():
            hvd.broadcast_(parameter.data, 2, name=name, process_set=members)
        found["parameters"] = bits(parameters)
        found["object"] = hvd.broadcast_object({"of": hvd.rank()}, 2, process_set=members)["of"]
        found["tensor"] = float(hvd.broadcast(torch.tensor([float(hvd.rank())]), 2, process_set=members))
        with pytest.raises(ValueError, match="rank"):
            hvd.broadcast_object(0, 0, process_set=members)
    fresh = make_parameters(SHAPES, seed=10 + hvd.rank())
    found["fresh"] = bits(fresh)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(fresh, lr=0.1 + hvd.rank(), momentum=0.9),
                                         named(fresh), process_set=members, broadcast_weights=True)
    found["first"] = bits(fresh)
    backward(fresh, worker_gradients(SHAPES, worker=hvd.rank(), step=0))
    optimizer.step()
    optimizer.zero_grad()
    found["before"] = optimizer.state[fresh[0]]["momentum_buffer"].sum().item()
    hvd.broadcast_optimizer_state(optimizer, 2)  # of all ranks, by the global rank
    found["lr"] = optimizer.param_groups[0]["lr"]
    found["momentum"] = optimizer.state[fresh[0]]["momentum_buffer"].sum().item()
    hvd.remove_process_set(members)
    return found


def test_a_root_is_a_global_rank_in_a_set_too():
    alone, first, second = run_ranks(broadcast_in_a_set, 3, env={"HOROVOD_DYNAMIC_PROCESS_SETS": "1"})
    assert first["own"] != first["parameters"] == second["parameters"] == second["own"]
    assert (first["object"], first["tensor"]) == (second["object"], second["tensor"]) == (2, 2.0)
    assert first["fresh"] == first["first"] == second["first"] != second["fresh"]  # the set's first rank's
    assert alone["first"] == alone["fresh"]
    for one in (alone, first, second):
        assert (one["lr"], one["momentum"]) == (2.1, second["before"])


def load_without_extensions():
    """A state as ``torch.distributed.checkpoint`` gives it: without the entry of the extensions."""
    parameters = make_parameters(SHAPES)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=0.1, momentum=0.9), named(parameters),
                                         compression=hvd.Compression.topk(0.5, min_size=1))
    backward(parameters, worker_gradients(SHAPES, worker=hvd.rank(), step=0))
    optimizer.step()
    state = optimizer.state_dict()
    del state["hvd_ext"]
    if hvd.rank() == 0:
        with pytest.warns(UserWarning, match=r"holds nothing of Compression\.topk"):
            optimizer.load_state_dict(state)
    else:
        optimizer.load_state_dict(state)
    optimizer.load_state_dict(state, reset_per_rank_state=True)
    return True


@pytest.mark.filterwarnings("error")
def test_a_state_without_extensions_is_taken_with_a_warning(ranks):
    assert ranks(2).run(load_without_extensions) == [True, True]
