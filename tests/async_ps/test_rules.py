"""The rules and the delay engine against the float64 oracle."""

import numpy as np
import pytest

from hvd_ext.reducers.delay_compensation.engine import replay
from hvd_ext.reducers.delay_compensation.momentum import AutoMomentum, momentum_for_delay
from hvd_ext.reducers.delay_compensation.sequences import Constant, Geometric, Recorded, Simulated, Uniform
from hvd_ext.reducers.delay_compensation.update_rules import (
    BLOCK_NUMEL,
    AsyncRule,
    apply_in_blocks,
    apply_update,
)
from tests.reference.async_sgd import trajectory

N = 7
CURVATURE = np.random.default_rng(1).normal(size=(N, N))
CURVATURE = CURVATURE @ CURVATURE.T / N + np.eye(N)
NOISE = np.random.default_rng(2).normal(size=(400, N))
START = np.random.default_rng(3).normal(size=N)
RULES = [
    AsyncRule(name="asgd"),
    AsyncRule(name="dc-asgd-c", lam=0.5),
    AsyncRule(name="dc-asgd-a"),
    AsyncRule(name="dc-asgd-a", lam=1.5, decay=0.0),
]


def gradient(w, k):
    """Of a noisy quadratic, in w's dtype; w is (n,) or (R, n)."""
    return (w @ CURVATURE.astype(w.dtype) + NOISE[k % 400].astype(w.dtype)).astype(w.dtype)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.name}-{rule.decay}")
@pytest.mark.parametrize("momentum", [0.0, 0.7])
@pytest.mark.parametrize("delays", [Constant(3), Uniform(0, 6, seed=4), Simulated(5, 0.4)],
                         ids=["constant", "uniform", "simulated"])
def test_engine_follows_the_formulas(rule, momentum, delays):
    steps = 60
    expected = trajectory(
        gradient, START, delays.take(steps), lr=0.03, momentum=momentum, rule=rule.name,
        lam=rule.lam, decay=rule.decay, senders=delays.workers(steps),
    )
    seen = replay(gradient, START, steps=steps, delays=delays, lr=0.03, momentum=momentum,
                  rule=rule, observe=lambda w, k: w.copy())
    np.testing.assert_allclose(np.stack(seen.observed), expected, rtol=1e-11, atol=1e-12)
    single = replay(gradient, START.astype(np.float32), steps=steps, delays=delays, lr=0.03,
                    momentum=momentum, rule=rule)
    assert single.weights.dtype == np.float32
    np.testing.assert_allclose(single.weights, expected[-1], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["asgd", "dc-asgd-c", "dc-asgd-a"])
def test_no_delay_is_sequential_sgd_bit_for_bit(name, dtype):
    w = START.astype(dtype)
    for k in range(50):
        w = w - gradient(w, k) * dtype(0.05)
    run = replay(gradient, START.astype(dtype), steps=50, lr=dtype(0.05), rule=AsyncRule(name=name))
    np.testing.assert_array_equal(run.weights, w)


@pytest.mark.parametrize("name", ["dc-asgd-c", "dc-asgd-a"])
def test_lam_zero_is_asgd(name):
    plain, zero = (
        replay(gradient, START, steps=50, delays=4, lr=0.02, momentum=0.5, rule=rule).weights
        for rule in (AsyncRule(name="asgd"), AsyncRule(name=name, lam=0.0))
    )
    np.testing.assert_array_equal(plain, zero)


def test_repetitions_equal_single_runs():
    sequences = [Uniform(0, 5, seed=s) for s in range(4)]
    momentum = np.array([0.0, 0.3, 0.6, 0.9])
    starts = np.stack([START * (r + 1) for r in range(4)])
    rule = AsyncRule(name="dc-asgd-c", lam=0.2)
    together = replay(gradient, starts, steps=40, delays=sequences, lr=0.02,
                      momentum=momentum[:, None], rule=rule)
    for r in range(4):
        alone = replay(gradient, starts[r], steps=40, delays=sequences[r], lr=0.02,
                       momentum=float(momentum[r]), rule=rule)
        np.testing.assert_allclose(together.weights[r], alone.weights, rtol=1e-13)
        np.testing.assert_array_equal(together.delays[:, r], alone.delays)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.name}-{rule.decay}")
@pytest.mark.parametrize("momentum", [None, 0.6])
def test_blocks_equal_one_pass_bit_for_bit(rule, momentum):
    rng = np.random.default_rng(5)
    n = 2 * BLOCK_NUMEL + 17
    w, g, bak, velocity = (rng.normal(size=n).astype(np.float32) for _ in range(4))
    mean_square = rng.random(n).astype(np.float32)
    one = [array.copy() for array in (w, bak, mean_square, velocity)]
    two = [array.copy() for array in (w, bak, mean_square, velocity)]
    moving = momentum is not None
    apply_update(rule, one[0], g, lr=0.1, momentum=momentum or 0.0, w_bak=one[1],
                 mean_square=one[2], velocity=one[3] if moving else None,
                 work=(np.empty_like(w), np.empty_like(w)))
    apply_in_blocks(rule, two[0], g, lr=0.1, momentum=momentum or 0.0, w_bak=two[1],
                    mean_square=two[2], velocity=two[3] if moving else None,
                    work=(np.empty(BLOCK_NUMEL, np.float32), np.empty(BLOCK_NUMEL, np.float32)))
    for first, second in zip((one[0], one[0], one[2], one[3]), two, strict=True):
        np.testing.assert_array_equal(first, second)


