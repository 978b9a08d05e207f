"""Compressed replies of a server: equal to the oracle, the same on all ranks, saved and loaded."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras  # noqa: E402

import hvd_ext.tensorflow.keras as hvd  # noqa: E402
from hvd_ext.reducers.topk import keep_count  # noqa: E402
from tests.reference import replies as oracle  # noqa: E402
from tests.tensorflow import training  # noqa: E402

SHAPES = [(40, 30), (7,), (33, 21), (2, 3, 5), (600,), ()]
STEPS, LR, MU = 10, 0.125, 0.5  # float32 holds them as they are


def topk(ratio=0.1, **more):
    return hvd.Compression.topk(ratio, **{"min_size": 20, "values": "float64", **more})


@pytest.mark.parametrize(("reply", "optimizer", "said"), [
    (topk(lambda step: 0.1), keras.optimizers.SGD(), "ratio is a function of the step"),
    (topk(), keras.optimizers.SGD(use_ema=True), "use_ema=True"),
])
def test_what_only_pytorch_has_is_refused(reply, optimizer, said):
    with pytest.raises(NotImplementedError, match=said):
        hvd.DistributedOptimizer(optimizer, server=hvd.Server("sharded", downlink=reply))


# The trajectory

def targets(worker, step):
    rng = np.random.default_rng([3, worker, step])
    return [np.asarray(rng.standard_normal(shape)) for shape in SHAPES]


def flat(arrays):
    return np.concatenate([np.ravel(np.array(one, np.float64)) for one in arrays])


def gradient(weights, worker, step):
    return weights - flat(targets(worker, step))


def made_variables(dtype="float64"):
    rng = np.random.default_rng(0)
    return [keras.Variable(rng.standard_normal(shape), dtype=dtype, name=f"p{number}")
            for number, shape in enumerate(SHAPES)]


def made_optimizer(server, compression=None, **options):
    more = {} if compression is None else {"compression": compression}
    return hvd.DistributedOptimizer(keras.optimizers.SGD(LR, momentum=MU, **options), server=server,
                                    name=f"replies{STEPS}", **more)


def bits(arrays):
    return b"".join(np.array(one).tobytes() for one in arrays)


def case(server, compression, dtype, eager, options):
    variables = made_variables(dtype)
    optimizer = made_optimizer(server, compression, **options)
    optimizer.build(variables)

    def step(given):
        optimizer.apply([one - tf.cast(target, dtype) for one, target in zip(variables, given, strict=True)],
                        variables)

    run = step if eager else tf.function(step, autograph=False)
    for number in range(STEPS):
        run([tf.constant(one) for one in targets(hvd.rank(), number)])
    held = bits(variables)
    with optimizer.exact_weights():
        exact, exact_bits = flat(variables), bits(variables)
    return {"held": flat(variables), "bits": held, "exact": exact, "exact_bits": exact_bits,
            "unchanged": held == bits(variables), "places": places(optimizer), "report": optimizer.report()}


def places(optimizer):
    """Positions in the flat weights that each owner chooses among, and of those that are sent whole."""
    replies = optimizer._hvd_ext.server.replies
    starts = np.cumsum([0, *(int(np.prod(shape)) for shape in SHAPES)])
    parts, every = [], np.arange(starts[-1])
    for bucket in () if replies is None else replies.buckets:
        numbers = [int(replies.variables[slot.index].name[1:]) for slot in bucket.slots]
        parts.append(np.concatenate([every[starts[n]:starts[n + 1]] for n in numbers]))
    return parts, np.setdiff1d(every, np.concatenate([np.zeros(0, np.int64), *parts]))


def trajectories(cases):
    return {name: case(hvd.Server(kind, downlink=reply), *more) for name,
            (kind, reply, *more) in cases.items()}


TOPK = topk(0.05, min_size=1)
CASES = {
    "sharded": ("sharded", topk(), None, "float64", False, {}),
    "rank0, TopK gradients, eager": ("rank0", topk(), TOPK, "float64", True, {}),
    "by tensor": ("sharded", topk(per_tensor=True), TOPK, "float64", False, {}),
    "excluded": ("rank0", topk(exclude=["p0"]), None, "float64", False, {}),
    "fp16": ("sharded", hvd.Compression.fp16, None, "float64", False, {}),
}
OTHERS = {
    "sampled": ("sharded", topk(0.2, selection="sampled"), TOPK, "float32", False, {}),
    "half precision": ("rank0", topk(values="float32"), None, "bfloat16", False, {}),
}
EQUAL = {f"{kind}, {options}": (kind, topk(1.0), None, "float32", False, options)
         for kind in ("sharded", "rank0") for options in ({}, {"weight_decay": 0.25}, {"clipnorm": 0.5})}


def expected(name, found):
    """The oracle's w and w^."""
    _, reply, compression, *_ = CASES[name]
    w0 = flat(made_variables())
    parts, whole = found["places"]
    if reply is hvd.Compression.fp16:
        sent = oracle.half_reply
    else:
        if reply.per_tensor:
            tensor = np.repeat(np.arange(len(SHAPES)), [int(np.prod(shape)) for shape in SHAPES])
            parts = [part[tensor[part] == one] for part in parts for one in range(len(SHAPES))]
        sent = oracle.topk_reply(parts, whole, lambda numel: keep_count(numel, reply.ratio))
    keep = keep_count(len(w0), compression.ratio) if compression is not None else None
    return oracle.train(gradient, w0, oracle.momentum(LR, MU), sent, workers=2, steps=STEPS, keep=keep)


