"""Parameters that are special: sparse, without elements, complex, none at all; and odd backward passes."""

from __future__ import annotations

import time
import warnings

import numpy as np
import pytest
import torch
from horovod.torch import mpi_ops

import hvd_ext.torch as hvd
from hvd_ext.torch import collectives
from hvd_ext.torch.collectives import keep_alive_until_done
from tests.torch.problems import bits, flat, named

pytestmark = pytest.mark.distributed
ROWS, STEPS = [9, 5], 5
OPTIMIZERS = {
    "sparse_adam": lambda p: torch.optim.SparseAdam(p, lr=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}


def tables():
    torch.manual_seed(3)
    return [torch.nn.Embedding(rows, 3, sparse=True, dtype=torch.float64) for rows in ROWS]


def rows_of(case, rank, step, table):
    """The rows that a rank uses of a table in a step, if any."""
    if table == 1 and (case == "nobody at all" or (case == "nobody" and step in (0, 3))
                       or (case == "not rank 1 at first" and step < 2 and rank == 1)
                       or (case == "nobody, then rank 0" and (step == 0 or rank == 1) and step < 3)):
        return None
    return np.random.default_rng([step, rank, table]).integers(0, ROWS[table], 4)


def loss_of(model, case, rank, step):
    terms = [one(torch.from_numpy(rows)).pow(2).sum() for table, one in enumerate(model)
             if (rows := rows_of(case, rank, step, table)) is not None]
    return sum(terms)


def train_tables(name, case, options):
    model = tables()
    parameters = [one.weight for one in model]
    optimizer = hvd.DistributedOptimizer(OPTIMIZERS[name](parameters), named(parameters), **options)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, case, hvd.rank(), step).backward()
        optimizer.step()
    return flat(parameters), bits(parameters)


def expected_tables(name, case, ranks):
    model = tables()
    parameters = [one.weight for one in model]
    optimizer = OPTIMIZERS[name](parameters)
    for step in range(STEPS):
        optimizer.zero_grad()
        (sum(loss_of(model, case, rank, step) for rank in range(ranks)) / ranks).backward()
        for parameter in parameters:
            if parameter.grad is None and ranks > 1:  # zeros
                parameter.grad = torch.zeros_like(parameter).to_sparse(1)
        optimizer.step()
    return flat(parameters)


CASES = ["ordinary", "nobody at all", "nobody", "not rank 1 at first", "nobody, then rank 0"]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("options", [
    {}, {"server": "rank0"}, {"server": "sharded"}, {"sparse_as_dense": True},
    {"sparse_as_dense": True, "server": "sharded"}], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sparse_tables_that_are_not_used(ranks, name, options, size):
    for case in CASES:
        results = ranks(size).run(train_tables, name, case, options)
        for found, mine in results:
            assert mine == results[0][1]
            np.testing.assert_allclose(found, expected_tables(name, case, size), rtol=0, atol=1e-9,
                                       err_msg=case)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("options", [
    {"overlap": hvd.DelayedUpdate(0.0, adaptive=False)}, {"op": hvd.DelayCompensated()},
    {"compression": hvd.Compression.topk(0.5, min_size=0)},
    {"compression": hvd.Compression.topk(0.5, min_size=0), "server": "sharded"}], ids=str)
@pytest.mark.parametrize("name", ["sparse_adam", "adagrad"])
def test_what_was_made_dense_on_its_way_is_given_back_alike(ranks, name, options, size):
    for case in CASES:
        results = ranks(size).run(train_tables, name, case, {**options, "sparse_as_dense": True})
        assert len({mine for _, mine in results}) == 1, case


def step_without(kind, options):
    """Weights after steps of a model that has nothing of a kind, and of the rest trained without ranks."""
    torch.manual_seed(1)
    main, odd = torch.nn.Linear(4, 3, dtype=torch.float64), torch.nn.Linear(4, 0, dtype=torch.float64)
    parts = [torch.nn.Linear(0, 3, dtype=torch.float64), main] if kind == "inputs" else [main, odd]
    model = torch.nn.ModuleList(parts)
    if kind == "trainable":
        model.requires_grad_(False)
    options = {key: value(model) if callable(value) else value for key, value in options.items()}
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
                                         model.named_parameters(), **options)
    for step in range(3):
        optimizer.zero_grad()
        x = torch.from_numpy(np.random.default_rng([step, hvd.rank()]).standard_normal((5, 4)))
        loss = main(x).pow(2).mean()
        loss = loss + (model[0](x[:, :0]).pow(2).mean() if kind == "inputs" else odd(x).sum())
        if kind != "trainable":
            loss.backward()
        optimizer.step()
    optimizer.flush()
    assert all(p.isfinite().all() for p in model.parameters())
    return bits(model.parameters())