def test_recording_replays_and_survives_a_file(tmp_path):
    simulated = Simulated(4, 0.5, seed=9)
    recorded = Recorded(simulated.take(30), simulated.workers(30))
    recorded.save(tmp_path / "run.npz")
    loaded = Recorded.load(tmp_path / "run.npz")
    assert len(loaded) == 30
    rule = AsyncRule(name="dc-asgd-a")
    runs = [replay(gradient, START, steps=30, delays=d, lr=0.05, rule=rule).weights
            for d in (simulated, loaded)]
    np.testing.assert_array_equal(*runs)
    with pytest.raises(ValueError, match="at most the 30 recorded updates, got 31"):
        loaded.take(31)


def test_sequences_have_the_delays_they_promise():
    np.testing.assert_array_equal(Constant(3).take(6), [0, 1, 2, 3, 3, 3])
    uniform = Uniform(2, 5).take(5000)[10:]
    assert set(uniform) == {2, 3, 4, 5}
    assert abs(uniform.mean() - 3.5) < 0.1
    geometric = Geometric(4.0).take(20000)[100:]
    assert abs(geometric.mean() - 4.0) < 0.2
    assert abs((geometric == 0).mean() - 0.2) < 0.02
    np.testing.assert_array_equal(Simulated(4, 0.0).take(8), [0, 1, 2, 3, 3, 3, 3, 3])
    slowed = Simulated(4, 0.1, slow=(1, 1, 1, 4))
    delays, workers = slowed.take(2000), slowed.workers(2000)
    assert delays[workers == 3].mean() > 3 * delays[workers == 0].mean()
    np.testing.assert_array_equal(Geometric(4.0, seed=3).take(50), Geometric(4.0, seed=3).take(50))


def test_momentum_for_delay():
    assert momentum_for_delay(1, momentum=0.9, reference_delay=1) == pytest.approx(0.9)
    assert momentum_for_delay(4, momentum=0.9, reference_delay=1) == pytest.approx(0.8)
    assert momentum_for_delay(0, momentum=0.9) == 0.9  # never above what is known to work
    assert momentum_for_delay(1e6, momentum=0.9) == 0.0
    # Async-MSGD Figure 1, from its first pair: within a factor 1.6 of the measured delays
    for mu, tau in ((0.8, 80), (0.85, 60), (0.9, 30)):
        rule = momentum_for_delay(tau, momentum=0.95, reference_delay=10)
        assert (1 - rule) / (1 - mu) == pytest.approx(1.0, abs=0.3)


def test_auto_momentum_follows_the_largest_recent_delay():
    auto = AutoMomentum(momentum=0.9, reference_delay=1, window=3)
    assert [round(auto.next_momentum(d), 3) for d in (0, 4, 1, 1, 1)] == [0.9, 0.8, 0.8, 0.8, 0.9]
    other = AutoMomentum(momentum=0.9, reference_delay=1, window=3)
    other.load_state_dict(auto.state_dict())
    assert other.next_momentum(0) == auto.next_momentum(0)
    runs = [replay(gradient, START, steps=40, delays=Constant(4), lr=0.02, momentum=auto)
            for _ in range(2)]
    np.testing.assert_array_equal(runs[0].weights, runs[1].weights)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AsyncRule(name="dc"), "rule must be one of 'asgd', 'dc-asgd-c', 'dc-asgd-a'"),
        (lambda: AsyncRule(lam=-1), "lam must be in .* got -1; the paper's value"),
        (lambda: AsyncRule(name="asgd", lam=1), 'lam must be 0 for rule "asgd", got 1; for'),
        (lambda: AsyncRule(decay=1.0), "decay must be in .0, 1., got 1.0; the paper uses"),
        (lambda: AsyncRule(eps=0), "eps must be in"),
        (lambda: momentum_for_delay(1, momentum=1.0), "momentum must be in .* got 1.0; pass"),
        (lambda: momentum_for_delay(-1), "delay must be in"),
        (lambda: momentum_for_delay(1, reference_delay=0), "reference_delay must be in"),
        (lambda: AutoMomentum(window=0), r"window must be in \[1, "),
        (lambda: Constant(-1), "delay must be at least 0"),
        (lambda: Uniform(3, 2), "high must be at least 3, got 2; it must not lie under low"),
        (lambda: Simulated(2, slow=(1.0,)), "one factor a worker .2., got 1"),
        (lambda: Recorded([0, 2]), r"delay of update 1 must be in \[0, 1\], got 2"),
        (lambda: replay(lambda w, k: w[:1], START, steps=1, lr=1), "gradient must return shape"),
        (lambda: replay(gradient, START, steps=1, lr=1, delays=[Constant(1)]), "needs 7 of them"),
    ],
)
def test_bad_settings_say_what_to_do(make, message):
    with pytest.raises(ValueError, match=message):
        make()
