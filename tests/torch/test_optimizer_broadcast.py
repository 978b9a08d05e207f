"""``broadcast_optimizer_state``: a fresh optimizer stays fresh, and a rank without state gets the root's."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch

import hvd_ext.torch as hvd
from tests.torch.problems import bits
from tests.torch.small import same

pytestmark = pytest.mark.distributed
SERVERS = (None, "replicated", "rank0", "sharded")
OPTIMIZERS = {
    **{name: {} for name, one in vars(torch.optim).items()
       if inspect.isclass(one) and issubclass(one, torch.optim.Optimizer)
       and name not in ("Optimizer", "LBFGS", "SparseAdam")},
    "SGD": {"lr": 0.1},
    "SGD with momentum": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "dampening": 0.5},
    "Adam, foreach": {"foreach": True, "amsgrad": True, "weight_decay": 0.1},
    "AdamW, fused": {"fused": True, "weight_decay": 0.1},
    "Adam with a tensor": {"lr": torch.tensor(0.1)},
    "Adagrad with decay": {"lr_decay": 0.5},
    "hvd.AMSGrad": {}, "hvd.Muon": {"lr": 0.1},
}


def made(name, dtype=torch.float64):
    """Parameters, the same on every rank, and a torch optimizer for them."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(6, 4), (5, 3)] if "Muon" in name else [(6, 4), (5,), (2, 3, 2, 2)]
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
                  for shape in shapes]
    if parameters[-1].dim() == 4:
        parameters[-1].data = parameters[-1].data.contiguous(memory_format=torch.channels_last)
    if name.startswith("hvd."):
        kind = getattr(hvd, name[4:])
    else:
        kind = getattr(torch.optim, name.split(",")[0].split(" ")[0])
    half = len(parameters) // 2
    groups = [{"params": parameters[:half]}, {"params": parameters[half:]}]
    return parameters, kind(groups, **copy.deepcopy(OPTIMIZERS[name]))


def wrapped(optimizer, parameters, server):
    names = [(f"w{n}", p) for n, p in enumerate(parameters)]
    return hvd.DistributedOptimizer(optimizer, named_parameters=names, server=server)


def take_steps(optimizer, parameters, steps, rank=None):
    for step in steps:
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(10 * step + (hvd.rank() if rank is None else rank))
        for p in parameters:
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            (p * noise).sum().backward()
        optimizer.step()


def state_of(optimizer, parameters):
    return [dict(optimizer.state[p]) if p in optimizer.state else None for p in parameters]


def fresh(name, server, order):
    """The bits after three steps, with the call and without; nothing must be changed by it."""
    ends = []
    for call in (True, False):
        parameters, optimizer = made(name)
        before = bits(parameters), copy.deepcopy(state_of(optimizer, parameters))
        if order == "wrap, broadcast":
            optimizer = wrapped(optimizer, parameters, server)
        if call:
            hvd.broadcast_optimizer_state(optimizer, root_rank=1)
        after = copy.deepcopy(state_of(optimizer, parameters))
        if server in (None, "replicated"):
            assert same(after, before[1])
        assert bits(parameters) == before[0]
        assert all(p.grad is None for p in parameters)
        if order == "broadcast, wrap":
            optimizer = wrapped(optimizer, parameters, server)
        take_steps(optimizer, parameters, range(3))
        ends.append(bits(parameters))
    assert ends[0] == ends[1]
    return ends[0]


def all_fresh(names, servers):
    return [fresh(name, server, order) for name in names for server in servers
            for order in ("wrap, broadcast", "broadcast, wrap")]


@pytest.mark.parametrize(("names", "servers"), [
    (tuple(OPTIMIZERS), (None,)), (("SGD with momentum", "Adam", "AdamW", "NAdam"), SERVERS[1:])])
def test_a_fresh_optimizer_stays_fresh(ranks, names, servers):
    one, other = ranks(2).run(all_fresh, names, servers)
    assert one == other


