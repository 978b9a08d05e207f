"""A tape's step is a transaction: gradients that are thrown away leave no trace in what is kept.

Programs: "a" takes a gradient and applies it, "s" takes one and throws it away, "d" takes two and applies the
second, "o" one that is not finite on rank 1, under a loss scale. Each must end where the program without what
is thrown away ends.
"""

from __future__ import annotations

import time

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras  # noqa: E402

import hvd_ext.tensorflow as hvd  # noqa: E402
from tests.ranks import Ranks  # noqa: E402
from tests.tensorflow import training  # noqa: E402

SHAPES = ((6, 4), (4,))
LR = 0.25
CASES = {
    "topk": lambda: {"compression": hvd.Compression.topk(0.3, min_size=0)},
    "sparse allreduce": lambda: {"compression": hvd.Compression.topk(0.3, min_size=0,
                                                                     exchange="sparse_allreduce")},
    "powersgd": lambda: {"compression": hvd.Compression.powersgd(2)},
    "delay": lambda: {"op": hvd.DelayCompensated(lam=1.0, adaptive=True)},
}
PROGRAMS = ("ssada", "aosda")


def gradients_at(position, which, rank, letter="a"):
    rng = np.random.default_rng([position, which, rank])
    found = [rng.standard_normal(shape).astype("float32") for shape in SHAPES]
    if letter == "o" and rank == 1:
        found[0][1, 1] = np.inf
    return found


def calls_of(program):
    """(position, which gradient, letter, whether it is applied) of each reduction."""
    for position, letter in enumerate(program):
        if letter == "d":
            yield position, 0, letter, False
        yield position, 1, letter, letter != "s"


def without_discarded(program):
    return [call for call in calls_of(program) if call[3] and call[2] != "o"]


class Run:
    """Weights, and the optimizer with what the tape keeps."""

    def __init__(self, case, compiled):
        self.weights = [tf.Variable(tf.zeros(shape), name=f"w{n}") for n, shape in enumerate(SHAPES)]
        self.optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(LR, momentum=0.5),
                                                             initial_scale=8.0)
        self.options = CASES[case]()
        self.optimizer.build(self.weights)
        self.step = tf.function(self.call) if compiled else self.call

    def tape(self, tape):
        return hvd.DistributedGradientTape(tape, optimizer=self.optimizer, **self.options)

    def call(self, data, apply):
        with tf.GradientTape() as tape:
            loss = tf.add_n([tf.reduce_sum(one * weight)
                             for one, weight in zip(data, self.weights, strict=True)])
            loss = self.optimizer.scale_loss(loss)
        found = self.tape(tape).gradient(loss, self.weights)
        if apply:
            self.optimizer.apply(found, self.weights)

    def go(self, calls):
        for position, which, letter, apply in calls:
            data = gradients_at(position, which, hvd.rank(), letter)
            self.step([tf.constant(one) for one in data], apply)
        return [one.numpy() for one in self.weights]

    def state(self):
        return {one.path.rpartition("/")[2]: np.array(one) for one in self.optimizer.variables}


def programs_on_ranks(case, compiled):
    found = {}
    for program in PROGRAMS:
        run = Run(case, compiled)
        found[program] = run.go(calls_of(program)), run.state(), run.optimizer.report()
        run = Run(case, compiled)
        found[program] += run.go(without_discarded(program)), run.state()
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_what_is_thrown_away_leaves_no_trace(ranks, case, compiled):
    by_rank = ranks(2, init="tensorflow").run(programs_on_ranks, case, compiled, timeout=150)
    for program in PROGRAMS:
        for found in by_rank:
            weights, state, _, clean, clean_state = found[program]
            for mine, other, same in zip(weights, clean, by_rank[0][program][0], strict=True):
                np.testing.assert_array_equal(mine, same)
                np.testing.assert_array_equal(mine, other, err_msg=program)
            for name, value in state.items():
                kept = name.startswith(("residual_0", "owner_", "q_0", "mean_square_0", "steps"))
                if kept and not name.endswith("_before"):
                    np.testing.assert_array_equal(value, clean_state[name], err_msg=f"{program} {name}")


def counted(used):
    """Steps taken and skipped after a gradient that is not finite on rank 1, and two that are."""
    run = Run("topk", True)
    run.go([(0, 1, "o", used), (1, 1, "a", True), (2, 1, "a", True)])
    return [int(run.state()[name]) for name in ("steps", "skipped_steps")]


def counted_both_ways():
    return [counted(used) for used in (True, False)]


@pytest.mark.distributed
def test_a_gradient_that_is_thrown_away_is_no_skipped_step(ranks):
    assert ranks(2, init="tensorflow").run(counted_both_ways) == [[[2, 1], [2, 0]]] * 2


def topk_in_numpy(program):
    """The weights and residuals of both ranks, by the definition, in float64 but for what is sent."""
    numel = sum(int(np.prod(shape)) for shape in SHAPES)
    weight, momentum, residual = np.zeros(numel), np.zeros(numel), np.zeros((2, numel))
    for position, which, letter, _ in without_discarded(program):
        sent = np.zeros((2, numel))
        for rank in (0, 1):
            flat = np.concatenate([one.ravel() for one in gradients_at(position, which, rank, letter)[::-1]])
            residual[rank] += flat
            chosen = np.argsort(-np.abs(residual[rank]), kind="stable")[:round(0.3 * numel)]
            sent[rank, chosen] = residual[rank, chosen].astype("float32")
            residual[rank] -= sent[rank]
        momentum = 0.5 * momentum - LR * sent.mean(axis=0)
        weight = weight + momentum
    return weight, residual


