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

from tests.reference.step_methods import Method
from tests.reference.step_programs import MOMENTUM, OPERATIONS, Model, ProgramError, Unspecified
from tests.torch.problems import bits, flat
from tests.torch.step_program_loops import FURTHER, METHODS, SHAPES, SIZE, Loop, gradient

PROGRAMS = int(os.environ.get("HVD_EXT_PROGRAMS", "0"))  # of each method and number of ranks
LENGTH = 16
WEIGHTED = [*OPERATIONS, *["backward"] * 4, *["step"] * 3, *["synchronize"] * 2, *["zero_grad"] * 2, "freeze",
            "step_in_skip", "clear", "torch_clip", "load", "closure"]
SCALED = [*WEIGHTED, *["scaler_step"] * 8, *["update"] * 3, *["unscale"] * 2]


def number_of_programs(method):
    """By default few of the methods that are made of others."""
    return PROGRAMS or (4 if method in FURTHER else 24)


def settings_of(method, seed):
    """Backward passes per step, and whether there is a GradScaler. SENG takes one pass only here."""
    return 1 if "seng" in method else (1, 1, 2)[seed % 3], seed % 4 > 1


def carry_out(method, seed, program):
    """On this rank: the weights after each operation, the error that ended it if any, a checksum, and the
    entries that owners sent back."""
    passes, scaled = settings_of(method, seed)
    loop = Loop(method, passes, seed, scaled)
    trajectory, error = [], None
    try:
        for position, operation in program:
            loop.run(operation, position)
            trajectory.append(flat(loop.parameters))
    except (RuntimeError, AssertionError) as raised:
        error = "RuntimeError" if isinstance(raised, RuntimeError) else "AssertionError", str(raised)
    finally:
        loop.optimizer._hvd_ext.abort_step()
    return trajectory, error, zlib.crc32(bits(loop.parameters)), loop.sent_back


def model_of(method, ranks, seed):
    """What the optimizer is to do, in one process."""
    setup = METHODS[method]
    rng, (passes, scaled) = np.random.default_rng(seed), settings_of(method, seed)
    start = np.concatenate([rng.standard_normal(shape).ravel() for shape in SHAPES])
    reduces = Method(setup.kind, ranks, **{"buckets": [slice(0, SIZE)], **setup.method})
    reduces.buckets = list(reduces.buckets)
    several = ranks > 1
    return Model(reduces, start, passes, groups=[slice(0, SIZE)], scaler=scaled,
                 untouched=method in ("plain", "groups", "sum", "fp16") and not several,
                 **{**setup.model, "partial": several and setup.model.get("partial", False),
                    "half_replies": several and setup.model.get("half_replies", False)})


def gradients_of(method, seed, position, model):
    return [gradient(method, seed, position, rank, len(model.weights)) for rank in range(model.method.ranks)]


def draw_program(method, ranks, seed, length=LENGTH):
    """A random program, the weights after each operation, and the error in which it ends, if any.

    What is not specified is drawn anew, and so are most operations that would end the program.
    """
    model, draws = model_of(method, ranks, seed), np.random.default_rng([seed, zlib.crc32(method.encode())])
    choices = SCALED if model.scaler else WEIGHTED
    program, trajectory = [], []
    for position in range(length):
        given_to = gradients_of(method, seed, position, model)
        for _ in range(100):
            operation = "backward" if position == 0 else str(draws.choice(choices))
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


def replay(method, ranks, seed, program, sent_back):
    """The weights after each operation, where owners send these entries back."""
    model, trajectory = model_of(method, ranks, seed), []
    model.method.places = list(sent_back)
    for position, operation in program:
        try:
            model.run(operation, gradients_of(method, seed, position, model))
        except ProgramError:
            break
        trajectory.append(model.weights.copy())
    return trajectory


def tolerance_of(method):
    if "topk" in method:
        # TopK's values travel as float32; of a value below 8 that is half of 2^-21, in at most 16 updates.
        return LENGTH * 2.0**-22 / (1 - MOMENTUM)
    return 1e-9


@pytest.mark.distributed
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_a_random_program_is_what_one_process_makes_of_it(ranks, method, size):
    pool = ranks(size)
    for seed in range(number_of_programs(method)):
        program, expected, error = draw_program(method, size, seed)
        found = pool.run(carry_out, method, seed, program)
        assert len({crc for _, _, crc, _ in found}) == 1, program
        if method == "topk_owners" and size > 1:
            expected = replay(method, size, seed, program, found[0][3])
        for trajectory, raised, _, _ in found:
            assert (raised and raised[0]) == error, (program, raised)
            assert len(trajectory) == len(expected)
            for (_, operation), mine, theirs in zip(program, trajectory, expected, strict=False):
                np.testing.assert_allclose(mine, theirs, rtol=0, atol=tolerance_of(method),
                                           err_msg=f"after {operation} in {program}")


@pytest.mark.parametrize("method", METHODS)
def test_the_programs_use_every_operation(method):
    """Within 48 programs on two ranks; and gradients are thrown away after a reduction."""
    drawn = [[operation for _, operation in draw_program(method, 2, seed)[0]] for seed in range(48)]
    seen = {operation for program in drawn for operation in program}
    nowhere = {name for name, only in (("flush", "late"),) if only not in method}
    nowhere |= {"freeze", "unfreeze"} if "seng" in method else set()
    assert seen >= set(OPERATIONS) - nowhere
    pairs = {pair for program in drawn for pair in itertools.pairwise(program)}
    assert ("synchronize", "zero_grad") in pairs
    assert np.mean([len(program) for program in drawn]) > 8
