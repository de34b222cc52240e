"""`apex imatrix`: look at importance matrices, merge, compare, convert and fill them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apex_quant.cli import safe
from apex_quant.cli.console import console_for, print_json
from apex_quant.cli.options import Force, Json

if TYPE_CHECKING:
    from rich.console import Console

    from apex_quant.importance import Comparison, ImportanceReport
    from apex_quant.importance.files import Saved

imatrix_app = typer.Typer(
    help="Importance matrices: show, merge, diff, convert, fill.", no_args_is_help=True, rich_markup_mode=None
)

_MOST = 40  # rows of a table; --json has all

Matrix = Annotated[Path, typer.Argument(metavar="FILE", help="importance matrix, GGUF or .dat")]
Out = Annotated[Path, typer.Option("-o", "--out", help="the new file, .gguf or .dat")]


@imatrix_app.command()
def show(
    file: Matrix,
    entries: Annotated[bool, typer.Option("--entries", help="list every entry")] = False,
    floor: Annotated[int, typer.Option("--floor", min=1, help="tokens under which an expert is thinly covered")] = 64,
    as_json: Json = False,
) -> None:
    """What a matrix holds, and which experts it has few tokens for."""
    from apex_quant.importance import Importance, report

    with Importance.read(file) as matrix:
        found = report(matrix, file, floor=floor)
    if as_json:
        print_json(found.to_json())
    else:
        _show(console_for(False), found, entries)


@imatrix_app.command()
def merge(
    files: Annotated[list[Path], typer.Argument(metavar="A B ...", help="raw importance matrices of one model")],
    out: Out,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Add matrices of several texts: what one calibration over all of them would give."""
    from apex_quant.importance import merge as run
    from apex_quant.importance import save
    from apex_quant.importance.files import check_target

    check_target(out, force=force)
    with run(files) as merged:
        saved = save(merged, out, force=force)
        lost = [f"{name} could not be kept" for name in merged.ignored]
    _told(saved, lost, as_json)


@imatrix_app.command()
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="importance matrix, GGUF or .dat")],
    b: Annotated[Path, typer.Argument(metavar="B", help="the other one")],
    as_json: Json = False,
) -> None:
    """Entries that only one has, and how far the weights of the others are apart."""
    from apex_quant.importance import compare

    found = compare(a, b)
    if as_json:
        print_json(found.to_json())
    else:
        _show_comparison(console_for(False), found)


@imatrix_app.command()
def convert(file: Matrix, out: Out, force: Force = False, as_json: Json = False) -> None:
    """Between .gguf and the legacy .dat, told by the suffix of the new file."""
    from apex_quant.importance import convert as run

    _told(run(file, out, force=force), [], as_json)


