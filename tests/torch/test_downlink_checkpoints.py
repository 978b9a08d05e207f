"""Checkpoints with compressed replies: both weights, exact and held, go on bit for bit."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import pytest
import torch

import hvd_ext.torch as hvd
from hvd_ext.torch.persistence.elastic_snapshot import ElasticSnapshot
from tests.torch.problems import bits, make_parameters
from tests.torch.test_downlink import OPTIMIZERS, SHAPES, SINGLE, topk, train


class Model(torch.nn.Module):
    def __init__(self, dtype=SINGLE):
        super().__init__()
        self.weights = torch.nn.ParameterList(make_parameters(SHAPES, dtype=dtype))


def made(server, optimizer="adam", dtype=SINGLE):
    model = Model(dtype)
    return model, hvd.DistributedOptimizer(OPTIMIZERS[optimizer][0](model.parameters()), server=server,
                                           named_parameters=model.named_parameters(),
                                           compression=topk(0.05, min_size=1, values="float32"))


def both_weights(model, optimizer):
    held = bits(model.parameters())
    with optimizer.exact_weights():
        return held, bits(model.parameters())


def saved_and_gone_on(server, optimizer, folder, dtype):
    model, distributed = made(server, optimizer, dtype)
    train(list(model.parameters()), distributed, range(5))
    hvd.save_checkpoint(folder, 5, model=model, optimizer=distributed)
    own = copy.deepcopy({"model": model.state_dict(), "optimizer": distributed.state_dict()})
    whole = copy.deepcopy(distributed.gather_state_dict())
    commit = ElasticSnapshot(distributed).gather_commit()
    then = both_weights(model, distributed)
    train(list(model.parameters()), distributed, range(5, 8))
    end = both_weights(model, distributed)
    ends = {}
    for way in ("file", "own", "own, model last", "whole", "commit"):
        model, distributed = made(server, optimizer, dtype)
        train(list(model.parameters()), distributed, range(20, 21))
        if way == "file":
            assert hvd.load_checkpoint(folder, model=model, optimizer=distributed).step == 5
        else:
            if way != "own, model last":
                model.load_state_dict(own["model"])
            if way == "commit":
                ElasticSnapshot(distributed).restore(commit, commit["reducer"], same_ranks=True)
            else:
                distributed.load_state_dict(copy.deepcopy(whole if way == "whole" else own["optimizer"]))
            model.load_state_dict(own["model"])
        ends[way] = [both_weights(model, distributed)]
        train(list(model.parameters()), distributed, range(5, 8))
        ends[way].append(both_weights(model, distributed))
    exact = torch.load(Path(folder) / "update-000000000005" / "model.pt", weights_only=True)["model"]
    return then, end, ends, bits(exact.values()), own["model"], whole


def loaded_elsewhere(server, folder, model_state, whole):
    """On other ranks: both weights from the file, and from the gathered state; what a server without says."""
    model, optimizer = made(server)
    hvd.load_checkpoint(folder, model=model, optimizer=optimizer, reset_per_rank_state=True)
    from_file = both_weights(model, optimizer)
    train(list(model.parameters()), optimizer, [5])
    model, optimizer = made(server)
    optimizer.load_state_dict(whole, reset_per_rank_state=True)
    model.load_state_dict(model_state)
    from_gathered = both_weights(model, optimizer)
    train(list(model.parameters()), optimizer, [5])
    model, optimizer = made("replicated")
    try:
        optimizer.load_state_dict(whole)
        said = ""
    except ValueError as error:
        said = str(error)
    hvd.load_checkpoint(folder, model=model, optimizer=optimizer, reset_per_rank_state=True)
    return from_file, from_gathered, bits(model.parameters()), said


@pytest.mark.distributed
@pytest.mark.parametrize(("kind", "reply", "optimizer", "dtype"), [
    ("sharded", topk(selection="sampled"), "adam", SINGLE), ("rank0", hvd.Compression.fp16, "adam", SINGLE),
    ("sharded", topk(0.02), "rprop", SINGLE), ("rank0", topk(0.02), "adam", torch.bfloat16),
    ("sharded", topk(0.02), "adam", torch.bfloat16)])
def test_checkpoints_go_on_bit_for_bit(ranks, kind, reply, optimizer, dtype):
    with tempfile.TemporaryDirectory() as folder:
        server = hvd.Server(kind, downlink=reply)
        everyone = ranks(2).run(saved_and_gone_on, server, optimizer, folder, dtype)
        for then, end, ends, file, _, _ in everyone:
            assert then[0] != then[1]
            assert file == then[1]  # the model of a checkpoint is w
            for way, (at_once, later) in ends.items():
                assert at_once == then, way
                assert later == end, way
        if optimizer != "adam" or dtype != SINGLE:
            return
        then, *_, model_state, whole = everyone[0]
        for size in (1, 3):
            for from_file, from_gathered, plain, said in ranks(size).run(
                    loaded_elsewhere, server, folder, model_state, whole):
                assert from_file == (then[1], then[1])
                # Alone there is nothing to reply to: the parameters hold w at once.
                assert from_gathered == (then if size > 1 else (then[0], then[1]))
                assert plain == then[1]
                assert "pass downlink= here too" in said
