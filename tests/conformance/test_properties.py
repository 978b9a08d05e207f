"""Every property that an extension has, stated once for both front ends."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest

from tests.conformance import properties, references
from tests.conformance.methods import COMPENSATION, ERROR, LATE, METHODS, SPREADS, VARIANTS
from tests.conformance.references import Tensors
from tests.conftest import LEFT_OUT
from tests.ranks import run_ranks
from tests.tolerances import rounding_tolerance

pytestmark = pytest.mark.distributed

FRONT_ENDS = [name for name in ("torch", "tensorflow")
              if name not in LEFT_OUT and importlib.util.find_spec(f"horovod.{name}")]
STEPS = properties.STEPS
both = pytest.mark.parametrize("front_end", FRONT_ENDS)


def by_name(names: Iterable[str]) -> Any:
    """The parameter ``name``; tests of variants are for ``make test-long``."""
    return pytest.mark.parametrize("name", [
        pytest.param(name, marks=pytest.mark.extended if name in VARIANTS else ()) for name in names])


WITH_REFERENCE = [name for name, method in METHODS.items() if method.reference]
WITH_OTHER = [name for name, method in METHODS.items() if method.other]


def expected_weights(name: str, tensors: Tensors, start: np.ndarray, workers: Sequence[int], steps: int, *,
                     passes: int = 1, skipped: int | None = None, alone: bool = False) -> list[np.ndarray]:
    """The weights after each step of one process that has all workers' gradients; without the extension where
    a worker is ``alone``, outside of a process set."""
    method = METHODS[name]
    assert method.reference is not None
    reduce, late = method.reference(len(workers), tensors), method.late
    if alone:
        reduce, late = references.mean, False

    def flat(worker: int, step: int) -> np.ndarray:
        each = [properties.gradients_of(tensors, worker, step, number) for number in range(passes)]
        return np.concatenate([np.ravel(sum(parts)) for parts in zip(*each, strict=True)])

    return references.trajectory(
        reduce, references.update_of(method.optimizer), start,
        [[flat(worker, step) for worker in workers] for step in range(steps)], late=late,
        lam=COMPENSATION.get(name, 0.0), skipped=skipped)


def compare_weights(found: Sequence[np.ndarray], expected: Sequence[np.ndarray], tolerance: float) -> None:
    """Equal to rounding, step by step."""
    for step, (mine, reference) in enumerate(zip(found, expected, strict=True)):
        np.testing.assert_allclose(mine, reference, rtol=tolerance, atol=tolerance, err_msg=f"step {step}")


@pytest.fixture(scope="session")
def journeys(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """``journeys(ranks, front_end, name)``: the ranks' journeys, each made once."""
    @functools.cache
    def make(ranks: Any, front_end: str, name: str) -> Any:
        folder = tmp_path_factory.mktemp("journey")
        return ranks(2, init=front_end).run(properties.journey, front_end, name, str(folder), timeout=120)

    return make


@both
@by_name(METHODS)
class TestJourney:
    """One training of two ranks."""

    def test_replicas_hold_the_same_bits(self, ranks, journeys, front_end, name):
        first, second = journeys(ranks, front_end, name)
        assert first.bits == second.bits
        assert len(set(first.bits)) >= len(first.bits) - METHODS[name].late
        assert first.poisoned["bits"] == second.poisoned["bits"]

    def test_weights_are_the_references(self, ranks, journeys, front_end, name):
        if METHODS[name].reference is None:
            pytest.skip("has its reference in a file of its own")
        for one in journeys(ranks, front_end, name):
            compare_weights(one.weights, expected_weights(name, one.tensors, one.start, (0, 1), 2 * STEPS),
                            METHODS[name].tolerance)

    def test_a_checkpoint_goes_on_bit_for_bit(self, ranks, journeys, front_end, name):
        assert all(one.resumed for one in journeys(ranks, front_end, name))

    def test_an_elastic_commit_brings_everything_back(self, ranks, journeys, front_end, name):
        assert all(one.restored for one in journeys(ranks, front_end, name))

    def test_a_bad_gradient_of_one_rank_is_met_alike(self, ranks, journeys, front_end, name):
        method = METHODS[name]
        for one in journeys(ranks, front_end, name):
            found = one.poisoned
            assert ("the update " in found["said"]) == (method.bad == ERROR)
            if method.bad == ERROR:
                continue
            if method.bad == SPREADS:
                assert not np.isfinite(found["weights"][-1]).all()  # as under a plain allreduce
                continue
            assert found["taken"] == 2
            assert found["bits"][method.late] == (found["bits"][0] if method.late else one.bits[-1])
            assert np.isfinite(found["weights"][-1]).all()
            assert found["bits"][2] != found["bits"][1]
            if method.reference is not None:  # nothing is left of it in what the extension keeps
                expected = expected_weights(name, one.tensors, one.start, (0, 1), properties.POISONED + 3,
                                            skipped=properties.POISONED)
                compare_weights(found["weights"], expected[properties.POISONED:], method.tolerance)


