"""`calibrate`: text in, importance matrix out; the same call after an interruption goes on and ends with the same sums.

made = calibrate("MODEL-BF16.gguf", "imatrix.gguf", tokens=50_000, cover=True)
for row in made.uncovered: print(row["layer"], row["experts"])
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apex_quant.calibration.coverage import FLOOR, uncovered
from apex_quant.calibration.observer import ImportanceObserver
from apex_quant.calibration.state import State, locked, sums_path
from apex_quant.calibration.texts import BUILTIN, read_texts
from apex_quant.errors import NativeError, ResourceError, UsageError
from apex_quant.gguf import GGUFModel, open_model
from apex_quant.gguf.values import Value, ValueType
from apex_quant.importance import Importance
from apex_quant.native import Child, library_info
from apex_quant.recipe.stock_rules import kept_because
from apex_quant.runtime.options import SessionOptions

COLLECTOR = "apex_quant.calibration.collect"
TOKENS = 50_000
COVER_LIMIT = 4  # --cover draws at most this many times the tokens asked for
SAVE_SECONDS = 30.0
# options of a session that say where a model runs, not what is computed
_PLACES = {"threads", "gpu_layers", "tensor_split", "mmap", "cpu_experts", "tensor_buffers", "repack"}
_FORMAT = 1  # of the sums on disk and of what they mean; part of what a resumed run must agree on
_SAMPLES, _SAMPLE_BYTES = 64, 4096


@dataclass(frozen=True)
class CalibrationProgress:
    """How far a calibration is. `planned` chunks are those of the text asked for; --cover may draw more."""

    chunks: int
    planned: int
    resumed: int
    chunk_size: int
    experts: int
    uncovered: int


@dataclass(frozen=True)
class Calibration:
    """A finished importance matrix.

    `uncovered`: experts with fewer than `floor` tokens, by layer. `missing`: tensors that importance could serve and
    that no matrix multiplication reached. `draws`: kinds of text that were drawn for uncovered experts, in order.
    """

    path: Path
    tokens: int
    chunks: int
    floor: int
    experts: int
    uncovered: tuple[dict[str, Any], ...]
    missing: tuple[str, ...]
    draws: tuple[str, ...]
    warnings: tuple[str, ...]
    seconds: float
    resumed: int
    unchanged: bool

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "tokens": self.tokens,
            "chunks": self.chunks,
            "experts": {"number": self.experts, "floor": self.floor, "uncovered": list(self.uncovered)},
            "missing": list(self.missing),
            "draws": list(self.draws),
            "warnings": list(self.warnings),
            "seconds": round(self.seconds, 3),
            "resumed": self.resumed,
            "unchanged": self.unchanged,
        }


def calibrate(
    model: str | Path,
    out: str | Path,
    *,
    corpus: Sequence[str | Path] = (BUILTIN,),
    mix: Mapping[str, float] | None = None,
    tokens: int = TOKENS,
    cover: bool = False,
    floor: int = FLOOR,
    seed: int = 0,
    heads: bool = True,
    options: SessionOptions | None = None,
    force: bool = False,
    progress: Callable[[CalibrationProgress], None] | None = None,
    save_seconds: float = SAVE_SECONDS,
) -> Calibration:
    """Run `tokens` tokens of text through `model` and write the importance matrix `out`.

    `corpus`: 'builtin', files, folders, hub:NAME. `mix`: weights by kind of text (default: what the corpus has).
    `cover`: draw further text, first of the kinds that reach them, for experts with fewer than `floor` tokens.
    `heads`: also collect for the output matrix, which llama-imatrix leaves out. `options.ctx` is the length of a chunk.
    `force`: replace a file that was made in another way; one that the same call has finished is found, as without it.

    Raises UsageError, InputError, ResourceError (BusyError while another process calibrates into `out`) or
    NativeError; there is never a broken file under the name `out`.
    """
    started = time.monotonic()
    options, out = options or SessionOptions(), Path(out)
    if tokens < 1 or floor < 1:
        raise UsageError(f"{tokens} tokens and a floor of {floor}: both must be at least 1")
    if out.is_dir():
        raise UsageError(f"{out}: is a folder; the matrix goes to a file such as imatrix.gguf")
    problem = library_info().problem
    if problem:
        raise ResourceError(f"{problem}, so nothing can be run", hint="`apex doctor` says how to get it")
    with Child(COLLECTOR) as child, open_model(model) as opened, ExitStack() as held:
        cover_tokens = COVER_LIMIT * tokens if cover else 0
        texts = read_texts(
            opened, [str(one) for one in corpus], mix=mix, tokens=tokens, seed=seed, cover_tokens=cover_tokens
        )
        asked: dict[str, Any] = {
            "pieces": texts.pieces,
            "pool": texts.pool,
            "tokens": tokens,
            "floor": floor,
            "cover_tokens": cover_tokens,
            "heads": heads,
        }
        spec = _spec(opened, asked, options)
        if (found := _finished(out, spec, opened, force)) is not None:
            return found
        lock = held.enter_context(locked(out))
        if (found := _finished(out, spec, opened, force)) is not None:  # by whoever held the lock until now
            return found
        report = progress or (lambda _: None)

        def on_event(event: dict[str, Any]) -> None:
            counters = {key: event[key] for key in ("chunks", "planned", "resumed", "experts", "uncovered")}
            report(CalibrationProgress(**counters, chunk_size=options.ctx))

        payload = {
            **asked,
            "model": str(opened.path),
            "options": options.model_dump(mode="json"),
            "spec": spec,
            "sums": str(sums_path(out)),
            "save_seconds": save_seconds,
        }
        step = f"calibrating {opened.path.name}"
        result = child.run(f"{COLLECTOR}:run", payload, on_event, step=step, pass_fds=[lock])
        state = State.load(sums_path(out), spec)
        if state is None or not state.finished:
            raise NativeError(f"{sums_path(out)}: the sums are gone or damaged", hint="calibrate again")
        about = {
            "apex.calibration.spec": Value.string(spec),
            "apex.calibration.floor": Value.u32(floor),
            "apex.calibration.seed": Value.u32(seed),
            "apex.calibration.draws": Value.array(ValueType.STRING, tuple(state.draws)),
        }
        matrix = _matrix(state, texts.names, options.ctx, about)
        matrix.write(out)
        sums_path(out).unlink(missing_ok=True)
        made = _described(out, matrix, opened, floor, tuple(state.draws))
    return Calibration(
        **made,
        warnings=(*texts.notes, *result["warnings"]),
        seconds=time.monotonic() - started,
        resumed=result["resumed"],
        unchanged=False,
    )


def _spec(model: GGUFModel, asked: Mapping[str, Any], options: SessionOptions) -> str:
    """A hash of everything that decides the result; where and with how many threads the model runs does not."""
    digest = hashlib.sha256()
    for file in model.files:
        path = Path(file.path)
        size = path.stat().st_size
        digest.update(str(size).encode())
        with path.open("rb") as data:
            for number in range(_SAMPLES):
                data.seek(size * number // _SAMPLES)
                digest.update(data.read(_SAMPLE_BYTES))
    rest = [_FORMAT, asked, options.model_dump(mode="json", exclude=_PLACES), library_info().version]
    digest.update(json.dumps(rest, sort_keys=True).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _finished(out: Path, spec: str, model: GGUFModel, force: bool) -> Calibration | None:
    """What an earlier run of the same call made, or None. UsageError when something else has the name."""
    if not out.exists():
        if not out.parent.is_dir():
            raise UsageError(f"{out.parent}: no such folder")
        return None
    if any(out.samefile(file.path) for file in model.files):
        raise UsageError(f"{out} is the model itself", hint="choose another -o")
    try:
        with Importance.read(out) as matrix:
            known = matrix.metadata.get("apex.calibration.spec")
            if known is not None and known.data == spec:
                floor, draws = (matrix.metadata[f"apex.calibration.{key}"].data for key in ("floor", "draws"))
                kinds = draws if isinstance(draws, tuple) else ()
                made = _described(out, matrix, model, int(str(floor)), tuple(str(kind) for kind in kinds))
                return Calibration(**made, warnings=(), seconds=0.0, resumed=0, unchanged=True)
    except (ValueError, KeyError):
        pass
    if force:
        return None
    raise UsageError(f"{out} exists and was made in another way", hint="--force replaces it")


def _matrix(state: State, names: Sequence[str], chunk_size: int, about: dict[str, Value]) -> Importance:
    """The sums as an importance matrix, with what stock does not know under names and keys that it passes over."""
    observer = ImportanceObserver()
    observer.restore(state.arrays, state.shared)
    entries, extras = {}, {}
    for name in (*observer.sums, *observer.shared):
        sums = observer.sums[observer.shared.get(name, name)]
        rows = len(sums.counts)
        entries[name] = (sums.squares.reshape(rows, -1), sums.counts)
        extras[f"{name}.apex_in_sum"] = sums.plain.reshape(rows, -1)
    for layer, router in observer.routers.items():
        extras[f"blk.{layer}.apex_router_mass"] = router.mass.astype(np.float32)
        extras[f"blk.{layer}.apex_router_margin"] = np.array([router.margin, router.tokens], np.float32)
    return Importance.from_arrays(
        entries,
        extras=extras,
        datasets=tuple(names),
        chunk_count=state.chunks,
        chunk_size=chunk_size,
        metadata=about,
    )


def _described(path: Path, matrix: Importance, model: GGUFModel, floor: int, draws: tuple[str, ...]) -> dict[str, Any]:
    """What a matrix covers of a model."""
    observer = ImportanceObserver()
    observer.restore(
        {
            f"{kind}/{name}": array
            for name, entry in matrix.entries.items()
            if entry.n_mat > 1
            for kind, array in (("squares", np.empty(0, np.float32)), ("plain", np.empty(0)), ("counts", entry.counts))
        },
        {},
    )
    counts = observer.expert_counts()
    architecture = str(model.get("general.architecture"))
    return {
        "path": path,
        "tokens": matrix.chunk_count * matrix.chunk_size,
        "chunks": matrix.chunk_count,
        "floor": floor,
        "experts": sum(len(tokens) for tokens in counts.values()),
        "uncovered": tuple(uncovered(counts, floor)),
        "missing": tuple(
            name
            for name, info in model.tensors.items()
            if kept_because(name, info.shape, architecture) is None and matrix.find(name) is None
        ),
        "draws": draws,
    }
