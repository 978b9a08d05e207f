"""What ranks do for the suite. Each function is called on every rank, with a front end's name.

A front end has a ``Trainer`` (``torch_trainer.py``, ``tensorflow_trainer.py``): a model, its distributed
optimizer, a step with given gradients or on a batch, weights, state, checkpoints. A third front end would be
one such file.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.conformance.methods import LATE, METHODS
from tests.conformance.references import Tensors
from tests.problems import worker_gradients

SHAPES = ((12, 9), (5,), (10, 3, 4), (20, 21), ())
STEPS = 4  # before the checkpoint, and as many after it
POISONED = 2 * STEPS  # the step in which one rank's gradient is not finite


def front_end_module(front_end: str) -> Any:
    """Its module of Horovod's interface."""
    return importlib.import_module({"torch": "hvd_ext.torch", "tensorflow": "hvd_ext.tensorflow.keras"}
                                   [front_end])


def make_trainer(front_end: str, name: str, *, shapes: Sequence[tuple[int, ...]] = SHAPES,
                 **options: Any) -> Any:
    """A trainer of the method of that name."""
    module = importlib.import_module(f"tests.conformance.{front_end}_trainer")
    return module.Trainer(METHODS[name], shapes, **options)


def gradients_of(tensors: Tensors, worker: int, step: int, number: int = 0) -> list[np.ndarray]:
    """A worker's gradient of one micro-batch, by tensor."""
    return worker_gradients(tensors.shapes, worker=worker, step=1000 * number + step)


def train(trainer: Any, worker: int, step: int, *, passes: int = 1, poison: bool = False,
          other_way: bool = False) -> None:
    """Take step ``step`` with what ``worker`` has for it."""
    if trainer.network:
        rng = np.random.default_rng([worker, step])
        x, y = (rng.normal(size=(8, n)) for n in (6, 3))
        x[0, 0] = np.nan if poison else x[0, 0]
        trainer.fit(x, y)
        return
    gradients = [gradients_of(trainer.tensors, worker, step, number) for number in range(passes)]
    if poison:
        gradients[0][0][1, 2] = np.nan
    trainer.step(gradients, other_way=other_way)


@dataclass
class Journey:
    """What one training showed on one rank."""

    tensors: Tensors
    start: np.ndarray
    weights: list[np.ndarray] = field(default_factory=list)  # after each step
    bits: list[bytes] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)  # before the bad step
    restored: bool = False  # an elastic commit brought everything back
    resumed: bool = False  # a checkpoint did, into another model
    poisoned: dict[str, Any] = field(default_factory=dict)


def journey(front_end: str, name: str, folder: str) -> Journey:
    """Train, commit, save, train on, go back to the commit; resume in another model, meet a NaN, go on."""
    hvd = front_end_module(front_end)
    trainer = make_trainer(front_end, name)
    seen = Journey(trainer.tensors, trainer.weights())

    def take(one: Any, steps: Sequence[int]) -> list[bytes]:
        found = []
        for step in steps:
            train(one, hvd.rank(), step)
            found.append(one.bits())
            if len(seen.weights) < POISONED:
                seen.weights.append(one.weights())
        return found

    seen.bits += take(trainer, range(STEPS))
    before, commit = trainer.digest(), trainer.commit()
    trainer.save(folder, STEPS)
    seen.bits += take(trainer, range(STEPS, POISONED))
    seen.report, after = trainer.report(), trainer.digest()
    other = make_trainer(front_end, name, seed=1)
    resumed = other.load(folder) == STEPS and other.digest() == before
    seen.resumed = resumed and take(other, range(STEPS, POISONED)) == seen.bits[STEPS:] \
        and other.digest() == after
    commit.restore()
    seen.restored = take(trainer, range(STEPS, POISONED)) == seen.bits[STEPS:]
    seen.poisoned = _poison(hvd, other)
    return seen


def _poison(hvd: Any, trainer: Any) -> dict[str, Any]:
    """A gradient that is not finite on the last rank, and two steps after it: the weights, skipped steps."""
    before = trainer.report()["steps"]
    weights, bits, said = [], [], ""
    try:
        for step in range(POISONED, POISONED + 3):
            train(trainer, hvd.rank(), step, poison=step == POISONED and hvd.rank() == hvd.size() - 1)
            weights.append(trainer.weights())
            bits.append(trainer.bits())
    except Exception as error:
        said = str(error)
    return {"weights": weights, "bits": bits, "said": said,
            "taken": trainer.report()["steps"] - before}


def weights_of_steps(front_end: str, name: str, steps: int, passes: int = 1, dtype: str = "float64",
                     other_way: bool = False) -> tuple[Tensors, np.ndarray, list[np.ndarray], bytes,
                                                     dict[str, Any]]:
    """Tensors, weights at the start and after each step, bits at the end, and the report."""
    hvd = front_end_module(front_end)
    trainer = make_trainer(front_end, name, passes=passes, dtype=dtype)
    start, found = trainer.weights(), []
    for step in range(steps):
        train(trainer, hvd.rank(), step, passes=passes, other_way=other_way)
        found.append(trainer.weights())
    return trainer.tensors, start, found, trainer.bits(), trainer.report()


def one_step_late(front_end: str, name: str, steps: int) -> tuple[list[bytes], list[bytes]]:
    """The bits after each step: as they are, and with ``overlap=`` one step late and not compensated."""
    hvd, found = front_end_module(front_end), []
    for method in (METHODS[name], LATE[name]):
        trainer = make_trainer(front_end, name, options=method.options)
        found.append([trainer.bits()])
        for step in range(steps):
            train(trainer, hvd.rank(), step)
            found[-1].append(trainer.bits())
    return found[0], found[1]


def disagree(front_end: str, names: Sequence[str]) -> dict[tuple[str, str], str]:
    """By method and by what differs on rank 1, its arguments or a shape: what a step says."""
    hvd, said = front_end_module(front_end), {}
    for name, what in itertools.product(names, ("arguments", "shape")):
        other = hvd.rank() == 1 and {"arguments": {"options": METHODS[name].other},
                                     "shape": {"shapes": ((12, 10), *SHAPES[1:])}}[what]
        if what == "shape" and METHODS[name].network:
            continue
        trainer = make_trainer(front_end, name, **(other or {}))
        try:
            train(trainer, hvd.rank(), 0)
            said[name, what] = "no error"
        except Exception as error:
            said[name, what] = f"{type(error).__name__}: {error}"
    return said


def members_and_others(front_end: str, names: Sequence[str], steps: int) -> dict[str, Any]:
    """By method, what ``weights_of_steps`` gives where ranks 0 and 2 of 3 are a process set."""
    hvd = front_end_module(front_end)
    module = hvd if front_end == "torch" else importlib.import_module("hvd_ext.tensorflow")
    members, found = module.add_process_set([0, 2]), {}
    for name in names:
        trainer = make_trainer(front_end, name, process_set=members)
        start, weights = trainer.weights(), []
        for step in range(steps):
            train(trainer, hvd.rank(), step)
            weights.append(trainer.weights())
        found[name] = trainer.tensors, start, weights, trainer.bits()
    module.remove_process_set(members)
    return found
