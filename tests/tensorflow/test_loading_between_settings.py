"""Files loaded between settings: everything is restored, or refused by name before anything is changed."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras

import hvd_ext.tensorflow.keras as hvd
from hvd_ext.tensorflow.persistence import keras_checkpoint_layout
from hvd_ext.tensorflow.variables import as_tf, is_per_rank
from tests.tensorflow import training

pytestmark = pytest.mark.distributed


def topk(**options):
    return hvd.Compression.topk(0.3, min_size=1, **options)


SETTINGS = {
    "none": lambda model: {},
    "replicated": lambda model: {"server": "replicated"},
    "rank0": lambda model: {"server": "rank0"},
    "sharded": lambda model: {"server": "sharded"},
    "reply": lambda model: {"server": hvd.Server("sharded", downlink=topk())},
    "topk": lambda model: {"compression": topk()},
    "topk_sparse": lambda model: {"compression": topk(exchange="sparse_allreduce")},
    "topk_sharded": lambda model: {"compression": topk(), "server": "sharded"},
    "delay": lambda model: {"op": hvd.DelayCompensated()},
    "powersgd": lambda model: {"compression": hvd.Compression.powersgd(1, min_compression=1.0)},
    "late": lambda model: {"overlap": hvd.DelayedUpdate()},
    "late_topk": lambda model: {"overlap": hvd.DelayedUpdate(), "compression": topk()},
    "late_delay": lambda model: {"overlap": hvd.DelayedUpdate(), "op": hvd.DelayCompensated()},
    "passes": lambda model: {"backward_passes_per_step": 2},
    "seng": lambda model: {"preconditioner": hvd.SENG(model, damping=0.5, update_freq=2)},
}
# What is missed where the optimizer that loads has no place for it.
KEPT = {"topk": {"residual"}, "topk_sparse": {"residual", "owner"}, "topk_sharded": {"residual"},
        "delay": {"mean_square"}, "powersgd": {"residual", "q_"}, "late": {"late_gradient"},
        "late_topk": {"residual", "late_gradient"}, "late_delay": {"mean_square", "late_gradient"},
        "passes": {"passes"}}
METHOD = {"topk": "topk", "topk_sparse": "topk", "topk_sharded": "topk", "late_topk": "topk",
          "delay": "delay", "late_delay": "delay", "powersgd": "powersgd"}
SERVER = {"rank0": "rank0", "sharded": "sharded", "topk_sharded": "sharded", "reply": "reply"}


def build(name):
    model = training.dense_model()
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.05, momentum=0.9), **SETTINGS[name](model))
    optimizer.build(model.trainable_variables)
    return model, optimizer


def fill(optimizer, seed):
    """Give every variable values as a training might, other ones on each rank where they are its own."""
    optimizer.iterations.assign(seed)
    for number, variable in enumerate(list(optimizer.variables)[2:]):
        if "rank_and_ranks" not in variable.path:
            own = hvd.rank() if is_per_rank(variable) else 9
            values = np.random.default_rng([seed, number, own]).integers(1, 50, tuple(variable.shape))
            variable.assign(values.astype(as_tf(variable).dtype.as_numpy_dtype))


def saved(optimizer):
    """What a file would hold, by number."""
    store = {}
    optimizer.save_own_variables(store)
    return {key: np.array(value) for key, value in store.items()}


def by_name(optimizer):
    """Values of the plain optimizer's variables, by number, and of the extensions', by name."""
    values = [np.array(as_tf(one)) for one in optimizer.variables]
    count = optimizer._hvd_ext.plain_count
    return values[:count], dict(zip(keras_checkpoint_layout.layout_of(optimizer).names, values[count:],
                                    strict=True))


def same(one, other):
    return one.shape == other.shape and one.tobytes() == other.tobytes()


def group(name):
    """The beginning of KEPT that an extension's variable goes by."""
    return next((one for kept in KEPT.values() for one in kept if name.startswith(one)), "")


