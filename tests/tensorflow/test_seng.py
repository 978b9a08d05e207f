"""``preconditioner=hvd.SENG`` under Keras: per-sample gradients, directions, couplings, PyTorch."""

from __future__ import annotations

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras  # noqa: E402

import hvd_ext.tensorflow.keras as hvd  # noqa: E402
from hvd_ext.tensorflow.collectives import Collectives  # noqa: E402
from tests.reference import seng as reference  # noqa: E402
from tests.tensorflow import training  # noqa: E402

L = keras.layers
LAM = 0.25
EXACT = {"damping": LAM, "sketch": None}
IMPLICIT = {**EXACT, "explicit_threshold": 0, "rank": 10**6, "uc": "exact"}


class Alone(Collectives):
    """One rank, in a process where Horovod was not initialised."""

    size, rank, elastic = 1, 0, False

    def if_many(self, communicate, alone):
        return alone()


class Shared(keras.Model):
    """A subclassed model that uses one layer twice."""

    def __init__(self):
        super().__init__()
        self.twice = L.Dense(5, activation="tanh")
        self.out = L.Dense(3)

    def call(self, x):
        return self.out(self.twice(self.twice(x)))


def sequential(shape, *layers):
    return keras.Sequential([keras.Input(shape), *layers, L.Flatten(), L.Dense(2)])


MODELS = {
    "dense": lambda: (sequential((5,), L.Dense(4, activation="tanh")), (5,)),
    "dense of sequences": lambda: (sequential((3, 5), L.Dense(4, use_bias=False)), (3, 5)),
    "conv1d": lambda: (sequential((7, 2), L.Conv1D(4, 3, strides=2, activation="relu")), (7, 2)),
    "conv2d same": lambda: (sequential((5, 5, 2), L.Conv2D(4, 3, padding="same")), (5, 5, 2)),
    "conv2d dilated": lambda: (sequential((6, 6, 2), L.Conv2D(3, 2, dilation_rate=2)), (6, 6, 2)),
    "conv2d grouped": lambda: (sequential((5, 5, 4), L.Conv2D(6, 3, groups=2)), (5, 5, 4)),
    "conv3d": lambda: (sequential((3, 3, 3, 2), L.Conv3D(2, 2)), (3, 3, 3, 2)),
    "depthwise": lambda: (sequential((5, 5, 3), L.DepthwiseConv2D(2, depth_multiplier=2)),
                          (5, 5, 3)),
    "transposed": lambda: (sequential((3, 3, 2), L.Conv2DTranspose(3, 3, strides=2)), (3, 3, 2)),
    "layer norm": lambda: (sequential((6, 4), L.LayerNormalization()), (6, 4)),
    "layer norm of two axes": lambda: (sequential((3, 4), L.LayerNormalization(axis=[1, 2])),
                                       (3, 4)),
    "group norm": lambda: (sequential((3, 3, 4), L.GroupNormalization(2)), (3, 3, 4)),
    "shared": lambda: (_built(Shared(), (5,)), (5,)),
}


def _built(model, shape):
    model(tf.zeros((1, *shape)))
    return model


def batch(shape, rho=6, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rho, *shape)).astype("float32"),
            rng.integers(0, 2, rho))


def loss_of(model, x, y):
    scores = model(x, training=True)
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)(y, scores)


def gradient(model, x, y):
    with tf.GradientTape() as tape:
        loss = loss_of(model, x, y)
    return tape.gradient(loss, model.trainable_variables)


def per_sample(model, x, y):
    """Each variable's gradient of each sample's own loss: no use of any layer's structure."""
    rows = [[g.numpy() for g in gradient(model, x[i:i + 1], y[i:i + 1])] for i in range(len(x))]
    return [np.stack(of_variable) for of_variable in zip(*rows, strict=True)]


