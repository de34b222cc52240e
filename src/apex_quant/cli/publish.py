"""`apex publish`: its options, what it says on the way and the plan that it shows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from apex_quant.cli import safe
from apex_quant.cli.console import console_for, print_json
from apex_quant.cli.options import Json
from apex_quant.cli.progress import Bar

if TYPE_CHECKING:
    from apex_quant.hub import HubProgress
    from apex_quant.publish import Published

_WORDS = {
    "hash": "hashing",
    "verify": "verifying",
    "download": "downloading",
    "upload": "uploading",
    "commit": "committing",
}


class HubBar(Bar):
    """Call it with each HubProgress. Notes (a failure, and how long until the next try) are always said, unless
    `quiet`."""

    def __init__(self, *, quiet: bool = False) -> None:
        super().__init__("", quiet=quiet)

    def __call__(self, event: HubProgress) -> None:
        show_hub(self, event)


def show_hub(bar: Bar, event: HubProgress) -> None:
    """An upload's or download's event, or its note."""
    if event.note:
        bar.line(event.note)
        return
    size = f", {event.total / 1e9:.2f} GB" if event.total else ""
    bar.show(event.done / max(event.total, 1), event.file + size, what=_WORDS[event.phase])


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
    from apex_quant.publish import publish as run

    console = console_for(as_json)
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
        print_json(done.to_json())
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
