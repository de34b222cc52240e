"""`measure_speed`: tokens per second of prompts (pp512) and of generation (tg128), as llama-bench measures them.

speed = measure_speed("MODEL.gguf")
print(speed["tg128"]["value"], speed["bandwidth"]["share"])

Random tokens, a warm-up, an empty context before every repetition; with the bytes of weights that a generated token
reads, and which share of the memory's bandwidth that is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Final, Literal

from apex_quant.errors import ResourceError, UsageError
from apex_quant.evaluation import environment
from apex_quant.evaluation.active import ActiveBytes, active_bytes
from apex_quant.evaluation.busy import judge, load_average
from apex_quant.gguf import open_model
from apex_quant.native import Child, library_info
from apex_quant.runtime.options import SessionOptions

JOB: Final = "apex_quant.evaluation.speed_job"
PROMPTS, GENERATE, DEPTHS = (512,), (128,), (0,)  # tokens: llama-bench's defaults
REPETITIONS: Final = 5
BATCH: Final = 2048  # most tokens of one decode; computed `options.ubatch` at a time, 512 unless told
SEED: Final = 0

Event = dict[str, Any]  # {"what": "speed", "done", "planned", "resumed"}, in runs


@dataclass(frozen=True)
class Test:
    """`n` tokens of a prompt at once (pp) or generated one by one (tg), after `depth` tokens that are not timed."""

    __test__ = False  # to pytest

    kind: Literal["pp", "tg"]
    n: int
    depth: int = 0

    @property
    def name(self) -> str:
        """llama-bench's: pp512, tg128, tg128 @ d4096; without the spaces."""
        return f"{self.kind}{self.n}" + (f"@d{self.depth}" if self.depth else "")

    @property
    def room(self) -> int:
        """Tokens that the context must hold."""
        return self.depth + self.n


@dataclass(frozen=True)
class SpeedPlan:
    """What is timed: lists of numbers of tokens, as llama-bench's -p, -n and -d, each `repetitions` times."""

    prompts: tuple[int, ...] = PROMPTS
    generate: tuple[int, ...] = GENERATE
    depths: tuple[int, ...] = DEPTHS
    repetitions: int = REPETITIONS


def plan_tests(prompts: Sequence[int], generate: Sequence[int], depths: Sequence[int] = DEPTHS) -> list[Test]:
    """All combinations, prompts first, each once. Raises UsageError for numbers that mean nothing."""
    if not prompts and not generate:
        raise UsageError("nothing to measure: no prompt and nothing to generate")
    if min((*prompts, *generate), default=1) < 1 or min(depths, default=-1) < 0:
        raise UsageError("speed needs at least one token of each prompt and generation, and depths from 0")
    kinds: list[tuple[Literal["pp", "tg"], Sequence[int]]] = [("pp", prompts), ("tg", generate)]
    tests = [Test(kind, n, depth) for depth in depths for kind, sizes in kinds for n in sizes]
    return list(dict.fromkeys(tests))


def measure_speed(
    model: str | Path,
    *,
    prompts: Sequence[int] = PROMPTS,
    generate: Sequence[int] = GENERATE,
    depths: Sequence[int] = DEPTHS,
    repetitions: int = REPETITIONS,
    options: SessionOptions | None = None,
    bandwidth: bool = True,
    progress: Callable[[Event], None] | None = None,
    pass_fds: Sequence[int] = (),
) -> dict[str, Any]:
    """The metric "speed" of results.json; docs/speed.md names its keys.

    `prompts`, `generate`, `depths`: lists of numbers of tokens, as llama-bench's -p, -n and -d. `options` say how the
    model is loaded and computed; context, sequences and batches are decided here. `bandwidth`: also measure the
    memory's. `pass_fds` stay open as long as the child lives (locks).

    Method: llama-bench's. Raises UsageError, InputError, ResourceError or NativeError.
    """
    tests = plan_tests(prompts, generate, depths)
    if repetitions < 1:
        raise UsageError(f"{repetitions} repetitions: at least one is needed")
    problem = library_info().problem
    if problem:
        raise ResourceError(f"{problem}, so nothing can be run", hint="`apex doctor` says how to get it")
    chosen, load, started = options or SessionOptions(), load_average(), time.monotonic()
    with Child(JOB, single_blas=True) as child, open_model(model) as opened:
        touched = active_bytes(opened)
        payload = {
            "model": str(opened.path),
            "options": chosen.model_dump(mode="json"),
            "tests": [asdict(test) for test in tests],
            "repetitions": repetitions,
            "seed": SEED,
            "bandwidth": bandwidth,
        }
        step = f"measuring the speed of {opened.path.name}"
        found = child.run(f"{JOB}:run", payload, progress or (lambda _: None), step=step, pass_fds=pass_fds)
    about = environment.collect()
    return {
        **{test.name: rate(test.n, seconds) for test, seconds in zip(tests, found["seconds"], strict=True)},
        "device": device(chosen, found["devices"], about["cpu"]),
        "threads": found["threads"],
        "build": f"{about['library']} (ggml {about['commit']})",
        **judge(found["others"], load, found["processors"]),
        "active_bytes_per_token": touched.total,
        "active_bytes": touched.to_json(),
        "bandwidth": describe_bandwidth(found["bandwidth"], touched, tests, found["seconds"], found["devices"]),
        "like": like(tests, repetitions, chosen, found["threads"]),
        "seconds": time.monotonic() - started,
    }


