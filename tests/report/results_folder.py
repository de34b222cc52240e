"""Folders as apex eval leaves them, with made-up numbers whose truth is known and real GGUF headers beside them."""

from __future__ import annotations

import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from apex_quant.evaluation.results import load, update
from apex_quant.evaluation.schema import ModelInfo, Results
from apex_quant.report.gather import gather
from apex_quant.report.html import render
from apex_quant.report.pairs import Pairs
from apex_quant.report.sentences import sentences
from tests.evaluation.synthetic import kld_arrays, task_arrays, tokens
from tests.helpers.random_models import write_random_gguf

REFERENCE = {"path": "tiny-BF16.gguf", "form": "gguf", "sha256": "f" * 64, "model_sha256": "f" * 64}
IDS = tokens()
SETTINGS = {"ctx": 64, "chunks": None, "scored": "half", "texts": ["chat", "code"], "options": {"gpu_layers": 0}}
ENVIRONMENT = {"apex": "0.1.0", "library": "llama-cpp-python 0.3.36", "commit": "abc", "cpu": "a cpu", "os": "Linux"}


def add(
    folder: Path,
    name: str,
    *,
    scale: float,
    size: int = 1000,
    seed: int = 0,
    sha256: str | None = None,
    reference: dict[str, Any] | None = None,
    **model: Any,
) -> Path:
    """Results of a file whose divergence is `scale` times a text's."""
    path = folder / f"{re.sub('[^A-Za-z0-9-]', '_', name)[:40]}-{seed}.json"
    arrays = kld_arrays(IDS, scale=scale, seed=seed)
    kld = arrays["kld"].astype(np.float64)
    digest = sha256 or hashlib.sha256(f"{name} {seed}".encode()).hexdigest()
    about = {"bpw": 4.5, "architecture": "qwen3moe", **model}
    info = ModelInfo(path=f"{name}.gguf", sha256=digest, bytes=size, **about)
    base = Results(model=info, reference=reference or REFERENCE, settings=SETTINGS, environment=ENVIRONMENT)
    mean = {"value": float(kld.mean()), "low": float(kld.mean()) * 0.9, "high": float(kld.mean()) * 1.1, "n": kld.size}
    domain = {"mean": {**mean, "low": None, "high": None, "note": "too few: 20 chunks"}, "median": 0.1}
    value = {
        "mean": mean,
        "median": float(np.median(kld)),
        "p99": float(np.quantile(kld, 0.99)),
        "p99_9": {"value": None, "low": None, "high": None, "n": kld.size, "note": "too few: 1,240 values"},
        "max": {"value": float(kld.max()), "chunk": 1, "position": 40, "token": "x", "context": "before "},
        "top1_agreement": {"value": 0.9, "low": 0.88, "high": 0.92, "n": kld.size},
        "by_domain": {"chat": domain, "code": domain},
    }
    update(path, "kld", value, base=base, arrays=arrays)
    update(path, "ppl", {"value": 6.5 + scale, "error": 0.0412, "n": 1240})
    update(path, "hellaswag", {"value": 0.5, "low": 0.4038, "high": 0.5962, "n": 100},
           arrays=task_arrays(np.arange(100) % 2 == 0))  # fmt: skip
    update(path, "speed", {"pp512": {"value": 100.5, "deviation": 1.25, "n": 5},
                           "tg128": {"value": 10 / scale, "deviation": 0.5, "n": 5}})  # fmt: skip
    layers = [{"layer": layer, "changed": 0.01 * layer, "mass_moved": 0.005 * layer} for layer in range(3)]
    update(path, "router", {"layers": layers, "changed": 0.01, "mass_moved": 0.005})
    return path


def with_headers(folder: Path) -> list[Path]:
    """Three files with their GGUF: larger ones diverge less; the second has the first's name with an i."""
    made: list[Path] = []
    for name, layers, scale in (("tiny-large", "MMM", 0.5), ("tiny-medium", "MM", 1.0), ("tiny-small", "M", 2.0)):
        model = write_random_gguf(folder / f"{name}.gguf", "qwen3moe", layers=layers)
        made.append(add(folder, name, scale=scale, size=model.stat().st_size, seed=len(made)))
    return made


def page_of(folder: Path | list[Path], **options: Any) -> str:
    """The page of what is there."""
    gathered = gather(folder if isinstance(folder, list) else [folder], **options)
    pairs = Pairs()
    return render(gathered, sentences(gathered, pairs), pairs)


def at(path: Path, pointer: str) -> Any:
    """What stands at a JSON pointer."""
    found: Any = json.loads(path.read_text())
    for part in pointer.split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        found = found[int(part)] if isinstance(found, list) else found[part]
    return found


def agrees(text: str, scale: float, value: float) -> bool:
    """Whether the shown text is the value up to half of its last digit."""
    digits = text.split("e")[0].partition(".")[2]
    exponent = int(text.split("e")[1]) if "e" in text else 0
    whole = re.fullmatch(r"-?(\d+)", text)
    step = 10.0 ** (exponent - len(digits))
    if whole and "." not in text:  # 45 of 45.3: the last digit may be a ten where digits are significant ones
        step = 10.0 ** max(0, len(whole[1]) - 4)
    return abs(float(text) - value / scale) <= 0.5000001 * step


class Page(HTMLParser):
    """Elements of a page: (tag, attributes, text) in order; text of data and script elements only as theirs."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self._open: list[tuple[str, dict[str, str], list[str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        one = (tag, {name: value or "" for name, value in attrs}, list[str]())
        self.elements.append(one)
        if tag not in ("meta", "br", "input", "path", "circle", "rect", "link"):
            self._open.append(one)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        for one in self._open:
            one[2].append(data)

    def all(self, tag: str) -> list[tuple[dict[str, str], str]]:
        return [(attributes, "".join(text)) for name, attributes, text in self.elements if name == tag]


__all__ = ["IDS", "REFERENCE", "Page", "add", "agrees", "at", "load", "page_of", "with_headers"]