def seng(model):
    return hvd.SENG(model, damping=0.2)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", ["outputs", "inputs"])
@pytest.mark.filterwarnings("ignore")
def test_seng_takes_layers_without_elements(ranks, kind, size):
    assert len(set(ranks(size).run(step_without, kind, {"preconditioner": seng}))) == 1


@pytest.mark.parametrize("options", [
    {}, {"overlap": hvd.DelayedUpdate()}, {"overlap": hvd.DelayedUpdate(0.0, adaptive=False)},
    {"op": hvd.DelayCompensated()},
    {"compression": hvd.Compression.topk(0.5)}, {"server": "sharded"}], ids=str)
def test_nothing_trainable(ranks, options):
    assert len(set(ranks(2).run(step_without, "trainable", options))) == 1


def wrap_complex(options):
    """What a complex parameter is answered with."""
    parameters = [torch.nn.Parameter(torch.ones(3)),
                  torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))]
    inner = torch.optim.SGD(parameters, lr=0.1)
    try:
        optimizer = hvd.DistributedOptimizer(inner, named(parameters), **options)
    except ValueError as error:
        assert not parameters[0]._post_accumulate_grad_hooks
        return str(error)
    (parameters[1] * (1 + 2j)).abs().square().sum().backward()
    optimizer.step()
    return parameters[1].tolist()


@pytest.mark.parametrize("options", [
    {}, {"op": hvd.DelayCompensated()}, {"compression": hvd.Compression.topk(0.5)}, {"server": "sharded"},
    {"compression": hvd.Compression.powersgd(rank=1)}, {"overlap": hvd.DelayedUpdate()}, {"server": "rank0"}],
    ids=str)
def test_complex_parameters_are_refused_by_name(ranks, options):
    for found in ranks(2).run(wrap_complex, options):
        assert "p1 is a parameter of torch.complex64" in found


class Checkpointed(torch.nn.Module):
    """One layer used under activation checkpointing: twice, or once there and once beside it."""

    def __init__(self, order):
        super().__init__()
        self.first, self.shared = torch.nn.Linear(4, 5), torch.nn.Linear(5, 5)
        self.order = order

    def forward(self, x, **how):
        x = self.first(x)
        for checkpointed in self.order:
            x = torch.utils.checkpoint.checkpoint(self.shared, x, **how) if checkpointed else self.shared(x)
        return x.square().mean()


def checkpoint_layers(options, order, reentrant):
    """The error of a backward pass with reentrant checkpointing, or of the second one without it."""
    torch.manual_seed(0)
    model = Checkpointed(order)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1),
                                         model.named_parameters(), **options)
    rows = torch.randn(2, 3, 4)[hvd.rank()]
    try:
        for _ in range(optimizer.backward_passes_per_step + (not reentrant)):
            model(rows, use_reentrant=reentrant).backward()
    except AssertionError as error:
        return str(error)
    return None


@pytest.mark.parametrize("order", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("options", [{}, {"op": hvd.DelayCompensated(virtual_workers="microbatch"),
                                          "backward_passes_per_step": 2}], ids=str)
def test_reentrant_checkpointing_of_a_layer_used_twice_is_named(ranks, options, order):
    for found in ranks(2).run(checkpoint_layers, options, order, True):
        assert "shared." in found
        assert "use_reentrant=False" in found
    for found in ranks(2).run(checkpoint_layers, options, order, False):
        assert "Increase backward_passes_per_step" in found


def keep_graph(options, create_graph):
    """The weights after steps whose backward passes keep their graph, and what of it is left."""
    torch.manual_seed(2)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)).double()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
                                         model.named_parameters(), backward_passes_per_step=2, **options)
    for step in range(3):
        optimizer.zero_grad()
        for part in range(2):
            rng = np.random.default_rng([step, part, hvd.rank()])
            x = torch.from_numpy(rng.standard_normal((5, 4)))
            (model(x).pow(2).mean() / 2).backward(create_graph=create_graph)
        optimizer.step()
    assert not any(p.grad is not None and p.grad.requires_grad for p in model.parameters())
    buffers = getattr(optimizer._hvd_ext.reducer, "_buffers", {})
    assert not any(one.requires_grad for one in buffers.values())
    optimizer.flush()
    return bits(model.parameters())