def topk_on_ranks(program):
    run = Run("topk", True)
    weights = run.go(calls_of(program))
    return np.concatenate([one.ravel() for one in weights[::-1]]), run.state()  # buckets begin with the last


@pytest.mark.distributed
def test_topk_by_its_definition(ranks):
    for program in ("soada",):
        expected, residual = topk_in_numpy(program)
        for rank, (weight, state) in enumerate(ranks(2, init="tensorflow").run(topk_on_ranks, program)):
            np.testing.assert_allclose(weight, expected, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(state["residual_0"], residual[rank], rtol=1e-5, atol=1e-6)


def saved_between(case, folder):
    """A run from a checkpoint that was written after a gradient was thrown away, and one without."""
    first = Run(case, True)
    calls = list(calls_of("asa"))
    first.go(calls[:2])
    stem = tf.train.Checkpoint(weights=first.weights, optimizer=first.optimizer).write(
        f"{folder}/{case}{hvd.rank()}")
    second = Run(case, True)
    second.tape(tf.GradientTape()).build(second.weights)
    tf.train.Checkpoint(weights=second.weights, optimizer=second.optimizer).read(stem) \
        .assert_existing_objects_matched()
    return first.go(calls[2:]), second.go(calls[2:])


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_after_a_gradient_that_is_thrown_away(ranks, case, tmp_path):
    for straight, restored in ranks(2, init="tensorflow").run(saved_between, case, str(tmp_path)):
        for mine, other in zip(straight, restored, strict=True):
            np.testing.assert_array_equal(mine, other)


def seng_on_ranks(program, update_freq, coupling):
    model = training.dense_model()
    seng = hvd.SENG(model, damping=0.5, update_freq=update_freq, coupling=coupling)
    optimizer, weights = keras.optimizers.SGD(0.1), model.trainable_variables
    x, y = training.data()

    @tf.function
    def step(x, y, apply):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x) - y) ** 2)
        tape = hvd.DistributedGradientTape(tape, optimizer=optimizer, preconditioner=seng)
        found = tape.gradient(loss, weights)
        if apply:
            optimizer.apply(found, weights)

    for position, which, _, apply in program:
        rows = slice(8 * position + 4 * which, 8 * position + 4 * which + 4)
        step(tf.constant(x[rows][hvd.rank()::2]), tf.constant(y[rows][hvd.rank()::2]), apply)
    return training.weights(model), int(seng.steps)


SENG_PROGRAMS = ((1, "block", "asada"), (2, "block", "sadsada"), (3, "lagged", "ssaadasda"))


def seng_programs_on_ranks():
    return [(seng_on_ranks(list(calls_of(program)), *case), seng_on_ranks(without_discarded(program), *case))
            for *case, program in SENG_PROGRAMS]


@pytest.mark.distributed
def test_curvature_of_what_is_thrown_away_is_pending(ranks):
    by_rank = ranks(2, init="tensorflow").run(seng_programs_on_ranks, timeout=200)
    for found in by_rank:
        for ((mine, steps), (other, clean_steps)), ((first, _), _), (*_, program) in zip(
                found, by_rank[0], SENG_PROGRAMS, strict=True):
            assert steps == clean_steps == len(program) - program.count("s")
            for one, same, replica in zip(mine, other, first, strict=True):
                np.testing.assert_array_equal(one, replica)
                np.testing.assert_array_equal(one, same, err_msg=program)


def asked_twice():
    run, found = Run("topk", False), []
    for sources in (run.weights, run.weights[:1]):
        with tf.GradientTape(persistent=True) as tape:
            first = tf.reduce_sum(run.weights[0] ** 2)
            second = tf.reduce_sum(run.weights[0] ** 3)
        wrapped = run.tape(tape)
        wrapped.gradient(first, run.weights)
        try:
            run.tape(tape).gradient(second, sources)
        except RuntimeError as error:
            found.append(str(error))
    plain = hvd.DistributedGradientTape(tape)  # keeps nothing, and may be asked as often as one likes
    return found, [plain.gradient(one, run.weights[:1])[0].numpy().tolist() for one in (first, second)]


@pytest.mark.distributed
def test_a_persistent_tape_asked_twice_is_an_error(ranks):
    for found, _ in ranks(2, init="tensorflow").run(asked_twice):
        assert len(found) == 2
        assert all("a second time on one tape with Compression.topk" in one for one in found)


def take_gradients_again():
    weights = tf.Variable([1.0, -2.0, 3.0])
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.build([weights])
    for _ in range(3):
        with tf.GradientTape() as plain:
            loss = tf.reduce_sum(weights ** 2)
        hvd.DistributedGradientTape(plain, optimizer=optimizer, compression=hvd.Compression.topk(
            0.5, min_size=0)).gradient(loss, [weights])
    print("all taken", flush=True)


@pytest.mark.distributed
def test_gradients_taken_again_before_an_update_are_told_once():
    with Ranks(1, init="tensorflow") as alone:
        alone.run(take_gradients_again)
        end = time.monotonic() + 30
        while "all taken" not in alone.output() and time.monotonic() < end:
            time.sleep(0.1)
        said = alone.output()
    assert said.count("a distributed tape gives gradients again before an update") == 1
    assert "backward_passes_per_step=" in said
