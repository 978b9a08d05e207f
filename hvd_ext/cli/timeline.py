"""``hvd-ext timeline``: repair a timeline of Horovod that was cut short, and say where the time went."""

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from hvd_ext.cli.console import CliError, stdout_console

Event = dict[str, Any]
_BETWEEN = re.compile(r"[\s,]*")
# Names as the collectives of this package have them (docs/collectives.md), behind "allreduce." and,
# in TensorFlow, behind the optimizer's name.
_OURS = re.compile(
    r"(?:^|[./])(?:(delay|topk|powersgd)/"
    r"|(seng)\.(?:uc/|state|scores|rho|xi|xg|xa|refresh)|(server)/rank\d|(hvd_ext)/)"
)
THEIRS = "gradients"


@dataclass
class Phase:
    """What one phase took, over all tensors of a group.

    Args:
        depth: 0 for a negotiation or an operation, 1 for a part of it.
        count: how often.
        micros: microseconds altogether.
        longest: microseconds of the longest one.
    """

    depth: int
    count: int = 0
    micros: int = 0
    longest: int = 0


@dataclass
class Summary:
    """A timeline in figures: phases by group and name, first and last time stamp, events never ended."""

    phases: dict[str, dict[str, Phase]] = field(default_factory=dict)
    first: int | None = None
    last: int | None = None
    unended: int = 0

    @property
    def seconds(self) -> float:
        """From the first event to the last."""
        return 0.0 if self.first is None or self.last is None else (self.last - self.first) / 1e6


def add_subcommand(subcommands: Any) -> None:
    """Add the subcommand to ``hvd-ext``."""
    parser = subcommands.add_parser(
        "timeline",
        help="repair a timeline of Horovod and summarise it by phase",
        description="Reads what HOROVOD_TIMELINE=FILE made, also where the run was killed while it wrote. "
        "The mended file opens in Perfetto and in chrome://tracing.",
    )
    parser.add_argument("file", type=Path, help="the timeline")
    parser.add_argument("--repair", type=Path, metavar="OUT", help="write a complete timeline to OUT")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    """Mend, if asked to, and print the summary."""
    try:
        text = args.file.read_text(errors="replace")
    except OSError as error:
        raise CliError(f"{args.file} cannot be read: {error}",
                       "pass the file that HOROVOD_TIMELINE named; rank 0 writes it") from error
    if args.repair is not None and args.repair.resolve() == args.file.resolve():
        raise CliError(f"--repair {args.repair} is the timeline itself", "name another file")
    events, whole = read_timeline(text)
    if not events:
        raise CliError(f"{args.file} has no whole event", "pass the file that HOROVOD_TIMELINE named")
    if args.repair is not None:
        write_timeline(events, args.repair)
    summary = summarize_events(events)
    if args.json:
        stdout_console().print_json(json.dumps(as_json(summary, len(events), whole)))
    else:
        show_summary(summary, len(events), whole, args)
    return 0


def read_timeline(text: str) -> tuple[list[Event], bool]:
    """The whole events of a timeline, and whether the file is complete.

    Horovod writes a closing bracket behind every event and overwrites it with the next; a run that is
    killed leaves what its buffer had last passed on, which may end within an event.

    Raises:
        Failure: this is no timeline, or it is broken before its end.
    """
    start = _BETWEEN.match(text)
    at = start.end() if start else 0
    if text[at : at + 1] != "[":
        raise CliError("this is no timeline: it does not begin with [", "pass what HOROVOD_TIMELINE named")
    events: list[Event] = []
    decoder = json.JSONDecoder()
    at += 1
    while True:
        at = _after_blanks(text, at)
        if at >= len(text):
            return events, False
        if text[at] == "]":
            rest = text[at + 1 :].strip()
            if rest:
                raise CliError(f"{len(rest)} characters behind the closing bracket", "pass one timeline only")
            return events, True
        try:
            event, at = decoder.raw_decode(text, at)
        except ValueError as error:
            if "\n{" in text[at:] or "},{" in text[at:]:
                raise CliError(
                    f"the timeline is broken at character {at}, with whole events behind it: {error}",
                    "two runs may have written to the same file: give each one its own",
                ) from error
            return events, False
        if not isinstance(event, dict) or "ph" not in event:
            raise CliError(f"no event of a timeline: {str(event)[:80]}", "pass what HOROVOD_TIMELINE named")
        events.append(event)


