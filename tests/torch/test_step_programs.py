"""Random training loops against one process: whatever follows ``backward()``, the weights are the model's.

``tests/reference/step_programs.py`` says what each operation means. Programs are drawn, carried out on every
rank and compared after each operation: weights to rounding, replicas bit by bit, errors by their type.
"""

from __future__ import annotations

import copy
import itertools
import os
import zlib

import numpy as np
import pytest
import torch

import hvd_ext.torch as hvd
from tests.reference.step_methods import LR, Method
from tests.reference.step_programs import (
    CLIP,
    MOMENTUM,
    NEW_SIZE,
    OPERATIONS,
    Model,
    ProgramError,
    Unspecified,
    new_weights,
)
from tests.torch.problems import bits, flat

EXAMPLES = int(os.environ.get("HVD_EXT_PROGRAMS", "25"))  # programs of each method and number of ranks
SHAPES = [(3, 2), (4,)]
SIZE = 10
METHODS = {
    "plain": ("plain", {}, {}),
    "sharded": ("plain", {"partial": True}, {"server": "sharded"}),
    "rank0": ("plain", {}, {"server": "rank0"}),
    "topk": ("topk", {}, {}),
    "topk_sharded": ("topk", {}, {"server": "sharded"}),
    "powersgd": ("exact", {}, {}),
    "delay": ("delay", {}, {}),
    "adaptive": ("adaptive", {}, {}),
    "late": ("plain", {"late": True}, {}),
    "late_compensated": ("plain", {"late": True, "late_lam": 0.4}, {}),
    "late_topk": ("topk", {"late": True}, {}),
}


def options_of(method):
    return {
        "topk": {"compression": hvd.Compression.topk(0.3, min_size=0)},
        "powersgd": {"compression": hvd.Compression.powersgd(rank=8, min_compression=1.0)},
        "delay": {"op": hvd.DelayCompensated(0.8, adaptive=False)},
        "adaptive": {"op": hvd.DelayCompensated(0.8)},
        "late": {"overlap": hvd.DelayedUpdate(0.0, adaptive=False)},
        "late_compensated": {"overlap": hvd.DelayedUpdate(0.4, adaptive=False)},
    }.get(method, {}) if "_" not in method or method == "late_compensated" else {
        key: value for part in method.split("_") for key, value in
        ({"server": "sharded"} if part == "sharded" else options_of(part)).items()}


def gradient(seed, position, rank, size):
    """A rank's gradient of one operation, (size,)."""
    return np.random.default_rng([seed, position, rank]).standard_normal(size)


class Loop:
    """The same operations on an optimizer."""

    def __init__(self, method, passes, seed):
        rng = np.random.default_rng(seed)
        self.seed, self.partial = seed, hvd.size() > 1 and METHODS[method][1].get("partial", False)
        self.parameters = [torch.nn.Parameter(torch.from_numpy(rng.standard_normal(shape)))
                           for shape in SHAPES]
        inner = torch.optim.SGD(self.parameters, lr=LR, momentum=MOMENTUM)
        self.optimizer = hvd.DistributedOptimizer(
            inner, [(f"p{k}", p) for k, p in enumerate(self.parameters)], backward_passes_per_step=passes,
            **{**options_of(method), **METHODS[method][2]})
        self.saved = None

    def run(self, operation, position):
        getattr(self, operation)(position)
        if self.partial and operation in ("step", "step_in_skip", "closure"):
            self.clear(position)

    def backward(self, position, factor=1.0):
        size = sum(p.numel() for p in self.parameters)
        g = torch.from_numpy(gradient(self.seed, position, hvd.rank(), size)) * factor
        parts = g.split([p.numel() for p in self.parameters])
        sum((p.reshape(-1) * part).sum() for p, part in zip(self.parameters, parts, strict=True)
            if p.requires_grad).backward()

    def overflow(self, position):
        self.backward(position, float("inf") if hvd.rank() == 0 else 1.0)

    def synchronize(self, _):
        self.optimizer.synchronize()

    def step(self, _):
        self.optimizer.step()

    def step_in_skip(self, _):
        with self.optimizer.skip_synchronize():
            self.optimizer.step()

    def zero_grad(self, _):
        self.optimizer.zero_grad()

    def clear(self, _):
        for parameter in self.parameters:
            parameter.grad = None

    def clip(self, _):
        hvd.clip_grad_norm_(self.optimizer, CLIP)

    def torch_clip(self, _=None):
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)

    def closure(self, position):
        def closure():
            self.optimizer.zero_grad()
            self.backward(position)
            if self.partial:
                hvd.clip_grad_norm_(self.optimizer, CLIP)
            else:
                self.torch_clip()
            return torch.zeros(())

        self.optimizer.step(closure)

    def flush(self, _):
        self.optimizer.flush()

    def skip_step(self, position):
        self.optimizer.skip_step()
        self.clear(position)

    def add_group(self, position):
        self.clear(position)
        weights = new_weights(len(self.optimizer.param_groups) + 1)
        assert len(weights) == NEW_SIZE
        self.parameters.append(torch.nn.Parameter(torch.from_numpy(weights)))
        self.optimizer.add_param_group({"params": [self.parameters[-1]]})

    def freeze(self, position, *, frozen=True):
        self.clear(position)
        self.parameters[0].requires_grad_(not frozen)

    def unfreeze(self, position):
        self.freeze(position, frozen=False)

    def save(self, _):
        self.saved = copy.deepcopy(self.optimizer.state_dict()), [p.detach().clone() for p in self.parameters]

    def load(self, position):
        state, weights = copy.deepcopy(self.saved)
        self.optimizer.load_state_dict(state)
        with torch.no_grad():
            for parameter, weight in zip(self.parameters, weights, strict=True):
                parameter.copy_(weight)
        self.clear(position)


