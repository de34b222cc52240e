"""A GPU against the processor of the same machine: equal answers, and how long each takes.

    python benchmarks/gpu.py --work DIR                            # the embedded model, every kind of measurement
    python benchmarks/gpu.py --work DIR --real --layers 40         # a model of Qwen3.5-35B-A3B's shapes, GPU alone

Needs llama-cpp-python built for the GPU (README.md). Every row is one command, run twice: with all layers on the GPU,
and with no GPU visible (the baseline). `ratio` is seconds on the processor / seconds on the GPU; `agrees` compares the
numbers that both gave. A large model's weights are random and repeat themselves: time and memory mean something there,
quality nothing. `--real` needs two bytes a weight on DIR's disk (40 layers: 72 GB) and somewhat more on the GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

import gguf  # noqa: E402
import numpy as np  # noqa: E402
from scipy.stats import spearmanr  # noqa: E402

import apex_quant  # noqa: E402
from apex_quant.gguf import open_model  # noqa: E402
from apex_quant.importance import Importance  # noqa: E402
from tests.helpers.imatrix import random_imatrix  # noqa: E402
from tests.helpers.random_models import random_tensor, write_random_gguf  # noqa: E402

Json = dict[str, Any]
Words = Callable[[Path], Sequence[Any]]
Agree = Callable[[Path, Path], Json]
REPEATED = 1 << 24  # weights of a large tensor that are drawn; the rest repeats them
HIDDEN = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "GGML_VK_VISIBLE_DEVICES")


@dataclass(frozen=True)
class Done:
    """What a command printed, and how long it took."""

    document: Json
    seconds: float


def apex(words: Sequence[Any], *, gpu: bool) -> Done:
    """One command with `--json`, all layers on the GPU or none to be seen. SystemExit with its words if it fails."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    if not gpu:
        environment |= dict.fromkeys(HIDDEN, "")
    started = time.perf_counter()
    command = [sys.executable, "-m", "apex_quant", *map(str, words), *(["--gpu-layers", "-1"] if gpu else []), "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nexit {done.returncode}\n{done.stderr[-3000:]}")
    return Done(json.loads(done.stdout), seconds)


class Bench:
    """Rows, printed as they come."""

    def __init__(self, work: Path) -> None:
        self.work, self.rows = work, list[Json]()
        work.mkdir(parents=True, exist_ok=True)

    def both(self, name: str, words: Words, agree: Agree) -> None:
        """`words(folder)` is the command that writes into a folder of each side's own; `agree(cpu, gpu)` compares."""
        sides, seconds = [], []
        for gpu in (False, True):
            folder = self.work / ("gpu" if gpu else "cpu")
            folder.mkdir(exist_ok=True)
            sides.append(folder)
            seconds.append(apex(words(folder), gpu=gpu).seconds)
        self.row(name, cpu=seconds[0], gpu=seconds[1], ratio=seconds[0] / seconds[1], agrees=agree(*sides))

    def row(self, name: str, **found: Any) -> None:
        self.rows.append({"name": name, **found})
        print(json.dumps({"name": name, **found}, default=lambda value: round(float(value), 6)), flush=True)


def metrics(folder: Path, name: str) -> Json:
    found: Json = json.loads((folder / f"{name}.json").read_text())["metrics"]
    return found


def evaluating(name: str, file: Path, reference: Path, source: Path) -> Words:
    return lambda to: ["eval", file, "--reference", reference, "--source", source, "-o", to / f"{name}.json"]


def evaluations(name: str) -> Agree:
    def agree(*sides: Path) -> Json:
        found = [metrics(side, name) for side in sides]
        return {"ppl": [one["ppl"]["value"] for one in found], "kld": [one["kld"]["mean"]["value"] for one in found]}

    return agree


def small(bench: Bench, model: Path, tokens: int) -> None:
    """Calibrate, evaluate, measure and compare cache types on both."""
    work = bench.work

    bench.both("calibrate", lambda to: ["calibrate", model, "-o", to / "imatrix.gguf", "--tokens", "20k"], matrices)
    matrix = work / "cpu" / "imatrix.gguf"
    apex_quant.quantize(model, "i-quality,i-compact,micro", imatrix=matrix, out=work)
    reference = work / "full.apexref"
    apex_quant.make_reference(model, reference, ctx=512, chunks=10, force=True)
    files = {"bf16": model} | {
        tier: next(work.glob(f"*-APEX-{tier}.gguf")) for tier in ("I-Quality", "I-Compact", "Micro")
    }
    for name, file in files.items():
        bench.both(f"eval {name}", evaluating(name, file, reference, model), evaluations(name))
    bench.both(
        "speed",
        lambda to: ["eval", files["I-Compact"], "--only", "speed", "-o", to / "speed.json"],
        lambda cpu, gpu: {
            test: [metrics(side, "speed")["speed"][test]["value"] for side in (cpu, gpu)] for test in ("pp512", "tg128")
        },
    )
    bench.both(
        "measure",
        lambda to: ["measure", model, "--imatrix", matrix, "-o", to / "s.json", "--tokens", tokens, "--joint", 4],
        sensitivities,
    )
    types = ["--types", "q8_0,q4_0,q8_0/q4_0", "--ctx", 512, "--chunks", 4, "--no-speed"]
    bench.both("kv", lambda to: ["kv", files["I-Compact"], *types, "-o", to / "kv.json"], pairs)


