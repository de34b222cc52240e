"""`choose`: the best measured file that fits into memory with its context, and why.

choice = choose("results/", vram=16_000_000_000, ctx=32768)
print(choice.sentence)

What must fit: the whole file, the KV cache of one text of `ctx` tokens (model/kv_cache.py, from the header of the GGUF
or of another file of the same model) and an allowance for compute buffers (`compute_buffers`). Where no header is at
hand the cache is not counted, and the choice says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from apex_quant.errors import ApexError, InputError, UsageError
from apex_quant.gguf import GGUFModel, open_model
from apex_quant.model.kv_cache import kv_cache
from apex_quant.report.entry import Entry
from apex_quant.report.examples import EXAMPLE
from apex_quant.report.gather import Gathered, gather
from apex_quant.report.pairs import Pairs
from apex_quant.report.quantities import QUANTITIES, Number
from apex_quant.report.sentences import ranked_by
from apex_quant.sizes import parse_ctx

CTX: Final = 32768
UBATCH: Final = 512
RUNTIME_BYTES: Final = 256 << 20
"""What a GPU's runtime and small buffers take."""
UNKNOWN_BYTES: Final = 1 << 30
"""The whole allowance where no header says how large the vocabulary is."""
NEIGHBOURS: Final = 8
"""Files next in rank that the best is compared with."""


@dataclass(frozen=True)
class Candidate:
    """One measured file. Bytes: the file, its KV cache (None: not known), compute buffers, `device_bytes` of them on
    the GPU and `host_bytes` in main memory. `value`, `low`, `high`: of the quantity that ranks."""

    label: str
    file_name: str
    results: str
    bytes: int
    kv_bytes: int | None
    compute_bytes: int
    device_bytes: int
    host_bytes: int
    fits: bool
    value: float
    low: float | None
    high: float | None
    pointer: str
    tokens_per_second: float | None
    note: str | None = None

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.device_bytes + self.host_bytes


@dataclass(frozen=True)
class Choice:
    """`best` of `candidates` (best first), None when none fits; `ties`: those that fit and to which no difference was
    shown; `unpaired`: those that fit and could not be compared. `sentence` says it all; `notes` what is not counted."""

    best: Candidate | None
    ties: tuple[str, ...]
    unpaired: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    sentence: str
    notes: tuple[str, ...]
    metric: str
    vram: int
    ram: int | None
    ctx: int
    type_k: str
    type_v: str

    def to_json(self) -> dict[str, Any]:
        made = asdict(self)
        made["candidates"] = [{**asdict(one), "total_bytes": one.total_bytes} for one in self.candidates]
        made["best"] = None if self.best is None else {**asdict(self.best), "total_bytes": self.best.total_bytes}
        return made


class Memory:
    """What contexts take, from the headers that lie beside the results. Headers of the same model count as one: the
    cache depends on the architecture's keys alone, and large vocabularies are not kept."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._headers: dict[str, _Header] = {}
        self.problems: dict[str, str] = {}
        alike: dict[tuple[Any, ...], GGUFModel] = {}
        known: dict[tuple[str, str], _Header] = {}
        unknown = []
        for entry in entries:
            if entry.gguf is None:
                unknown.append(entry)
                continue
            try:
                with open_model(entry.gguf) as model:  # metadata stays usable
                    words = model.get("tokenizer.ggml.tokens")
                    kept = alike.setdefault(_shape_of(model), model)
                    found = _Header(kept, len(words) if words is not None else None)
                    self._headers[entry.label] = known[_kind(entry)] = found
            except ApexError as error:
                self.problems[entry.label] = error.message
        for entry in unknown:
            if _kind(entry)[1] and _kind(entry) in known:
                self._headers[entry.label] = known[_kind(entry)]
        self._bytes: dict[tuple[int, int, str, str], int] = {}

    def kv_bytes(self, entry: Entry, ctx: int, type_k: str, type_v: str) -> int | None:
        """Of one text of `ctx` tokens; None where no header says it. Raises UsageError for types that cannot be."""
        header = self._headers.get(entry.label)
        if header is None:
            return None
        wanted = id(header.model), ctx, type_k, type_v
        if wanted not in self._bytes:
            try:
                made = kv_cache(header.model, ctx=ctx, type_k=type_k, type_v=type_v, ubatch=UBATCH)
            except InputError as error:
                self.problems[entry.label] = error.message
                return None
            self._bytes[wanted] = made.bytes
        return self._bytes[wanted]

    @property
    def trained(self) -> int | None:
        """The fewest tokens that one of the models was trained on at once; None where no header says it."""
        stated = (header.model.get("{arch}.context_length") for header in self._headers.values())
        return min((one for one in stated if isinstance(one, int) and one > 0), default=None)

    def usual_ctx(self) -> int:
        """CTX, or less where the model was trained on less."""
        return min(CTX, self.trained or CTX)

    def beyond(self, ctx: int) -> str | None:
        """A sentence where `ctx` is more than the model was trained on."""
        if self.trained is None or ctx <= self.trained:
            return None
        return f"the model was trained on contexts of {self.trained:,} tokens; beyond that, as at {ctx:,}, it may fail"

    def compute_bytes(self, entry: Entry, ctx: int) -> int:
        """See compute_buffers."""
        header = self._headers.get(entry.label)
        return compute_buffers(header.vocabulary if header is not None else None, ctx)


class _Header(NamedTuple):
    """A model with the same architecture's keys, and the words of this one."""

    model: GGUFModel
    vocabulary: int | None