def places(seng, variables):
    """Each layer's variables by number."""
    number = {id(v.value): k for k, v in enumerate(variables)}
    return [[number[id(w.value)] for w in state.layer.weights.values()]
            for state in seng.states]


def flat(arrays):
    return np.concatenate([np.asarray(a, np.float64).ravel() for a in arrays])


CASES = [*((case, EXACT, True) for case in MODELS),
         *((case, EXACT, False) for case in ("dense", "shared", "group norm")),
         *((case, IMPLICIT, True) for case in MODELS
           if "norm" not in case)]


@pytest.mark.parametrize(("case", "settings", "compiled"), CASES, ids=[
    f"{case}, {'implicit' if settings is IMPLICIT else 'compiled' if compiled else 'eager'}"
    for case, settings, compiled in CASES])
def test_direction_is_the_dense_solve(case, settings, compiled):
    keras.utils.set_random_seed(1)
    model, shape = MODELS[case]()
    x, y = batch(shape)
    samples = per_sample(model, x, y)
    seng = hvd.SENG(model, **settings)
    variables = model.trainable_variables

    def step(x, y):
        found = gradient(model, x, y)
        return found, seng.precondition(found, variables, Alone())

    run = tf.function(step) if compiled else step
    g, p = run(tf.constant(x), tf.constant(y))
    assert all(bool(state.ready) for state in seng.states)
    for numbers in places(seng, variables):
        us = np.concatenate([samples[k].reshape(len(x), -1) for k in numbers], axis=1)
        expected = reference.direction(reference.dense_u(us), flat([g[k] for k in numbers]), LAM)
        np.testing.assert_allclose(flat([p[k] for k in numbers]), expected, rtol=2e-4, atol=1e-5)
    seng.close()
    assert model.get_config() is not None


def test_batch_norm_takes_its_statistics_as_given():
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((4, 3)), L.BatchNormalization(), L.Flatten(), L.Dense(2)])
    x, y = batch((4, 3))
    seng = hvd.SENG(model, **EXACT)
    g = gradient(model, x, y)
    state = seng.states[0]
    # The mean of the per-sample gradients is the gradient.
    np.testing.assert_allclose(np.asarray(state.captured.u).sum(0) / len(x) ** 0.5, flat(g[:2]),
                               rtol=1e-4, atol=1e-6)


def test_between_refreshes_nothing_is_captured_and_the_curvature_stays():
    model, shape = MODELS["dense"]()
    seng = hvd.SENG(model, update_freq=3, **EXACT)
    ages, held = [], []
    for number in range(5):
        x, y = batch(shape, seed=number)
        seng.precondition(gradient(model, x, y), model.trainable_variables, Alone())
        ages.append(seng.report()["layers"][0]["age"])
        held.append(np.asarray(seng.states[0].blocks[0].u))
    assert ages == [1, 2, 3, 1, 2]
    np.testing.assert_array_equal(held[0], held[2])
    assert not np.array_equal(held[2], held[3])


def test_bad_gradient_changes_nothing():
    model, shape = MODELS["dense"]()
    seng = hvd.SENG(model, **EXACT)
    x, y = batch(shape)
    found = gradient(model, x, y)
    bad = [g * np.nan if number == 0 else g for number, g in enumerate(found)]
    result = seng.precondition(bad, model.trainable_variables, Alone())
    np.testing.assert_array_equal(result[1], found[1])
    assert int(seng.step) == 0
    assert not bool(seng.states[0].ready)
    gradient(model, x, y)
    assert bool(seng.capture.wanted)