@pytest.mark.parametrize("options", [
    {}, {"groups": 1}, {"op": hvd.DelayCompensated()}, {"compression": hvd.Compression.topk(0.5, min_size=0)},
    {"compression": hvd.Compression.powersgd(rank=1, min_compression=1.0)}, {"server": "sharded"},
    {"overlap": hvd.DelayedUpdate()}, {"op": hvd.DelayCompensated(virtual_workers="microbatch")}], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_backward_passes_that_keep_their_graph(ranks, options):
    kept = ranks(2).run(keep_graph, options, True)
    assert kept == ranks(2).run(keep_graph, options, False)
    assert len(set(kept)) == 1


def accumulate(options):
    """Two backward passes before a step, and a pass that is thrown away."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([parameter], lr=0.5), [("p", parameter)], **options)
    try:
        for _ in range(2):
            (2 * parameter).sum().backward()
        optimizer.step()
        parameter.sum().backward()
        optimizer.zero_grad()
        optimizer.step()
    except AssertionError:
        optimizer._hvd_ext.abort_step()
        return "error"
    return parameter.tolist()


@pytest.mark.parametrize("size", [1])
def test_one_rank_without_an_extension_does_what_horovods_does(ranks, size):
    assert ranks(1).run(accumulate, {}) == [[-1.0] * 3]
    assert ranks(1).run(accumulate, {"op": hvd.DelayCompensated()}) == ["error"]
    assert ranks(1).run(wrap_complex, {})[0] == pytest.approx([0, 0], abs=1e-6)
    assert "p1 is a parameter of torch.complex64" in ranks(1).run(wrap_complex,
                                                                  {"overlap": hvd.DelayedUpdate()})[0]


def drop_optimizers(options):
    """What is held of optimizers that were dropped after a step."""
    parameter = torch.nn.Parameter(torch.ones(3))
    for _ in range(4):
        inner = torch.optim.SGD([parameter], lr=0.5)
        optimizer = hvd.DistributedOptimizer(inner, [("p", parameter)], **options)
        for _ in range(2):
            optimizer.zero_grad()
            parameter.sum().backward()
            optimizer.step()
        del optimizer, inner
        hvd.allreduce(torch.ones(1), name="all are here")
    for _ in range(1000):
        keep_alive_until_done([])
        if not mpi_ops._handle_map and not collectives._UNFINISHED:
            break
        time.sleep(0.01)
    return len(mpi_ops._handle_map), len(collectives._UNFINISHED)


@pytest.mark.parametrize("options", [{}, {"overlap": hvd.DelayedUpdate()},
                                     {"overlap": hvd.DelayedUpdate(), "op": hvd.DelayCompensated()}], ids=str)
def test_a_dropped_optimizer_leaves_nothing_behind(ranks, options):
    assert ranks(2).run(drop_optimizers, options) == [(0, 0)] * 2


def schedule(options, before):
    """The warnings of a scheduler that was made with the optimizer that was wrapped, or with the result."""
    parameter = torch.nn.Parameter(torch.ones(3))
    inner = torch.optim.SGD([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(inner, 0.5) if before else None
    optimizer = hvd.DistributedOptimizer(inner, [("p", parameter)], **options)
    scheduler = scheduler or torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            parameter.sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    return optimizer.param_groups[0]["lr"], [str(one.message) for one in seen]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("options", [{}, {"server": "sharded"}, {"overlap": hvd.DelayedUpdate()}], ids=str)
@pytest.mark.parametrize("size", [1])
def test_a_scheduler_does_not_warn_falsely(ranks, options, before, size):
    assert ranks(1).run(schedule, options, before) == [(0.25, [])]