def _shape_of(model: GGUFModel) -> tuple[Any, ...]:
    """All that the cache depends on."""
    own = (key for key in sorted(model.metadata) if key.startswith(f"{model.architecture}."))
    data = ((key, model.metadata[key].data) for key in own)
    plain = ((key, value.tobytes() if isinstance(value, np.ndarray) else str(value)) for key, value in data)
    return model.architecture, *plain


def compute_buffers(vocabulary: int | None, ctx: int) -> int:
    """An allowance, not a measurement: RUNTIME_BYTES, and for one batch of UBATCH tokens the logits and the attention
    mask in float32, which are the largest of llama.cpp's compute buffers; UNKNOWN_BYTES without a vocabulary."""
    return UNKNOWN_BYTES if vocabulary is None else RUNTIME_BYTES + 4 * UBATCH * (vocabulary + ctx)


def choose(
    results: Gathered | str | Path | Sequence[str | Path],
    *,
    vram: int,
    ctx: int = CTX,
    type_k: str = "f16",
    type_v: str = "f16",
    ram: int | None = None,
    pairs: Pairs | None = None,
) -> Choice:
    """The file with the lowest mean KLD (perplexity, where no KLD was measured) that fits into `vram` bytes.

    `results`: what gather() gave, or places for it. With `ram`, routed experts may lie in that many bytes of main
    memory (llama.cpp's --cpu-moe), where the GGUF or a plan says how large they are. Files that were measured on other
    text or against another reference than most are left out, with a note.

    Raises UsageError for sizes below 1 and cache types that cannot be, InputError when nothing is ranked.
    """
    if vram < 1 or ctx < 1 or (ram is not None and ram < 1):
        raise UsageError("memory and context are at least 1", hint="without a device, --vram is the main memory to use")
    gathered = results if isinstance(results, Gathered) else gather(with_results(results))
    key = ranked_by(gathered)
    rows = ranked(gathered, key) if key is not None else []
    if key is None or not rows:
        raise InputError(
            "no file with a size and a mean KLD or perplexity, so none can be chosen",
            hint="apex eval MODEL --reference MODEL-BF16.gguf -o results.json measures it",
        )
    memory = Memory(gathered.entries)
    made = [(entry, _candidate(entry, value, memory, vram, ctx, type_k, type_v, ram)) for entry, value in rows]
    fitting = [row for row in made if row[1].fits]
    ties, unpaired = (
        tied(fitting[0][0], [row[0] for row in fitting[1:]], key, pairs or Pairs()) if fitting else ([], [])
    )
    best = fitting[0][1] if fitting else None
    candidates = tuple(one for _, one in made)
    return Choice(
        best=best,
        ties=tuple(ties),
        unpaired=tuple(unpaired),
        candidates=candidates,
        sentence=_sentence(best, ties, unpaired, candidates, key, len(fitting)),
        notes=tuple(_notes(gathered, key, candidates, memory, ctx)),
        metric=key,
        vram=vram,
        ram=ram,
        ctx=ctx,
        type_k=type_k,
        type_v=type_v,
    )


def ranked(gathered: Gathered, key: str) -> list[tuple[Entry, Number]]:
    """Files that can be ranked: comparable, with a size; lowest value first. The reference itself is none of them,
    unless nothing else is there."""
    shown = [one for one in gathered.shown(key) if one.entry.bytes]
    rows = [(one.entry, one.number) for one in shown if not one.entry.is_reference]
    return sorted(rows or [(one.entry, one.number) for one in shown], key=lambda row: (row[1].value, row[0].bytes or 0))


