"""Measuring against llama.cpp's own tools in the same run: the same text, tasks, threads and batches, in turns.

    python benchmarks/evaluate.py --tools build/stock-tools/bin --threads 2 --hellaswag hellaswag_val_full.txt
    python benchmarks/evaluate.py --memory                  # peak resident size at a vocabulary of 150,000, alone
    python benchmarks/evaluate.py --tools ... --bench PATH/llama-bench

Prints JSON. Times are of whole commands (ours with Python's start and a child's), medians over the rounds, by the clock
and by processor time; ratios are stock / ours, so that 1 and more is at least as fast. Bounds: at least 1.0 in tokens
per second and in seconds per 100 HellaSwag tasks; memory under the model's size and 1 GB.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

import gguf  # noqa: E402
import numpy as np  # noqa: E402

from apex_quant import SessionOptions, embedded_model, evaluate  # noqa: E402
from apex_quant.text import heldout  # noqa: E402
from tests.helpers.random_models import copy_metadata  # noqa: E402

Work = Callable[[], Any]
GIB = 1 << 30


def in_turns(jobs: dict[str, Work], rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """{"clock": {job: median seconds}, "processor": ..., "ratio_clock", "ratio_processor", each round's}, last results.

    The first of `jobs` is the baseline, the second ours.
    """
    clock: dict[str, list[float]] = {name: [] for name in jobs}
    processor: dict[str, list[float]] = {name: [] for name in jobs}
    last: dict[str, Any] = {}
    for _ in range(rounds):
        for name, work in jobs.items():
            started, before = time.perf_counter(), _used()
            last[name] = work()
            clock[name].append(time.perf_counter() - started)
            processor[name].append(_used() - before)
    stock, ours = jobs
    made: dict[str, Any] = {"rounds": rounds}
    for kind, times in (("clock", clock), ("processor", processor)):
        made[kind] = {name: round(statistics.median(values), 2) for name, values in times.items()}
        ratios = [a / b for a, b in zip(times[stock], times[ours], strict=True)]
        made[f"ratio_{kind}"] = [round(value, 3) for value in (statistics.median(ratios), min(ratios), max(ratios))]
    return made, last


def _used() -> float:
    """Processor seconds of this process and of its finished children."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF))
    return sum(used.ru_utime + used.ru_stime for used in both)


def stock(command: list[Any]) -> str:
    done = subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def ours(*words: Any) -> dict[str, Any]:
    """`apex eval` as a command of its own: a process start counts on both sides."""
    command = [sys.executable, "-m", "apex_quant", "eval", *map(str, words), "--json"]
    document: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return document


def perplexity(
    tool: Path, model: Path, text: Path | None, folder: Path, threads: int, chunks: int, rounds: int
) -> dict[str, Any]:
    """Tokens a second and both values, on `text` or the held-out text."""
    if text is None:
        text = folder / "text.txt"
        text.write_text("\n".join(document.text for document in heldout() if document.text))
    ctx, number = 512, iter(range(10_000))
    command = [tool, "-m", model, "-f", text, "-c", ctx, "-t", threads, "--chunks", chunks]
    words = [model, "--only", "ppl", "--text", text, "--ctx", ctx, "--chunks", chunks, "-j", threads]
    jobs: dict[str, Work] = {
        "llama-perplexity": lambda: stock(command),
        "apex eval": lambda: ours(*words, "-o", folder / f"ppl-{next(number)}.json"),
    }
    made, last = in_turns(jobs, rounds)
    found = re.search(r"Final estimate: PPL = ([0-9.]+)", last["llama-perplexity"])
    metric = last["apex eval"]["metrics"]["ppl"]
    assert found is not None
    tokens = 2 * metric["n"]  # half of each context is scored
    made["tokens_per_second"] = {name: round(tokens / value) for name, value in made["clock"].items()}
    made["perplexity"] = {"llama-perplexity": float(found[1]), "apex eval": round(metric["value"], 4)}
    return {"model": model.name, "threads": threads, "ctx": ctx, **made}


def hellaswag(
    tool: Path, model: Path, file: Path, folder: Path, threads: int, tasks: int, rounds: int
) -> dict[str, Any]:
    """Seconds per 100 tasks and both accuracies."""
    number = iter(range(10_000))
    command = [tool, "-m", model, "-f", file, "--hellaswag", "--hellaswag-tasks", tasks, "-t", threads]
    words = [model, "--only", "hellaswag", "--task-file", f"hellaswag={file}", "--tasks", tasks, "-j", threads]
    jobs: dict[str, Work] = {
        "llama-perplexity": lambda: stock(command),
        "apex eval": lambda: ours(*words, "-o", folder / f"tasks-{next(number)}.json"),
    }
    made, last = in_turns(jobs, rounds)
    shown = re.findall(rf"^{tasks}\t([0-9.]+)%", last["llama-perplexity"], re.MULTILINE)
    made["seconds_per_100_tasks"] = {name: round(100 * value / tasks, 2) for name, value in made["clock"].items()}
    made["accuracy"] = {
        "llama-perplexity": float(shown[-1]) / 100 if shown else None,
        "apex eval": last["apex eval"]["metrics"]["hellaswag"]["value"],
    }
    return {"model": model.name, "threads": threads, "tasks": tasks, **made}


def widened(path: Path, vocabulary: int) -> Path:
    """The embedded model with rows of noise and unused tokens up to `vocabulary`."""
    known = gguf.GGUFReader(embedded_model())
    writer = gguf.GGUFWriter(path, str(known.fields["general.architecture"].contents()))
    copy_metadata(known, writer, vocabulary)
    rng = np.random.default_rng(0)
    for tensor in known.tensors:
        data = np.asarray(tensor.data)
        if tensor.name in ("token_embd.weight", "output.weight"):
            more = vocabulary - int(tensor.shape[1])
            noise = rng.normal(0, 0.02, (more, int(tensor.shape[0]))).astype(np.float32)
            data = np.concatenate([data, (noise.view(np.uint32) >> 16).astype(np.uint16).view(data.dtype)])
        writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def memory(folder: Path, vocabulary: int, ctx: int) -> dict[str, Any]:
    """Peak resident size of the largest process: perplexity, then divergence from the model itself, side by side."""
    model = widened(folder / "wide.gguf", vocabulary)
    size = model.stat().st_size
    chunks = {"text": None, "chunks": 1, "ctx": ctx}
    made: dict[str, Any] = {"vocabulary": vocabulary, "ctx": ctx, "model_mb": round(size / 1e6)}
    for name, more in (("perplexity", {"only": ["ppl"]}), ("divergence", {"reference": model, "only": ["kld"]})):
        options = SessionOptions(threads=2, mmap=False)
        evaluate(model, **chunks, **more, options=options)  # type: ignore[arg-type]
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        models = 2 if "reference" in more else 1
        made[name] = {"peak_mb": round(peak / 1e6), "bound_mb": round((models * size + GIB) / 1e6)}
    return made


def speed(bench: Path, model: Path, threads: int, rounds: int) -> dict[str, Any]:
    """pp512 and tg128 of both, in turns."""
    rates: dict[str, dict[str, list[float]]] = {"llama-bench": {}, "apex eval": {}}
    with tempfile.TemporaryDirectory() as name:
        for number in range(rounds):
            for row in json.loads(_json_part(stock([bench, "-m", model, "-t", threads, "-o", "json"]))):
                test = f"pp{row['n_prompt']}" if row["n_prompt"] else f"tg{row['n_gen']}"
                rates["llama-bench"].setdefault(test, []).append(row["avg_ts"])
            made = ours(model, "--only", "speed", "-j", threads, "-o", Path(name) / f"{number}.json")
            for test in ("pp512", "tg128"):
                rates["apex eval"].setdefault(test, []).append(made["metrics"]["speed"][test]["value"])
    return {
        "tokens_per_second": {who: {t: [round(v, 1) for v in vs] for t, vs in r.items()} for who, r in rates.items()},
        "ratio": {
            test: round(statistics.median(rates["apex eval"][test]) / statistics.median(values), 3)
            for test, values in rates["llama-bench"].items()
        },
    }


def _json_part(text: str) -> str:
    return text[text.index("[\n") : text.rindex("]") + 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=embedded_model())
    parser.add_argument("--tools", type=Path, help="folder with llama-perplexity")
    parser.add_argument("--bench", type=Path, help="llama-bench")
    parser.add_argument("--text", type=Path, help="instead of the held-out text, which has some 60 chunks")
    parser.add_argument("--hellaswag", type=Path, help="hellaswag_val_full.txt")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--vocabulary", type=int, default=150_000)
    parser.add_argument("--ctx", type=int, default=2048, help="of --memory")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--chunks", type=int, default=100)
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.memory:
            print(json.dumps(memory(folder, given.vocabulary, given.ctx), indent=1))
        if given.tools is not None:
            tool = given.tools / "llama-perplexity"
            found = perplexity(tool, given.model, given.text, folder, given.threads, given.chunks, given.rounds)
            print(json.dumps(found, indent=1), flush=True)
            if given.hellaswag is not None:
                tasks = hellaswag(tool, given.model, given.hellaswag, folder, given.threads, given.tasks, given.rounds)
                print(json.dumps(tasks, indent=1), flush=True)
        if given.bench is not None:
            print(json.dumps(speed(given.bench, given.model, given.threads, given.rounds), indent=1))


if __name__ == "__main__":
    main()