@imatrix_app.command()
def fill(
    file: Matrix,
    out: Out,
    strength: Annotated[float, typer.Option("--strength", help="tokens that the mean over experts is worth")] = 64.0,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Shrink thinly covered experts towards the mean over their tensor's experts, as quantize does by itself."""
    from apex_quant.importance import Importance, save
    from apex_quant.importance import fill as run
    from apex_quant.importance.files import check_target
    from apex_quant.importance.fill import blind_tensors

    check_target(out, force=force)
    with Importance.read(file) as raw:
        blind = [f"{name}: no expert has data, left as it is" for name in blind_tensors(raw)]
        saved = save(run(raw, strength), out, force=force)
    _told(saved, blind, as_json)


def _told(saved: Saved, more: list[str], as_json: bool) -> None:
    from apex_quant.cli.show import human, show_warnings

    warnings = [*saved.warnings, *more]
    if as_json:
        print_json({**saved.to_json(), "warnings": warnings})
        return
    console = console_for(False)
    prior = f", filled: {safe(saved.prior)}" if saved.prior else ""
    console.print(
        f"{safe(str(saved.path))}  {human(saved.bytes)}, {saved.entries} entries, {saved.chunk_count} chunks{prior}"
    )
    show_warnings(console, warnings)


def _show(console: Console, found: ImportanceReport, entries: bool) -> None:
    """The matrix in short; its entries, one row for the same tensor of all layers; experts short of tokens."""
    from apex_quant.cli.show import table

    state = f"filled: {safe(found.prior)}" if found.prior else "raw"
    console.print(
        f"[bold]{safe(found.path)}[/]  {found.form}, {state}, {len(found.entries)} entries, "
        f"{found.chunk_count} chunks of {found.chunk_size} tokens"
    )
    console.print(f"[dim]from {safe(', '.join(found.datasets)) or 'texts without a name'}[/]")
    made = table(None, "entries", ">number", ">channels", ">experts", ">tokens: least", ">median", ">most")
    groups: dict[str, list[int]] = {}
    for number, entry in enumerate(found.entries):
        name = entry.name.replace(f"blk.{entry.layer}.", "blk.*.", 1) if not entries else entry.name
        groups.setdefault(name, []).append(number)
    for name, numbers in groups.items():
        members = [found.entries[number] for number in numbers]
        medians = sorted(entry.tokens_median for entry in members)
        made.add_row(
            safe(name), str(len(members)), _span(e.channels for e in members), _span(e.experts for e in members),
            str(min(e.tokens_min for e in members)), f"{medians[len(medians) // 2]:.0f}",
            str(max(e.tokens_max for e in members)),
        )  # fmt: skip
    console.print(made)
    short = table(f"experts with fewer than {found.floor} tokens", "layer", "none", f"under {found.floor}")
    rows = {kind: {row["layer"]: row["experts"] for row in found.by_layer(kind)} for kind in ("uncovered", "thin")}
    for layer in sorted({*rows["uncovered"], *rows["thin"]}, key=lambda layer: layer or 0):
        cells = [", ".join(map(str, rows[kind].get(layer, ()))) or "-" for kind in ("uncovered", "thin")]
        short.add_row("-" if layer is None else str(layer), *cells)
    if short.row_count:
        console.print(short)
    elif found.form == "dat":
        console.print("[dim]a .dat file has chunks times 512 for tokens, and no counts per expert[/]")
    elif any(entry.experts for entry in found.entries):
        console.print(f"every expert has at least {found.floor} tokens")
    for what, names in (("extra tensors kept", found.extras), ("tensors of another kind", found.ignored)):
        if names:
            console.print(f"[dim]{what}: {len(names)} ({safe(names[0])}{', ...' if names[1:] else ''})[/]")


def _span(numbers: Iterable[int]) -> str:
    """'256', or '256-512' where they differ; '-' for none."""
    values = sorted(set(numbers))
    text = str(values[0]) if len(values) == 1 else f"{values[0]}-{values[-1]}"
    return "-" if text == "0" else text


def _show_comparison(console: Console, found: Comparison) -> None:
    """Counts, then entries that are only in one, then the most different ones."""
    from apex_quant.cli.show import table

    sides = (("a", found.a, found.chunks_a, found.prior_a), ("b", found.b, found.chunks_b, found.prior_b))
    for side, name, chunks, prior in sides:
        console.print(f"{side} {safe(name)}  {chunks} chunks, {'filled: ' + safe(prior) if prior else 'raw'}")
    for what, names in (
        ("only in a", found.only_a),
        ("only in b", found.only_b),
        ("of other shape", found.other_shape),
    ):
        if names:
            rest = f" and {len(names) - 8} more" if len(names) > 8 else ""
            console.print(f"[bold]{what}[/]: {safe(', '.join(names[:8]))}{rest}")
    made = table(
        "weights |a - b| / max(a, b), the most different first",
        "entry", ">tokens a", ">tokens b", ">uncovered a", ">uncovered b", ">median", ">max", ">cosine",
    )  # fmt: skip
    differing = [entry for entry in found.entries if not entry.equal]
    for e in differing[:_MOST]:
        numbers = [f"{x:.6f}" if x is not None else "-" for x in (e.median, e.max, e.cosine)]
        made.add_row(safe(e.name), str(e.tokens_a), str(e.tokens_b), str(e.uncovered_a), str(e.uncovered_b), *numbers)
    if differing:
        console.print(made)
    if len(differing) > _MOST:
        console.print(f"... and {len(differing) - _MOST} more (--json lists all)")
    console.print(f"{len(found.entries) - len(differing)} entries have equal weights, {len(differing)} differ")
