"""`quickstart`: the whole way on the embedded model, with every step told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from apex_quant.cli import safe
from apex_quant.cli.progress import JobBar
from apex_quant.cli.show import heat_map, human, table
from apex_quant.data import embedded_model
from apex_quant.encode.quantize import quantize
from apex_quant.encode.verify import verify
from apex_quant.errors import InputError
from apex_quant.gguf import open_model
from apex_quant.model.inspect import inspect
from apex_quant.recipe.plan import plan

TIERS = ("quality", "balanced", "compact")


def quickstart(folder: str | Path, console: Console) -> dict[str, Any]:
    """Inspect, plan, quantize and verify the embedded model into `folder`, telling each step on `console`.

    Returns what was made, as quantize's JSON. Run again, it finds its own files and makes nothing twice.
    """
    folder = Path(folder)
    source = embedded_model()
    with open_model(source) as model:
        console.print("[bold]1. Inspect[/] the model that ships in this package")
        report = inspect(model)
        console.print(
            f"   {safe(str(report.name))}: {report.parameters / 1e6:.1f} M parameters, "
            f"{report.active_parameters / 1e6:.1f} M active, {report.layers} layers, {report.experts} experts, "
            f"{human(report.file_bytes)} in BF16"
        )
        for usage in report.roles[:4]:
            console.print(f"   [dim]{usage.name}: {usage.share:.0%} of the bytes[/]")
        console.print("[bold]2. Plan[/]: a type for every tensor, and the size to the byte, before any work")
        plans = {tier: plan(model, tier) for tier in TIERS}
        for tier, one in plans.items():
            console.print(f"   {tier}: {one.total_bytes} bytes, {one.bpw:.2f} bits per weight")
        console.print(f"   {plans['quality'].zones}")
        console.print(heat_map(plans["quality"].tensors, console.width))
    console.print("[bold]3. Encode[/] all three in one pass: each tensor is read once")
    with JobBar("quantizing") as bar:
        made = quantize(source, TIERS, out=folder, progress=bar)
    console.print("[bold]4. Verify[/] each file: structure, values, hashes, a sample encoded again")
    for output in made.outputs:
        with JobBar(f"verifying {output.path.name}") as bar:
            result = verify(output.path, source=source, progress=bar)
        if not result.ok:
            failed = ", ".join(check.name for check in result.checks if check.ok is False)
            raise InputError(f"{output.path}: failed: {failed}", hint=f"apex verify {output.path} --source {source}")
        console.print(f"   [green]ok[/] {safe(output.path.name)}")
    rows = table(None, "tier", ">bytes", ">bpw", ">time", "path")
    for output in made.outputs:
        rows.add_row(
            output.tier, str(output.bytes), f"{output.bpw:.2f}", f"{output.seconds:.1f} s", safe(str(output.path))
        )
    console.print(rows)
    console.print("[bold]Next[/], with a model of your own:")
    for command in (
        "apex inspect MODEL-BF16.gguf",
        "apex plan MODEL-BF16.gguf --fit 16GiB",
        "apex quantize MODEL-BF16.gguf --tier quality,balanced,compact",
    ):
        console.print(f"   {command}", highlight=False)
    return {"outputs": [output.to_json() for output in made.outputs]}
