"""Random training loops against one process, under Keras: with the optimizer's ``apply`` and with tapes.

``tests/reference/keras_programs.py`` says what each operation means. Programs are drawn, carried out on every
rank and compared after each operation: weights to rounding, replicas bit by bit, errors by their type.
"""

from __future__ import annotations

import copy
import itertools
import os
import zlib

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

import keras  # noqa: E402

import hvd_ext.tensorflow as hvd_tf  # noqa: E402
import hvd_ext.tensorflow.keras as hvd  # noqa: E402
from tests.reference.keras_programs import (  # noqa: E402
    CLIP,
    MOMENTUM,
    OPERATIONS,
    PARTS,
    WEIGHTED,
    gradient_at,
    make_model,
    start_weights,
)
from tests.reference.step_methods import LR  # noqa: E402
from tests.reference.step_programs import ProgramError, Unspecified  # noqa: E402

EXAMPLES = int(os.environ.get("HVD_EXT_PROGRAMS", "3"))  # programs of each loop and number of ranks
LENGTH = 14
SHAPES = ((3, 2), (4,))
METHODS = {  # what the reference calls it, and the arguments
    "plain": ("plain", dict),
    "rank0": ("plain", lambda: {"server": "rank0"}),
    "sharded": ("plain", lambda: {"server": "sharded"}),
    "topk": ("topk", lambda: {"compression": hvd.Compression.topk(0.3, min_size=0)}),
    "topk_sharded": ("topk", lambda: {"compression": hvd.Compression.topk(0.3, min_size=0),
                                      "server": "sharded"}),
    "powersgd": ("exact", lambda: {"compression": hvd.Compression.powersgd(rank=8, min_compression=1.0)}),
    "delay": ("delay", lambda: {"op": hvd.DelayCompensated(0.8, adaptive=False)}),
    "adaptive": ("adaptive", lambda: {"op": hvd.DelayCompensated(0.8)}),
    "late": ("plain", lambda: {"overlap": hvd.DelayedUpdate(0.0, adaptive=False)}),
    "late_compensated": ("plain", lambda: {"overlap": hvd.DelayedUpdate(0.4, adaptive=False)}),
    "late_topk": ("topk", lambda: {"overlap": hvd.DelayedUpdate(0.0, adaptive=False),
                                   "compression": hvd.Compression.topk(0.3, min_size=0)}),
}
# Of each method: backward_passes_per_step, gradient_accumulation_steps, clipping, a loss scale, a tape.
LOOPS = {
    "plain": ({}, {"accumulate": 2, "clip": "clipnorm"}, {"tape": True, "scaled": True},
              {"passes": 2, "scaled": True}),
    "rank0": ({"clip": "global_clipnorm"}, {"accumulate": 2, "scaled": True}),
    "sharded": ({"passes": 2, "clip": "clipnorm"}, {"scaled": True, "clip": "global_clipnorm"}),
    "topk": ({"passes": 2}, {"accumulate": 2, "clip": "global_clipnorm"}, {"tape": True, "scaled": True}),
    "topk_sharded": ({"clip": "clipnorm"},),
    "powersgd": ({"clip": "clipnorm"}, {"tape": True}),
    "delay": ({"passes": 2}, {"tape": True}),
    "adaptive": ({"scaled": True}, {"tape": True, "clip": "global_clipnorm"}),
    "late": ({"clip": "global_clipnorm"}, {"passes": 2}),
    "late_compensated": ({"scaled": True, "clip": "clipnorm"},),
    "late_topk": ({},),
}
CASES = [(method, tuple(sorted(loop.items()))) for method, loops in LOOPS.items() for loop in loops]
# Tracing takes most of the time: of all loops some, unless the number of programs is given.
DRAWN = {1: CASES[1::4], 2: CASES[::2]} if "HVD_EXT_PROGRAMS" not in os.environ else {1: CASES, 2: CASES}


