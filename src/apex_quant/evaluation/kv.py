"""`kv`: what each pair of cache types costs in divergence, bytes and speed on one model.

found = kv("MODEL.gguf", reference="MODEL-BF16.gguf", ctx=(512, 4096), out="kv.json")
for row in found.pairs:
    print(row["k"], row["v"], row["kld_mean"], row["mib_at"])

Each pair is compared with f16 on the same weights, token by token, and with the full-precision model where one is
given. With `simulate` types that stock llama.cpp lacks (turbo2, turbo3, turbo4) are rounded into the running model's
cache; the same is done with stock types, whose real divergence is known, so that the prediction has an error.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from apex_quant.errors import ApexError, InputError, ResourceError, UsageError
from apex_quant.evaluation import pertoken, state
from apex_quant.evaluation.kv_run import LARGEST, SCHEMA, Rotation, Run, read_json
from apex_quant.evaluation.kv_types import MIXED, STOCK, Pair, all_pairs, bits_of, parse_pair, require_offered
from apex_quant.evaluation.steps import Scored
from apex_quant.evaluation.token_job import Report
from apex_quant.gguf import GGUFModel, open_model
from apex_quant.native import library_info
from apex_quant.runtime.options import SessionOptions

CTX: Final = (512, 4096)
SAVE_SECONDS: Final = 30.0


@dataclass
class KVResult:
    """What kv.json holds; docs/kv.md names its keys. `pairs` are its rows, f16 first; `path` where it is, if kept."""

    document: dict[str, Any]
    path: Path | None = None
    pairs: list[dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.pairs = self.document["pairs"]

    @property
    def simulated(self) -> list[dict[str, Any]]:
        """Rows of types that were predicted, not measured."""
        found: list[dict[str, Any]] = self.document["simulated"]
        return found

    def row(self, k: str, v: str, *, rotation: bool = True) -> dict[str, Any]:
        """The row of one pair. Raises UsageError."""
        rows: list[dict[str, Any]] = [*self.pairs, *self.document["unrotated"]]
        for row in rows:
            if (row["k"], row["v"]) == (k, v) and row["rotation"] in (rotation, None):
                return row
        raise UsageError(f"{k}/{v} was not measured")

    def to_json(self) -> dict[str, Any]:
        return dict(self.document)


def kv(
    model: str | Path,
    *,
    reference: str | Path | None = None,
    source: str | Path | None = None,
    types: Iterable[str | Sequence[str]] = STOCK,
    pairs: Iterable[str | Sequence[str]] = MIXED,
    ctx: Sequence[int] = CTX,
    text: Sequence[str | Path] | None = None,
    chunks: int | None = None,
    scored: Scored = "half",
    rotation: Rotation = "on",
    simulate: str | Iterable[str | Sequence[str]] | None = None,
    speed: bool = True,
    out: str | Path | None = "kv.json",
    options: SessionOptions | None = None,
    progress: Report | None = None,
    save_seconds: float = SAVE_SECONDS,
) -> KVResult:
    """Measure pairs of cache types of `model`; the result is also at `out`, with numbers per token beside it (.npz).
    An earlier result there is replaced; other files are not.

    `types`: names, each for both K and V, or pairs such as "q8_0/q5_1"; `pairs`: more of them. f16 is always there.
    `ctx`: contexts for which memory is given; divergence is measured at those that the model was trained on and the
    text is long enough for. `reference`: the full-precision GGUF, a .apexref or a _logits_ file (whose text and context
    are taken then). `text`, `chunks`, `scored`, `source` as for evaluate().

    `rotation`: llama.cpp rotates quantized K and V before it stores them; "off" and "both" show what that is worth.
    `simulate`: turbo2, turbo3, turbo4 or pairs with them. `speed`: also prompt and generation speed of each pair.

    Everything but speed is the same number in every run. The same call after an interruption goes on with the pair it
    was at. Raises UsageError (turbo types among `types` that no llama-server of this user has), InputError,
    ResourceError (BusyError while another process works on `out`) or NativeError.
    """
    types, pairs = list(types), list(pairs)
    asked = all_pairs(types, pairs)
    require_offered(asked)
    if not types and not pairs and not simulate:
        raise UsageError("no cache types to measure", hint="leave --types away for all of them")
    wanted = [parse_pair(one) for one in ([simulate] if isinstance(simulate, str) else simulate or ())]
    served = [pair for pair in asked if pair.turbo]
    wanted = list(dict.fromkeys([*wanted, *served]))
    asked = [pair for pair in asked if not pair.turbo]
    if not ctx or min(ctx) < 16:
        given = ", ".join(map(str, ctx)) or "none"
        raise UsageError(f"contexts (--ctx): {given}; it takes at least one, and each of 16 tokens or more")
    if chunks is not None and chunks < 1:
        raise UsageError(f"{chunks} chunks (--chunks): at least 1")
    chosen = options or SessionOptions()
    if wanted and chosen.gpu_layers:
        raise UsageError("a simulation changes the cache in main memory", hint="leave --gpu-layers away")
    flash = _flash(chosen, asked)
    problem = library_info().problem
    if problem:
        raise ResourceError(f"{problem}, so nothing can be run", hint="`apex doctor` says how to get it")
    with ExitStack() as held:
        opened = held.enter_context(open_model(model))
        target = _target(out, opened, held)
        lock = held.enter_context(state.locked(target))
        run = Run(opened, target, chosen.model_copy(update={"flash_attention": flash}), progress or (lambda _: None))
        run.notes += [
            f"{pair.name} is simulated: your llama-server has it, the library here does not" for pair in served
        ]
        run.plan(reference, source, text, sorted(set(ctx)), chunks, scored, rotation, asked, wanted, save_seconds)
        known = _finished(target, run.spec)
        if known is None or (speed and not known.get("speed")):
            known = run.measure(lock, speed=speed)
        return KVResult(known, target if out is not None else None)


def _flash(options: SessionOptions, asked: Sequence[Pair]) -> str:
    """Flash attention is on for all pairs, so that nothing but their types differs. Raises UsageError."""
    if options.flash_attention == "off" and (bad := [pair.name for pair in asked if bits_of(pair.v) < 16]):
        raise UsageError(f"a quantized V needs flash attention: {', '.join(bad)}", hint="leave it on")
    return "off" if options.flash_attention == "off" else "on"


def _target(out: str | Path | None, opened: GGUFModel, held: ExitStack) -> Path:
    if out is None:
        return Path(held.enter_context(tempfile.TemporaryDirectory(prefix="apex-kv-"))) / "kv.json"
    target = Path(out)
    if not target.parent.is_dir():
        raise UsageError(f"{target.parent}: no such folder")
    if any(target.resolve() == Path(file.path).resolve() for file in opened.files):
        raise UsageError(f"{target}: is the model", hint="choose another -o")
    _require_ours(target)
    return target


def _require_ours(target: Path) -> None:
    """Only an earlier result of kv() is replaced, and only the numbers per token that it names. Raises UsageError."""
    if target.is_dir() or target.suffix in (".npz", ".gguf"):
        raise UsageError(f"{target}: the result goes to a file such as kv.json")
    archive = target.with_suffix(".npz")
    document = read_json(target)
    if document is None or document.get("schema") != SCHEMA:
        taken = next((path for path in (target, archive) if path.exists() or path.is_symlink()), None)
    else:
        about = document.get("per_token")
        named = about.get("path") if isinstance(about, dict) else None
        taken = archive if archive.exists() and named != archive.name else None
    if taken is not None:
        raise UsageError(f"{taken} exists already and is no result of apex kv", hint="choose another -o")


def _finished(target: Path, spec: str) -> dict[str, Any] | None:
    """The document of an earlier, equal call, when it and its numbers per token are whole."""
    document = read_json(target)
    if document is None or document.get("schema") != SCHEMA or document.get("spec") != spec:
        return None
    try:
        pertoken.read(target.with_suffix(".npz"), document["per_token"]["sha256"])
    except (ApexError, KeyError, TypeError):
        return None
    return document


def load_kv(path: str | Path) -> KVResult:
    """Read kv.json. Raises InputError for anything else."""
    try:
        document = json.loads(pertoken.read_bounded(path, LARGEST, "kv.json"))
    except (ValueError, RecursionError):
        raise InputError(f"{path}: not a whole JSON document") from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise InputError(f"{path}: is no kv.json of schema {SCHEMA}", hint="`apex kv MODEL` makes one")
    rows = document.get("pairs")
    if not isinstance(rows, list) or not isinstance(document.get("simulated"), list):
        raise InputError(f"{path}: has no pairs")
    for row in rows:
        if not isinstance(row, dict) or not {"k", "v", "kld_mean", "bytes_per_token", "mib_at"} <= set(row):
            raise InputError(f"{path}: a row of its pairs lacks keys")
    return KVResult(document, Path(path))
