"""``hvd.SENG`` gives the same directions and trajectories under Keras as under PyTorch."""

from __future__ import annotations

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")
pytest.importorskip("horovod.torch", reason="Horovod is not built for PyTorch")

import keras  # noqa: E402

import hvd_ext.tensorflow.keras as hvd  # noqa: E402
from hvd_ext.torch.seng import SENG as TorchSENG  # noqa: E402
from tests.tensorflow.seng_cases import (  # noqa: E402
    EXACT,
    IMPLICIT,
    LAM,
    Alone,
    L,
    as_torch,
    batch,
    gradient,
)

LR = 0.05


class TwiceThere(torch.nn.Module):
    """The PyTorch counterpart of a convolution that is used twice."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(2, 4, 3, padding=1)
        self.twice = torch.nn.Conv2d(4, 4, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(4, eps=1e-3)
        self.up = torch.nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.out = torch.nn.Linear(3, 2)

    def forward(self, x):
        x = torch.tanh(self.norm(torch.tanh(self.first(x))))
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        return self.out(torch.tanh(self.up(x)).mean((2, 3)))


def twice_here():
    """A functional model with a shared convolution, a batch norm and a transposed convolution."""
    keras.utils.set_random_seed(3)
    x = given = keras.Input((4, 4, 2))
    x = L.Conv2D(4, 3, padding="same", activation="tanh")(x)
    x = L.BatchNormalization()(x)
    x = L.Activation("tanh")(x)
    twice = L.Conv2D(4, 3, padding="same", activation="tanh")
    x = L.Conv2DTranspose(3, 2, strides=2, activation="tanh")(twice(twice(x)))
    return keras.Model(given, L.Dense(2)(L.GlobalAveragePooling2D()(x)))


def both():
    """The same model in both frameworks."""
    ours, theirs = twice_here(), TwiceThere()
    by_kind = {type(layer).__name__: layer for layer in ours.layers}
    convolutions = [layer for layer in ours.layers if type(layer) is L.Conv2D]
    pairs = [(theirs.first, convolutions[0]), (theirs.twice, convolutions[1]),
             (theirs.norm, by_kind["BatchNormalization"]), (theirs.up, by_kind["Conv2DTranspose"]),
             (theirs.out, by_kind["Dense"])]
    matched = []
    with torch.no_grad():
        for module, layer in pairs:
            weights = [layer.gamma, layer.beta] if module is theirs.norm else [layer.kernel, layer.bias]
            for parameter, weight in zip(module.parameters(), weights, strict=True):
                parameter.copy_(torch.from_numpy(as_torch(weight.numpy())))
                matched.append((parameter, weight))
    return ours, theirs, matched


def there_step(theirs, seng, x, y, passes=1):
    theirs.zero_grad()
    channels_first = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
    for part, wanted in zip(channels_first.chunk(passes), torch.from_numpy(y).chunk(passes), strict=True):
        torch.nn.functional.cross_entropy(theirs(part), wanted).backward()
    seng.before_reduce()
    seng.precondition()
    seng.commit()


SETTINGS = {
    "explicit": EXACT,
    "lagged": {**EXACT, "coupling": "lagged"},
    "lagged, no rows to redraw": {**EXACT, "coupling": "lagged", "sketch": "uniform", "resample": "step"},
    "subsample": {**EXACT, "subsample": 4},
    "bfloat16": {**EXACT, "curvature_dtype": "bfloat16"},
    "float64": {**EXACT, "curvature_dtype": "float64", "loss_reduction": "sum"},
    "implicit, exact": {**IMPLICIT, "rank": 2, "loss_scale": 2.0},
    "implicit, factored": {**IMPLICIT, "uc": "factored"},
    "implicit, factored, cut": {**IMPLICIT, "uc": "factored", "rank": 2},
    "implicit, bfloat16, schedule": {**IMPLICIT, "curvature_dtype": "bfloat16",
                                     "damping": lambda step: LAM / (1 + step)},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_same_trajectory_as_pytorch(settings):
    ours, theirs, matched = both()
    here, there = hvd.SENG(ours, update_freq=2, **settings), TorchSENG(theirs, update_freq=2, **settings)
    half = "bfloat16" in str(settings.get("curvature_dtype"))
    variables = ours.trainable_variables

    @tf.function
    def step(x, y):
        directions = here.precondition(gradient(ours, x, y), variables, Alone())
        for variable, direction in zip(variables, directions, strict=True):
            variable.assign_sub(LR * direction)
        return directions

    for number in range(3):
        x, y = batch((4, 4, 2), rho=6, seed=number)
        directions = dict(zip(map(id, variables), step(x, y), strict=True))
        there_step(theirs, there, x, y)
        for parameter, weight in matched:
            mine = as_torch(np.asarray(directions[id(weight)]))
            wanted = parameter.grad.numpy()
            # What rounding tells apart falls into different bfloat16 numbers now and then.
            error = np.linalg.norm(mine - wanted) / max(1.0, np.linalg.norm(wanted))
            assert error <= (2e-3 if half else 1e-5), (number, weight.path, error)
            with torch.no_grad():
                parameter.sub_(LR * parameter.grad)


def test_accumulated_passes_take_the_curvature_of_the_last():
    ours, theirs, matched = both()
    here, there = hvd.SENG(ours, **EXACT), TorchSENG(theirs, **EXACT)
    x, y = batch((4, 4, 2), rho=8)
    first = gradient(ours, x[:4], y[:4])
    here.end_pass()
    total = [one + other for one, other in zip(first, gradient(ours, x[4:], y[4:]), strict=True)]
    variables = ours.trainable_variables
    directions = dict(zip(map(id, variables), here.precondition(total, variables, Alone()), strict=True))
    there_step(theirs, there, x, y, passes=2)
    for parameter, weight in matched:
        np.testing.assert_allclose(as_torch(np.asarray(directions[id(weight)])), parameter.grad.numpy(),
                                   rtol=2e-5, atol=1e-5)


def test_same_report_as_pytorch():
    ours, theirs, _ = both()
    x, y = batch((4, 4, 2))
    settings = {**IMPLICIT, "uc": "factored", "rank": 2}
    here, there = hvd.SENG(ours, **settings), TorchSENG(theirs, **settings)
    here.precondition(gradient(ours, x, y), ours.trainable_variables, Alone())
    there_step(theirs, there, x, y)
    mine, wanted = here.report(), there.report()
    assert {key: mine[key] for key in ("step", "damping", "coupling", "ranks", "failures", "skipped",
                                       "identity_parameters", "formula_bytes")} == {
        key: wanted[key] for key in ("step", "damping", "coupling", "ranks", "failures", "skipped",
                                     "identity_parameters", "formula_bytes")}
    for one, other in zip(sorted(mine["layers"], key=lambda row: row["n"]),
                          sorted(wanted["layers"], key=lambda row: row["n"]), strict=True):
        for key in ("held", "n", "n_G", "n_A", "groups", "rho", "rank", "age", "failures", "sketch"):
            assert one[key] == other[key], (one["layer"], key)
        np.testing.assert_allclose(one["coefficient_norm"], other["coefficient_norm"], rtol=1e-4)
    assert "SENG at step 1" in str(mine)
