"""SENG on architectures that keep their samples elsewhere, against one sample's pass after the other."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import hvd_ext.torch as hvd
from hvd_ext.torch.seng.per_sample import MOST_CALLS
from tests.reference import seng as reference
from tests.torch import seng_models as models
from tests.torch.per_sample import by_single_samples, flat_gradient, held_u
from tests.torch.test_seng_rules import LAM, mean_loss

B = 5


def compare(model, inputs, take, seng, axis: int = 0, *, leave=(), samples: int = B) -> None:
    """Each layer's direction is the dense one, to 1e-9; ``take(i)`` gives one sample's inputs."""
    torch.manual_seed(1)
    model.zero_grad()
    target = torch.randn_like(model(*inputs))
    model.zero_grad()
    mean_loss(model(*inputs), target).backward()
    g = {layer: flat_gradient(layer).numpy() for layer in seng.layers}
    seng.step()
    for layer in seng.layers:
        if layer.name in leave:
            continue
        shares = []
        for i in range(samples):
            loss = mean_loss(model(*take(i)), target[i:i + 1])
            grads = torch.autograd.grad(loss, layer.parameters, allow_unused=True)
            shares.append(torch.cat([torch.zeros_like(p).flatten() if d is None else d.flatten()
                                     for p, d in zip(layer.parameters, grads, strict=True)]))
        u = reference.dense_u(torch.stack(shares).numpy())
        wanted = reference.direction(u, g[layer], LAM)
        error = np.linalg.norm(flat_gradient(layer).numpy() - wanted) / np.linalg.norm(wanted)
        assert error < 1e-9, layer.name


CASES = {
    "windows": (models.Windows, (B, 6, 4), {"norm": 0, "qkv": "contiguous"}),
    "rolled windows": (lambda: models.Windows(roll=1), (B, 6, 4), {"project": "contiguous", "head": 0}),
    "flattened": (models.Flattened, (B, 3, 4), {"embed": 0, "inner": "contiguous"}),
    "flattened, time first": (lambda: models.Flattened(time_first=True), (B, 3, 4),
                              {"norm": "strided", "outer": "strided"}),
    "time as long as the batch": (lambda: models.Flattened(time_first=True), (B, B, 4),
                                  {"embed": 0, "inner": "strided"}),
    "encoder, sequence first": (models.SequenceFirst, (B, 3, 4),
                                {"encoder.layers.0.linear1": 1, "encoder.layers.1.norm2": 1,
                                 "encoder.layers.0.self_attn": 0, "head": 0}),
    "encoder, time as long as the batch": (models.SequenceFirst, (B, B, 4),
                                           {"encoder.layers.0.linear1": 1, "head": 0}),
    "recurrent, time first": (models.TimeMajor, (B, 3, 4), {"rnn": 1, "head": 1}),
    "gated recurrent": (lambda: models.TimeMajor(kind=nn.GRU), (B, 3, 4), {"rnn": 1}),
    "last state of an LSTM": (lambda: models.LastState(nn.LSTM), (B, 3, 4), {"rnn": 0}),
    "last state and output of a GRU of two layers": (
        lambda: models.LastState(nn.GRU, both=True, num_layers=2), (B, 3, 4), {"rnn": 0}),
    "images": (lambda: models.Images().eval(), (B, 2, 6, 6), {"same": 0}),
    "a batch of one": (models.Windows, (1, 6, 4), {}),
}


# explicit_threshold=0 leaves modules without a rule by factors without one.
IMPLICIT = [case for case in CASES if not any(word in case for word in ("images", "recurrent", "state"))]


@pytest.mark.parametrize(("case", "threshold"), [*((case, 10**9) for case in CASES),
                                                 *((case, 0) for case in IMPLICIT)])
def test_direction_is_that_of_single_samples(case, threshold):
    make, shape, wanted = CASES[case]
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(shape).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = {"explicit_threshold": threshold, "rank": 10**6, "uc": "exact"} if threshold == 0 else {}
        seng = hvd.SENG(model, damping=LAM, sketch=None, **small)
        compare(model, (x,), lambda i: (x[i:i + 1],), seng, samples=shape[0])
    assert seng.report()["coverage"] == 1.0
    names = dict(model.named_modules())
    for name, placement in wanted.items():
        assert seng.capture.samples.placements[names[name]] == placement, name


def test_a_model_whose_own_input_has_time_first():
    torch.manual_seed(0)
    model, x = models.SequenceFirst(turn=False).double(), torch.randn(3, B, 4).double()
    seng = hvd.SENG(model, damping=LAM, sketch=None, samples=1)
    compare(model, (x,), lambda i: (x[:, i:i + 1],), seng)


def test_later_batches_of_other_sizes():
    torch.manual_seed(0)
    model = models.Flattened(time_first=True).double()
    seng = hvd.SENG(model, damping=LAM, sketch=None, update_freq=1)
    for b, t in ((5, 3), (2, 4), (1, 3), (4, 4)):
        x = torch.randn(b, t, 4).double()
        compare(model, (x,), lambda i, x=x: (x[i:i + 1],), seng, samples=b)


def test_a_recurrent_layer_counts_the_last_micro_batch():
    torch.manual_seed(0)
    model, x = models.LastState(nn.LSTM).double(), torch.randn(B, 3, 4).double()
    found = []
    for before in (True, False):
        model.zero_grad()
        seng = hvd.SENG(model, damping=LAM, sketch=None)
        if before:
            mean_loss(model(torch.randn(B, 3, 4).double()), torch.ones(B, 3).double()).backward()
        mean_loss(model(x), torch.zeros(B, 3).double()).backward()
        seng.step()
        assert seng.report()["coverage"] == 1.0
        found.append(held_u(seng, seng.layers[0]))
        seng.close()
    torch.testing.assert_close(*found)


def test_subsample_keeps_samples_not_rows():
    torch.manual_seed(0)
    model, x = models.Flattened(time_first=True).double(), torch.randn(B, 3, 4).double()
    seng = hvd.SENG(model, damping=LAM, sketch=None, subsample=2)
    mean_loss(model(x), torch.randn(B, 3).double()).backward()
    seng.step()
    assert {row["rho"] for row in seng.report()["layers"]} == {2}
    assert {(row["layer"], row["samples"]) for row in seng.report()["layers"]} >= {
        ("embed", "axis 0"), ("inner", "strided")}


@pytest.mark.parametrize("experts", [3, 2])
def test_experts_count_rows_as_samples_and_say_so_once(experts):
    torch.manual_seed(0)
    model, x = models.Experts(experts=experts).double(), torch.randn(B, 3, 4).double()
    seng = hvd.SENG(model, damping=LAM, sketch=None, update_freq=1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            compare(model, (x,), lambda i: (x[i:i + 1],), seng,
                    leave=[f"experts.{k}" for k in range(experts)])
    about = sorted(str(one.message) for one in said)
    assert len(about) == len(set(about)) == experts - 1
    assert "which rows of experts.0, experts.1 belong" in about[0]
    assert "samples={name: ...}" in about[0]
    if experts == 3:
        assert "could not refresh experts.2: it was not used" in about[1]
    assert {row["samples"] for row in seng.report()["layers"]} >= {"rows", "axis 0"}


@pytest.mark.parametrize("subsample", [None, 3])
def test_packed_experts_are_run_once_for_each_sample(subsample):
    """Of more tokens than :data:`per_sample.MOST_CALLS`, which one by one would be refused."""
    torch.manual_seed(0)
    tokens = MOST_CALLS // B + 1
    model, x = models.PackedExperts().double(), torch.randn(B, tokens, 4).double()
    seng = hvd.SENG(model, damping=LAM, sketch=None, update_freq=1, subsample=subsample)
    if subsample is None:
        compare(model, (x,), lambda i: (x[i:i + 1],), seng)
    else:
        mean_loss(model(x), torch.randn(B, 3).double()).backward()
        seng.step()
    rows = {row["layer"]: row for row in seng.report()["layers"]}
    assert rows["packed"]["samples"] == "contiguous"
    assert rows["packed"]["rho"] == (subsample or B)
    assert rows["packed"]["refused"] is None


def test_strict_refuses_rows():
    torch.manual_seed(0)
    model, x = models.Experts(experts=2).double(), torch.randn(B, 3, 4).double()
    seng = hvd.SENG(model, damping=LAM, strict=True)
    mean_loss(model(x), torch.randn(B, 3).double()).backward()
    with pytest.raises(ValueError, match=r"rows of experts.0, experts.1 belong .* strict=False"):
        seng.step()
    agreed = hvd.SENG(model, damping=LAM, strict=True, samples={"experts": "rows"})
    mean_loss(model(x), torch.randn(B, 3).double()).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agreed.step()


def graphs():
    torch.manual_seed(0)
    sizes = [2, 3, 1, 4]
    graph = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))
    adjacency = (graph[:, None] == graph).double()
    return torch.randn(10, 4).double(), adjacency / adjacency.sum(1, keepdim=True), graph


def test_a_batch_of_graphs_needs_to_be_told():
    x, adjacency, graph = graphs()
    model = models.Graphs().double()

    def one(i: int):
        mine = (graph == i).nonzero().flatten()
        return x[mine], adjacency[mine][:, mine], graph[mine] - i

    seng = hvd.SENG(model, damping=LAM, sketch=None)
    target = torch.randn(4, 3).double()
    mean_loss(model(x, adjacency, graph), target).backward()
    with pytest.warns(UserWarning, match="which rows of first, second, head belong"):
        seng.step()
    seng.close()
    where = {"first": lambda rows: graph.numpy(), "second": lambda rows: graph.numpy(), "head": 0}
    seng = hvd.SENG(model, damping=LAM, sketch=None, samples=where)
    compare(model, (x, adjacency, graph), one, seng, samples=4)


def test_names_in_samples_must_be_there():
    with pytest.raises(ValueError, match="samples names the module 'body', which Windows does not have"):
        hvd.SENG(models.Windows(), damping=LAM, samples={"body": 0})


class Watched(nn.Module):
    """Batch statistics, dropout, an attribute set in ``forward``, and the user's own hook."""

    def __init__(self) -> None:
        super().__init__()
        self.body = models.Flattened(time_first=True)
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.5)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.last = self.drop(self.norm(self.body(x)))
        return self.last


