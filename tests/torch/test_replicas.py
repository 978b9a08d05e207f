"""Replicas that differ are found on every rank, with the tensors and ranks named."""

from __future__ import annotations

import numpy as np
import pytest

from hvd_ext.consistency.replicas import ReplicasDifferError, check_replicas, summarize_array


def summaries(**arrays):
    return [summarize_array(name, np.asarray(array)) for name, array in arrays.items()]


def test_equal_replicas_pass_also_with_nans():
    check_replicas([summaries(w=[1.0, np.nan], b=[0.0])] * 3)


def test_message_names_tensors_ranks_and_how_to_mend_it():
    ranks = [summaries(w=[3.0, 4.0], b=[0.0]), summaries(w=[3.0, 4.0], b=[0.0]),
             summaries(w=[0.0, 4.0], b=[-0.0])]
    with pytest.raises(ReplicasDifferError, match=(
            r"(?s)2 of 2 tensors differ.*w: float64\[2\] with norm 5 .* on ranks 0, 1; .*norm 4 .*"
            r" on rank 2.*b: .*Broadcast the model")):
        check_replicas(ranks)


def test_missing_tensors_shapes_and_dtypes_differ():
    first = summaries(w=np.zeros(2))
    for other in (summaries(), summaries(v=np.zeros(2)), summaries(w=np.zeros((2, 1))),
                  summaries(w=np.zeros(2, np.int64))):
        with pytest.raises(ReplicasDifferError):
            check_replicas([first, other])


def test_only_the_first_are_shown():
    many = [summaries(**{f"w{i}": [float(rank)] for i in range(9)}) for rank in range(2)]
    with pytest.raises(ReplicasDifferError, match="and 4 more"):
        check_replicas(many)


def drifting_models():
    import horovod.torch as horovod
    import torch

    from hvd_ext.torch.consistency.replicas import assert_replicas_equal

    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(4, 3, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    assert_replicas_equal(model, optimizer=optimizer, statistics=True)
    rank = horovod.rank()
    said = []
    model[1].running_mean += rank
    assert_replicas_equal(model, optimizer=optimizer)
    with pytest.raises(ReplicasDifferError, match=r"1\.running_mean: bfloat16\[2\]"):
        assert_replicas_equal(model, statistics=True)
    optimizer.state[model[0].weight]["momentum_buffer"] += rank
    with pytest.raises(ReplicasDifferError, match=r"optimizer/0\.0/momentum_buffer"):
        assert_replicas_equal(model, optimizer=optimizer)
    with torch.no_grad():
        model[0].bias[1] += 0.5 * rank
    try:
        assert_replicas_equal(model)
    except ReplicasDifferError as error:
        said.append(str(error))
    with pytest.raises(ValueError, match="no shape yet"):
        assert_replicas_equal(torch.nn.LazyLinear(2))
    with pytest.raises(ValueError, match="no tensors"):
        assert_replicas_equal(torch.nn.ReLU())
    return said


@pytest.mark.distributed
def test_ranks_are_told_alike(ranks):
    pytest.importorskip("torch")
    first, second = ranks(2).run(drifting_models)
    assert first == second
    assert len(first) == 1
    assert "1 of 4 tensors differ" in first[0]
    assert "0.bias" in first[0]
