"""Parameters that are special: sparse, without elements, complex, none at all; and odd backward passes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hvd_ext.torch as hvd
from tests.torch.problems import bits, flat, named

pytestmark = pytest.mark.ranks
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
    {"late": hvd.Late(0.0, adaptive=False)}, {"op": hvd.DelayCompensated()},
    {"compression": hvd.Compression.topk(0.5, min_size=0)},
    {"compression": hvd.Compression.topk(0.5, min_size=0), "server": "sharded"}], ids=str)
@pytest.mark.parametrize("name", ["sparse_adam", "adagrad"])
def test_what_was_made_dense_on_its_way_is_given_back_alike(ranks, name, options, size):
    for case in CASES:
        results = ranks(size).run(train_tables, name, case, {**options, "sparse_as_dense": True})
        assert len({mine for _, mine in results}) == 1, case
