"""Run tests as other machines would: with other instruction sets, and with a scheduler that gives little.

    python -m scripts.portable_tests                                  # every configuration, three times
    python -m scripts.portable_tests tests/torch -k delay --repeats 1 --configurations plain one-core
    python -m scripts.portable_tests -m distributed --configurations busy
    python -m scripts.portable_tests tests/core -- -n 2               # behind --: further options of pytest

Numbers may differ from one machine to another by rounding, and threads may run in any order. A test that
cannot stand that falls here. Configurations run one at a time, and a table says which tests fell in each
and how often. The exit status is 1 when anything fell, a run ended without a result or ran no tests.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUSY = "while True: pass"


@dataclass(frozen=True)
class Configuration:
    """How one run of the tests differs from an ordinary run.

    Args:
        name: what the command line and the table call it.
        environment: variables on top of this process's.
        needs: flags in ``/proc/cpuinfo`` without which the processor cannot run it.
        one_core: whether all processes of the tests share one core.
        busy: whether a busy loop of higher priority runs on that core too.
    """

    name: str
    environment: dict[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    one_core: bool = False
    busy: bool = False

    def lacks(self, flags: set[str]) -> list[str]:
        """What this processor does not have of what the configuration needs."""
        return [flag for flag in self.needs if flag not in flags]

    def command(self, core: int, selection: Sequence[str], report: Path) -> list[str]:
        """The command line that runs the selected tests and writes a report in JUnit's XML."""
        before = ["taskset", "-c", str(core)] if self.one_core else []
        before += ["nice", "-n", "10"] if self.busy else []
        return [*before, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o",
                "junit_family=xunit1", f"--junitxml={report}", *selection]


def openblas(core_type: str, *needs: str) -> Configuration:
    """NumPy's products by OpenBLAS' kernels for another kind of processor."""
    return Configuration(f"openblas-{core_type.lower()}", {"OPENBLAS_CORETYPE": core_type}, needs)


CONFIGURATIONS = {one.name: one for one in (
    Configuration("plain"),
    Configuration("aten-default", {"ATEN_CPU_CAPABILITY": "default"}),
    Configuration("aten-avx2", {"ATEN_CPU_CAPABILITY": "avx2"}, ("avx2", "fma")),
    Configuration("mkl-compatible", {"MKL_CBWR": "COMPATIBLE"}),
    Configuration("onednn-sse41", {"ONEDNN_MAX_CPU_ISA": "SSE41"}, ("sse4_1",)),
    Configuration("onednn-avx2", {"ONEDNN_MAX_CPU_ISA": "AVX2"}, ("avx2",)),
    Configuration("tf-onednn-off", {"TF_ENABLE_ONEDNN_OPTS": "0"}),
    openblas("Prescott", "pni"),
    openblas("Nehalem", "sse4_2"),
    openblas("Haswell", "avx2", "fma"),
    openblas("SkylakeX", "avx512f", "avx512bw", "avx512dq", "avx512vl"),
    Configuration("numpy-baseline", {"NPY_DISABLE_CPU_FEATURES": "X86_V3"}),
    Configuration("numba-generic", {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}),
    Configuration("one-core", one_core=True),
    Configuration("busy", one_core=True, busy=True),
)}


@dataclass(frozen=True)
class Run:
    """What became of one run: each test's name and "passed", "failed" or "skipped"."""

    configuration: str
    status: int
    tests: dict[str, str]


def cpu_flags(path: Path = Path("/proc/cpuinfo")) -> set[str]:
    """What the processor can do, as Linux names it."""
    for line in path.read_text().splitlines():
        if line.startswith("flags"):
            return set(line.split(":", 1)[1].split())
    return set()


def read_report(path: Path) -> dict[str, str]:
    """Each test's state in pytest's report; empty where there is no whole report."""
    try:
        cases = ElementTree.parse(path).iter("testcase")
    except (FileNotFoundError, ElementTree.ParseError):
        return {}
    found: dict[str, str] = {}
    for case in cases:
        name = f"{case.get('file') or case.get('classname')}::{case.get('name')}"
        parts = {part.tag for part in case}
        state = "failed" if parts & {"failure", "error"} else "skipped" if "skipped" in parts else "passed"
        if found.get(name) != "failed":  # a test whose teardown raises has a second entry
            found[name] = state
    return found