@pytest.mark.parametrize(("front_end", "size"), [
    pytest.param(front_end, size, marks=pytest.mark.extended if front_end != "torch" and size != 3 else ())
    for front_end in FRONT_ENDS for size in (1, 3, 4)])
def test_any_number_of_ranks_gives_what_one_process_gives(ranks, front_end, size):
    for name in WITH_REFERENCE:
        everyone = ranks(size, init=front_end).run(
            properties.weights_of_steps, front_end, name, 3, timeout=120)
        tensors, start, _, bits, _ = everyone[0]
        expected = expected_weights(name, tensors, start, range(size), 3)
        for _, _, weights, own, _ in everyone:
            assert own == bits, name
            compare_weights(weights, expected, METHODS[name].tolerance)


@both
@by_name(WITH_REFERENCE)
def test_micro_batches_add_up(ranks, front_end, name):
    for tensors, start, weights, _, _ in ranks(2, init=front_end).run(
            properties.weights_of_steps, front_end, name, 3, 2, timeout=120):
        compare_weights(weights, expected_weights(name, tensors, start, (0, 1), 3, passes=2),
                        2 * METHODS[name].tolerance)


@both
@by_name(LATE)
def test_every_method_is_itself_one_step_late(ranks, front_end, name):
    everyone = ranks(2, init=front_end).run(properties.one_step_late, front_end, name, 4, timeout=120)
    assert everyone[0] == everyone[1]
    for synchronous, late in everyone:
        assert len(set(synchronous)) == len(synchronous)
        assert late[0] == late[1]
        assert late[1:] == synchronous[:-1]


@both
@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_single_precision_and_bytes(ranks, front_end, name):
    """Also where ranks have their gradients in opposite orders."""
    method = METHODS[name]
    everyone = ranks(2, init=front_end).run(
        properties.weights_of_steps, front_end, name, 3, 1, "float32", True, timeout=120)
    for tensors, start, weights, bits, report in everyone:
        assert bits == everyone[0][3]
        # Each of 3 steps rounds some ten times in what is below 8.
        compare_weights(weights, expected_weights(name, tensors, start, (0, 1), 3),
                        max(method.tolerance, rounding_tolerance("float32", 30, 8)))
        for kind, count in method.bytes(2, tensors).items() if method.bytes else ():
            assert report["sent"][kind] == pytest.approx(count, rel=1e-2), kind


@both
def test_ranks_that_disagree_are_all_told(ranks, front_end):
    for said in ranks(2, init=front_end).run(properties.disagree, front_end, WITH_OTHER, timeout=200):
        for what, error in said.items():
            assert "rank 1" in error, (what, error)


@both
def test_members_of_a_process_set_train_together_and_others_alone(front_end):
    names = [name for name in WITH_REFERENCE if name not in VARIANTS]
    everyone = run_ranks(properties.members_and_others, 3, front_end, names, 3, init=front_end, timeout=240,
                         env={"HOROVOD_DYNAMIC_PROCESS_SETS": "1"})
    for name in names:
        for rank, (tensors, start, weights, bits) in enumerate(one[name] for one in everyone):
            workers = (1,) if rank == 1 else (0, 2)
            compare_weights(weights, expected_weights(name, tensors, start, workers, 3, alone=rank == 1),
                            METHODS[name].tolerance)
            assert (bits == everyone[0][name][3]) == (rank != 1), name
