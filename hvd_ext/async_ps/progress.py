"""The primary server's terminal: a bar where it is one, a line every ten seconds where not."""

from __future__ import annotations

import time

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from hvd_ext.async_ps.report import Report
from hvd_ext.reporting.terminal import make_console

EVERY = 10.0


class Display:
    """Shows a report from time to time; does nothing unless ``enabled``.

    Args:
        enabled: whether anything is shown.
        total: number of updates to come, None if unknown.
    """

    def __init__(self, *, enabled: bool, total: int | None) -> None:
        self.enabled = enabled
        self.total = total
        self.console = make_console()
        self._shown = time.monotonic()
        self._bar: Progress | None = None
        if enabled and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("async"), BarColumn(), MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"), TimeElapsedColumn(), console=self.console,
                auto_refresh=False,
            )
            self._task = self._bar.add_task("", total=total, text="")
            self._bar.start()

    def is_due(self) -> bool:
        """Whether it is time for the next report."""
        wait = 0.5 if self._bar is not None else EVERY
        return self.enabled and time.monotonic() - self._shown >= wait

    def show_report(self, report: Report) -> None:
        """Shows where the run stands."""
        self._shown = time.monotonic()
        active = sum(not worker.finished and worker.left_out is None for worker in report.workers)
        text = (f"{report.updates_per_second:.1f} updates/s, delay {report.delay.mean:.1f} "
                f"(max {report.delay.maximum}), {active} workers")
        if report.not_finite:
            text += f", {report.not_finite} gradients not finite"
        if self._bar is not None:
            self._bar.update(self._task, completed=report.updates, text=text)
            self._bar.refresh()
        elif self.enabled:
            total = f"/{self.total}" if self.total else ""
            self.print_line(f"async: {report.updates}{total} updates, {text}")

    def print_line(self, text: str) -> None:
        """A line of its own, whether or not progress is shown."""
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
