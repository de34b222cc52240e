"""`quickstart`: the whole way on the embedded model, with every step told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from apex_quant.calibration.calibrate import calibrate
from apex_quant.cli import safe
from apex_quant.cli.calibrate import CalibrationBar
from apex_quant.cli.evaluate import EvaluationBar, interval
from apex_quant.cli.progress import JobBar
from apex_quant.cli.show import heat_map, human, table
from apex_quant.data import embedded_model
from apex_quant.encode.quantize import quantize
from apex_quant.encode.verify import verify
from apex_quant.errors import InputError
from apex_quant.evaluation.compare import compare
from apex_quant.evaluation.evaluate import evaluate
from apex_quant.evaluation.make_reference import make_reference
from apex_quant.evaluation.schema import Results
from apex_quant.gguf import open_model
from apex_quant.model.inspect import inspect
from apex_quant.recipe.plan import plan
from apex_quant.recipe.tiers import published_tiers
from apex_quant.text import heldout

TOKENS = 8192  # half a minute on a slow core; real calibrations take 50k and more
_SHOWN = 0.005  # share of the bytes
CTX, CHUNKS = 512, 8  # of each domain's text: 40 chunks in all, enough for an interval


def quickstart(folder: str | Path, console: Console) -> dict[str, Any]:
    """Inspect, plan, calibrate, quantize, verify and evaluate the embedded model, telling each step on `console`.

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
        for usage in sorted(report.roles, key=lambda one: -one.share):
            if usage.share >= _SHOWN:
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
    measured = _measured(source, [output.path for output in made.outputs], folder, console)
    rows = table(None, "tier", ">bytes", ">bpw", ">time", ">mean KLD", ">perplexity", "file")
    for output in made.outputs:
        metrics = measured[output.path].metrics
        rows.add_row(
            output.tier,
            str(output.bytes),
            f"{output.bpw:.2f}",
            f"{output.seconds:.1f} s",
            interval(metrics["kld"]["mean"]),
            f"{metrics['ppl']['value']:.3f} ± {metrics['ppl']['error']:.3f}",
            safe(output.path.name),
        )
    console.print(rows)
    console.print("   [dim]KLD: what each token's prediction loses against BF16, with its 95 % interval[/]")
    by_tier = {output.tier: measured[output.path] for output in made.outputs}
    for name in sorted(by_tier):  # what the importance matrix gains
        if f"i-{name}" in by_tier:
            for pair in compare([by_tier[f"i-{name}"], by_tier[name]], ["kld"]):
                console.print(f"   {safe(pair.sentence)}", highlight=False)
    console.print("[bold]Next[/], with a model of your own:")
    for command in (
        "apex inspect MODEL-BF16.gguf",
        "apex plan MODEL-BF16.gguf --fit 16GiB",
        "apex calibrate MODEL-BF16.gguf -o imatrix.gguf",
        "apex quantize MODEL-BF16.gguf --imatrix imatrix.gguf --tier i-quality,i-balanced,i-compact",
        "apex eval MODEL-APEX-I-Compact.gguf --reference MODEL-BF16.gguf",
    ):
        console.print(f"   {command}", highlight=False)
    outputs = [{**output.to_json(), "metrics": measured[output.path].metrics} for output in made.outputs]
    return {"imatrix": matrix.to_json(), "outputs": outputs}


def _measured(source: Path, files: Sequence[Path], folder: Path, console: Console) -> dict[Path, Results]:
    """What every file loses on held-out text. The full model reads the text once, into a reference file."""
    reference = folder / "reference.apexref"
    pieces = CHUNKS * len({document.source.partition(":")[0] for document in heldout()})
    console.print(f"[bold]6. Evaluate[/] on {pieces} pieces of held-out text, {CTX} tokens each, against BF16")
    if not reference.exists():
        with EvaluationBar("reference") as counting:
            make_reference(source, reference, ctx=CTX, chunks=CHUNKS, progress=counting)
    found = {}
    for path in files:
        with EvaluationBar(f"evaluating {path.name}") as counting:
            found[path] = evaluate(
                path,
                reference=reference,
                source=source,
                only=("ppl", "kld"),
                ctx=CTX,
                chunks=CHUNKS,
                out=path.with_suffix(".json"),
                progress=counting,
            )
    return found
