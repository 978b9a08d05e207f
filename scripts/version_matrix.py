"""Which versions of Python, PyTorch and TensorFlow Horovod builds for and runs with.

    python -m scripts.version_matrix --python 3.11 3.12 --torch 2.13.0 2.15.0 --tensorflow none 2.21.0
    python -m scripts.version_matrix --combination 3.13,2.15.0,none --write docs/install.md

Each combination gets an environment of its own, in which hvd-ext is installed, Horovod is built, and
``hvd-ext doctor`` reduces a vector over two ranks. What is done is kept in FOLDER/results.json, so that an
interrupted run goes on where it stopped. A combination takes 5 to 30 minutes and, with CUDA builds of
torch, 7 GB, which are freed when it is done.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hvd_ext.cli.horovod_source import patch_id
from hvd_ext.versions import HOROVOD

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- version_matrix -->", "<!-- /version_matrix -->"
LIMIT = 3600.0  # seconds for one step
NONE = "none"


@dataclass(frozen=True, order=True)
class Combination:
    """Versions to try together; ``none`` leaves a framework out."""

    python: str
    torch: str
    tensorflow: str

    @classmethod
    def of(cls, text: str) -> Combination:
        """From "PYTHON,TORCH,TENSORFLOW"."""
        parts = [part.strip() for part in text.split(",")]
        if len(parts) != 3 or not all(parts) or parts[1:] == [NONE, NONE]:
            raise argparse.ArgumentTypeError(
                f"a combination is PYTHON,TORCH,TENSORFLOW with at least one framework, such as "
                f"3.12,2.13.0,none; got {text!r}")
        return cls(*parts)

    @property
    def frameworks(self) -> list[str]:
        """What pip installs."""
        wanted = {"torch": self.torch, "tensorflow-cpu": self.tensorflow}
        return [f"{name}=={version}" for name, version in wanted.items() if version != NONE]


@dataclass(frozen=True)
class Result:
    """What became of one combination.

    Args:
        edits: the edits of Horovod's source that it was built with.
        built, ran: "yes", "no" or "not run".
        reason: of a "no" or "not run".
        found: versions as they name themselves, such as {"PyTorch": "2.13.0+cu130 (CUDA 13.0, 0 GPU)"}.
        seconds: of Horovod's build and installation.
    """

    combination: Combination
    edits: str
    built: str
    ran: str
    reason: str = ""
    found: dict[str, str] | None = None
    seconds: float = 0.0


class StepFailed(Exception):
    """A step of a combination ended with an error."""


def find_python(version: str) -> str | None:
    """An interpreter of this version on the machine: on the PATH, or one of pyenv's or uv's."""
    candidates = [shutil.which(f"python{version}")]
    for folder in (Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions",
                   Path.home() / ".local" / "share" / "uv" / "python"):
        candidates += [str(path) for path in sorted(folder.glob(f"*{version}.*/bin/python{version}"))]
    for candidate in candidates:
        if candidate and _says(candidate) == version:
            return candidate
    return None


def _says(python: str) -> str:
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def attempt(combination: Combination, folder: Path, *, keep: bool = False) -> Result:
    """Build and run one combination in an environment in ``folder``."""
    edits = patch_id()
    python = find_python(combination.python)
    if python is None:
        return Result(combination, edits, "not run", "not run", f"no Python {combination.python} here")
    home = folder / "-".join((combination.python, combination.torch, combination.tensorflow))
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    log = folder / f"{home.name}.log"
    log.unlink(missing_ok=True)
    try:
        return _attempt(combination, edits, python, home, log)
    finally:
        if not keep:
            shutil.rmtree(home, ignore_errors=True)


def _attempt(combination: Combination, edits: str, python: str, home: Path, log: Path) -> Result:
    bin_ = home / "bin"
    pip = [str(bin_ / "python"), "-m", "pip", "install", "--quiet"]
    try:
        _step([python, "-m", "venv", str(home)], log)
        _step([*pip, "--upgrade", "pip"], log)
        _step([*pip, *combination.frameworks], log)
        _step([*pip, str(ROOT)], log)
    except StepFailed as failure:
        return Result(combination, edits, "not run", "not run", str(failure))
    started = time.monotonic()
    try:
        _step([str(bin_ / "hvd-ext"), "install-horovod", "--no-gpu"], log)
    except StepFailed as failure:
        return Result(combination, edits, "no", "not run", str(failure), None, time.monotonic() - started)
    seconds = time.monotonic() - started
    command = [str(bin_ / "hvd-ext"), "doctor", "--json", "--timeout", "300"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=home, env=environ(bin_))
    with log.open("a") as lines:
        lines.write(done.stdout + done.stderr)
    return judged(combination, edits, done.stdout, seconds)


def judged(combination: Combination, edits: str, report: str, seconds: float) -> Result:
    """What the doctor's report says about a combination whose Horovod was built."""
    try:
        rows = {row["subject"]: row for row in json.loads(report)["findings"]}
    except (ValueError, KeyError):
        return Result(combination, edits, "yes", "no", "the doctor gave no report", None, seconds)
    wanted = {"torch": "PyTorch", "tensorflow": "TensorFlow"}
    titles = [title for name, title in wanted.items() if getattr(combination, name) != NONE]
    found = {title: rows[title]["value"] for title in titles if title in rows}
    bad = [f"{row['subject']}: {row['value']}" for row in rows.values() if row["level"] == "problem"]
    ran = all(rows.get(f"Self-test {title}", {}).get("level") == "ok" for title in titles)
    return Result(combination, edits, "yes", "yes" if ran else "no", "; ".join(bad), found, seconds)