def tied(
    best: Entry, others: Sequence[Entry], key: str, pairs: Pairs, neighbours: int = NEIGHBOURS
) -> tuple[list[str], list[str]]:
    """Labels of the next in rank to which no difference is shown, and of those that cannot be paired with the best."""
    verdicts = [(other.label, pairs.shown(best, other, key)) for other in others[:neighbours]]
    return [label for label, shown in verdicts if shown is False], [label for label, shown in verdicts if shown is None]


def with_results(places: str | Path | Sequence[str | Path]) -> list[str | Path]:
    """Places for gather(): a folder's own folder "results" belongs to it, as `apex run` lays out a release."""
    every = [places] if isinstance(places, str | Path) else list(places)
    inner = [Path(place, "results") for place in every if not str(place).startswith(EXAMPLE)]
    return [*every, *(path for path in inner if path.is_dir())]


def _kind(entry: Entry) -> tuple[str, str]:
    """Files with the same architecture and reference are of the same model."""
    reference = entry.source_of("kld").reference or {}
    return entry.results.model.architecture or "", str(reference.get("model_sha256") or reference.get("sha256") or "")


def _candidate(
    entry: Entry, value: Number, memory: Memory, vram: int, ctx: int, type_k: str, type_v: str, ram: int | None
) -> Candidate:
    size = entry.bytes or 0
    kv, compute = memory.kv_bytes(entry, ctx, type_k, type_v), memory.compute_bytes(entry, ctx)
    device, host, note = size + (kv or 0) + compute, 0, None
    if device > vram and ram is not None:
        experts = _expert_bytes(entry)
        if experts and device - experts <= vram and experts <= ram:
            device, host, note = device - experts, experts, "routed experts in main memory (--cpu-moe)"
    speed = entry.number("tg")
    return Candidate(
        label=entry.label,
        file_name=entry.file_name,
        results=value.file,
        bytes=size,
        kv_bytes=kv,
        compute_bytes=compute,
        device_bytes=device,
        host_bytes=host,
        fits=device <= vram,
        value=value.value,
        low=value.low,
        high=value.high,
        pointer=value.pointer,
        tokens_per_second=speed.value if speed is not None else None,
        note=note,
    )


def _expert_bytes(entry: Entry) -> int:
    return sum(one.bytes for one in entry.precision.tensors if one.role == "routed_expert") if entry.precision else 0


def _sentence(
    best: Candidate | None, ties: Sequence[str], unpaired: Sequence[str], every: Sequence[Candidate], key: str, fit: int
) -> str:
    title = QUANTITIES[key].title
    if best is None:
        least = min(every, key=lambda one: one.device_bytes)
        return (
            f"no measured file fits; the smallest, {least.label}, takes {_gb(least.device_bytes)} with its context, "
            f"{_gb(least.bytes)} of them the file"
        )
    held = "" if best.low is None or best.high is None else f" [{best.low:.4g}, {best.high:.4g}]"
    text = f"{best.label}: lowest {title} of the {fit} that fit, {best.value:.4g}{held}; takes {_gb(best.total_bytes)}"
    parts = [f"file {_gb(best.bytes)}"]
    parts += [] if best.kv_bytes is None else [f"KV cache {_gb(best.kv_bytes)}"]
    text += f" ({', '.join(parts)}, compute buffers about {_gb(best.compute_bytes)})"
    if best.note:
        text += f", {best.note}, {_gb(best.device_bytes)} of them on the GPU"
    if ties:
        text += f"; no difference could be shown to {', '.join(ties)}"
    if unpaired:
        text += f"; not compared token by token with {', '.join(unpaired)}"
    if best.kv_bytes is None:
        text += "; its KV cache is not counted, for no GGUF of this model is at hand"
    return text


def _notes(gathered: Gathered, key: str, candidates: Sequence[Candidate], memory: Memory, ctx: int) -> list[str]:
    beyond = memory.beyond(ctx)
    notes = [] if beyond is None else [beyond]
    notes += [one.sentence for one in gathered.set_aside(key)]
    unknown = [one.label for one in candidates if one.kv_bytes is None]
    if unknown:
        notes.append(f"KV cache not counted, no header at hand: {', '.join(unknown)}")
    rated = {one.label for one in candidates}
    left = [one.label for one in gathered.entries if one.number(key) is None and not one.is_reference]
    if left:
        notes.append(f"not ranked, {QUANTITIES[key].title} not measured: {', '.join(left)}")
    notes += [f"{label}: {problem}" for label, problem in memory.problems.items() if label in rated]
    notes.append("compute buffers are an allowance: llama.cpp's own depend on the device and its batch size")
    return notes


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


__all__ = ["CTX", "Candidate", "Choice", "choose", "parse_ctx"]
