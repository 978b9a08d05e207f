"""The combinations, and how one is run and judged."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import time
from dataclasses import dataclass

from tests.ranks import ROOT, command_of, environment_of_ranks, kill_tree, launch_command

FRONT_ENDS = ("torch", "tensorflow")
METHODS = ("plain", "fp16", "delay", "topk", "powersgd", "seng")
SERVERS = ("none", "replicated", "rank0", "sharded")
DISAGREE = ("extension", "setting", "server", "shape", "dtype", "missing_parameter")
MAY_FINISH = ("missing_gradient", "nan")  # the ranks go on together, or skip, or fail together
LEAVE = ("more_optimizers", "more_steps", "raise", "exit", "kill", "stop")
FAULTS = (*DISAGREE, *MAY_FINISH, *LEAVE)
LIMITS = "4,10"  # HVD_EXT_TIMEOUT
SECONDS = 75.0  # with the start of two frameworks' ranks, the first limit and the way down


@dataclass(frozen=True)
class Case:
    """One run: what both ranks are given, and what is wrong on rank 1."""

    front_end: str
    method: str
    server: str
    fault: str

    def __str__(self) -> str:
        return f"{self.front_end}-{self.method}-{self.server}-{self.fault}"


@dataclass(frozen=True)
class Ended:
    """How a run ended: the launcher's status, None when it had to be killed; and what was printed."""

    status: int | None
    output: str
    seconds: float

    def says(self, rank: int, word: str) -> bool:
        """Whether rank ``rank`` printed a line with ``word``."""
        return any(line.startswith(f"rank {rank} {word}") for line in self.output.splitlines())


def every_case(front_ends: tuple[str, ...] = FRONT_ENDS) -> list[Case]:
    """All combinations."""
    return [Case(*one) for one in itertools.product(front_ends, METHODS, SERVERS, FAULTS)]


def drawn_cases() -> list[Case]:
    """All combinations, or those that ``HVD_EXT_MATRIX`` says, drawn with ``HVD_EXT_SEED`` (0).

    "150" are the first 150 drawn, "150-300" the next 150.
    """
    cases = every_case()
    if "HVD_EXT_MATRIX" not in os.environ:
        return cases
    random.Random(int(os.environ.get("HVD_EXT_SEED", "0"))).shuffle(cases)
    first, _, last = os.environ["HVD_EXT_MATRIX"].rpartition("-")
    return cases[int(first or 0):int(last)]


def quick_cases() -> list[Case]:
    """Each fault once in each front end, over methods and servers in turn."""
    found = []
    for shift, front_end in enumerate(FRONT_ENDS):
        for number, fault in enumerate(FAULTS):
            if front_end == "tensorflow" and number % 2:
                continue
            found.append(Case(front_end, METHODS[(number + 2 * shift) % len(METHODS)],
                              SERVERS[(number + shift) % len(SERVERS)], fault))
    return [*found, Case("tensorflow", "seng", "none", "extension")]  # SENG compares layers when it is traced


def run(case: Case) -> Ended:
    """Run a case on two ranks of its own."""
    environment = environment_of_ranks(HVD_EXT_TIMEOUT=LIMITS)
    command = command_of(case.front_end, "tests.matrix.program", case.front_end, case.method, case.server,
                         case.fault, environment=environment)
    began = time.monotonic()
    process = subprocess.Popen(launch_command(2, command), cwd=ROOT, env=environment,
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.STDOUT, start_new_session=True)
    try:
        output, _ = process.communicate(timeout=SECONDS)
        status: int | None = process.returncode
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        output, status = process.communicate()[0], None
    return Ended(status, output, time.monotonic() - began)


def wrong(case: Case, ended: Ended) -> str | None:
    """What is not as it should be; None when all is."""
    if ended.status is None:
        return "hung"
    if case.fault in MAY_FINISH:
        same = [ended.says(0, word) == ended.says(1, word) for word in ("finished", "failed")]
        return None if all(same) and (ended.says(0, "finished") or ended.says(0, "failed")) \
            else "the ranks did not end alike"
    if ended.says(0, "finished") and case.fault not in ("more_optimizers", "more_steps"):
        return "rank 0 noticed nothing"
    if case.fault in DISAGREE and not (ended.says(0, "failed") and ended.says(1, "failed")):
        return "not an error on both ranks"
    if case.fault in DISAGREE and "compared with rank 0" not in ended.output \
            and "differ" not in ended.output:
        return "the error does not say what differs"
    if case.fault == "stop" and "rank 1 does not answer" not in ended.output:
        return "the stopped rank was not named"
    return None
