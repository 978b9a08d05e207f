"""Embeddings and attention: rules that hold some rows only, and projections that no module computes."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hvd_ext.torch as hvd
from tests.torch import seng_models as models
from tests.torch.per_sample import flat_gradient
from tests.torch.test_seng_rules import LAM, mean_loss
from tests.torch.test_seng_samples import B, compare


class Bag(nn.Module):
    def __init__(self, mode: str, **more) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(9, 4, mode=mode, **more)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.table(ids)))


class Tokens(nn.Module):
    def __init__(self, *, twice: bool = False, time_first: bool = False, **more) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4, **more)
        self.head = nn.Linear(4, 3)
        self.twice, self.time_first = twice, time_first

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids.T).transpose(0, 1) if self.time_first else self.table(ids)
        x = torch.tanh(x + self.table(ids.flip(1))) if self.twice else torch.tanh(x)
        return self.head(x.mean(1))


TABLES = {
    "tokens": Tokens, "padding": lambda: Tokens(padding_idx=2), "time first": lambda: Tokens(time_first=True),
    "used twice": lambda: Tokens(twice=True), "a sum of bags": lambda: Bag("sum"),
    "a mean of bags, padding": lambda: Bag("mean", padding_idx=1),
}


@pytest.mark.parametrize("case", TABLES)
@pytest.mark.parametrize("coupling", ["block", "full"])
def test_tables_hold_the_rows_that_are_used(case, coupling):
    torch.manual_seed(0)
    model, ids = TABLES[case]().double(), torch.randint(0, 9, (B, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seng = hvd.SENG(model, damping=LAM, sketch="uniform", coupling=coupling)
        compare(model, (ids,), lambda i: (ids[i:i + 1],), seng)
    row = seng.report()["layers"][0]
    columns = 12 if case == "used twice" else 6
    assert (row["held"], row["rank"], row["rho"]) == ("rows used", columns, B)
    # rows (8 bytes) and g (4 times 8) of each column and sample; the system and its factor beside them
    assert row["bytes"] == B * columns * 40 + 2 * B * B * 8


def test_a_long_table_is_multiplied_in_parts(monkeypatch):
    from hvd_ext.torch.seng import embedding

    found = []
    for size in (embedding.CHUNK_NUMEL, 3 * B * 4):
        monkeypatch.setattr(embedding, "CHUNK_NUMEL", size)
        torch.manual_seed(0)
        model, ids = Tokens().double(), torch.randint(0, 9, (B, 6))
        seng = hvd.SENG(model, damping=LAM)
        mean_loss(model(ids), torch.ones(B, 3).double()).backward()
        seng.step()
        found.append(flat_gradient(seng.layers[0]))
    torch.testing.assert_close(*found)


def test_its_state_comes_back_bit_for_bit():
    torch.manual_seed(0)
    model, ids = Tokens(), torch.randint(0, 9, (B, 6))

    def step(seng) -> list[torch.Tensor]:
        model.zero_grad()
        mean_loss(model(ids), torch.ones(B, 3)).backward()
        seng.step()
        return [p.grad.clone() for p in model.parameters()]

    seng, again = (hvd.SENG(model, damping=LAM, update_freq=5) for _ in range(2))
    step(seng)
    again.close()
    again = hvd.SENG(model, damping=LAM, update_freq=5)
    again.load_state_dict(seng.state_dict())
    for one, other in zip(step(seng), step(again), strict=True):
        assert torch.equal(one, other)


def test_half_precision_storage_of_a_table():
    found = []
    for dtype in (None, "bfloat16"):
        torch.manual_seed(0)
        model, ids = Tokens(), torch.randint(0, 9, (B, 6))
        seng = hvd.SENG(model, damping=LAM, curvature_dtype=dtype)
        mean_loss(model(ids), torch.ones(B, 3)).backward()
        seng.step()
        found.append(model.table.weight.grad)
    torch.testing.assert_close(found[1], found[0], rtol=0.05, atol=0.02 * float(found[0].abs().max()))


@pytest.mark.parametrize("more", [{"sparse": True}, {"scale_grad_by_freq": True}])
def test_tables_whose_gradient_is_another_fall_back(more):
    torch.manual_seed(0)
    model, ids = Tokens(**more), torch.randint(0, 9, (B, 6))

    def one_step():
        seng = hvd.SENG(model, damping=LAM)
        mean_loss(model(ids), torch.ones(B, 3)).backward()
        seng.step()
        return seng

    with pytest.warns(UserWarning, match=r"table \(Embedding\)|table: its samples"):
        seng = one_step()
    assert seng.report()["coverage"] < 1


def test_a_small_language_model():
    torch.manual_seed(0)
    model, ids = models.Language().double(), torch.randint(0, 11, (B, 6))
    seng = hvd.SENG(model, damping=LAM, sketch=None)
    with pytest.warns(UserWarning, match="places: its input is the same for all samples"):
        compare(model, (ids,), lambda i: (ids[i:i + 1],), seng, leave=["places"])
    rules = {row["layer"]: row["kind"] for row in seng.report()["layers"]}
    assert (rules["inner"], rules["norm"], rules["tokens"]) == ("Conv1D", "RMS", "Embedding")
    assert "its input is the same for all samples" in seng.report()["coverage_line"]


def test_conv1d_is_held_by_factors_too():
    torch.manual_seed(0)
    model, ids = models.Language().double(), torch.randint(0, 11, (B, 6))
    seng = hvd.SENG(model, damping=LAM, sketch=None, explicit_threshold=20, rank=10**6, uc="exact",
                    exclude=["places"])
    compare(model, (ids,), lambda i: (ids[i:i + 1],), seng)
    held = {row["layer"]: row["held"] for row in seng.report()["layers"]}
    assert (held["inner"], held["norm"], held["tokens"]) == ("implicit", "explicit", "rows used")


class HeadFirst(models.Language):
    """The output layer is met before the table; it has a bias, and the table is used twice."""

    def __init__(self) -> None:
        super().__init__()
        first = nn.Linear(4, 11)
        self.tokens.weight = first.weight
        self._modules = {"head": first, **{name: m for name, m in self._modules.items() if name != "head"}}

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) + self.head(torch.tanh(self.tokens(ids.flip(1)))).mean(1)


@pytest.mark.parametrize("make", [lambda: models.Language(tied=True), HeadFirst], ids=["plain", "head first"])
@pytest.mark.parametrize("threshold", [10**9, 0])
@pytest.mark.parametrize("coupling", ["block", "full"])
def test_a_table_tied_to_the_output_has_both_parts(make, threshold, coupling, monkeypatch):
    from hvd_ext.torch.seng import tied_embedding

    torch.manual_seed(0)
    model, ids = make().double(), torch.randint(0, 11, (B, 6))
    monkeypatch.setattr(tied_embedding, "CHUNK_NUMEL", 2 * B * B * 6)  # two columns at a time
    seng = hvd.SENG(model, damping=LAM, sketch="uniform", row_sketch=3, explicit_threshold=threshold,
                    rank=10**6, uc="exact", coupling=coupling, exclude=["places", "norm", "inner", "outer"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(model, (ids,), lambda i: (ids[i:i + 1],), seng)
    (row,) = seng.report()["layers"]
    assert row["held"] == ("explicit" if threshold else "implicit and rows used")
    again = hvd.SENG(model, damping=LAM, sketch="uniform", row_sketch=3, explicit_threshold=threshold,
                     rank=10**6, uc="exact", coupling=coupling, exclude=["places", "norm", "inner", "outer"])
    again.load_state_dict(seng.state_dict())
    found = []
    for one in (seng, again):
        model.zero_grad()
        mean_loss(model(ids), torch.ones(B, 11).double()).backward()
        one.step()
        found.append(flat_gradient(one.layers[0]))
    assert torch.equal(*found)


class Scaled(nn.Embedding):
    """Gemma's and BART's: what is found is scaled."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return 2.0 * super().forward(ids)


