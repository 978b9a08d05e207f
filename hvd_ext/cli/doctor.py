"""``hvd-ext doctor``: what is installed and usable, and fixes for anything broken."""

import argparse
import json
from dataclasses import asdict
from typing import Any

from rich.markup import escape
from rich.table import Table

from hvd_ext.cli.console import CliError, stderr_console, stdout_console
from hvd_ext.cli.diagnosis import diagnose, usable_frameworks
from hvd_ext.cli.environment import collect_facts
from hvd_ext.cli.finding import Finding, Level
from hvd_ext.cli.selftest import allreduce
from hvd_ext.versions import HVD_EXT

SIGNS: dict[Level, str] = {
    "ok": "[green]ok[/]",
    "note": "[yellow]note[/]",
    "problem": "[red]problem[/]",
}


def add_subcommand(subcommands: Any) -> None:
    """Add the subcommand to ``hvd-ext``."""
    parser = subcommands.add_parser(
        "doctor",
        help="show what is installed and usable, and how to fix anything broken",
        description="Prints one table of what is installed, whether Horovod fits the installed "
        "frameworks, and a two-rank allreduce. Exit status 1 when something needed is missing.",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--no-selftest", action="store_true", help="leave out the two-rank run")
    parser.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="limit of each two-rank run, after which it is killed (default: %(default)g)",
    )
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    """Print the findings; 1 when one of them is a problem."""
    if not args.timeout > 0:
        raise CliError(f"--timeout must be above 0 seconds, got {args.timeout:g}", "leave it out")
    if stderr_console().is_terminal:
        with stderr_console().status("Looking around ..."):
            findings = run_diagnosis(selftest=not args.no_selftest, limit=args.timeout)
    else:
        findings = run_diagnosis(selftest=not args.no_selftest, limit=args.timeout)
    problems = [finding for finding in findings if finding.level == "problem"]
    if args.json:
        report = {
            "hvd_ext": HVD_EXT,
            "ok": not problems,
            "findings": [asdict(finding) for finding in findings],
        }
        stdout_console().print_json(json.dumps(report))
    else:
        _print_findings(findings, len(problems))
    return 1 if problems else 0


def run_diagnosis(*, selftest: bool, limit: float) -> list[Finding]:
    """All findings about this machine, those of the two-rank runs last."""
    facts = collect_facts()
    findings = diagnose(facts)
    if selftest and not any(finding.level == "problem" for finding in findings):
        findings += [allreduce(facts, framework, limit) for framework in usable_frameworks(facts)]
    elif selftest:
        findings.append(Finding("Self-test", "left out until the problems are fixed", "note"))
    return findings


def _print_findings(findings: list[Finding], problems: int) -> None:
    table = Table(title=f"hvd-ext {HVD_EXT}")
    for heading in ("", "found", "", "what to do"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        table.add_row(
            finding.subject, escape(finding.value), SIGNS[finding.level], escape(finding.remedy)
        )
    console = stdout_console()
    console.print(table)
    for finding in findings:
        if finding.level == "problem":
            # Once more outside the table: there a long command is broken over lines.
            console.print(f"[red]{finding.subject}[/]: {escape(finding.remedy)}", soft_wrap=True)
    console.print("All that is needed works." if not problems else f"Problems: {problems}.")