def matrices(cpu: Path, gpu: Path) -> Json:
    """How far mean squared activations are apart: median and most, over all channels that both have."""
    off = []
    with Importance.read(cpu / "imatrix.gguf") as a, Importance.read(gpu / "imatrix.gguf") as b:
        for name, entry in a.entries.items():
            used = (entry.counts > 0) & (b.entries[name].counts > 0)
            x, y = entry.weights()[used], b.entries[name].weights()[used]
            off.append(np.abs(y[x > 0] / x[x > 0] - 1))
    every = np.concatenate(off)
    return {"entries": len(off), "median_off": np.median(every), "p99_off": np.quantile(every, 0.99)}


def sensitivities(cpu: Path, gpu: Path) -> Json:
    """Rank correlation, and median and largest difference, of all probes; the floor after a patch was taken back."""
    documents = [json.loads((side / "s.json").read_text()) for side in (cpu, gpu)]
    klds = [{(g["name"], p["type"]): p["kld"] for g in one["groups"] for p in g["probes"]} for one in documents]
    keys = sorted(set(klds[0]) & set(klds[1]))
    a, b = (np.array([one[key] for key in keys]) for one in klds)
    return {
        "probes": len(keys), "rank": float(spearmanr(a, b)[0]), "median_off": float(np.median(np.abs(b / a - 1))),
        "most_off": float(np.max(np.abs(b / a - 1))), "floor": [one["floor"]["kld"] for one in documents],
        "joint": [[round(probe["kld"], 5) for probe in one["joint"]] for one in documents],
    }  # fmt: skip


def pairs(cpu: Path, gpu: Path) -> Json:
    documents = [json.loads((side / "kv.json").read_text()) for side in (cpu, gpu)]
    return {
        "kld": [{f"{row['k']}/{row['v']}": row["kld_mean"]["value"] for row in one["pairs"]} for one in documents],
        "failed": [one.get("failed") for one in documents],
    }


def filled(path: Path, tokenizer: Path, layers: int) -> Path:
    """A model of Qwen3.5-35B-A3B's shapes with so many layers: random weights, large tensors repeating theirs."""
    kinds = ("LLLF" * layers)[:layers] + "N"
    write_random_gguf(path, "qwen35moe", scale="real", layers=kinds, sparse=True, vocabulary=tokenizer)
    pieces: dict[int, memoryview] = {}
    with open_model(path) as opened, path.open("r+b") as file:
        for info in opened.tensors.values():
            file.seek(info.offset)
            if info.n_elements < REPEATED:
                file.write(random_tensor(info.name, info.shape, gguf.GGMLQuantizationType[info.type.name]))
                continue
            n = info.shape[0]
            if n not in pieces:
                pieces[n] = memoryview(random_tensor("any", (n, REPEATED // n), gguf.GGMLQuantizationType.BF16))
            left = info.nbytes
            while left:
                left -= file.write(pieces[n][:left])
    return path


def large(bench: Bench, tokenizer: Path, layers: int, tokens: int, budget: str) -> None:
    """Encode, measure, solve and time a model of real shapes."""
    work = bench.work
    model, matrix = work / "real-BF16.gguf", work / "real.imatrix.gguf"
    if not model.exists():
        started = time.perf_counter()
        filled(model, tokenizer, layers)
        random_imatrix(model).write(matrix)
        bench.row("written", bytes=model.stat().st_size, seconds=time.perf_counter() - started)
    common = [model, "--imatrix", matrix]
    done = apex(["measure", *common, "-o", work / "real.s.json", "--tokens", tokens, "--budget", budget], gpu=True)
    groups = done.document["groups"]
    bench.row(
        "measure", seconds=done.seconds, tokens=done.document["tokens_spent"], groups=len(groups),
        measured=sum(probe["kind"] == "real" for group in groups for probe in group["probes"]),
        joint=len(done.document["joint"]), complete=done.document["settings"]["complete"],
        floor=done.document["floor"]["kld"],
    )  # fmt: skip
    quantized = apex(["quantize", *common, "--tier", "i-compact", "-o", work], gpu=False)
    made = quantized.document["outputs"][0]
    bench.row("quantize i-compact", seconds=quantized.seconds, bytes=made["bytes"])
    solved = apex(
        ["optimize", *common, "--sensitivity", work / "real.s.json", "--like-size", made["path"], "--no-validate",
         "-o", work / "real.recipe.txt"], gpu=False,
    )  # fmt: skip
    bench.row("optimize", seconds=solved.seconds, **{key: solved.document[key] for key in ("total_bytes", "gap")})
    timed = apex(["eval", made["path"], "--only", "speed", "-o", work / "real.speed.json"], gpu=True)
    speed = timed.document["metrics"]["speed"]
    bench.row("speed i-compact", seconds=timed.seconds, **{test: speed[test]["value"] for test in ("pp512", "tg128")})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for what the commands make")
    parser.add_argument("--model", type=Path, default=apex_quant.embedded_model())
    parser.add_argument("--tokens", type=int, default=4096, help="of each probe")
    parser.add_argument("--real", action="store_true", help="a model of real shapes")
    parser.add_argument("--layers", type=int, default=40, help="of --real, and one NextN block")
    parser.add_argument("--budget", default="10min", help="of measuring, with --real")
    given = parser.parse_args()
    bench = Bench(given.work)
    if given.real:
        large(bench, given.model, given.layers, given.tokens, given.budget)
    else:
        small(bench, given.model, given.tokens)


if __name__ == "__main__":
    main()
