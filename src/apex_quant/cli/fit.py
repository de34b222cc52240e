"""`apex fit`: which file, cache types and context fit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apex_quant.cli import safe
from apex_quant.cli.console import console_for, print_json
from apex_quant.cli.options import Json, tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from apex_quant.model.kv_cache import LayerCache
    from apex_quant.serving.fit import Fit
    from apex_quant.serving.joint import Joint


def fit(
    places: Annotated[list[Path], typer.Argument(metavar="MODEL|DIR ...", help="GGUF files, or folders of them")],
    vram: Annotated[str, typer.Option("--vram", metavar="SIZE", help="of the device: 16GB; 0 without one")],
    ram: Annotated[
        str | None, typer.Option("--ram", metavar="SIZE", help="main memory that may be used (default: not checked)")
    ] = None,
    devices: Annotated[int, typer.Option("--devices", min=1, help="that --vram is the sum of")] = 1,
    ctx: Annotated[int, typer.Option("--ctx", parser=tokens, metavar="N", help="tokens of each sequence: 32k")] = 32768,
    parallel: Annotated[int, typer.Option("--parallel", min=1, max=256, help="sequences at a time")] = 1,
    type_k: Annotated[str | None, typer.Option("--type-k", metavar="TYPE", help="of the cache; default: tried")] = None,
    type_v: Annotated[str | None, typer.Option("--type-v", metavar="TYPE", help="of the cache; default: tried")] = None,
    ubatch: Annotated[int, typer.Option("--ubatch", min=1, help="tokens computed together")] = 512,
    reserve: Annotated[
        str | None, typer.Option("--reserve", metavar="SIZE", help="kept free (default 1GiB of each device)")
    ] = None,
    joint: Annotated[
        list[Path] | None,
        typer.Option("--joint", metavar="KV.json", help="of apex kv: choose by measurements; repeat"),
    ] = None,
    results: Annotated[
        list[Path] | None, typer.Option("--results", metavar="FILE|DIR", help="of apex eval, for --joint; repeat")
    ] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Exact bytes of weights, KV cache and states, compute buffers, expert offload: what fits, how much context."""
    from apex_quant.serving.fit import fit as run
    from apex_quant.sizes import parse_memory, parse_size

    found = run(
        list(places),
        vram=parse_memory(vram),
        ram=None if ram is None else parse_size(ram),
        devices=devices,
        ctx=ctx,
        parallel=parallel,
        type_k=type_k,
        type_v=type_v,
        ubatch=ubatch,
        reserve=None if reserve is None else parse_memory(reserve),
        joint=joint or None,
        results=results or (),
    )
    if as_json:
        print_json(found.to_json())
    else:
        show(console_for(False), found)


def show(console: Console, found: Fit) -> None:
    """A table of the possibilities, then the choice and its reason."""
    from apex_quant.cli.show import show_warnings, table

    made = table(
        None, "file", "K/V", "fits", "placement", ">weights", ">KV", ">states", ">compute", ">device", ">RAM",
        ">most context",
    )  # fmt: skip
    for one in found.options:
        both = (one.device, one.host)
        made.add_row(
            safe(one.name), f"{one.k}/{one.v}", "yes" if one.fits else f"no, {_mib(one.missing)} short",
            one.placement.words(one.layers), *(_mib(sum(getattr(use, part) for use in both)) for part in
                                               ("weights", "kv", "recurrent", "compute")),
            _mib(one.device.total), _mib(one.host.total), f"{one.ctx_left:,}" if one.ctx_left else "-",
        )  # fmt: skip
    console.print(made)
    sequences = f" for each of {found.parallel} sequences" if found.parallel > 1 else ""
    free = "not used" if found.reserve >= found.vram else f"of which {_mib(found.reserve)} stay free"
    console.print(f"asked: {found.ctx:,} tokens{sequences}, device {_mib(found.vram)} {free}")
    compute, error = found.compute.at(found.ctx), found.compute.error
    console.print(f"compute buffers {_mib(compute)} ± {error:.0%}: {safe(found.compute.source)}")
    if found.options:
        shown = found.choice or found.options[0]
        console.print(f"[dim]{safe(shown.name)}, {shown.k}/{shown.v}, by layer: {'; '.join(layers(shown.cache))}[/]")
    for name, note in {one.name: one.note for one in found.options if one.note}.items():
        console.print(f"[yellow]{safe(name)}: the cache is estimated: {safe(note)}[/]")
    if found.choice is not None:
        best = found.choice
        console.print(
            f"[bold]{safe(best.name)}[/] with {best.k}/{best.v}, {best.placement.words(best.layers)}: "
            + safe(found.reason)
        )
        console.print(f"[dim]llama-server -m {safe(str(best.path))} -c {found.ctx * found.parallel} "
                      f"-ngl {best.placement.gpu_layers}"
                      + (f" --n-cpu-moe {best.placement.cpu_moe}" if best.placement.cpu_moe else "")
                      + ("" if (best.k, best.v) == ("f16", "f16") else f" -ctk {best.k} -ctv {best.v} -fa on")
                      + "[/]", soft_wrap=True)  # fmt: skip
    else:
        console.print(f"[bold red]{safe(found.reason)}[/]")
    if found.joint is not None:
        _show_joint(console, found.joint)
    show_warnings(console, list(found.warnings))


def layers(cache: Sequence[LayerCache]) -> list[str]:
    """What layers remember, equal ones together."""
    alike: dict[tuple[str, int, int, int], list[int]] = {}
    for one in cache:
        alike.setdefault((one.kind, one.cells, one.k_bytes, one.v_bytes), []).append(one.layer)
    return [
        f"{len(which)} {kind} ({_ranges(which)}) of {(k + v) / 2**20:.2f} MiB"
        + ("" if kind == "recurrent" else f", {cells:,} cells")
        for (kind, cells, k, v), which in alike.items()
    ]


def _ranges(numbers: Sequence[int]) -> str:
    """3, 7-9: runs of numbers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _show_joint(console: Console, joint: Joint) -> None:
    from apex_quant.cli.show import show_warnings, table

    made = table(
        "what fits, by the sum of both damages (mean KLD)",
        "file",
        "K/V",
        "on the device",
        ">memory",
        ">sum",
        ">low",
        ">high",
    )
    for one in joint.fitting:
        mark = " (shown worse)" if one.shown_worse else ""
        made.add_row(
            safe(one.name) + mark, f"{one.k}/{one.v}", "wholly" if one.on_device else "not wholly", _mib(one.bytes),
            *(f"{value:.5f}" for value in (one.kld.value, one.kld.low, one.kld.high)),
        )  # fmt: skip
    console.print(made)
    console.print(safe(joint.sentence))
    console.print("[dim]that the damages of weights and cache add up is an assumption[/]")
    show_warnings(console, list(joint.warnings))


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB" if size < 10 * 2**30 else f"{size / 2**30:,.2f} GiB"