@pytest.mark.distributed
def test_trajectory_is_the_oracles_and_ratio_1_is_the_server_without_a_reply(ranks):
    without = {f"{name}, without": (kind, None, *more) for name, (kind, _, *more) in EQUAL.items()}
    everyone = ranks(2, init="tensorflow").run(
        trajectories, {**CASES, **OTHERS, **EQUAL, **without}, timeout=200)
    for name, first in everyone[0].items():
        for one in everyone:
            assert (one[name]["bits"], one[name]["exact_bits"]) == (first["bits"], first["exact_bits"]), name
            assert one[name]["unchanged"], name
    for name in CASES:
        first = everyone[0][name]
        w, held = expected(name, first)
        np.testing.assert_allclose(first["exact"], w, rtol=1e-9, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(first["held"], held, rtol=1e-9, atol=1e-12, err_msg=name)
        error = math.hypot(*(one[name]["report"]["server"]["downlink"]["error_norm"] for one in everyone))
        assert error == pytest.approx(np.linalg.norm(w - held), rel=1e-6), name
        assert np.linalg.norm(w - held) > 0
        reply = everyone[0][name]["report"]
        assert 0 < reply["server"]["downlink"]["bytes_sent"] <= reply["sent"]["weights"]
    for name in EQUAL:
        np.testing.assert_allclose(everyone[0][name]["held"], everyone[0][f"{name}, without"]["held"],
                                   rtol=2e-5, atol=2e-6, err_msg=name)


# What is wrong

def broken(what):
    variables = made_variables("float32")
    ratio = 0.1 + 0.1 * (hvd.rank() if what == "other replies" else 0)
    optimizer = made_optimizer(hvd.Server("sharded", downlink=topk(ratio)))
    if what == "a constraint":
        variables[0].constraint = keras.constraints.NonNeg()
    try:
        optimizer.build(variables)
        gradients = [np.ones(shape, "float32") for shape in SHAPES]
        if what == "not finite":
            gradients[0][0, 0] = np.inf
        optimizer.apply([tf.constant(one) for one in gradients], variables)
    except Exception as error:
        return f"{type(error).__name__}: {error}", bits(variables[:1] + variables[2:5])
    return None, bits(variables)


@pytest.mark.distributed
def test_what_is_wrong_is_an_error_on_all_ranks(ranks):
    for what, said in (("other replies", "ratio=0.2"), ("not finite", "the update failed on rank"),
                       ("a constraint", "NotImplementedError: downlink= with a constraint on p0")):
        found = ranks(2, init="tensorflow").run(broken, what)
        assert all(error is not None and said in error for error, _ in found), found[0][0]
        assert found[0][1] == found[1][1]


# Checkpoints

def fitted(model, epochs=1):
    x, y = training.data()
    model.fit(x[hvd.rank()::2], y[hvd.rank()::2], batch_size=8, epochs=epochs, shuffle=False, verbose=0)


def compiled(server):
    model, rng = training.dense_model(), np.random.default_rng(5)
    model.set_weights([rng.standard_normal(weight.shape) for weight in model.get_weights()])
    model.compile(hvd.DistributedOptimizer(keras.optimizers.Adam(0.01), server=server,
                                           compression=hvd.Compression.topk(0.3, min_size=1)), "mse")
    return model


def both_weights(model):
    held = bits(model.get_weights())
    with model.optimizer.exact_weights():
        return held, bits(model.get_weights())


def saved_and_gone_on(server, folder):
    model = compiled(server)
    fitted(model)
    hvd.save_checkpoint(folder, 5, model=model, optimizer=model.optimizer)
    path = f"{folder}/model.keras"
    hvd.save_model(model, path, reset_per_rank_state=True)
    then = both_weights(model)
    fitted(model)
    end = both_weights(model)
    again = compiled(server)
    fitted(again, 2)
    assert hvd.load_checkpoint(folder, model=again, optimizer=again.optimizer).step == 5
    at_once = both_weights(again)
    fitted(again)
    plain = bits(keras.models.load_model(path).get_weights())
    without = compiled("sharded")
    without.optimizer.build(without.trainable_variables)
    hvd.load_checkpoint(folder, model=without, optimizer=without.optimizer, reset_per_rank_state=True)
    with np.load(Path(folder) / "update-000000000005" / "model.npz") as file:
        exact = bits([file[f"model/{n}"] for n in range(len(model.variables))])
    return then, end, at_once, both_weights(again), plain, bits(without.get_weights()), exact


@pytest.mark.distributed
def test_checkpoints_go_on_bit_for_bit(ranks):
    for server in (hvd.Server("sharded", downlink=topk(0.2, min_size=1)),
                   hvd.Server("rank0", downlink=hvd.Compression.fp16)):
        with tempfile.TemporaryDirectory() as folder:
            for then, end, at_once, later, plain, without, exact in ranks(2, init="tensorflow").run(
                    saved_and_gone_on, server, folder, timeout=120):
                assert then[0] != then[1]
                assert (at_once, later) == (then, end)
                assert plain == without == exact == then[1]  # the model of a checkpoint is w