class Loop:
    """The same operations on an optimizer; programs begin from the same state, one after another."""

    def __init__(self, method, loop):
        loop = dict(loop)
        clip = {loop["clip"]: CLIP} if loop.get("clip") else {}
        self.variables = [tf.Variable(np.zeros(shape), name=f"p{k}") for k, shape in enumerate(SHAPES)]
        inner = keras.optimizers.SGD(LR, momentum=MOMENTUM,
                                     gradient_accumulation_steps=loop.get("accumulate"), **clip)
        self.tape = METHODS[method][1]() if loop.get("tape") else None
        self.inner = inner if loop.get("tape") else hvd.DistributedOptimizer(
            inner, backward_passes_per_step=loop.get("passes", 1), **METHODS[method][1]())
        self.optimizer = keras.optimizers.LossScaleOptimizer(self.inner, initial_scale=8.0) \
            if loop.get("scaled") else self.inner
        self.optimizer.build(self.variables)
        if self.tape is not None:
            hvd_tf.DistributedGradientTape(tf.GradientTape(), optimizer=self.optimizer, **self.tape).build(
                self.variables)
        self.fresh = self.state()
        self.saved = None

    def state(self):
        if self.tape is not None:
            return [np.array(one) for one in self.optimizer.variables]
        store = {}
        self.inner.save_own_variables(store)
        return {key: np.array(value) for key, value in store.items()}

    def restore(self, state):
        if self.tape is None:
            self.inner.load_own_variables(state)
            return
        for variable, value in zip(self.optimizer.variables, state, strict=True):
            variable.assign(value)

    def begin(self, seed):
        self.seed, self.frozen, self.saved = seed, False, None
        self.set_weights(start_weights(seed))
        self.restore(self.fresh)

    def set_weights(self, flat):
        for variable, part in zip(self.variables, PARTS, strict=True):
            variable.assign(flat[part].reshape(variable.shape))

    def weights(self):
        return np.concatenate([one.numpy().ravel() for one in self.variables])

    def gradients(self, position, factor):
        """This pass's gradients of the variables that are not frozen, with the loss's scale."""
        flat = gradient_at(self.seed, position, hvd.rank()) * factor
        given = [(tf.constant(flat[part].reshape(one.shape)), one)
                 for one, part in zip(self.variables, PARTS, strict=True)][self.frozen:]
        with tf.GradientTape() as tape:
            loss = tf.add_n([tf.reduce_sum(g * one) for g, one in given])
            if self.optimizer is not self.inner:
                loss = self.optimizer.scale_loss(loss)
        if self.tape is not None:
            tape = hvd_tf.DistributedGradientTape(tape, optimizer=self.optimizer, **self.tape)
        given = [one for _, one in given]
        return tape.gradient(loss, given), given

    def apply(self, position, factor=1.0):
        self.optimizer.apply(*self.gradients(position, factor))

    def thrown(self, position):
        self.gradients(position, 1.0)

    def overflow(self, position):
        self.apply(position, np.inf if hvd.rank() == 0 else 1.0)

    def freeze(self, _):
        self.frozen = True

    def unfreeze(self, _):
        self.frozen = False

    def save(self, _):
        self.saved = self.weights(), self.state()

    def load(self, _):
        self.set_weights(self.saved[0])
        self.restore(self.saved[1])

    def flush(self, _):
        self.optimizer.flush()


def carry_out(programs):
    """By case and program: weights after each operation, the error's type, and the replica's bits."""
    floats = keras.config.floatx()
    keras.config.set_floatx("float64")
    found = []
    try:
        for (method, loop), given in programs:
            run = Loop(method, loop)
            for seed, program in given:
                run.begin(seed)
                trajectory, error = [], None
                try:
                    for position, operation in program:
                        getattr(run, operation)(position)
                        trajectory.append(run.weights())
                except RuntimeError as raised:
                    error = str(raised)
                found.append((trajectory, error, zlib.crc32(run.weights().tobytes())))
    finally:
        keras.config.set_floatx(floats)
    return found


def draw_program(case, ranks, seed):
    """A random program, the weights after each operation, and the error in which it ends, if any."""
    (method, loop), draws = case, np.random.default_rng([seed, 1])
    loop = dict(loop)
    late = method.startswith("late")
    model = make_model(
        METHODS[method][0], ranks, seed, late=late, late_lam=0.4 if method == "late_compensated" else 0.0,
        passes=loop.get("passes") or loop.get("accumulate") or 1, divisor=loop.get("accumulate", 1),
        clip=loop.get("clip"), scaled=loop.get("scaled", False))
    program, trajectory = [], []
    for position in range(LENGTH):
        given = [gradient_at(seed, position, rank) for rank in range(ranks)]
        while True:
            operation, trial = "apply" if not position else str(draws.choice(WEIGHTED)), copy.deepcopy(model)
            try:
                trial.run(operation, given)
            except Unspecified:
                continue
            except ProgramError as error:
                if draws.random() < 0.2:
                    return [*program, (position, operation)], trajectory, error.args[0]
                continue
            break
        model = trial
        program.append((position, operation))
        trajectory.append(model.weights.copy())
    return program, trajectory, None


@pytest.mark.distributed
@pytest.mark.parametrize("size", [1, 2])
def test_a_random_program_is_what_one_process_makes_of_it(ranks, size):
    drawn = {case: [(seed, *draw_program(case, size, seed)) for seed in range(EXAMPLES)]
             for case in DRAWN[size]}
    by_rank = ranks(size, init="tensorflow").run(carry_out, [
        (case, [(seed, program) for seed, program, *_ in programs]) for case, programs in drawn.items()],
        timeout=300 + 20 * EXAMPLES)
    expected = [(case, program) for case, programs in drawn.items() for program in programs]
    for number, ((method, loop), (_, program, trajectory, error)) in enumerate(expected):
        # TopK's values travel as float32; of a value below 8 that is half of 2^-21, in at most 14 updates.
        tolerance = 1e-9 if "topk" not in method else LENGTH * 2.0**-22 / (1 - MOMENTUM)
        assert len({rank[number][2] for rank in by_rank}) == 1, (method, loop, program)
        for mine, raised, _ in (rank[number] for rank in by_rank):
            assert (raised is None) == (error is None), (method, loop, program, raised)
            assert len(mine) == len(trajectory)
            for (_, operation), weights, wanted in zip(program, mine, trajectory, strict=False):
                np.testing.assert_allclose(weights, wanted, rtol=0, atol=tolerance,
                                           err_msg=f"{method} {loop} after {operation} in {program}")


def test_the_programs_use_every_operation():
    for case in CASES:
        drawn = [[operation for _, operation in draw_program(case, 2, seed)[0]] for seed in range(25)]
        seen = {operation for program in drawn for operation in program}
        nowhere = {name for name, there in (("flush", "late" in case[0]),
                                            ("overflow", "topk" in case[0] or ("scaled", True) in case[1]))
                   if not there}
        assert seen == set(OPERATIONS) - nowhere
        assert ("thrown", "apply") in {pair for program in drawn for pair in itertools.pairwise(program)}
