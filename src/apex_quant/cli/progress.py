"""Progress of long work: a bar on a terminal, now and then a line elsewhere. Always on standard error."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from apex_quant.cli import one_line, safe
from apex_quant.encode.job import JobProgress

_LINE_SECONDS = 10.0


class JobBar:
    """A context manager; call it with each JobProgress."""

    def __init__(self, what: str, *, quiet: bool = False) -> None:
        self.what, self.quiet = what, quiet
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._start = self._last_line = time.monotonic()

    def __enter__(self) -> JobBar:
        if sys.stderr.isatty() and not self.quiet:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                TextColumn("{task.percentage:>3.0f} %"),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("[dim]{task.fields[tensor]}[/]"),
                console=Console(stderr=True, emoji=False),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(safe(self.what), total=1.0, rate="", tensor="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, event: JobProgress) -> None:
        if self.quiet:
            return
        now = time.monotonic()
        share = event.work / event.total if event.total else 1.0
        rate = event.bytes_read / max(now - self._start, 0.1)
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task,
                description=safe(f"{self.what} ({event.phase})"),
                completed=share,
                rate=f"{rate / 1e6:.1f} MB/s",
                tensor=safe(event.tensor),
            )
        elif now - self._last_line >= _LINE_SECONDS:
            self._last_line = now
            left = (now - self._start) * (1 - share) / share if share > 0.01 else None
            eta = f", about {left:.0f} s left" if left is not None else ""
            print(
                one_line(f"{self.what} ({event.phase}): {share:.0%}, {rate / 1e6:.1f} MB/s{eta}, {event.tensor}"),
                file=sys.stderr,
                flush=True,
            )
