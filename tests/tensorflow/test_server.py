"""``server="rank0"`` and ``"sharded"``: one trajectory, state only at owners, checkpoints, failures."""

from __future__ import annotations

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")
pytest.importorskip("torch", reason="the shared problems need PyTorch")

import keras  # noqa: E402

import hvd_ext.tensorflow.keras as hvd  # noqa: E402
from tests.tensorflow import synthetic_steps, training  # noqa: E402

SERVERS = ("rank0", "sharded", "replicated")
WEIGHTS = 5 * 8 + 8 + 8 * 3 + 3  # of training.dense_model()
OPTIMIZERS = {
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "clipped and accumulated": lambda: keras.optimizers.Adam(
        0.01, global_clipnorm=0.1, gradient_accumulation_steps=2),
    "averages": lambda: keras.optimizers.SGD(
        0.1, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=5),
}


def trained(server, names):
    """Weights by optimizer, how many numbers of state this rank keeps, and what it reports."""
    found = {}
    for name in names:
        optimizer = hvd.DistributedOptimizer(OPTIMIZERS[name](), server=server)
        model = training.fit(training.dense_model(), optimizer, hvd.rank(), hvd.size(),
                             callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0),
                                        hvd.callbacks.AssertReplicasEqualCallback(2)])
        state = sum(int(np.prod(v.shape)) for v in optimizer.variables if len(v.shape) > 0)
        found[name] = training.weights(model), state - 2, optimizer.report()["server"]  # - the stamp
    return found


@pytest.mark.distributed
@pytest.mark.parametrize(("size", "names"), [
    (2, tuple(OPTIMIZERS)), pytest.param(4, ("momentum", "averages"), marks=pytest.mark.extended)])
def test_same_trajectory_with_state_only_at_the_owner(ranks, size, names):
    one = {name: training.weights(training.fit_joined(training.dense_model(), OPTIMIZERS[name](), size))
           for name in names}
    for server in ("rank0", "sharded"):
        by_rank = ranks(size, init="tensorflow").run(trained, server, names, timeout=200)
        for name in names:
            for rank in by_rank:
                for mine, first, reference in zip(rank[name][0], by_rank[0][name][0], one[name],
                                                  strict=True):
                    np.testing.assert_array_equal(mine, first)
                    np.testing.assert_allclose(mine, reference, rtol=1e-5, atol=1e-5)
        check_shares(by_rank, server, size)


def check_shares(by_rank, server, size):
    """State only where it is owned, in balanced parts."""
    reports = [rank["momentum"][2] for rank in by_rank]
    assert [rank["momentum"][1] for rank in by_rank] == [r["owned_elements"] for r in reports]
    assert [4 * r["owned_elements"] for r in reports] == [r["state_bytes"] for r in reports]
    assert sum(r["owned_elements"] for r in reports) == WEIGHTS
    if server == "rank0":
        assert reports[0]["owned_elements"] == WEIGHTS
    else:
        assert reports[0]["largest_share"] <= WEIGHTS / size + 5 * 8
        # Tensors of less than 128 elements are not cut: of four ranks one may have nothing.
        assert sum(r["owned_elements"] > 0 for r in reports) >= min(size, 3)


SHAPES = [(200, 100), (37, 11), (), (50,), (0, 3)]  # the first is sent alone, the others packed


def spoil(step, gradients):
    """A bad gradient on the last rank in one step."""
    bad = step == 2 and hvd.rank() == hvd.size() - 1
    return [one * np.inf if bad else one for one in gradients]


