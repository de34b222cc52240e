"""Time of `apex_quant.quantize` against llama.cpp's own llama_model_quantize: same file, types, threads, machine.

    python benchmarks/encode.py                             # all nine tiers of the embedded model in one pass
    python benchmarks/encode.py --tier quality --repeat 5   # one tier
    python benchmarks/encode.py --model model.gguf --imatrix imatrix.gguf --threads 8

Stock makes each tier in a process of its own, from our plan's recipe, base type and importance; ours makes all of
them in one call. Runs alternate within one job and every pair of files is compared: equal data sections, or the
benchmark stops. Two times are given: `process` from start to end of a fresh Python process, and `call` for the
library call alone, taken inside it (llama_model_quantize without reading the importance matrix; quantize() with
everything, its child process and fsync included). `call` is the harder comparison for us, since llama-quantize
itself starts faster than Python; `cpu` is the processor time of the processes, which other work on the machine
disturbs least. The goals are stated for the median: one tier at most 1.00, all nine at most
0.75 of stock's sum, source bytes read at most 1.01, every distinct (tensor, type, importance) encoded once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

import apex_quant  # noqa: E402
from apex_quant.gguf import open_model  # noqa: E402
from tests.helpers.imatrix import random_imatrix  # noqa: E402
from tests.helpers.random_models import write_random_gguf  # noqa: E402
from tests.helpers.stock import stock_quantize  # noqa: E402

Json = dict[str, Any]
CLOCKS = ("process", "call", "cpu")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(run_ours(json.load(sys.stdin))))
        return 0
    parser.add_argument("--model", type=Path, help="source GGUF (default: the embedded model)")
    parser.add_argument("--random", metavar="ARCH", help="a random model of this architecture instead")
    parser.add_argument("--size", action="append", default=[], metavar="NAME=N", help="sizes for --random")
    parser.add_argument("--tier", default="all", help="tier names with commas between, or all")
    parser.add_argument("--imatrix", type=Path, help="importance matrix (default: seeded random numbers)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--work-dir", type=Path, help="where outputs go (default: a temporary folder)")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="apex-bench-", dir=options.work_dir) as folder:
        result = benchmark(options, Path(folder))
    print(json.dumps(result, indent=1) if options.json else report(result))
    return 0


def benchmark(options: argparse.Namespace, work: Path) -> Json:
    """All runs; the folder is left with the model and importance matrix only."""
    model = options.model or apex_quant.embedded_model()
    if options.random:
        sizes: dict[str, Any] = {name: int(n) for name, n in (size.split("=") for size in options.size)}
        model = write_random_gguf(work / "model.gguf", options.random, **sizes)
    imatrix = options.imatrix
    if imatrix is None:
        imatrix = work / "imatrix.gguf"
        random_imatrix(model).write(imatrix)
    job: Json = {
        "model": str(model),
        "imatrix": str(imatrix),
        "tier": options.tier,
        "threads": options.threads,
        "out": str(work / "ours"),
    }
    raw = apex_quant.PlanOptions(fill="none")  # stock's rule for experts without data, so that bytes can be compared
    planned = apex_quant.quantize(model, options.tier, imatrix=imatrix, dry_run=True, options=raw).plans
    warm_cache(model)
    runs: list[Json] = []
    for _ in range(options.repeat):
        ours = in_fresh_process(job)
        stock: list[Json] = []
        for plan in planned:
            out = work / "stock.gguf"
            before = cpu_of_children()
            took = stock_quantize(
                model,
                out,
                plan.file_type,
                imatrix=imatrix if plan.importance else None,
                tensor_types=[(pattern, kind.id) for pattern, kind in plan.recipe.overrides()],
                threads=options.threads,
            )
            cpu_s = cpu_of_children() - before
            if data_hash(out) != data_hash(Path(ours["paths"][plan.tier])):
                raise SystemExit(f"{plan.tier}: our tensor data differs from llama.cpp's")
            out.unlink()
            times = {"process_s": took["process_s"], "call_s": took["quantize_s"], "cpu_s": cpu_s}
            stock.append({"tier": plan.tier, **times})
        for path in map(Path, ours.pop("paths").values()):
            path.unlink()
        run: Json = {"ours": ours, "stock": stock}
        for clock in CLOCKS:
            run[f"{clock}_ratio"] = ours[f"{clock}_s"] / sum(one[f"{clock}_s"] for one in stock)
        runs.append(run)
        print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return {
        "model": model.name,
        "source_bytes": model.stat().st_size,
        "tiers": [plan.tier for plan in planned],
        "threads": options.threads,
        "runs": runs,
        **{f"{clock}_ratio": statistics.median(run[f"{clock}_ratio"] for run in runs) for clock in CLOCKS},
        "goal": 1.0 if len(planned) == 1 else 0.75,
    }


def in_fresh_process(job: Json) -> Json:
    """`run_ours` in a new Python process, with the time that process took."""
    start, before = time.perf_counter(), cpu_of_children()
    done = subprocess.run(
        [sys.executable, __file__, "--worker"],
        input=json.dumps(job),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    took = time.perf_counter() - start
    return {"process_s": took, "cpu_s": cpu_of_children() - before, **json.loads(done.stdout)}


def cpu_of_children() -> float:
    """Processor seconds of all processes that this one has started and waited for, theirs included."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run_ours(job: Json) -> Json:
    """One quantize() call: its time, files and counters."""
    start = time.perf_counter()
    made = apex_quant.quantize(
        job["model"],
        job["tier"],
        imatrix=job["imatrix"],
        out=job["out"] + "/",
        threads=job["threads"],
        options=apex_quant.PlanOptions(fill="none"),
    )
    call_s = time.perf_counter() - start
    assert made.job is not None
    return {
        "call_s": call_s,
        "paths": {one.tier: str(one.path) for one in made.outputs},
        "bytes_read": made.job.bytes_read,
        "tensor_bytes": made.job.source_bytes,
        "rows_encoded": made.job.rows_encoded,
        "rows_distinct": made.job.rows_distinct,
    }


