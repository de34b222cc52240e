"""`apex calibrate`: its options, its progress and what it shows."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from apex_quant.cli import safe
from apex_quant.cli.console import console_for, print_json
from apex_quant.cli.options import (
    Buffers,
    CpuExperts,
    Force,
    GpuLayers,
    Json,
    NoMmap,
    TensorSplit,
    Threads,
    session_options,
)
from apex_quant.cli.progress import Bar
from apex_quant.sizes import parse_count as parse_count

if TYPE_CHECKING:
    from apex_quant.calibration.calibrate import Calibration, CalibrationProgress


class CalibrationBar(Bar):
    """Call it with each CalibrationProgress."""

    def __init__(self, what: str, *, quiet: bool = False) -> None:
        super().__init__(what, quiet=quiet)
        self._start = time.monotonic()

    def __call__(self, event: CalibrationProgress) -> None:
        passed = max(time.monotonic() - self._start, 0.1)
        rate = (event.chunks - event.resumed) * event.chunk_size / passed
        left = max(0, event.planned - event.chunks) * event.chunk_size / max(rate, 0.1)
        told = f"{event.chunks * event.chunk_size} tokens, {rate:.0f} tokens/s, ETA {left:.0f} s"
        if event.chunks > event.planned:
            told += ", drawing text for uncovered experts"
        if event.experts:
            told += f", {event.experts - event.uncovered} of {event.experts} experts covered"
        self.show(min(1.0, event.chunks / max(event.planned, 1)), told)


def show_calibration(console: Console, made: Calibration) -> None:
    """What was made, and what it does not cover."""
    how = "unchanged" if made.unchanged else f"in {made.seconds:.1f} s"
    console.print(f"{safe(str(made.path))}: {made.tokens} tokens in {made.chunks} chunks, {how}")
    if made.resumed:
        console.print(f"went on from {made.resumed} chunks of an earlier run")
    if made.draws:
        console.print(f"drawn for uncovered experts: {safe(', '.join(made.draws))}")
    if made.experts:
        thin = sum(len(row["experts"]) for row in made.uncovered)
        console.print(f"{made.experts - thin} of {made.experts} experts saw at least {made.floor} tokens")
        for row in made.uncovered[:20]:
            console.print(f"  [yellow]layer {row['layer']}:[/] experts {', '.join(map(str, row['experts']))}")
        if made.uncovered:
            console.print("[dim]more --tokens, or --cover, which draws text that reaches them[/]")
    if made.missing:
        names = ", ".join(made.missing[:3]) + (", ..." if len(made.missing) > 3 else "")
        console.print(f"[dim]{len(made.missing)} tensors met no activations and got no importance: {safe(names)}[/]")
    for warning in made.warnings:
        console.print(f"[yellow]note:[/] {safe(warning)}")


def calibrate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="a GGUF file, or any shard of one")],
    out: Annotated[Path, typer.Option("-o", "--out", help="the importance matrix to write")] = Path("imatrix.gguf"),
    corpus: Annotated[
        list[str] | None,
        typer.Option("--corpus", metavar="TEXT", help="builtin, FILE, DIR or hub:NAME; repeat for several"),
    ] = None,
    mix: Annotated[
        str | None, typer.Option("--mix", metavar="KIND=PERCENT,...", help="chat=30,code=25,reasoning=25,tools=20")
    ] = None,
    tokens: Annotated[str, typer.Option("--tokens", metavar="N", help="how much text: 50k")] = "50k",
    ctx: Annotated[int, typer.Option("--ctx", min=16, help="tokens of a chunk")] = 512,
    cover: Annotated[
        bool, typer.Option("--cover", help="draw more text until every expert saw enough tokens (see --floor)")
    ] = False,
    floor: Annotated[int, typer.Option("--floor", min=1, help="tokens that are enough for an expert")] = 64,
    seed: Annotated[int, typer.Option("--seed", min=0, help="of the order of the text")] = 0,
    skip_output: Annotated[
        bool, typer.Option("--skip-output", help="nothing for the output matrix, as llama-imatrix does")
    ] = False,
    threads: Threads = None,
    gpu_layers: GpuLayers = 0,
    cpu_experts: CpuExperts = False,
    tensor_split: TensorSplit = None,
    tensor_buffers: Buffers = None,
    no_mmap: NoMmap = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Make an importance matrix from text. Interrupted, the same command goes on."""
    from apex_quant.calibration.calibrate import calibrate as run
    from apex_quant.text import parse_mix

    options = session_options(threads, gpu_layers, cpu_experts, tensor_split, tensor_buffers, no_mmap, ctx=ctx)
    with CalibrationBar(f"calibrating {model.name}") as bar:
        made = run(
            model,
            out,
            corpus=corpus or ("builtin",),
            mix=parse_mix(mix) if mix else None,
            tokens=parse_count(tokens),
            cover=cover,
            floor=floor,
            seed=seed,
            heads=not skip_output,
            options=options,
            force=force,
            progress=bar,
        )
    if as_json:
        print_json(made.to_json())
    else:
        show_calibration(console_for(False), made)
