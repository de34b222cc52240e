"""`apex report`, `apex card` and `apex which`: what was measured, to publish and to choose from."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apex_quant.cli import one_line, safe
from apex_quant.cli.console import console_for, print_json
from apex_quant.cli.options import Json

if TYPE_CHECKING:
    from rich.console import Console

    from apex_quant.report.choose import Choice

Reference = Annotated[
    str | None, typer.Option("--reference", metavar="NAME", help="which file the others are measured against")
]
Families = Annotated[
    list[str] | None,
    typer.Option("--family", metavar="NAME=GLOB", help="files of one maker, such as 'Unsloth=UD-*'; repeat"),
]


def report(
    places: Annotated[
        list[str],
        typer.Argument(metavar="DIR|FILES...", help="results of apex eval, folders of them, logs and tables of others"),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="where the report goes")] = Path("report"),
    reference: Reference = None,
    family: Families = None,
    formats: Annotated[
        str, typer.Option("--format", metavar="LIST", help="some of html, png, svg, md, csv")
    ] = "html,png,svg,md,csv",
    as_json: Json = False,
) -> None:
    """Plots, a page that opens offline, Markdown and CSV from results files; claims only where intervals earn them."""
    from apex_quant.report.report import report as run

    words = [word.strip() for word in formats.split(",") if word.strip()]
    started = time.monotonic()

    def tell(what: str) -> None:
        print(f"{time.monotonic() - started:5.1f} s  {one_line(what)}", file=sys.stderr)

    made = run(list(places), out, reference=reference, family=family or (), formats=words, progress=tell)
    if as_json:
        print_json(made.to_json())
        return
    console = console_for(False)
    for line in made.sentences:
        console.print(safe(line))
    if not made.sentences:
        console.print("no file was shown to be better than another one at no more bytes")
    if made.caution:
        console.print(f"[dim]{safe(made.caution)}[/]")
    for line in made.missing:
        console.print(f"[yellow]missing:[/] {safe(line)}")
    for path in made.paths.values():
        console.print(safe(str(path)))


def card(
    place: Annotated[Path, typer.Argument(metavar="DIR", help="folder with the files and their results")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="the card (default: README.md in DIR)")] = None,
    base_model: Annotated[
        str | None, typer.Option("--base-model", metavar="ORG/NAME", help="the original (default: the files' headers)")
    ] = None,
    license: Annotated[
        str | None, typer.Option("--license", metavar="NAME", help="of the original, as the hub names it: apache-2.0")
    ] = None,
    quantized_by: Annotated[
        str | None, typer.Option("--quantized-by", metavar="NAME", help="your name on the hub (default: of --repo)")
    ] = None,
    repo: Annotated[
        str | None, typer.Option("--repo", metavar="ORG/NAME", help="where the files go, for links and commands")
    ] = None,
    reference: Reference = None,
    family: Families = None,
    ctx: Annotated[
        str | None,
        typer.Option("--ctx", metavar="N", help="context for memory and commands (default: 32k, or the trained one)"),
    ] = None,
    as_json: Json = False,
) -> None:
    """A model card for the hub: front matter, files with intervals, calibration, hashes, and only earned claims."""
    from apex_quant.report.card import card as run
    from apex_quant.report.choose import parse_ctx

    path = run(
        place,
        out,
        base_model=base_model,
        license=license,
        quantized_by=quantized_by,
        repo=repo,
        reference=reference,
        family=family or (),
        ctx=None if ctx is None else parse_ctx(ctx),
    )
    if as_json:
        print_json({"path": str(path), "bytes": path.stat().st_size})
    else:
        console_for(False).print(f"written: {safe(str(path))}")


def which(
    place: Annotated[
        Path, typer.Argument(metavar="[DIR]", help="results, and the files beside them for their KV cache")
    ] = Path(),
    vram: Annotated[str, typer.Option("--vram", metavar="SIZE", help="memory to fit into: 16GB, 24GiB")] = "16GB",
    ctx: Annotated[str, typer.Option("--ctx", metavar="N", help="context in tokens: 32k, 131072")] = "32k",
    type_k: Annotated[str, typer.Option("--type-k", metavar="TYPE", help="of the KV cache's keys")] = "f16",
    type_v: Annotated[str, typer.Option("--type-v", metavar="TYPE", help="of its values")] = "f16",
    ram: Annotated[
        str | None, typer.Option("--ram", metavar="SIZE", help="main memory for routed experts (--cpu-moe)")
    ] = None,
    as_json: Json = False,
) -> None:
    """Which file should I take? The best measured one that fits with its context, and why."""
    from apex_quant.report.choose import choose, parse_ctx
    from apex_quant.sizes import parse_memory, parse_size

    found = choose(
        place,
        vram=parse_memory(vram),
        ctx=parse_ctx(ctx),
        type_k=type_k,
        type_v=type_v,
        ram=None if ram is None else parse_size(ram),
    )
    if as_json:
        print_json(found.to_json())
    else:
        _show_choice(console_for(False), found)


def _show_choice(console: Console, found: Choice) -> None:
    from apex_quant.cli.show import human, table
    from apex_quant.report.quantities import QUANTITIES, shown

    made = table(None, "file", ">size", ">KV cache", ">buffers", ">total", f">{QUANTITIES[found.metric].title}", ">low",
                 ">high", "fits")  # fmt: skip
    for one in found.candidates:
        ends = ("-" if end is None else shown(found.metric, end) for end in (one.low, one.high))
        kv = "unknown" if one.kv_bytes is None else human(one.kv_bytes)
        fits = ("yes" + (", with experts in main memory" if one.host_bytes else "")) if one.fits else "no"
        made.add_row(safe(one.label), human(one.bytes), kv, human(one.compute_bytes), human(one.total_bytes),
                     shown(found.metric, one.value), *ends, fits)  # fmt: skip
    console.print(made)
    console.print(f"[bold]{safe(found.sentence)}[/]")
    for note in found.notes:
        console.print(f"[dim]{safe(note)}[/]")