class Shifted(nn.Embedding):
    """OPT's: rows are numbered from 2 on, and the positions come from a mask."""

    def forward(self, mask: torch.Tensor) -> torch.Tensor:
        return super().forward(mask.long().cumsum(1) * mask.long() + 2)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("threshold", [10**9, 0])
def test_embeddings_with_a_forward_of_their_own(tied, threshold):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.places = Scaled(11, 4), Shifted(9, 4)
            self.head = nn.Linear(4, 11)
            if tied:
                self.head.weight = self.tokens.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.tokens(ids) + self.places((ids > 2).double()))).mean(1)

    torch.manual_seed(0)
    model, ids = Two().double(), torch.randint(0, 11, (B, 6))
    original = F.embedding
    seng = hvd.SENG(model, damping=LAM, sketch=None, explicit_threshold=threshold, rank=10**6, uc="exact")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(model, (ids,), lambda i: (ids[i:i + 1],), seng)
    assert F.embedding is original
    assert seng.report()["coverage"] == 1.0


class Attention(nn.Module):
    def __init__(self, cross: bool = False, dropout: float = 0.0, **more) -> None:
        super().__init__()
        self.cross = cross
        self.attention = nn.MultiheadAttention(4, 2, dropout, **more)
        self.memory = nn.Linear(4, more.get("kdim", 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, T, E)
        query = x if self.attention.batch_first else x.transpose(0, 1)
        memory = self.memory(query[:, :2] if self.attention.batch_first else query[:2])
        key = memory if self.cross else query
        out, _ = self.attention(query, key, memory if self.cross else query, need_weights=False)
        return self.head(out.mean(1 if self.attention.batch_first else 0))


ATTENTIONS = {
    "self": {}, "self, time first": {"batch_first": False}, "cross": {"cross": True},
    "cross, time first": {"cross": True, "batch_first": False}, "no bias": {"bias": False},
    "other widths": {"cross": True, "kdim": 5, "vdim": 5},
    "other widths, no bias": {"cross": True, "kdim": 5, "vdim": 5, "bias": False},
}


@pytest.mark.parametrize(("case", "threshold"), [*((case, 10**9) for case in ATTENTIONS), ("self", 0),
                                                 ("cross, time first", 0)])
def test_attention_by_its_projections(case, threshold):
    torch.manual_seed(0)
    model, x = Attention(**{"batch_first": True, **ATTENTIONS[case]}).double(), torch.randn(B, 3, 4).double()
    seng = hvd.SENG(model, damping=LAM, sketch=None, explicit_threshold=threshold, rank=10**6, uc="exact",
                    exclude=[] if "cross" in ATTENTIONS[case] else ["memory"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(model, (x,), lambda i: (x[i:i + 1],), seng)
    assert F.linear is torch._C._nn.linear
    kinds = [row["kind"] for row in seng.report()["layers"]]
    assert kinds.count("MultiheadAttention") == 1
    if threshold == 0:
        assert {row["held"] for row in seng.report()["layers"]} == {"implicit"}


def test_attention_with_dropout_and_further_parameters():
    torch.manual_seed(0)
    model = Attention(dropout=0.5, add_bias_kv=True, batch_first=True)
    with pytest.warns(UserWarning, match="bias_k and bias_v of MultiheadAttention"):
        seng = hvd.SENG(model, damping=LAM, exclude=["memory"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mean_loss(model(torch.randn(B, 3, 4)), torch.ones(B, 3)).backward()
        seng.step()
    assert {row["held"] for row in seng.report()["layers"]} == {"explicit"}
    assert seng.report()["without_rule"]["no rule"]["parameters"] == 8


def test_attention_that_fails_gives_linear_back():
    model = Attention(batch_first=True)
    hvd.SENG(model, damping=LAM)
    with pytest.raises(Exception, match=r"shape|size|dim"):
        model.attention(torch.randn(B, 3, 5), torch.randn(B, 3, 5), torch.randn(B, 3, 5))
    assert F.linear is torch._C._nn.linear