def warm_cache(path: Path) -> None:
    """Read the source once, so that no run pays for the disk (models larger than memory excepted)."""
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass


def data_hash(path: Path) -> str:
    """sha256 of a GGUF's data section."""
    with open_model(path) as model, path.open("rb") as file:
        file.seek(model.files[0].header_bytes)
        return hashlib.file_digest(file, "sha256").hexdigest()


def report(result: Json) -> str:
    """The result as plain text."""
    lines = [
        f"{result['model']}: {result['source_bytes'] / 1e6:.1f} MB, {result['threads']} threads, "
        f"tiers {', '.join(result['tiers'])}",
        "seconds     " + "".join(f"{clock + ': ours':>16}{'stock':>9}{'ratio':>8}" for clock in CLOCKS),
    ]
    for number, run in enumerate(result["runs"], 1):
        cells = []
        for clock in CLOCKS:
            stock = sum(one[f"{clock}_s"] for one in run["stock"])
            cells.append(f"{run['ours'][f'{clock}_s']:16.2f}{stock:9.2f}{run[f'{clock}_ratio']:8.3f}")
        lines.append(f"run {number:<8}" + "".join(cells))
    ours = result["runs"][-1]["ours"]
    goal = result["goal"]
    for clock in CLOCKS:
        ratio = result[f"{clock}_ratio"]
        lines.append(f"median {clock} ratio {ratio:.3f}, goal {goal:.2f}: {'met' if ratio <= goal else 'MISSED'}")
    read = ours["bytes_read"] / ours["tensor_bytes"]
    lines.append(f"source tensor bytes read {ours['bytes_read']} of {ours['tensor_bytes']}: {read:.3f}x")
    lines.append(f"rows encoded {ours['rows_encoded']}, distinct {ours['rows_distinct']}")
    lines.append("tensor data identical to llama.cpp's in every run")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