def test_damping_may_be_a_function_of_the_step():
    model, shape = MODELS["dense"]()
    seng = hvd.SENG(model, damping=lambda step: LAM / (step + 1), sketch=None)
    x, y = batch(shape)
    for lam in (LAM, LAM / 2):
        found = gradient(model, x, y)
        p = seng.precondition(found, model.trainable_variables, Alone())
        u = np.asarray(seng.states[0].blocks[0].u, np.float64).T
        expected = reference.direction(u, flat(found[:2]), lam)
        np.testing.assert_allclose(flat(p[:2]), expected, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("sketch", ["uniform", "leverage"])
def test_sketched_direction(sketch):
    model, shape = MODELS["conv2d same"]()
    seng = hvd.SENG(model, damping=LAM, sketch=sketch, sketch_size=40)
    x, y = batch(shape)
    found = gradient(model, x, y)
    p = seng.precondition(found, model.trainable_variables, Alone())
    state = seng.states[0]
    omega = np.zeros((40, state.layer.n))
    omega[np.arange(40), np.asarray(state.blocks[0].rows)] = np.asarray(state.blocks[0].weights)
    expected = reference.sketched_direction(np.asarray(state.blocks[0].u, np.float64).T, flat(found[:2]),
                                            LAM, omega)
    np.testing.assert_allclose(flat(p[:2]), expected, rtol=1e-3, atol=1e-4)


def u_of(state):
    """U (n, rho) that a layer's curvature stands for."""
    parts = []
    for block in state.blocks:
        if hasattr(block, "u"):
            parts.append(np.asarray(block.u, np.float64))
            continue
        u = np.einsum("gori,gari->iago", np.asarray(block.g, np.float64), np.asarray(block.a))
        parts += [part.reshape(len(u), -1) for part in (u[:, :block.width], u[:, block.width:])]
    return np.concatenate(parts, axis=1).T


def steps_on_ranks(coupling, settings):
    """Local U and gradient, and the direction, of each step of each layer on this rank."""
    keras.utils.set_random_seed(1)
    model, shape = MODELS["conv2d same"]()
    seng = hvd.SENG(model, coupling=coupling, update_freq=2, **settings)
    variables, collectives = model.trainable_variables, Collectives()
    seen = []

    @tf.function(reduce_retracing=True)
    def step(x, y):
        found = gradient(model, x, y)
        mean = [collectives.allreduce(g, f"g{k}") for k, g in enumerate(found)]
        return mean, seng.precondition(mean, variables, collectives)

    for number in range(4):
        x, y = batch(shape, rho=4, seed=10 * hvd.rank() + number)
        mean, p = step(tf.constant(x), tf.constant(y))
        seen.append([([u_of(state)], flat([mean[k] for k in numbers]),
                      flat([p[k] for k in numbers]))
                     for state, numbers in zip(seng.states, places(seng, variables), strict=True)])
    return seen


@pytest.mark.ranks
@pytest.mark.parametrize("settings", [EXACT, IMPLICIT], ids=["explicit", "implicit"])
@pytest.mark.parametrize("coupling", ["block", "lagged", "full"])
def test_couplings_are_their_equations(ranks, coupling, settings):
    everyone = ranks(2, init="tensorflow").run(steps_on_ranks, coupling, settings, timeout=150)
    before = {}
    for step, together in enumerate(zip(*everyone, strict=True)):
        for layer in range(len(together[0])):
            us = [rank[layer][0][0] for rank in together]
            g = together[0][layer][1]
            if coupling == "full":
                expected = reference.joint_direction(us, g, LAM)
            else:
                lagged = before.get(layer) if coupling == "lagged" else None
                expected = reference.block_direction(us, g, LAM, lagged)
            before[layer] = g
            for rank in together:
                np.testing.assert_allclose(rank[layer][2], expected, rtol=3e-4, atol=2e-5,
                                           err_msg=f"step {step}, layer {layer}")


def fit_on_ranks(how):
    model = training.dense_model()
    seng = hvd.SENG(model, damping=0.5, update_freq=2, sketch=None, coupling="full")
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=0.9),
                                         preconditioner=seng)
    training.fit(model, optimizer, hvd.rank(), hvd.size(), **how)
    hvd.assert_replicas_equal(model, optimizer=optimizer)
    assert seng.report()["layers"][0]["failures"] == 0
    return training.weights(model)