def test_the_probe_leaves_no_trace():
    found = []
    for probed in (True, False):
        torch.manual_seed(0)
        model, x = Watched(), torch.randn(B, 3, 4)
        seen = []
        model.norm.register_forward_hook(lambda m, i, o, seen=seen: seen.append(o.requires_grad))
        model.body.head.eval()
        seng = hvd.SENG(model, damping=LAM) if probed else None
        out = model(x)
        random = torch.randn(3)
        assert model.last is out
        assert model.training
        assert not model.body.head.training
        assert seen == [True]
        out.square().mean().backward()
        found.append((random, model.norm.running_mean.clone(), model.norm.num_batches_tracked.clone(),
                      torch.tensor(model.calls), *(p.grad for p in model.parameters())))
        if seng is not None:
            assert "strided" in seng.capture.samples.placements.values()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_probe_that_fails_is_said():
    class Training(models.Flattened):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert self.training, "never evaluated"
            return super().forward(x)

    model, x = Training(), torch.randn(B, 3, 4)
    seng = hvd.SENG(model, damping=LAM)
    model(x).square().mean().backward()
    with pytest.warns(UserWarning, match=r"norm, inner, outer belong .*AssertionError: never evaluated"):
        seng.step()


def test_against_the_oracle_of_single_samples_by_another_way():
    """``by_single_samples`` agrees with the comparison of this file."""
    torch.manual_seed(0)
    model, x = models.Flattened().double(), torch.randn(B, 3, 4).double()
    target = torch.randn(B, 3).double()
    seng = hvd.SENG(model, damping=LAM, sketch=None)
    mean_loss(model(x), target).backward()
    layer = seng.layers[2]
    g = flat_gradient(layer).numpy()
    seng.step()
    shares = by_single_samples(model, lambda out, i: mean_loss(out, target[i]), x, layer.parameters)
    u = reference.dense_u(torch.cat([s.flatten(1) for s in shares], 1).numpy())
    np.testing.assert_allclose(flat_gradient(layer).numpy(), reference.direction(u, g, LAM), rtol=1e-9,
                               atol=1e-12)