@contextlib.contextmanager
def busy_loop(core: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process that keeps a core busy meanwhile."""
    loop = subprocess.Popen(["taskset", "-c", str(core), sys.executable, "-c", BUSY])
    try:
        yield loop
    finally:
        loop.kill()
        loop.wait()


def run_once(configuration: Configuration, selection: Sequence[str], folder: Path, number: int) -> Run:
    """Run the selected tests in one configuration; output and report are kept in ``folder``."""
    report, log = (folder / f"{configuration.name}-{number}.{kind}" for kind in ("xml", "log"))
    report.unlink(missing_ok=True)
    core = min(os.sched_getaffinity(0))
    environment = {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "2", **os.environ,
                   **configuration.environment}
    with log.open("wb") as out, busy_loop(core) if configuration.busy else contextlib.nullcontext():
        done = subprocess.run(configuration.command(core, selection, report), cwd=ROOT, env=environment,
                              stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
    return Run(configuration.name, done.returncode, read_report(report))


def fallen(runs: Sequence[Run]) -> Counter[str]:
    """How many of the runs each test fell in; a run that ended otherwise is an entry of its own."""
    counts: Counter[str] = Counter()
    for run in runs:
        names = [name for name, state in run.tests.items() if state == "failed"]
        # 1 is pytest's status when tests failed, 0 when none did.
        bad_end = run.status != (1 if names else 0) or not run.tests
        counts.update(names + [f"pytest ended with status {run.status}"] * bad_end)
    return counts


def table(runs: Sequence[Run], left_out: dict[str, list[str]]) -> str:
    """One row a configuration, in Markdown.

    Args:
        runs: in any order, several of each configuration.
        left_out: configurations that this processor cannot run, and what it lacks.
    """
    lines = ["| configuration | runs | passed each time | skipped | failed | fell (in how many runs) |",
             "|---|--:|--:|--:|--:|---|"]
    for name in dict.fromkeys(run.configuration for run in runs):
        mine = [run for run in runs if run.configuration == name]
        states: dict[str, set[str]] = {}
        for run in mine:
            for test, state in run.tests.items():
                states.setdefault(test, set()).add(state)
        count = Counter("failed" if "failed" in seen else "passed" if "passed" in seen else "skipped"
                        for seen in states.values())
        fell = "<br>".join(f"{test} ({times})" for test, times in fallen(mine).items())
        lines.append(f"| {name} | {len(mine)} | {count['passed']} | {count['skipped']} | {count['failed']} "
                     f"| {fell} |")
    lines += [f"| {name} | 0 | | | | not run: the processor lacks {', '.join(flags)} |"
              for name, flags in left_out.items()]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m scripts.portable_tests", description=__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("paths", nargs="*", default=["tests"], help="of tests (default: tests)")
    top.add_argument("-m", dest="marked", default="not distributed", metavar="EXPRESSION",
                     help="which marks tests must have (default: %(default)s)")
    top.add_argument("-k", dest="named", metavar="EXPRESSION", help="which names tests must have")
    top.add_argument("--configurations", nargs="+", choices=list(CONFIGURATIONS), metavar="NAME",
                     help=f"of {', '.join(CONFIGURATIONS)} (default: all that this processor can run)")
    top.add_argument("--repeats", type=int, default=3, help="runs of each (default: %(default)s)")
    top.add_argument("--folder", type=Path, default=ROOT / "out" / "portable_tests",
                     help="where output and reports are kept (default: %(default)s)")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the configurations and print the table; the exit status is 1 when anything fell."""
    given = list(sys.argv[1:] if argv is None else argv)
    cut = given.index("--") if "--" in given else len(given)
    top = parser()
    args, further = top.parse_args(given[:cut]), given[cut + 1:]
    if args.repeats < 1:
        top.error(f"--repeats must be at least 1, got {args.repeats}")
    flags = cpu_flags()
    wanted = [CONFIGURATIONS[name] for name in args.configurations or CONFIGURATIONS]
    left_out = {one.name: lacking for one in wanted if (lacking := one.lacks(flags))}
    if args.configurations and left_out:
        top.error("; ".join(f"{name} needs {', '.join(lacking)}, which this processor lacks"
                            for name, lacking in left_out.items()))
    selection = [*args.paths, "-m", args.marked, *(["-k", args.named] if args.named else []), *further]
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    runs: list[Run] = []
    try:
        for one in wanted:
            for number in range(1, args.repeats + 1) if one.name not in left_out else ():
                began = time.monotonic()
                runs.append(run_once(one, selection, folder, number))
                print(f"{one.name} {number}: {time.monotonic() - began:.0f} s, "
                      f"{', '.join(fallen(runs[-1:])) or 'nothing fell'}", flush=True)
    finally:  # also of a run that was interrupted
        print(table(runs, left_out))
    return int(bool(fallen(runs)))


if __name__ == "__main__":
    sys.exit(main())