def carry_out(method, passes, seed, program):
    """This rank's weights after each operation, and the type of the error that ended it, if any."""
    loop = Loop(method, passes, seed)
    trajectory, error = [], None
    try:
        for position, operation in program:
            loop.run(operation, position)
            trajectory.append(flat(loop.parameters))
    except (RuntimeError, AssertionError) as raised:
        error = "RuntimeError" if isinstance(raised, RuntimeError) else "AssertionError", str(raised)
    finally:
        loop.optimizer._hvd_ext.abort_step()
    return trajectory, error, zlib.crc32(bits(loop.parameters))


def model_of(method, passes, ranks, seed):
    """What the optimizer is to do, in one process."""
    kind, options, _ = METHODS[method]
    rng = np.random.default_rng(seed)
    start = np.concatenate([rng.standard_normal(shape).ravel() for shape in SHAPES])
    reduces = Method("plain" if kind == "exact" else kind, ranks, [slice(0, SIZE)])
    model = Model(reduces, start, passes, groups=[slice(0, SIZE)],
                  untouched=method == "plain" and ranks == 1,
                  **{**options, "partial": options.get("partial", False) and ranks > 1})
    if kind == "exact":  # of full rank, so that nothing is left over
        reduces.__class__ = type("Exact", (Method,), {"repeatable": property(lambda self: False)})
    return model


def draw_program(method, passes, ranks, seed, length):
    """A random program, the weights after each operation, and the error in which it ends, if any.

    What is not specified is drawn anew, and so are most operations that would end the program.
    """
    model, draws = model_of(method, passes, ranks, seed), np.random.default_rng([seed, 1])
    program, trajectory = [], []
    for position in range(length):
        given_to = [gradient(seed, position, rank, len(model.weights)) for rank in range(ranks)]
        for _ in range(100):
            operation = "backward" if position == 0 else str(draws.choice(WEIGHTED))
            trial = copy.deepcopy(model)
            try:
                trial.run(operation, given_to)
            except Unspecified:
                continue
            except ProgramError as error:
                if draws.random() < 0.1:
                    return [*program, (position, operation)], trajectory, error.args[0]
                continue
            model = trial
            program.append((position, operation))
            trajectory.append(model.weights.copy())
            break
    return program, trajectory, None


WEIGHTED = [*OPERATIONS, "freeze", *["backward"] * 4, *["synchronize"] * 2, *["step"] * 3, *["zero_grad"] * 2]


@pytest.mark.distributed
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_a_random_program_is_what_one_process_makes_of_it(ranks, method, size):
    # TopK's values travel as float32; of a value below 8 that is half of 2^-21, in at most 16 updates.
    tolerance = 1e-9 if "topk" not in method else 16 * 2.0**-22 / (1 - MOMENTUM)
    for seed in range(EXAMPLES):
        passes = (1, 1, 2)[seed % 3]
        program, expected, error = draw_program(method, passes, size, seed, 16)
        found = ranks(size).run(carry_out, method, passes, seed, program)
        assert len({crc for _, _, crc in found}) == 1, program
        for trajectory, raised, _ in found:
            assert (raised and raised[0]) == error, (program, raised)
            assert len(trajectory) == len(expected)
            for (_, operation), mine, theirs in zip(program, trajectory, expected, strict=False):
                np.testing.assert_allclose(mine, theirs, rtol=0, atol=tolerance,
                                           err_msg=f"after {operation} in {program}")


@pytest.mark.parametrize("method", METHODS)
def test_the_programs_use_every_operation(method):
    """By the default number of programs, on two ranks; and gradients are thrown away after a reduction."""
    drawn = [[operation for _, operation in draw_program(method, (1, 1, 2)[seed % 3], 2, seed, 16)[0]]
             for seed in range(25)]
    seen = {operation for program in drawn for operation in program}
    nowhere = {name for name, only in (("overflow", "topk"), ("flush", "late")) if only not in method}
    assert seen >= set(OPERATIONS) - nowhere
    pairs = {pair for program in drawn for pair in itertools.pairwise(program)}
    assert ("synchronize", "zero_grad") in pairs
    assert np.mean([len(program) for program in drawn]) > 8