def with_topk():
    """Steps of AMSGrad behind TopK, a bad gradient in one of them; some weights stay on their rank."""
    found = {}
    for server in SERVERS:
        variables = synthetic_steps.make_variables(SHAPES)
        for compiled in (True, False):
            optimizer = hvd.DistributedOptimizer(
                hvd.AMSGrad(0.01), compression=hvd.Compression.topk(0.1, min_size=10), server=server)
            synthetic_steps.run_steps(optimizer, variables, hvd.rank(), 4, compiled=compiled, change=spoil)
            hvd.assert_replicas_equal(variables, optimizer=optimizer)
            report = optimizer.report()
            assert (report["steps"], report["skipped_steps"]) == (3, 1)
            assert int(optimizer.iterations) == 3
        found[server] = synthetic_steps.flat(variables), report
    local = synthetic_steps.make_variables([(3,), (4,)])
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), server="sharded")
    optimizer.register_local_var(local[0])
    synthetic_steps.run_steps(optimizer, local, hvd.rank(), 2, compiled=True)
    return found, [v.numpy() for v in local]


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.extended)])
def test_topk_and_amsgrad_behind_each_server(ranks, size):
    by_rank = ranks(size, init="tensorflow").run(with_topk, timeout=200)
    total = sum(int(np.prod(shape)) for shape in SHAPES)
    for found, _ in by_rank:
        for server in SERVERS:
            np.testing.assert_array_equal(found[server][0], by_rank[0][0]["replicated"][0])
    for server in ("rank0", "sharded"):
        moved = [(found[server][1]["sent"].get("weights", 0),
                  found[server][1]["received"].get("weights", 0)) for found, _ in by_rank]
        words = total + (1 if server == "rank0" else size)  # one status word a rank that sends
        assert sum(sent for sent, _ in moved) == sum(got for _, got in moved) == 4 * (size - 1) * words
    assert by_rank[0][0]["replicated"][1]["server"]["owned_elements"] == total
    for _, local in by_rank:
        np.testing.assert_array_equal(local[1], by_rank[0][1][1])
    assert not np.array_equal(by_rank[0][1][0], by_rank[1][1][0])


CHECKPOINTS = {
    "adam": lambda: keras.optimizers.Adam(0.01),
    "accumulated": lambda: keras.optimizers.SGD(  # saved after 2 of 5 steps
        0.1, momentum=0.9, gradient_accumulation_steps=5, use_ema=True, ema_momentum=0.5),
}


def save_each(folder):
    """Train and save under each server; the weights six steps later."""
    found = {}
    for name, make in CHECKPOINTS.items():
        for server in SERVERS:
            optimizer = hvd.DistributedOptimizer(make(), server=server)
            model = training.fit(training.dense_model(), optimizer, hvd.rank(), hvd.size())
            hvd.save_model(model, f"{folder}/{name}-{server}.keras")
            if (name, server) == ("adam", "sharded"):
                with pytest.raises(FileNotFoundError if hvd.rank() == 0 else RuntimeError):
                    hvd.save_model(model, f"{folder}/nowhere/model.keras")
                own_files(model, folder)
            training.fit(model, optimizer, hvd.rank(), hvd.size(), epochs=1)
            found[name, server] = training.weights(model)
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=0.9),
                                         compression=hvd.Compression.topk(0.5, min_size=0))
    model = training.fit(training.dense_model(), optimizer, hvd.rank(), hvd.size())
    with pytest.raises(ValueError, match="TopK keeps state that belongs to each rank"):
        hvd.save_model(model, f"{folder}/topk.keras")
    hvd.save_model(model, f"{folder}/topk.keras", reset_per_rank_state=True)
    return found


