"""State, report and bad use of a preconditioner on one rank."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

import hvd_ext.torch as hvd
from tests.torch.small import LAM, batch, loss_of, network, same

SETTINGS = [
    {"coupling": "block", "sketch": "uniform", "sketch_size": 50},
    {"coupling": "lagged", "explicit_threshold": 0, "rank": 3, "row_sketch": 4,
     "sketch": "leverage"},
    {"resample": "step", "sketch_size": 50, "coupling": "lagged"},
    {"coupling": "full", "explicit_threshold": 0, "uc": "exact", "curvature_dtype": "bfloat16"},
    {"coupling": "lagged", "damping": lambda step: 0.5 / (1 + step)},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("steps", [2, 3])
def test_resuming_gives_the_same_next_step_bit_for_bit(settings, steps):
    settings = {"damping": LAM, **settings}

    def made():
        model = network(torch.float32)
        return (model, hvd.SENG(model, update_freq=3, **settings),
                torch.optim.SGD(model.parameters(), lr=0.1))

    def go(model, seng, optimizer, seeds):
        for seed in seeds:
            optimizer.zero_grad()
            loss_of(model, batch(seed, dtype=torch.float32)).backward()
            seng.step()
            optimizer.step()

    first = made()
    go(*first, range(steps))
    file = io.BytesIO()
    torch.save((first[0].state_dict(), first[1].state_dict()), file)
    go(*first, range(10, 14))
    file.seek(0)
    second = made()
    weights, state = torch.load(file, weights_only=True)
    second[0].load_state_dict(weights)
    second[1].load_state_dict(state)
    go(*second, range(10, 14))
    for one, other in zip(first[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one.grad, other.grad)
    assert same(first[1].state_dict(), second[1].state_dict())


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_state_of_format_1_loads(settings):
    """It had the samples of a factor in the same axis as its columns."""
    def one_step(model, seng, seed):
        model.zero_grad()
        loss_of(model, batch(seed)).backward()
        seng.step()

    settings = {"damping": LAM, "update_freq": 9, **settings}
    model, other = network(), network()
    seng, again = hvd.SENG(model, **settings), hvd.SENG(other, **settings)
    one_step(model, seng, 0)
    saved = {**seng.state_dict(), "format": 1}
    saved["layers"] = {name: {**layer, "blocks": [
        {key: value.flatten(2) if key in ("g", "a", "xg", "xa") else value
         for key, value in block.items() if key not in ("start", "height")}
        for block in layer["blocks"]]} for name, layer in saved["layers"].items()}
    again.load_state_dict(saved)
    for name, buffer in model.named_buffers():
        other.get_buffer(name).copy_(buffer)
    one_step(model, seng, 1)
    one_step(other, again, 1)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_foreign_state_is_refused_with_the_reason():
    seng = hvd.SENG(network(), damping=LAM)
    state = seng.state_dict()
    with pytest.raises(ValueError, match="saved by 2 ranks and there are 1"):
        seng.load_state_dict({**state, "ranks": 2})
    with pytest.raises(ValueError, match="format None"):
        seng.load_state_dict({})
    with pytest.raises(ValueError, match="rank was 16 and is 8"):
        hvd.SENG(network(), damping=LAM, rank=8).load_state_dict(state)
    with pytest.raises(ValueError, match="layer 'x' that this model does not have"):
        seng.load_state_dict({**state, "layers": {"x": {}}})


def test_report_as_data_and_as_a_table():
    model = network(torch.float32)
    seng = hvd.SENG(model, damping=LAM, explicit_threshold=140, rank=2, row_sketch=6)
    loss_of(model, batch(0, dtype=torch.float32)).backward()
    seng.step()
    report = seng.report()
    conv = report["layers"][2]
    assert conv["kind"] == "Conv2d"
    assert {key: conv[key] for key in ("held", "n", "n_G", "n_A", "kappa", "rank", "sketch", "age",
                                       "jitter", "rho", "failures")} == {
        "held": "implicit", "n": 148, "n_G": 4, "n_A": 37, "kappa": 9, "rank": 2,
        "sketch": "all × 6", "age": 1, "jitter": 0.0, "rho": 6, "failures": 0}
    # Factors and the sampled rows of A, in float32; the rest are the small system and the rows.
    assert conv["formula_bytes"] == 4 * 2 * 6 * (4 + 37 + 6)
    assert conv["bytes"] == conv["formula_bytes"] + 2 * 8 * 36 + 6 * (8 + 4)
    assert conv["coefficient_norm"] > 0
    assert report["identity_parameters"] == 0
    assert "Conv2d" in str(report)
    assert str(148) in str(report)


def test_bad_use_says_what_to_change():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        hvd.SENG([torch.nn.Parameter(torch.ones(1))], damping=LAM)
    with pytest.raises(ValueError, match=r"no trainable layer.*register_seng_rule"):
        hvd.SENG(nn.Sequential(nn.ReLU()), damping=LAM)
    with pytest.raises(ValueError, match="at most 148"):
        hvd.SENG(network(), damping=LAM, sketch_size=1000)
    with pytest.raises(ValueError, match="damping must be"):
        hvd.SENG(network(), damping=0)
    with pytest.raises(TypeError, match="list of names"):
        hvd.SENG(network(), damping=LAM, exclude="0")
    with pytest.raises(RuntimeError, match=r"call loss\.backward\(\) before it"):
        hvd.SENG(network(), damping=LAM).step()


def test_misspelt_and_missing_arguments_name_seng():
    with pytest.raises(TypeError, match="SENG: missing a required argument: 'damping'"):
        hvd.SENG(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="SENG: got an unexpected keyword argument 'dampin'"):
        hvd.SENG(torch.nn.Linear(2, 2), damping=0.1, dampin=0.2)


def test_curvature_does_not_share_memory_with_the_layers_input():
    model = torch.nn.Linear(5, 3, bias=False)
    seng = hvd.SENG(model, damping=0.3, explicit_threshold=0, sketch=None, update_freq=10)
    x = torch.randn(1, 5)
    model(x).square().sum().backward()
    seng.step()
    (system,) = seng.state.systems.values()
    before = system.blocks[0].a.clone()
    x.zero_()
    torch.testing.assert_close(system.blocks[0].a, before)