def environ(bin_: Path) -> dict[str, str]:
    """Variables of an environment of its own: nothing of the one that this script runs in."""
    kept = {name: value for name, value in os.environ.items()
            if name not in ("PYTHONPATH", "VIRTUAL_ENV", "HVD_EXT_FRAMEWORKS", "PYENV_VERSION")
            and not name.startswith("HOROVOD_")}
    return {**kept, "PATH": f"{bin_}{os.pathsep}{kept['PATH']}", "OMP_NUM_THREADS": "1"}


def _step(command: Sequence[str], log: Path) -> None:
    with log.open("a") as lines:
        lines.write(f"$ {' '.join(command)}\n")
        lines.flush()
        before = lines.tell()
        try:
            done = subprocess.run(command, stdout=lines, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                  cwd=log.parent, env=environ(Path(command[0]).parent), timeout=LIMIT)
        except subprocess.TimeoutExpired:
            raise StepFailed(f"{' '.join(command[:4])}: no end after {LIMIT:g} s") from None
    if done.returncode:
        said = log.read_text(errors="replace")[before:].strip().splitlines()
        errors = [line.strip() for line in said if "error" in line.lower()] or said[-1:]
        raise StepFailed(" ".join(errors[:1])[:200])


def load(path: Path) -> list[Result]:
    """The results of earlier runs."""
    if not path.exists():
        return []
    rows = json.loads(path.read_text())
    return [Result(**{**row, "combination": Combination(**row["combination"])}) for row in rows]


def save(path: Path, results: Iterable[Result]) -> None:
    """Keep the results, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    os.replace(part, path)


def run(combinations: Sequence[Combination], folder: Path, *, again: bool = False,
        one: Callable[[Combination, Path], Result] = attempt) -> list[Result]:
    """Try what was not tried with these edits, and give the results of all that were ever tried."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    results = {result.combination: result for result in load(path)}
    for combination in combinations:
        known = results.get(combination)
        if known is not None and known.edits == patch_id() and known.built != "not run" and not again:
            continue
        print(f"{combination.python}, torch {combination.torch}, tensorflow {combination.tensorflow} ...",
              flush=True)
        results[combination] = one(combination, folder)
        save(path, results.values())
        print(f"  built: {results[combination].built}, ran: {results[combination].ran} "
              f"{results[combination].reason}", flush=True)
    return sorted(results.values(), key=lambda result: _order(result.combination))


def _order(combination: Combination) -> list[list[int]]:
    parts = (combination.python, combination.torch, combination.tensorflow)
    return [[int(number) if number.isdigit() else -1 for number in part.split(".")] for part in parts]


def table(results: Sequence[Result]) -> str:
    """The results as a table in Markdown."""
    lines = ["| Python | PyTorch | TensorFlow | built | two ranks | |", "|---|---|---|---|---|---|"]
    for result in results:
        found = result.found or {}
        torch, tensorflow = (
            "-" if version == NONE else found.get(title, version)
            for version, title in ((result.combination.torch, "PyTorch"),
                                   (result.combination.tensorflow, "TensorFlow")))
        # "2.15.0+cu130 (CUDA 13.0, 0 GPU); tested with 2.13.0": the version is enough.
        torch, tensorflow = torch.split(" ")[0], tensorflow.split(" ")[0]
        reason = " ".join(result.reason.split()).replace("|", "/")
        cells = (result.combination.python, torch, tensorflow, result.built, result.ran, reason)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write(path: Path, text: str) -> None:
    """Put ``text`` between the two markers of a page.

    Raises:
        ValueError: the page does not have each marker once, in this order.
    """
    page = path.read_text()
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(END) < page.index(BEGIN):
        raise ValueError(f"{path} must have {BEGIN} and {END} once each, in this order")
    head, rest = page.split(BEGIN)
    path.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m scripts.version_matrix", description=__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("python", "torch", "tensorflow"):
        top.add_argument(f"--{name}", nargs="+", default=[], metavar="VERSION",
                         help=f"versions of {name}, each with each of the others")
    top.add_argument("--combination", action="append", default=[], type=Combination.of,
                     metavar="PYTHON,TORCH,TENSORFLOW", help="one combination; may be repeated")
    top.add_argument("--folder", type=Path, default=ROOT / "out" / "version_matrix",
                     help="where environments, logs and results are kept (default: %(default)s)")
    top.add_argument("--again", action="store_true", help="try also what has been tried")
    top.add_argument("--write", type=Path, metavar="PAGE", help="put the table between the page's markers")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the matrix; the exit status is 1 when something was built or run and failed."""
    args = parser().parse_args(argv)
    product = itertools.product(args.python, args.torch or [NONE], args.tensorflow or [NONE])
    wanted = [Combination(*parts) for parts in product if parts[1:] != (NONE, NONE)] + args.combination
    results = run(wanted, args.folder, again=args.again)
    text = table(results)
    print(f"Horovod {HOROVOD}, edits {patch_id()}\n{text}")
    if args.write:
        write(args.write, text)
    return int(any("no" in (result.built, result.ran) for result in results))


if __name__ == "__main__":
    sys.exit(main())
