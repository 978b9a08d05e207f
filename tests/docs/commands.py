"""Command lines of README.md and docs/*.md, in blocks and in the text, and what can be said of each unrun."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.docs.blocks import PAGES, ROOT, blocks_in, find_prose

WORDS = ("python", "make", "hvd-ext", ".venv/bin/hvd-ext", "pytest", "mpirun", "horovodrun", "srun", "pip",
         "apptainer", "module")
ASSIGNMENT = re.compile(r"[A-Z_]+=")
USERS = {"train.py", "image.sif", "cluster.json", "run.json", "./discover.sh"}  # files of the reader's own
# What is not a command although it begins as one: messages.
MESSAGES = ("pip could not", "srun has no", "mpirun has detected")
# What a command within a sentence leaves open, by the word it ends with.
ENDS = {"--only": ["dense"], "--gloo-timeout-seconds": ["60"], "--measure": ["--params", "1e6"]}
# Options of launchers that are not asked themselves, with the number of their arguments.
MPIRUN = {"-np": 1, "-H": 1, "-x": 1, "--bind-to": 1, "--mca": 2, "--oversubscribe": 0,
          "--enable-recovery": 0}
SRUN = {"--mpi=pmix": 0, "--kill-on-bad-exit=0": 0, "-N": 1, "--ntasks-per-node=4": 0}
APPTAINER = {"--nv": 0}
PIP = {"install", "wheel", "download", "uninstall"}


@dataclass(frozen=True)
class Command:
    """One command as a shell would run it.

    Args:
        place: ``page:line``.
        words: the command, variables before it among them.
        block: whether it stands in a block, and not within a sentence, which may leave out its end.
    """

    place: str
    words: tuple[str, ...]
    block: bool

    def __str__(self) -> str:
        return f"{self.place} {shlex.join(self.words)}"


class Wrong(AssertionError):
    """A command that would not do what the page says."""


def find_commands() -> list[Command]:
    """All of them, in the order of the pages."""
    return [command for page in PAGES for command in (*_in_blocks(page), *_in_text(page))]


def _in_blocks(page: str) -> Iterator[Command]:
    for block in blocks_in("sh"):
        if block.page == page:
            line = block.line
            for text in re.split(r"(?<!\\)\n", block.source.rstrip("\n")):
                line += 1
                for part in shlex.join(shlex.split(text.replace("\\\n", " "), comments=True)).split(" '&&' "):
                    if part:
                        yield Command(f"{page}:{line}", tuple(shlex.split(part)), True)
                line += text.count("\n")


def _in_text(page: str) -> Iterator[Command]:
    prose = find_prose(page)
    for found in re.finditer(r"`([^`]+)`", prose):
        text = " ".join(found.group(1).split())
        try:
            words = shlex.split(re.sub(r" \[.*\]$", "", text))
        except ValueError:  # an apostrophe: a message, not a command
            continue
        first = next((word for word in words if not ASSIGNMENT.match(word)), "")
        if first in WORDS and len(words) > 1 and not text.startswith(MESSAGES):
            words += ENDS.get(words[-1], [])
            if first == "horovodrun" and "-np" not in words:
                words += ["-np", "2", "true"]
            yield Command(f"{page}:{prose[:found.start()].count(chr(10)) + 1}", tuple(words), False)


def find_programs(command: Command) -> list[tuple[str, ...]]:
    """The (module, argument, ...) of this repository that a command runs, behind launchers.

    Raises:
        Wrong: a word of the command is not what its program takes.
    """
    words = list(command.words)
    while words and ASSIGNMENT.match(words[0]):
        del words[0]
    return list(_programs(words)) if words else []


def _programs(words: Sequence[str]) -> Iterator[tuple[str, ...]]:
    words = [word for word in words if word != "..."]
    name = words[0].rsplit("/", 1)[-1] if words else ""
    if name == "mpirun":
        yield from _programs(_after_options(words, MPIRUN))
    elif name == "srun":
        yield from _programs(_after_options(words, SRUN))
    elif name == "horovodrun":
        yield from _programs(_horovodruns(words))
    elif name == "apptainer":
        _require(words[1] == "exec", words)
        _require(_after_options(words[1:], APPTAINER)[0] in USERS, words)
        yield from _programs(_after_options(words[1:], APPTAINER)[1:])
    elif name == "hvd-ext":
        yield from _programs(_hvd_exts(words))
    elif name == "make":
        _check_make(words[1:])
    elif name == "pytest":
        _check_pytest(words[1:])
    elif name == "pip":
        _check_pip(words)
    elif name == "python":
        yield from _pythons(words)
    elif name == "module":
        _require(words[1] == "load", words)
    else:
        _require(not words or words == ["true"], words)


def _require(holds: object, words: Sequence[str]) -> None:
    if not holds:
        raise Wrong(f"cannot be: {shlex.join(words)}")


def _after_options(words: Sequence[str], arguments: dict[str, int]) -> list[str]:
    rest = list(words[1:])
    while rest and rest[0].startswith("-"):
        _require(rest[0] in arguments, words)
        del rest[:1 + arguments[rest[0]]]
    return rest


def _horovodruns(words: Sequence[str]) -> list[str]:
    from horovod.runner.launch import parse_args

    kept, sys.argv = sys.argv, list(words)
    try:
        return list(parse_args().command)
    except SystemExit as ended:
        raise Wrong(f"horovodrun refuses {shlex.join(words)} ({ended})") from None
    finally:
        sys.argv = kept


def _hvd_exts(words: Sequence[str]) -> list[str]:
    from hvd_ext.cli.main import build_parser

    given = list(words[1:])
    if given == ["plan"]:  # in a sentence
        given += ["--params", "1e6", "--ranks", "2"]
    try:
        args = build_parser().parse_args(given)
    except SystemExit as ended:
        raise Wrong(f"hvd-ext refuses {shlex.join(words)} ({ended})") from None
    return [word for word in getattr(args, "program", []) if word != "--"]


def _check_make(words: Sequence[str]) -> None:
    text = (ROOT / "Makefile").read_text()
    for word in words:
        name, assigned, value = word.partition("=")
        _require(re.search(rf"^{name} \?=" if assigned else rf"^{name}:", text, re.M), ["make", word])
        if name == "PYTEST_ARGS":
            _check_pytest(value.split())


def _check_pytest(words: Sequence[str]) -> None:
    kept = words[words.index("-k") + 1] if "-k" in words else ""
    named = [word for word in words if not word.startswith("-") and word != kept]
    for path in named:
        _require((ROOT / path).exists(), ["pytest", path])
    if kept:
        for path in named:
            files = [ROOT / path] if path.endswith(".py") else (ROOT / path).rglob("test_*.py")
            texts = [file.stem + "\n" + file.read_text() for file in files]
            _require(any(re.search(rf"^def test\w*{kept}|^test_\w*{kept}", text, re.M) for text in texts),
                     ["pytest", *words])


def _check_pip(words: Sequence[str]) -> None:
    _require(words[1] in PIP, words)
    extras = re.search(r"extras_require=\{(.*?)\n    \}", (ROOT / "setup.py").read_text(), re.S)
    assert extras is not None
    known = set(re.findall(r'^\s+"(\w+)": \[', extras.group(1), re.M))
    for word in words[2:]:
        found = re.fullmatch(r"(?:\.|hvd-ext)\[([\w,]+)\]", word)
        _require(not found or set(found.group(1).split(",")) <= known, words)
        if word.startswith("torch=="):
            from hvd_ext.versions import TORCH

            _require(word.split("==")[1].split("+")[0] == TORCH, words)
        if word.startswith("horovod=="):
            from hvd_ext.versions import HOROVOD

            _require(word == f"horovod=={HOROVOD}", words)


def _pythons(words: Sequence[str]) -> Iterator[tuple[str, ...]]:
    if len(words) == 1 or words[1] in USERS:
        return
    if words[1] != "-m":
        path = Path(words[1])
        _require((ROOT / path).exists() and path.suffix == ".py", words)
        yield (".".join(path.with_suffix("").parts), *words[2:])
    elif words[2] == "pytest":
        _check_pytest(words[3:])
    elif words[2] != "build":
        _require(module_files(words[2]), words)
        yield tuple(words[2:])


def module_files(module: str) -> list[Path]:
    """The files of a module of this repository; of a package all of them."""
    path = ROOT / module.replace(".", "/")
    if path.is_dir():
        return sorted(path.glob("*.py"))
    return [file for file in [path.with_suffix(".py")] if file.exists()]
