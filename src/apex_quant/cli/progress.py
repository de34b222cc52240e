"""Progress of long work: a bar on a terminal, now and then a line elsewhere. Always on standard error."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from apex_quant.cli import one_line, safe
from apex_quant.encode.job import JobProgress

_LINE_SECONDS = 10.0


class Bar:
    """A context manager. What takes the events of some work derives from it and calls show()."""

    def __init__(self, what: str, *, quiet: bool = False) -> None:
        self.what, self.quiet = what, quiet
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        if sys.stderr.isatty() and not self.quiet:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                TextColumn("{task.percentage:>3.0f} %"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[told]}"),
                console=Console(stderr=True, emoji=False),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(safe(self.what), total=1.0, told="starting")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Give the terminal back; what is shown from now on are lines."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def show(self, share: float, told: str, *, what: str | None = None) -> None:
        """`share` of the work is done, 0 to 1. `what`: other words for it than at the start."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=safe(what or self.what), completed=share, told=safe(told))
        elif time.monotonic() - self._last_line >= _LINE_SECONDS:
            self._last_line = time.monotonic()
            self.line(f"{what or self.what}: {share:.0%}, {told}")

    def line(self, text: str) -> None:
        """A line at once, above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(safe(text))
        elif not self.quiet:
            print(one_line(text), file=sys.stderr, flush=True)


class JobBar(Bar):
    """Call it with each JobProgress."""

    def __init__(self, what: str, *, quiet: bool = False) -> None:
        super().__init__(what, quiet=quiet)
        self._start = time.monotonic()

    def __call__(self, event: JobProgress) -> None:
        passed = time.monotonic() - self._start
        share = event.work / event.total if event.total else 1.0
        told = [f"{event.bytes_read / 1e6 / max(passed, 0.1):.1f} MB/s"]
        if share > 0.01:
            told.append(f"ETA {passed * (1 - share) / share:.0f} s")
        if event.tensor:
            told.append(event.tensor)
        self.show(share, ", ".join(told), what=f"{self.what} ({event.phase})")
