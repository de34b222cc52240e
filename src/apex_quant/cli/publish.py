"""`apex publish`: its options, what it says on the way and the plan that it shows."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from apex_quant.cli import one_line, safe

if TYPE_CHECKING:
    from types import TracebackType

    from apex_quant.hub import HubProgress
    from apex_quant.publish import Published

_LINE_SECONDS = 10.0
_WORDS = {
    "hash": "hashing",
    "verify": "verifying",
    "download": "downloading",
    "upload": "uploading",
    "commit": "committing",
}

Json = Annotated[bool, typer.Option("--json", help="one JSON document on standard output, everything else on stderr")]


class HubBar:
    """A context manager; call it with each HubProgress. A bar on a terminal, now and then a line elsewhere.

    Notes (a failure, and how long until the next try) are always said, unless `quiet`.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._last_line = time.monotonic()

    def __enter__(self) -> HubBar:
        if sys.stderr.isatty() and not self.quiet:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                TextColumn("{task.percentage:>3.0f} %"),
                TimeElapsedColumn(),
                TextColumn("[dim]{task.fields[file]}[/]"),
                console=Console(stderr=True, emoji=False),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=1.0, file="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Give the terminal back; calls from now on print lines."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __call__(self, event: HubProgress) -> None:
        now = time.monotonic()
        if self.quiet:
            return
        if event.note:
            self._line(event.note)
        elif self._bar is not None and self._task is not None:
            self._bar.update(
                self._task,
                description=_WORDS[event.phase],
                completed=event.done / max(event.total, 1),
                file=safe(event.file),
            )
        elif now - self._last_line >= _LINE_SECONDS:
            self._last_line = now
            share = f" ({event.done / event.total:.0%} of {event.total / 1e9:.2f} GB)" if event.total else ""
            self._line(f"{_WORDS[event.phase]} {event.file}{share}")

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(safe(text))
        else:
            print(one_line(text), file=sys.stderr, flush=True)


def publish(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="the folder with the files to publish")],
    repo: Annotated[str, typer.Argument(metavar="ORG/NAME", help="the repository on the Hugging Face hub")],
    private: Annotated[bool, typer.Option("--private", help="a new repository is private")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="compare and verify, upload nothing")] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="overwrite files that the repository has with other content")
    ] = False,
    as_json: Json = False,
) -> None:
    """Upload verified files, with imatrix, recipes, results, report and card. Interrupted, the same command goes on."""
    from apex_quant.cli.app import _console, _print_json
    from apex_quant.publish import publish as run

    console = _console(as_json)
    with HubBar(quiet=as_json) as bar:

        def plan(found: Published) -> None:
            bar.stop()  # the library has bars of its own for the bytes of each upload
            show_published(console, found)

        done = run(
            directory,
            repo,
            private=private,
            dry_run=dry_run,
            replace=replace,
            progress=bar,
            plan=plan,
        )
    if as_json:
        _print_json(done.to_json())
    elif dry_run:
        console.print("nothing was uploaded")
    else:
        console.print(f"{safe(done.url)} at {done.commit}")


def show_published(console: Console, found: Published) -> None:
    """Every file with its size and how it stands against the repository, then what that comes to."""
    from apex_quant.cli.show import human, table

    made = table(None, "file", "what", ">size", "there", "sha256")
    for file in found.files:
        made.add_row(safe(file.path), file.kind, human(file.bytes), file.state, file.sha256[:12])
    console.print(made)
    counts = {state: sum(file.state == state for file in found.files) for state in ("new", "equal", "differs")}
    where = f"{'new ' if found.created else ''}{'private ' if found.private else ''}{found.url}"
    console.print(
        f"{safe(where)}: {counts['new']} new, {counts['equal']} equal, {counts['differs']} differ; "
        f"{human(found.upload_bytes)} to upload"
    )
    if counts["differs"]:
        console.print("[yellow]note:[/] those that differ are overwritten only with --replace")
    if found.left_out:
        more = f" and {len(found.left_out) - 8} more" if len(found.left_out) > 8 else ""
        console.print(f"not published: {safe(', '.join(found.left_out[:8]))}{more}")
    for warning in found.warnings:
        console.print(f"[yellow]note:[/] {safe(warning)}")