def _after_blanks(text: str, at: int) -> int:
    match = _BETWEEN.match(text, at)
    return match.end() if match else at


def write_timeline(events: Iterable[Event], path: Path) -> None:
    """A complete timeline, one event a line."""
    path.write_text("[\n" + ",\n".join(json.dumps(event) for event in events) + "\n]\n")


def group_of(tensor: str) -> str:
    """Which part of this package a tensor's name belongs to; ``THEIRS`` for everything else."""
    match = _OURS.search(tensor)
    return next(name for name in match.groups() if name) if match else THEIRS


def summarize_events(events: Iterable[Event]) -> Summary:
    """Time by group and phase. Tensors overlap: a sum over them is no time by the clock."""
    summary = Summary()
    tensors: dict[int, str] = {}
    stacks: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for event in events:
        tensor, kind = event.get("pid", 0), event["ph"]
        if kind == "M":
            name = event.get("args", {}).get("name")
            if event.get("name") == "process_name" and name is not None:
                tensors[tensor] = name
            continue
        now = int(event.get("ts", 0))
        summary.first = now if summary.first is None else min(summary.first, now)
        summary.last = now if summary.last is None else max(summary.last, now)
        if kind == "B":
            stacks[tensor].append((event.get("name", ""), now))
        elif kind == "E" and stacks[tensor]:
            name, since = stacks[tensor].pop()
            _add_time(summary, group_of(tensors.get(tensor, "")), name, len(stacks[tensor]), now - since)
    summary.unended = sum(len(stack) for stack in stacks.values())
    return summary


def _add_time(summary: Summary, part: str, name: str, depth: int, micros: int) -> None:
    phase = summary.phases.setdefault(part, {}).setdefault(name, Phase(depth))
    phase.count += 1
    phase.micros += micros
    phase.longest = max(phase.longest, micros)


def summary_rows(summary: Summary) -> Iterator[tuple[str, str, Phase]]:
    """Group, name and phase, the groups that took longest first; operations before their parts."""
    def whole(part: str) -> int:
        return sum(phase.micros for phase in summary.phases[part].values() if phase.depth == 0)

    for part in sorted(summary.phases, key=whole, reverse=True):
        phases = summary.phases[part].items()
        for name, phase in sorted(phases, key=lambda item: (item[1].depth, -item[1].micros)):
            yield part, name, phase


def as_json(summary: Summary, events: int, whole: bool) -> dict[str, Any]:
    """The summary for programs; times in seconds."""
    return {
        "complete": whole, "events": events, "seconds": summary.seconds, "unended": summary.unended,
        "phases": [{"group": part, "phase": name, "part_of_operation": phase.depth > 0, "count": phase.count,
                    "seconds": phase.micros / 1e6, "longest": phase.longest / 1e6}
                   for part, name, phase in summary_rows(summary)],
    }


def show_summary(summary: Summary, events: int, whole: bool, args: argparse.Namespace) -> None:
    """The summary for people."""
    table = Table(title=f"{events} events in {summary.seconds:.3f} s")
    for heading in ("whose", "phase", "times", "s in all", "ms each", "longest"):
        table.add_column(heading, no_wrap=True)
    last = ""
    for part, name, phase in summary_rows(summary):
        shown = ("  " * phase.depth) + escape(name)
        table.add_row(part if part != last else "", shown, str(phase.count), f"{phase.micros / 1e6:.3f}",
                      f"{phase.micros / 1e3 / phase.count:.3f}", f"{phase.longest / 1e3:.3f}")
        last = part
    console = stdout_console()
    console.print(table)
    console.print("Sums are over tensors, which overlap; indented phases are parts of an operation.")
    if summary.unended:
        console.print(f"Begun and never ended: {summary.unended}.")
    if args.repair is not None:
        console.print(f"Complete timeline: {escape(str(args.repair))}", soft_wrap=True)
    elif not whole:
        command = f"hvd-ext timeline {args.file} --repair OUT"
        console.print(f"The file was cut short; repair it: {escape(command)}", soft_wrap=True)
