"""`apex measure`: its options, its progress and what it shows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from apex_quant.cli import safe
from apex_quant.cli.calibrate import parse_count
from apex_quant.cli.console import console_for, print_json
from apex_quant.cli.options import Buffers, CpuExperts, GpuLayers, Json, TensorSplit, Threads, session_options
from apex_quant.cli.progress import Bar
from apex_quant.errors import UsageError

if TYPE_CHECKING:
    from apex_quant.allocation.measure import MeasureProgress
    from apex_quant.allocation.sensitivity import Group, Sensitivities

_SHOWN = 12  # groups in the table: the most sensitive ones
_UNITS = {"": 60.0, "s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}
_TIME = re.compile(r"(\d+(?:\.\d+)?) ?(s|min|m|h|)", re.ASCII | re.IGNORECASE)


def parse_time(text: str) -> float:
    """'30min', '90s', '2h', '45' (minutes) to seconds. Raises UsageError."""
    found = _TIME.fullmatch(text.strip())
    seconds = float(found[1]) * _UNITS[found[2].lower()] if found else 0.0
    if not 0 < seconds < 1e8:
        raise UsageError(f"{text!r} is not a time; write 30min, 90s or 2h")
    return seconds


Groups = Annotated[
    str, typer.Option("--groups", metavar="HOW", help="tensor, or some of role,part,layer: what is probed together")
]
Budget = Annotated[
    str | None, typer.Option("--budget", metavar="TIME", help="30min, 90s, 2h: less text, then fewer probes")
]
Load = Annotated[
    Path | None,
    typer.Option("--load", metavar="FILE", help="disturb this file of the same model, such as its Q8_0 form, "
                 "where MODEL does not fit into memory"),
]  # fmt: skip


class MeasureBar(Bar):
    """Call it with each MeasureProgress."""

    def __call__(self, event: MeasureProgress) -> None:
        told = f"{event.what}: {event.done} of {event.planned}"
        if event.resumed:
            told += f" ({event.resumed} from an earlier run)"
        if event.left is not None:
            told += f", ETA {event.left:.0f} s"
        self.show(event.done / max(event.planned, 1), told)


def measure(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="the full-precision GGUF file, or any shard of one")],
    out: Annotated[Path, typer.Option("-o", "--out", help="the sensitivities to write")] = Path("sensitivity.json"),
    imatrix: Annotated[
        Path | None, typer.Option("--imatrix", help="importance matrix that the quantized files will be made with")
    ] = None,
    fill: Annotated[str, typer.Option("--fill", metavar="RULE", help="as apex quantize --fill")] = "prior",
    tokens: Annotated[str, typer.Option("--tokens", metavar="N", help="of text in each probe: 4096, 16k")] = "4096",
    budget: Budget = None,
    groups: Groups = "tensor",
    probe: Annotated[
        list[str] | None,
        typer.Option("--probe", metavar="TYPE,...", help="types that every group is probed in; 'noise': by random "
                     "matrices of the size of their error instead"),
    ] = None,
    joint: Annotated[int, typer.Option("--joint", min=0, help="random recipes of the whole model to measure too")] = 12,
    load: Load = None,
    text: Annotated[
        list[Path] | None, typer.Option("--text", metavar="FILE", help="instead of the built-in probe text; repeat")
    ] = None,
    ctx: Annotated[int, typer.Option("--ctx", min=16, help="tokens of a chunk")] = 256,
    seed: Annotated[int, typer.Option("--seed", min=0, help="of the random recipes")] = 0,
    no_rounding: Annotated[
        bool, typer.Option("--no-rounding", help="do not run a Q8_0 file, which tells what rounding activations costs")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="fail unless there is an interrupted run to go on with")
    ] = False,
    threads: Threads = None,
    gpu_layers: GpuLayers = 0,
    cpu_experts: CpuExperts = False,
    tensor_split: TensorSplit = None,
    tensor_buffers: Buffers = None,
    force: Annotated[
        bool, typer.Option("--force", help="replace an existing file once the new one is complete")
    ] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """How much each part of a model matters: what apex optimize decides by. Interrupted, the same command goes on."""
    from apex_quant.allocation.groups import PROBES
    from apex_quant.allocation.measure import measure as run

    words = [word.strip() for one in probe or () for word in one.split(",")]
    types = [word for word in words if word.lower() != "noise"]
    options = session_options(threads, gpu_layers, cpu_experts, tensor_split, tensor_buffers, no_mmap=True)
    with MeasureBar(f"measuring {model.name}") as bar:
        made = run(
            model,
            out=out,
            imatrix=imatrix,
            fill=fill,
            tokens=parse_count(tokens),
            ctx=ctx,
            groups=groups,
            types=types or PROBES,
            joint=joint,
            noise=len(types) < len(words),
            loaded=load,
            text=text,
            budget=parse_time(budget) if budget is not None else None,
            seed=seed,
            rounding=not no_rounding,
            options=options,
            resume=resume,
            force=force,
            progress=bar,
        )
    if as_json:
        print_json({"path": str(out), **made.to_json()})
    else:
        show_sensitivities(console_for(False), made, out)


def show_sensitivities(console: Console, made: Sensitivities, out: Path) -> None:
    """What it cost, the most sensitive groups by byte, and how far costs add up."""
    from apex_quant.allocation.cost import CostModel
    from apex_quant.cli.show import table

    console.print(
        f"{safe(str(out))}: {len(made.groups)} groups, {made.text.tokens} tokens in each probe, "
        f"{made.tokens_spent} tokens decoded in {made.seconds:.0f} s"
    )

    def first(group: Group) -> float:
        return group.probes[0].kld if group.probes else 0.0

    most = table(None, "most sensitive", "in", ">KLD", ">standard error", ">experts changed")
    for group in sorted(made.groups, key=first, reverse=True)[:_SHOWN]:
        for one in group.probes[:1]:
            flips = f"{one.flips:.2%}" if one.flips is not None else ""
            most.add_row(safe(group.name), safe(one.type), f"{one.kld:.3g}", f"{one.error:.1g}", flips)
    console.print(most)
    model = CostModel.from_sensitivities(made)
    if made.rounding is not None:
        console.print(
            f"rounding of activations costs {model.rounding:.2g}: a Q8_0 file has {made.rounding.kld:.3g}, with a "
            f"standard error of {made.rounding.error:.1g}"
        )
    if made.joint:
        rows = table(None, "whole recipes", ">sum of parts", ">predicted", ">measured", ">standard error")
        for joint in sorted(made.joint, key=lambda one: one.kld):
            total = model.total(joint.types)
            rows.add_row(
                safe(joint.name), f"{total:.3g}", f"{model.in_place(total):.3g}", f"{joint.kld:.3g}",
                f"{joint.error:.1g}",
            )  # fmt: skip
        console.print(rows)
    for warning in made.warnings:
        console.print(f"[yellow]note:[/] {safe(warning)}")