def own_files(model, folder):
    """``model.save`` writes what a rank keeps, and loads there only."""
    rank = hvd.rank()
    model.save(f"{folder}/own{rank}.keras")
    hvd.allreduce([0.0], name="saved")
    again = hvd.load_model(f"{folder}/own{rank}.keras", server="sharded")
    for mine, saved in zip(again.optimizer.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(np.array(mine), np.array(saved))
    with pytest.raises(ValueError, match=rf"this is rank {rank} of 2: .* hvd\.save_model"):
        hvd.load_model(f"{folder}/own{1 - rank}.keras", server="sharded")
    with pytest.raises(ValueError, match=r"with hvd\.save_model, which loads under every"):
        hvd.load_model(f"{folder}/own{rank}.keras", compression=hvd.Compression.topk(0.5))


def load_each(folder, names, saved, loaded):
    found = {}
    for name in names:
        for a in saved:
            for b in loaded:
                model = hvd.load_model(f"{folder}/{name}-{a}.keras", server=b)
                training.fit(model, model.optimizer, hvd.rank(), hvd.size(), epochs=1)
                hvd.assert_replicas_equal(model, optimizer=model.optimizer)
                found[name, a, b] = training.weights(model)
    return found


def load_elsewhere(folder):
    """A file of one rank's TopK under TopK anew; one of two ranks on four."""
    model = hvd.load_model(f"{folder}/topk.keras", compression=hvd.Compression.topk(0.5, min_size=0),
                           server="sharded")
    assert model.optimizer.report()["steps"] == 0
    training.fit(model, model.optimizer, hvd.rank(), hvd.size(), epochs=1)
    hvd.assert_replicas_equal(model, optimizer=model.optimizer)
    return load_each(folder, ["adam"], ["sharded"], ["rank0", "sharded"])


@pytest.mark.distributed
@pytest.mark.extended
def test_one_file_loads_under_every_server_and_number_of_ranks(ranks, tmp_path):
    folder = str(tmp_path)
    saves = ranks(2, init="tensorflow").run(save_each, folder, timeout=200)
    loads = ranks(2, init="tensorflow").run(load_each, folder, list(CHECKPOINTS), ["sharded"],
                                            list(SERVERS), timeout=200)
    loads = [{**one, **more} for one, more in zip(loads, ranks(2, init="tensorflow").run(
        load_each, folder, ["adam"], ["rank0", "replicated"], ["sharded"]), strict=True)]
    for found in loads:
        for (name, a, _), weights in found.items():
            for mine, straight in zip(weights, saves[0][name, a], strict=True):
                if name == "adam":
                    np.testing.assert_array_equal(mine, straight)
                np.testing.assert_allclose(mine, straight, rtol=1e-5, atol=1e-6)
    plain = {name: keras.models.load_model(f"{folder}/{name}-sharded.keras") for name in CHECKPOINTS}
    for name, model in plain.items():  # without this package, on the joined batches
        assert type(model.optimizer) is type(CHECKPOINTS[name]())
        training.fit_joined(model, model.optimizer, 2, epochs=1)
        for mine, straight in zip(training.weights(model), saves[0][name, "sharded"], strict=True):
            np.testing.assert_allclose(mine, straight, rtol=1e-5, atol=1e-5)
    four = keras.models.load_model(f"{folder}/adam-sharded.keras")
    training.fit_joined(four, four.optimizer, 4, epochs=1)
    for found in ranks(4, init="tensorflow").run(load_elsewhere, folder, timeout=200):
        for weights in found.values():
            for mine, one in zip(weights, training.weights(four), strict=True):
                np.testing.assert_allclose(mine, one, rtol=1e-5, atol=1e-5)


class Breaking(keras.optimizers.SGD):
    broken = False

    def update_step(self, gradient, variable, learning_rate):
        if self.broken:
            raise ArithmeticError("planted")
        super().update_step(gradient, variable, learning_rate)


def failing(server, where):
    """The update fails on one rank: what each rank is told, in eager mode and in a traced step."""
    said = []
    for compiled in (False, True):
        variables = synthetic_steps.make_variables(SHAPES)
        optimizer = hvd.DistributedOptimizer(Breaking(0.1), server=server)
        synthetic_steps.run_steps(optimizer, variables, hvd.rank(), 1, compiled=compiled)
        optimizer.broken = hvd.rank() == where
        try:
            synthetic_steps.run_steps(optimizer, variables, hvd.rank(), 1, compiled=compiled)
            said.append("no error")
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
        optimizer.broken = False
        synthetic_steps.run_steps(optimizer, variables, hvd.rank(), 1, compiled=compiled)
    return said


@pytest.mark.distributed
@pytest.mark.parametrize(("server", "where"), [("rank0", 0), ("sharded", 1)])
def test_an_update_that_fails_fails_everywhere(ranks, server, where):
    by_rank = ranks(2, init="tensorflow").run(failing, server, where)
    assert by_rank[where][0] == "ArithmeticError: planted"
    assert f"the update failed on rank {where}" in by_rank[1 - where][0]
    for rank, said in enumerate(by_rank):
        assert said[1].startswith("InvalidArgumentError")
        assert "the update failed on a rank" in said[1]
        assert ("Here: ArithmeticError: planted" in said[1]) == (rank == where)


def test_bad_input():
    sgd = keras.optimizers.SGD
    with pytest.raises(ValueError, match="server must be one of"):
        hvd.DistributedOptimizer(sgd(0.1), server="rank1")
    built = sgd(0.1)
    built.build([tf.Variable(1.0)])
    with pytest.raises(ValueError, match="state already"):
        hvd.DistributedOptimizer(built, server="sharded")
    with pytest.raises(NotImplementedError, match="way of its own"):
        hvd.DistributedOptimizer(training.OPTIMIZERS["multi"](), server="rank0")
    assert hvd.DistributedOptimizer(sgd(0.1), server="replicated")._hvd_ext.server is None