def every_pair():
    """By pair: the warning or error, and whether that is right."""
    optimizers, states, held, found = {}, {}, {}, {}
    for name in SETTINGS:
        optimizer = build(name)[1]
        fill(optimizer, 3)
        optimizers[name], states[name], held[name] = optimizer, saved(optimizer), by_name(optimizer)
    for number, (here, optimizer) in enumerate(optimizers.items()):
        fill(optimizer, 10 + number)
        for there, state in states.items():
            before, raised = saved(optimizer), ""
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    optimizer.load_own_variables(state)
                except ValueError as error:
                    raised = str(error)
            if raised:
                after = saved(optimizer)
                right = all(same(before[key], after[key]) for key in before)
            else:
                (plain, own), (plain_then, own_then) = by_name(optimizer), held[there]
                right = len(plain) == len(plain_then)
                part = SERVER.get(here) != SERVER.get(there)  # the rank takes what it owns
                right &= all(same(a, b) or (part and a.shape != b.shape)
                             for a, b in zip(plain, plain_then, strict=True))
                alike = METHOD.get(here) == METHOD.get(there)
                for name, value in own.items():
                    if name in own_then and (alike or name.startswith(("late_", "passes_"))):
                        right &= same(value, own_then[name])
                    elif not name.startswith("rank_and_ranks"):
                        right &= not value.any()
            found[there, here] = raised, [str(one.message) for one in caught], bool(right)
    return found, {name: {group(key) for key, value in own.items() if value.any()} - {""}
                   for name, (_, own) in held.items()}


def test_every_pair_restores_everything_or_is_refused(ranks):
    for rank, (found, full) in enumerate(ranks(2, init="tensorflow").run(every_pair, timeout=200)):
        assert len(found) == len(SETTINGS) ** 2
        for (there, here), (raised, said, right) in found.items():
            assert right, (rank, there, here, raised)
            if SERVER.get(there) not in (None, SERVER.get(here)):
                kind = SERVER[there].replace("reply", "sharded with compressed replies")
                assert f"saved with server={kind!r}" in raised, (there, here)
                continue
            assert raised == "", (there, here)
            missed = {one for one in full[there] if one not in KEPT.get(here, ())
                      or (one in ("residual", "mean_square") and METHOD.get(here) != METHOD.get(there))}
            if rank == 1 or not missed:
                assert said == [], (there, here)
            else:
                assert len(said) == 1, (there, here, said)
                assert all(one.rstrip("_") in said[0] for one in missed), (there, here, said)
                assert "hvd.load_model" in said[0]


def through_files(folder, suffix):
    """By pair: what the warning says, and whether moments and iterations are those that were saved."""
    found = {}
    for there in ("none", "topk"):
        path = str(Path(folder) / f"{there}-{hvd.rank()}{suffix}")
        model, optimizer = build(there)
        model.compile(optimizer, "mse")
        fill(optimizer, 3)
        model.save(path)
        values = by_name(optimizer)[0]
        for here in ("none", "topk", "delay"):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                again = hvd.load_model(path, custom_objects={"mse": keras.losses.mean_squared_error},
                                       **SETTINGS[here](model))
            said = [str(one.message) for one in caught if "dropped" in str(one.message)]
            found[there, here] = said, all(map(same, by_name(again.optimizer)[0], values))
    return found


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_files_hold_what_is_common(ranks, tmp_path, suffix):
    found = ranks(2, init="tensorflow").run(through_files, str(tmp_path), suffix)[0]
    for (there, here), (said, right) in found.items():
        assert right, (there, here)
        assert len(said) == (there == "topk" != here), (there, here, said)
    said = found["topk", "none"][0][0]
    assert "saved with Compression.topk and is loaded with no extension: residual" in said


def scaled(folder, suffix):
    """The same where a LossScaleOptimizer is around both."""
    found = []
    for there, here in (("topk", "none"), ("topk", "topk"), ("none", "topk")):
        path = str(Path(folder) / f"scaled-{there}-{here}-{hvd.rank()}{suffix}")
        model = training.dense_model()
        optimizer = keras.optimizers.LossScaleOptimizer(
            hvd.DistributedOptimizer(keras.optimizers.SGD(0.05, momentum=0.9), **SETTINGS[there](model)))
        model.compile(optimizer, "mse")
        optimizer.build(model.trainable_variables)
        fill(optimizer.inner_optimizer, 3)
        optimizer.dynamic_scale.assign(128.0)
        optimizer.step_counter.assign(5)
        model.save(path)
        again = hvd.load_model(path, custom_objects={"mse": keras.losses.mean_squared_error},
                               **SETTINGS[here](model)).optimizer
        then, now = by_name(optimizer.inner_optimizer)[0], by_name(again.inner_optimizer)[0]
        found.append((float(again.dynamic_scale.numpy()), int(again.step_counter.numpy()),
                      all(map(same, then, now))))
    return found


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.filterwarnings("ignore:the optimizer was saved with")
def test_files_hold_the_scale_of_the_loss(ranks, tmp_path, suffix):
    for found in ranks(2, init="tensorflow").run(scaled, str(tmp_path), suffix):
        assert found == [(128.0, 5, True)] * 3