def rate(tokens: int, seconds: Sequence[float]) -> dict[str, Any]:
    """Tokens per second over the repetitions: mean of the rates, and their sample standard deviation (n - 1), as in
    llama-bench; null where one repetition has none."""
    rates = [tokens / one for one in seconds]
    deviation = stdev(rates) if len(rates) > 1 else None
    return {"value": fmean(rates), "deviation": deviation, "n": len(rates), "samples": rates}


def describe_bandwidth(
    measured: dict[str, Any] | None,
    touched: ActiveBytes,
    tests: Sequence[Test],
    seconds: Sequence[Sequence[float]],
    devices: Sequence[str],
) -> dict[str, Any]:
    """What was measured, with `share`: bytes of weights read per second of the first generation test, of all bytes
    that the memory gives a second. Null, with a note, where that means nothing."""
    known: dict[str, Any] = measured or {"measured_gb_s": None}
    generation = next((place for place, test in enumerate(tests) if test.kind == "tg"), None)
    if measured is None:
        return {**known, "share": None, "note": "not measured"}
    if devices:
        return {**known, "share": None, "note": "of main memory, while the model is on another device"}
    if generation is None:
        return {**known, "share": None, "note": "nothing was generated"}
    speed = rate(tests[generation].n, seconds[generation])["value"]
    share = touched.total * speed / (measured["measured_gb_s"] * 1e9)
    cache = measured.get("cache_bytes")
    note = None
    if cache is not None and touched.total <= cache:
        note = "what a token reads fits the processor's caches, so memory is not what bounds it"
    return {**known, "share": share, "of": tests[generation].name, **({"note": note} if note else {})}


def device(options: SessionOptions, devices: Sequence[str], cpu: str) -> str:
    """What computed: 'NVIDIA H200 (all layers), Intel Xeon'; the processor alone without layers elsewhere."""
    if not devices:
        return cpu
    layers = "all layers" if options.gpu_layers < 0 else f"{options.gpu_layers} layers"
    return f"{' + '.join(devices)} ({layers}{', experts in main memory' if options.cpu_experts else ''}), {cpu}"


def like(tests: Sequence[Test], repetitions: int, options: SessionOptions, threads: int) -> str:
    """The llama-bench command line that measures the same."""
    lists = {
        "-p": dict.fromkeys(test.n for test in tests if test.kind == "pp") or {0: None},
        "-n": dict.fromkeys(test.n for test in tests if test.kind == "tg") or {0: None},
        "-d": dict.fromkeys(test.depth for test in tests),
    }
    words = [f"{flag} {','.join(map(str, sizes))}" for flag, sizes in lists.items()]
    words += [
        f"-r {repetitions}",
        f"-t {threads}",
        f"-b {BATCH}",
        f"-ub {options.ubatch}",
        f"-ngl {options.gpu_layers}",
    ]
    rest = {
        "-ctk": options.type_k if options.type_k != "f16" else None,
        "-ctv": options.type_v if options.type_v != "f16" else None,
        "-fa": options.flash_attention if options.flash_attention != "auto" else None,
        "-ts": "/".join(f"{part:g}" for part in options.tensor_split) or None,
        "-ncmoe": 999 if options.cpu_experts else None,
        "-ot": f"'{';'.join(options.tensor_buffers)}'" if options.tensor_buffers else None,
        "-mmp": None if options.mmap else 0,
        "--repack": None if options.repack else 0,
    }
    return " ".join(["llama-bench", *words, *(f"{flag} {value}" for flag, value in rest.items() if value is not None)])