def from_root(name, order):
    """Rank 1 has taken steps; the others get its state and settings, and all go on alike."""
    parameters, optimizer = made(name)
    if hvd.rank() == 1:
        take_steps(optimizer, parameters, range(2), rank=1)
        optimizer.param_groups[1]["lr"] = 0.07
        optimizer.param_groups[1]["initial_lr"] = 0.5
    hvd.broadcast_parameters(list(parameters), root_rank=1)
    groups = optimizer.param_groups
    if order == "wrap, broadcast":
        optimizer = wrapped(optimizer, parameters, None)
    hvd.broadcast_optimizer_state(optimizer, root_rank=1)
    assert optimizer.param_groups is groups
    everyone = hvd.allgather_object((state_of(optimizer, parameters), [
        {k: v for k, v in group.items() if k != "params"} for group in groups]), name="state")
    for state, settings in everyone:
        assert same(state, everyone[1][0])
        assert same(settings, everyone[1][1])
    assert groups[1]["lr"] == 0.07
    assert groups[1]["initial_lr"] == 0.5
    for p, state in zip(parameters, state_of(optimizer, parameters), strict=True):
        for value in (state or {}).values():
            if isinstance(value, torch.Tensor) and value.shape == p.shape:
                assert value.stride() == p.stride()
    if order == "broadcast, wrap":
        optimizer = wrapped(optimizer, parameters, None)
    take_steps(optimizer, parameters, range(2, 4))
    return bits(parameters)


def all_from_root(names):
    return [from_root(name, order) for name in names for order in ("wrap, broadcast", "broadcast, wrap")]


def test_ranks_without_state_get_the_roots(ranks):
    one, other = ranks(2).run(all_from_root, tuple(OPTIMIZERS))
    assert one == other


def embedded():
    """SparseAdam; bfloat16; more state on a rank than on the root; half of the parameters without state."""
    table = torch.nn.Embedding(6, 3, sparse=True)
    optimizer = torch.optim.SparseAdam(list(table.parameters()))
    if hvd.rank() == 0:
        table(torch.tensor([1, 2])).sum().backward()
        optimizer.step()
    hvd.broadcast_optimizer_state(optimizer, 0, model=table)
    ends = [optimizer.state[table.weight]["exp_avg"].tolist(), optimizer.state[table.weight]["step"]]
    parameters, optimizer = made("Adam", torch.bfloat16)
    if hvd.rank() == 1:
        take_steps(optimizer, parameters, range(2))
    hvd.broadcast_optimizer_state(optimizer, 1)
    ends.append(bits(optimizer.state[parameters[0]][key] for key in ("exp_avg", "exp_avg_sq")))
    assert optimizer.state[parameters[0]]["exp_avg"].dtype == torch.bfloat16
    parameters, optimizer = made("Adam")
    if hvd.rank() == 0:  # the root is fresh: so are all
        take_steps(optimizer, parameters, range(2))
    hvd.broadcast_optimizer_state(optimizer, 1)
    assert not optimizer.state
    parameters, optimizer = made("Adam")
    if hvd.rank() == 0:
        take_steps(optimizer, parameters[:1], range(2))
    hvd.broadcast_optimizer_state(optimizer, 0)
    assert list(optimizer.state) == parameters[:1]
    # Under Horovod elastic a rank that joins has a fresh optimizer.
    parameters, optimizer = made("AdamW", torch.bfloat16)
    if hvd.rank() == 0:
        take_steps(optimizer, parameters, range(2))
    hvd.elastic.TorchState(model=torch.nn.ParameterList(parameters), optimizer=optimizer).sync()
    ends += [bits(parameters), bits(optimizer.state[parameters[0]][key] for key in ("exp_avg", "step"))]
    return ends


def test_sparse_and_bfloat16_state_and_what_the_root_lacks(ranks):
    one, other = ranks(2).run(embedded)
    assert one == other


def says(call, kind=ValueError):
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def refusals():
    parameters, optimizer = made("Adam")
    said = [says(lambda: hvd.broadcast_optimizer_state(optimizer, 2)),
            says(lambda: hvd.broadcast_optimizer_state(torch.optim.LBFGS(parameters), 0))]
    more = parameters if hvd.rank() else [*parameters, torch.nn.Parameter(torch.ones(7))]
    said.append(says(lambda: hvd.broadcast_optimizer_state(torch.optim.Adam(more), 0)))
    large = [torch.nn.Parameter(torch.ones(40, 40))]
    plain = torch.optim.Adam([torch.nn.Parameter(torch.ones(40, 40))])
    take_steps(plain, plain.param_groups[0]["params"], range(1))
    sharded = wrapped(torch.optim.Adam(large), large, "sharded")
    if hvd.rank() == 0:  # a complete state, of which each rank must take its part
        sharded.load_state_dict(plain.state_dict())
    return [*said, says(lambda: hvd.broadcast_optimizer_state(sharded, 0))]


def test_what_cannot_be_broadcast_is_refused_on_all_ranks(ranks):
    one, other = ranks(2).run(refusals)
    assert one == other
    for text, wanted in zip(one, ["root_rank must be a global rank from 0 to 1, got 2",
                                  "cannot broadcast torch.optim.LBFGS", "does not have group 0: [7]",
                                  "load_state_dict() with the checkpoint on every rank"], strict=True):
        assert wanted in text
