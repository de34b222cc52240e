"""Results files for tests of plots and of what is gathered: every quantity, with numbers easy to find again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apex_quant.evaluation.results import save
from apex_quant.evaluation.schema import ModelInfo, Results
from apex_quant.evaluation.statistics import wilson

REFERENCE = {"path": "tiny.apexref", "sha256": "c" * 64, "model_sha256": "f" * 64}
SETTINGS = {"ctx": 64, "scored": "half", "texts": ["chat", "code"]}


def around(value: float, n: int = 100_352) -> dict[str, Any]:
    """An estimate with an interval of a tenth to both sides."""
    return {"value": value, "low": 0.9 * value, "high": 1.1 * value, "n": n}


def metrics(kld: float, *, speed: float = 50.0, layers: int = 6) -> dict[str, dict[str, Any]]:
    """Everything apex eval measures, for a file of this mean KLD."""
    hits = wilson(round(400 * min(1.0, max(0.0, 0.8 - kld / 10))), 400)
    domains = {"chat": around(0.8 * kld), "code": around(1.2 * kld)}
    return {
        "kld": {
            "mean": around(kld), "median": kld / 3, "p90": 2 * kld, "p95": 3 * kld, "p99": 8 * kld,
            "p99_9": around(30 * kld), "max": {"value": 90 * kld, "chunk": 1, "position": 40, "token": "x"},
            "top1_agreement": around(0.9 - kld), "delta_p_rms": kld, "ppl_ratio": 1 + kld,
            "by_domain": {name: {"mean": one, "top1_agreement": around(0.8)} for name, one in domains.items()},
        },
        "ppl": {**around(6.5 + kld), "error": 0.05, "texts": {"chat": around(6.0), "a/b~c": around(7.0)}},
        "router": {
            "changed": kld, "changed_interval": around(kld), "mass_moved": kld / 4,
            "layers": [{"layer": k, "changed": kld * (1 + k) / layers, "mass_moved": 0.1} for k in range(layers)],
        },
        "hellaswag": {"value": hits.value, "low": hits.low, "high": hits.high, "n": 400},
        "mmlu": {"value": 0.41, "low": 0.39, "high": 0.43, "n": 1548},
        "speed": {"pp512": {"value": 900.0, "deviation": 9.0, "n": 5},
                  "tg128": {"value": speed, "deviation": 1.5, "n": 5}, "device": "a cpu", "threads": 2},
    }  # fmt: skip


def write(folder: Path, name: str, kld: float, size: int, **more: Any) -> Path:
    """NAME.json about NAME.gguf; `more` replaces keys of Results."""
    known: dict[str, Any] = {
        "model": ModelInfo(path=f"{name}.gguf", sha256=f"{name:x<64}"[:64], bytes=size, bpw=4.5),
        "reference": REFERENCE, "settings": SETTINGS, "metrics": metrics(kld, speed=6e11 / size),
    }  # fmt: skip
    return save(Results(**(known | more)), folder / f"{name}.json")


def folder_of_all(folder: Path) -> Path:
    """Four tiers of ours, two files of a rival, and the reference."""
    for name, kld, size in (
        ("tiny-APEX-Quality", 0.012, 21_000_000_000), ("tiny-APEX-Balanced", 0.009, 23_500_000_000),
        ("tiny-APEX-Compact", 0.045, 16_000_000_000), ("tiny-APEX-Mini", 0.09, 12_000_000_000),
        ("tiny-UD-Q5_K", 0.007, 24_000_000_000), ("tiny-UD-Q3_K", 0.05, 15_000_000_000),
    ):  # fmt: skip
        write(folder, name, kld, size)
    whole = ModelInfo(path="tiny-BF16.gguf", sha256="f" * 64, bytes=70_000_000_000, bpw=16.0)
    kept = {key: value for key, value in metrics(0.0001).items() if key in ("ppl", "hellaswag", "mmlu", "speed")}
    write(folder, "tiny-BF16", 0.0, 1, model=whole, reference=None, metrics=kept)
    return folder
