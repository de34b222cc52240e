"""What observing costs: the same tokens with and without it, in turns in one process, and llama-imatrix beside it.

    python benchmarks/calibrate.py                                  # a random-weight MoE of 110 M parameters
    python benchmarks/calibrate.py --model MODEL.gguf --tools build/stock-tools/bin --threads 2

Prints JSON: tokens per second by processor time and by the clock (medians over the rounds). Processor time is what
counts on a machine that does other work; the clock is for a quiet one. The bounds: at most 35 % more than a plain
forward pass on a model of 100 M parameters or more, at most 1.3 times llama-imatrix's time on the embedded one.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from apex_quant import SessionOptions, calibrate, embedded_model
from apex_quant.calibration.observer import ImportanceObserver
from apex_quant.gguf import open_model
from apex_quant.runtime.session import Session
from tests.helpers.random_models import write_random_gguf

CTX = 512
Times = dict[str, list[float]]


def observing(model: Path, threads: int, rounds: int, sequences: int) -> dict[str, Any]:
    """Plain and observed decodes of the same random tokens, in turns."""
    options = SessionOptions(threads=threads, sequences=sequences)
    observer = ImportanceObserver()
    cpu: Times = {"plain": [], "observed": []}
    clock: Times = {"plain": [], "observed": []}
    with Session(model, options) as plain, Session(model, options, observer) as observed:
        tokens = np.random.default_rng(0).integers(5, 500, (sequences, CTX), dtype=np.int32)
        for number in range(rounds + 1):
            for name, session in (("plain", plain), ("observed", observed)):
                observer.begin()
                started = time.perf_counter(), time.process_time()
                session.decode(tokens)
                if number:  # the first round fills caches
                    clock[name].append(time.perf_counter() - started[0])
                    cpu[name].append(time.process_time() - started[1])
    with open_model(model) as opened:
        parameters = sum(info.n_elements for info in opened.tensors.values())
    return {
        "model": model.name,
        "parameters": parameters,
        "threads": threads,
        "tokens_per_second": {n: round(tokens.size / statistics.median(v), 1) for n, v in clock.items()},
        "processor_seconds": {n: round(statistics.median(v), 3) for n, v in cpu.items()},
        "overhead_clock": round(statistics.median(clock["observed"]) / statistics.median(clock["plain"]) - 1, 3),
        "overhead_processor": round(statistics.median(cpu["observed"]) / statistics.median(cpu["plain"]) - 1, 3),
    }


def against_stock(model: Path, tools: Path, threads: int, chunks: int, rounds: int) -> dict[str, Any]:
    """Whole commands, ours and llama-imatrix (without its perplexity), in turns, on the same text."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = folder / "text.txt"
        text.write_text((Path(__file__).parents[1] / "tests/calibration/golden.txt").read_text() * chunks)
        spent: dict[str, Times] = {"clock": {}, "processor": {}}
        for number in range(rounds):
            words = ["-m", model, "-f", text, "-o", folder / "stock.gguf", "--chunks", chunks, "-t", threads]
            for who in ("stock", "apex"):
                started, before = time.perf_counter(), _children()
                if who == "stock":
                    command = [str(tools / "llama-imatrix"), *map(str, words), "--no-ppl"]
                    subprocess.run(command, check=True, capture_output=True)
                else:
                    options = SessionOptions(threads=threads)
                    calibrate(model, folder / f"{number}.gguf", corpus=[text], tokens=chunks * CTX, options=options)
                spent["clock"].setdefault(who, []).append(time.perf_counter() - started)
                spent["processor"].setdefault(who, []).append(_children() - before)
    made: dict[str, Any] = {"model": model.name, "chunks": chunks, "threads": threads}
    for kind, times in spent.items():
        middle = {who: statistics.median(values) for who, values in times.items()}
        made[kind] = {who: round(value, 2) for who, value in middle.items()}
        made[f"ratio_{kind}"] = round(middle["apex"] / middle["stock"], 3)
    return made


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tools", type=Path, help="folder with llama-imatrix: also compare with it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--chunks", type=int, default=8, help="for the comparison with llama-imatrix")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        model = given.model
        if model is None:
            path, layers = Path(name) / "random.gguf", "M" * 5
            model = write_random_gguf(
                path, "qwen3moe", dtype="F16", layers=layers, embd=768, ff_exp=512, experts=16, used=4, vocab=4096
            )
        print(json.dumps(observing(model, given.threads, given.rounds, given.sequences), indent=1))
    if given.tools is not None:
        found = against_stock(embedded_model(), given.tools, given.threads, given.chunks, max(1, given.rounds // 2))
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
