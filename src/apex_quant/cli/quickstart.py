"""`quickstart`: the whole way on the embedded model, with every step told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from apex_quant.calibration.calibrate import calibrate
from apex_quant.cli import safe
from apex_quant.cli.calibrate import CalibrationBar
from apex_quant.cli.progress import JobBar
from apex_quant.cli.show import heat_map, human, table
from apex_quant.data import embedded_model
from apex_quant.encode.quantize import quantize
from apex_quant.encode.verify import verify
from apex_quant.errors import InputError
from apex_quant.gguf import open_model
from apex_quant.model.inspect import inspect
from apex_quant.recipe.plan import plan
from apex_quant.recipe.tiers import published_tiers

TOKENS = 8192  # half a minute on a slow core; real calibrations take 50k and more


def quickstart(folder: str | Path, console: Console) -> dict[str, Any]:
    """Inspect, plan, calibrate, quantize and verify the embedded model into `folder`, telling each step on `console`.

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
    console.print(
        "[bold]2. Calibrate[/]: which inputs matter, and which experts text reaches, from the built-in corpus"
    )
    folder.mkdir(parents=True, exist_ok=True)
    with CalibrationBar("calibrating") as counting:
        matrix = calibrate(source, folder / "imatrix.gguf", tokens=TOKENS, progress=counting)
    thin = sum(len(row["experts"]) for row in matrix.uncovered)
    console.print(
        f"   {matrix.tokens} tokens; {matrix.experts - thin} of {matrix.experts} experts saw at least {matrix.floor}"
    )
    with open_model(source) as model:
        console.print("[bold]3. Plan[/]: a type for every tensor, and the size to the byte, before any work")
        tiers = [tier.name for tier in published_tiers()]
        plans = {tier: plan(model, tier, imatrix=matrix.path) for tier in tiers}
        for tier, one in plans.items():
            console.print(f"   {tier}: {one.total_bytes} bytes, {one.bpw:.2f} bits per weight")
        console.print(f"   {plans['quality'].zones}")
        console.print(heat_map(plans["quality"].tensors, console.width))
    console.print(f"[bold]4. Encode[/] all {len(tiers)} tiers in one pass: each tensor is read once")
    with JobBar("quantizing") as bar:
        made = quantize(source, tiers, imatrix=matrix.path, out=folder, progress=bar)
    console.print("[bold]5. Verify[/] each file: structure, values, hashes, a sample encoded again")
    for output in made.outputs:
        weighted = matrix.path if output.plan.importance else None
        with JobBar(f"verifying {output.path.name}") as bar:
            result = verify(output.path, source=source, imatrix=weighted, progress=bar)
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
        "apex calibrate MODEL-BF16.gguf -o imatrix.gguf",
        "apex quantize MODEL-BF16.gguf --imatrix imatrix.gguf --tier i-quality,i-balanced,i-compact",
    ):
        console.print(f"   {command}", highlight=False)
    return {"imatrix": matrix.to_json(), "outputs": [output.to_json() for output in made.outputs]}
