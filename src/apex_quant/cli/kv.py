"""`apex kv`: what each pair of cache types costs on one model."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from apex_quant.cli import safe
from apex_quant.cli.console import console_for, print_json
from apex_quant.cli.evaluate import Chunks, EvaluationBar, EveryToken, Text, interval
from apex_quant.cli.options import Buffers, CpuExperts, GpuLayers, Json, NoMmap, TensorSplit, Threads, session_options
from apex_quant.sizes import parse_ctx

if TYPE_CHECKING:
    from apex_quant.evaluation.kv import KVResult


def kv(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="a GGUF file, or any shard of one")],
    reference: Annotated[
        Path | None,
        typer.Option("--reference", metavar="REF", help="the full-precision GGUF, a .apexref or a _logits_ file"),
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--source", metavar="GGUF", help="what the .apexref was made from, if elsewhere")
    ] = None,
    types: Annotated[
        list[str] | None,
        typer.Option("--types", metavar="TYPE|K/V,...", help="cache types, each for both K and V, or pairs as "
                     "q8_0/q5_1 (default: all stock types and three mixed pairs)"),
    ] = None,
    ctx: Annotated[
        str, typer.Option("--ctx", metavar="N,...", help="contexts to give memory for and measure at")
    ] = "512,4096",
    text: Text = None,
    chunks: Chunks = None,
    every_token: EveryToken = False,
    rotation: Annotated[
        Literal["on", "off", "both"], typer.Option("--rotation", help="llama.cpp's rotation of quantized K and V")
    ] = "on",
    simulate: Annotated[
        list[str] | None,
        typer.Option("--simulate", metavar="TYPE|K/V,...", help="predict turbo2, turbo3, turbo4 or pairs with them"),
    ] = None,
    no_speed: Annotated[bool, typer.Option("--no-speed", help="leave out speed")] = False,
    out: Annotated[Path, typer.Option("-o", "--out", help="the result, with numbers per token beside it")] = Path(
        "kv.json"
    ),
    threads: Threads = None,
    gpu_layers: GpuLayers = 0,
    cpu_experts: CpuExperts = False,
    tensor_split: TensorSplit = None,
    tensor_buffers: Buffers = None,
    no_mmap: NoMmap = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Divergence, memory and speed of KV-cache types on this model. Interrupted, the same command goes on."""
    from apex_quant.evaluation.kv import kv as run
    from apex_quant.evaluation.kv_types import MIXED, STOCK

    options = session_options(threads, gpu_layers, cpu_experts, tensor_split, tensor_buffers, no_mmap)
    with EvaluationBar(f"cache types of {model.name}") as bar:
        found = run(
            model,
            reference=reference,
            source=source,
            types=STOCK if types is None else _words(types),
            pairs=MIXED if types is None else (),
            ctx=[parse_ctx(word) for word in ctx.split(",")],
            text=text,
            chunks=chunks,
            scored="all" if every_token else "half",
            rotation=rotation,
            simulate=_words(simulate),
            speed=not no_speed,
            out=out,
            options=options,
            progress=bar,
        )
    if as_json:
        print_json(found.to_json())
    else:
        show_kv(console_for(False), found)


def _words(given: list[str] | None) -> list[str]:
    return [word.strip() for one in given or () for word in one.split(",") if word.strip()]


def show_kv(console: Console, found: KVResult) -> None:
    """One line for each pair, then what cannot be told apart, predictions and notes."""
    from apex_quant.cli.show import table

    document = found.document
    sizes = list(found.pairs[0]["mib_at"]) if found.pairs else []
    full = any(row.get("full") for row in found.pairs)
    made = table(
        None, "K", "V", ">bits", "mean KLD from f16", "99.9 %", ">same top", *(["added by KV"] if full else []),
        *(f">MiB at {size}" for size in sizes), ">bytes/token", ">pp", ">tg", "rotated",
    )  # fmt: skip
    for row in [*found.pairs, *document["unrotated"]]:
        made.add_row(*_cells(row, sizes, full))
    console.print(made)
    measured = sorted({row["ctx"] for row in found.pairs if row["ctx"]})
    if measured:
        over = ", 95 % intervals over chunks" if any(row["kld_mean"]["low"] is not None for row in found.pairs) else ""
        console.print(f"[dim]divergence at {', '.join(map(str, measured))} tokens{over}[/]")
    for line in _compared(document["ranking"]):
        console.print(safe(line))
    for row in found.simulated:
        console.print(safe(f"simulated: {row['sentence'] or row.get('problem')}"))
    for note in document["notes"]:
        console.print(f"[yellow]note:[/] {safe(note)}")
    if found.path is not None:
        console.print(f"[dim]{safe(str(found.path))}[/]")


def _compared(ranking: list[dict[str, Any]]) -> list[str]:
    """Neighbours between which no difference is shown; where the text was too short to look for one, that instead."""
    from apex_quant.evaluation.statistics import MIN_CHUNKS

    pairs = [(one, after) for one, after in pairwise(ranking) if one["to_next"] is not None]
    short = [one["to_next"] for one, _ in pairs if one["to_next"]["low"] is None]
    if short:
        return [
            f"{short[0]['chunks']} chunks: intervals and comparisons take {MIN_CHUNKS} (more --chunks, or more text)"
        ]
    return [
        f"no difference shown between {_name(one)} and {_name(after)}"
        for one, after in pairs
        if one["differs"] is False
    ]


def _name(row: dict[str, Any]) -> str:
    return f"{row['k']}/{row['v']}" + (" without rotation" if row["rotation"] is False else "")


def _cells(row: dict[str, Any], sizes: list[str], full: bool) -> list[str]:
    at = next((one for one in row["by_ctx"] if one["ctx"] == row["ctx"]), None)
    tail = "too few tokens" if row["kld_p99_9"]["value"] is None else interval(row["kld_p99_9"], 3)
    top = "-" if at is None else f"{at['top1_agreement']['value']:.2%}"
    speed = row["speed"] or {}
    added = [interval((row["full"] or {}).get("added"), 3)] if full else []
    rates = [
        next((f"{speed[key]['value']:.0f}" for key in speed if key.startswith(kind)), "-") for kind in ("pp", "tg")
    ]
    rotated = "-" if row["rotation"] is None else "on" if any((row["rotated"] or {}).values()) else "off"
    memory = ["-" if row["mib_at"][size] is None else f"{row['mib_at'][size]:.2f}" for size in sizes]
    grown = "-" if row["bytes_per_token"] is None else f"{row['bytes_per_token']:.0f}"
    first = [safe(row["k"]), safe(row["v"]), f"{row['bits']:g}", safe(interval(row["kld_mean"], 3)), safe(tail), top]
    return [*first, *map(safe, added), *memory, grown, *rates, rotated]