@pytest.mark.ranks
@pytest.mark.parametrize("how", [{}, {"run_eagerly": True}], ids=str)
def test_fit_with_full_coupling_equals_one_process(ranks, how):
    by_rank = ranks(2, init="tensorflow").run(fit_on_ranks, how, timeout=150)
    model = training.dense_model()
    seng = hvd.SENG(model, damping=0.5, update_freq=2, sketch=None)

    class Preconditioned(keras.optimizers.SGD):
        def _clip_gradients(self, grads):
            return seng.precondition(grads, model.trainable_variables, Alone())

    training.fit_joined(model, Preconditioned(0.1, momentum=0.9), 2)
    for rank in by_rank:
        for mine, first, one in zip(rank, by_rank[0], training.weights(model), strict=True):
            np.testing.assert_array_equal(mine, first)
            np.testing.assert_allclose(mine, one, rtol=1e-4, atol=1e-5)


SETTINGS = {
    "explicit": EXACT,
    "implicit, exact": {**IMPLICIT, "rank": 2},
    "implicit, factored": {**IMPLICIT, "uc": "factored"},
    "implicit, factored, cut": {**IMPLICIT, "uc": "factored", "rank": 2},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_same_direction_as_pytorch(settings):
    torch = pytest.importorskip("torch")
    from hvd_ext.torch.seng import SENG as TorchSENG

    ours = keras.Sequential([keras.Input((5, 5, 2)), L.Conv2D(4, 3, padding="same"),
                             L.Activation("tanh"), L.Conv2D(3, 2), L.GlobalAveragePooling2D(),
                             L.Dense(6, activation="tanh"), L.Dense(2)])
    theirs = torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3, padding=1), torch.nn.Tanh(), torch.nn.Conv2d(4, 3, 2),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 6),
        torch.nn.Tanh(), torch.nn.Linear(6, 2))
    with torch.no_grad():
        for target, weight in zip(theirs.parameters(), ours.get_weights(), strict=True):
            target.copy_(torch.from_numpy(as_torch(weight)))
    x, y = batch((5, 5, 2))
    there = TorchSENG(theirs, **settings)
    channels_first = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
    torch.nn.functional.cross_entropy(theirs(channels_first), torch.from_numpy(y)).backward()
    there.before_reduce()
    there.precondition()
    p = hvd.SENG(ours, **settings).precondition(gradient(ours, x, y), ours.trainable_variables,
                                                Alone())
    for mine, parameter in zip(p, theirs.parameters(), strict=True):
        np.testing.assert_allclose(as_torch(np.asarray(mine)), parameter.grad.numpy(), rtol=2e-5,
                                   atol=1e-5)


def as_torch(weight):
    """A kernel in PyTorch's layout."""
    order = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}[weight.ndim]
    return np.ascontiguousarray(weight.transpose(order))


def test_bad_input():
    dense = MODELS["dense"]
    with pytest.raises(ValueError, match="no weights yet"):
        hvd.SENG(keras.Sequential([L.Dense(2)]), damping=1.0)
    with pytest.raises(ValueError, match="no trainable layer"), pytest.warns(match="Embedding"):
        hvd.SENG(keras.Sequential([keras.Input((3,)), L.Embedding(4, 2)]), damping=1.0)
    with pytest.raises(ValueError, match="damping"):
        hvd.SENG(dense()[0], damping=0.0)
    with pytest.raises(ValueError, match="sketch_size"):
        hvd.SENG(dense()[0], damping=1.0, sketch_size=10**6)
    model = dense()[0]
    seng = hvd.SENG(model, damping=1.0)
    with pytest.raises(ValueError, match="tapped already"):
        hvd.SENG(model, damping=1.0)
    seng.close()
    hvd.SENG(model, damping=1.0).close()
    with pytest.raises(TypeError, match="preconditioner must be"):
        hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), preconditioner="seng")
