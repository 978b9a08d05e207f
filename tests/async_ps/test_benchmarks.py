"""The benchmarks' own parts: gradient, loaders, criterion, and the reproduction itself."""

import json
import pickle

import numpy as np
import pytest

from benchmarks import async_digits, async_speed, streaming_pca
from benchmarks.cifar10 import cifar10
from benchmarks.digits_mlp import Data, Network


def loss(network, w, rows):
    """Mean cross-entropy of one run, float64, written another way."""
    w1, b1, w2, b2 = np.split(w, network.cuts)
    hidden = network.data.train_x[rows].astype(np.float64) @ w1.reshape(-1, network.hidden) + b1
    scores = np.where(hidden > 0, hidden, 0) @ w2.reshape(network.hidden, -1) + b2
    right = scores[np.arange(len(rows)), network.data.train_y[rows]]
    return float(np.mean(np.log(np.exp(scores).sum(axis=1)) - right))


@pytest.fixture(scope="module")
def small():
    rng = np.random.default_rng(0)
    x = rng.random((60, 6)).astype(np.float32)
    y = rng.integers(0, 4, 60)
    return Data(x[:40], y[:40], x[40:], y[40:])


def test_gradient_against_differences(small):
    network = Network(small, hidden=5, batch=8, seeds=[3, 4])
    w = network.start().astype(np.float64)
    g = network.gradient(w, 7)
    for run in range(2):
        rows = network.samples(7)[run]
        for entry in range(0, network.numel, 3):
            moved = np.zeros(network.numel)
            moved[entry] = 1e-6
            slope = (loss(network, w[run] + moved, rows) - loss(network, w[run] - moved, rows)) / 2e-6
            assert g[run, entry] == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_every_epoch_shows_every_sample_at_most_once(small):
    network = Network(small, hidden=5, batch=8, seeds=[1, 2])
    assert network.batches == 5
    drawn = np.stack([network.samples(draw) for draw in range(10)])
    for run in range(2):
        assert sorted(drawn[:5, run].ravel()) == list(range(40))
        assert sorted(drawn[5:, run].ravel()) == list(range(40))
    assert (drawn[:5] != drawn[5:]).any()


def test_optimal_delay_is_the_last_before_the_error_is_lost():
    grid = [0, 5, 10, 20]
    errors = np.ones((5, 4, 3))
    errors[0, 2] = 2.1
    errors[1, 3] = 5.0
    errors[2, 1] = 1.9
    errors[3, 1] = 9.0
    assert streaming_pca.optimal_delays(grid, errors, 2.0) == {
        0.7: 5, 0.8: 10, 0.85: 20, 0.9: 0, 0.95: 20}


@pytest.mark.slow
def test_streaming_pca_reproduces_the_paper(tmp_path):
    streaming_pca.main(["--runs", "30", "--json", str(tmp_path / "out.json"),
                        "--plot", str(tmp_path / "out.png")])
    told = json.loads((tmp_path / "out.json").read_text())
    assert told["optimal_delay"] == {"0.7": 120, "0.8": 80, "0.85": 60, "0.9": 30, "0.95": 10}
    assert len(told["curves"]["0.9"]["30"]) == len(told["updates"]) == 101
    assert (tmp_path / "out.png").stat().st_size > 10_000


@pytest.mark.parametrize("measure", ["table", "lam", "momentum"])
def test_digits_benchmark_writes_what_it_found(measure, tmp_path, small, monkeypatch):
    monkeypatch.setattr(async_digits, "digits", lambda: small)
    told = async_digits.main([measure, "--seeds", "2", "--epochs", "2", "--json",
                              str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")])
    assert json.loads((tmp_path / "out.json").read_text()) == told
    assert (tmp_path / "out.png").exists()
    if measure == "table":
        assert [(row["workers"], row["method"]) for row in told["rows"][:5]] == [
            (1, "SGD"), (4, "SSGD"), (4, "ASGD"), (4, "DC-ASGD-c"), (4, "DC-ASGD-a")]


def test_a_synchronous_step_is_one_step_on_the_joined_batch(small):
    bench = async_digits.Bench(small, rates=(0.1,), seeds=1, epochs=2)
    joined = Network(small, hidden=32, batch=16, seeds=[0])
    w = bench.net.start()
    pair = (bench.net.gradient(w, 0) + bench.net.gradient(w, 1)) / 2
    np.testing.assert_allclose(pair, joined.gradient(w, 0), rtol=1e-4, atol=1e-6)


def test_kernel_measurement_has_every_rule():
    told = async_speed.kernel(100_000, 2)
    assert set(told) == {"asgd", "dc-asgd-c", "dc-asgd-a"}
    assert all(times["update"] > 0 and times["copy"] > 0 for times in told.values())


def made_cifar10(folder, seed=0):
    """Files of CIFAR-10's python format with four images each."""
    rng = np.random.default_rng(seed)
    whole = {}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        images = rng.integers(0, 256, (4, 3072)).astype(np.uint8)
        labels = rng.integers(0, 10, 4).tolist()
        entries = {b"batch_label": b"made", b"labels": labels, b"data": images,
                   b"filenames": [b"a.png"] * 4}
        (folder / name).write_bytes(pickle.dumps(entries, protocol=2))
        whole[name] = images, labels
    return whole


def test_cifar10_files_are_read(tmp_path):
    whole = made_cifar10(tmp_path)
    data = cifar10(tmp_path)
    assert data.train_x.shape == (20, 3072)
    assert data.test_x.shape == (4, 3072)
    labels = [label for i in range(1, 6) for label in whole[f"data_batch_{i}"][1]]
    assert data.train_y.tolist() == labels
    channels = data.train_x.reshape(20, 3, 1024)
    np.testing.assert_allclose(channels.mean(axis=(0, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(channels.std(axis=(0, 2)), 1, atol=1e-4)
    order = np.argsort(whole["data_batch_1"][0][0, :1024], kind="stable")
    assert (np.diff(data.train_x[0, :1024][order]) >= 0).all()
    network = Network(data, hidden=4, batch=4, seeds=[0])
    assert np.isfinite(network.gradient(network.start(), 0)).all()


def test_cifar10_says_what_is_missing_or_wrong(tmp_path):
    made_cifar10(tmp_path)
    (tmp_path / "data_batch_3").unlink()
    with pytest.raises(FileNotFoundError, match="lacks data_batch_3; unpack cifar-10-python"):
        cifar10(tmp_path)
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps({b"data": np.zeros((2, 5))}))
    with pytest.raises(ValueError, match="data_batch_3 is no CIFAR-10 batch"):
        cifar10(tmp_path)
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps(print))
    with pytest.raises(pickle.UnpicklingError, match="has no place in a CIFAR-10 batch"):
        cifar10(tmp_path)
