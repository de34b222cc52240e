"""The child's job of `kv`: one loaded model, a context for each pair of cache types, numbers of each scored token.

First the model with a cache of f16 is recorded (a .apexref beside the output), then every pair is compared with it, and
with the full-precision model's record where there is one. Rows of pairs that are finished are in files of their own.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from apex_quant.errors import ApexError, InputError, NativeError, ResourceError
from apex_quant.evaluation.kv_observe import AttentionTap, CacheTap, LayerRounding, attention_error, layer_rounding
from apex_quant.evaluation.kv_types import CacheLog, Pair, confirm, read_log
from apex_quant.evaluation.pertoken import hash_chunks
from apex_quant.evaluation.record import Recorder
from apex_quant.evaluation.reference import ApexReference
from apex_quant.evaluation.scores import NotFinite, Scorer, scorer
from apex_quant.evaluation.state import State
from apex_quant.evaluation.steps import Batching, Plan, plan_texts
from apex_quant.evaluation.stock_logits import StockLogits
from apex_quant.evaluation.watch import watcher
from apex_quant.evaluation.worker import Lane
from apex_quant.gguf import open_model
from apex_quant.model.kv_cache import head_lengths
from apex_quant.native.bindings import bindings
from apex_quant.native.worker import Emit, Json, Stopped
from apex_quant.runtime.observe import Observer
from apex_quant.runtime.options import SessionOptions
from apex_quant.runtime.session import Session, library

if TYPE_CHECKING:
    from collections.abc import Iterator

with contextlib.suppress(ImportError):  # early, as in worker.py
    bindings()

NO_ROTATION = "LLAMA_ATTN_ROT_DISABLE"
_ATTENTION_CHUNKS = 4  # whose errors of attention are computed, spread over the text

Reference = ApexReference | StockLogits


class Contexts:
    """One session, reopened for each pair; its observer and the library's log."""

    def __init__(self, held: ExitStack, payload: Json) -> None:
        self.options = SessionOptions.model_validate(payload["options"])
        self.recording = watcher(0, head=True)
        _, self._log = library()
        small = self.options.model_copy(update={"ctx": 16, "sequences": 1, "decode_tokens": None, "ubatch": 16})
        self.session = held.enter_context(Session(payload["model"], small, self.recording))
        self._callback = self.session.callback

    @contextmanager
    def open(self, pair: Pair, ctx: int, batching: Batching, *, rotation: bool = True, observer: Observer | None = None,
             flash: str | None = None) -> Iterator[list[CacheLog]]:  # fmt: skip
        """A context of these types, confirmed by the library's log. Raises what Session.reopen does, NativeError."""
        assert self._callback is not None
        self._callback.observer = observer
        self.session.callback = self._callback if observer is not None else None  # other contexts run without it
        before = os.environ.pop(NO_ROTATION, None)
        if not rotation:
            os.environ[NO_ROTATION] = "1"
        try:
            with self._log.recorded() as lines:
                self.session.reopen(
                    ctx=ctx, sequences=batching.sequences, decode_tokens=batching.tokens, type_k=pair.k, type_v=pair.v,
                    ubatch=max(16, batching.tokens), flash_attention=flash or self.options.flash_attention,
                )  # fmt: skip
            caches = read_log(lines)
            confirm(pair, caches, self.session.path.name)
            yield caches
        finally:
            os.environ.pop(NO_ROTATION, None)
            if before is not None:
                os.environ[NO_ROTATION] = before


class Job:
    """Everything of one call, context by context and row by row."""

    def __init__(self, held: ExitStack, payload: Json, emit: Emit, stop: threading.Event) -> None:
        self.payload, self._emit, self.stop = payload, emit, stop
        self.contexts = Contexts(held, payload)
        self.session = self.contexts.session
        self.scorer: Scorer = held.enter_context(scorer(self.session.threads))
        self.rows: list[Json] = payload["rows"]
        self.done = self.resumed = self.planned = 0
        self._unit = min((one["ctx"] for one in payload["contexts"]), default=1)

    def run(self) -> Json:
        """Facts of each context: what was measured, or why not."""
        made = []
        plans: list[tuple[Plan, Reference | None] | None] = []
        for about in self.payload["contexts"]:
            try:
                plans.append(self._plan(about))
            except InputError as error:
                if about.get("needed"):
                    raise
                plans.append(None)
                made.append({"ctx": about["ctx"], "problem": error.message})
        pending = [
            (about, *found) for about, found in zip(self.payload["contexts"], plans, strict=True) if found is not None
        ]
        self.planned = sum(self._units(about, plan) * (1 + len(self.rows)) for about, plan, _ in pending)
        for about, plan, full in pending:
            made.append(self._context(about, plan, full))
        return {"contexts": made, "threads": self.session.threads}

    def _units(self, about: Json, plan: Plan) -> int:
        """Chunks of the shortest context that make up this one."""
        return max(1, len(plan.tokens) * int(about["ctx"]) // int(self._unit))

    def _plan(self, about: Json) -> tuple[Plan, Reference | None]:
        full = _open(about["reference"]) if about["reference"] else None
        vocabulary = self.session.vocabulary
        bos = vocabulary.bos if vocabulary is not None and vocabulary.add_bos else None
        if full is None or self.payload["texts"]:
            plan = plan_texts(
                self.session, self.payload["texts"], about["ctx"], self.payload["scored"], self.payload["chunks"]
            )
            if full is not None and not np.array_equal(full.tokens, plan.tokens):
                raise InputError(f"{full.path.name}: is not of this text, or its model makes other tokens of it")
            return plan, full
        if isinstance(full, ApexReference) and full.bos != bos:
            raise InputError(f"{full.path.name}: its model begins a text with another token, so it is another model's")
        return Plan(full.tokens, full.domain, full.domains, full.first, bos), full

    def _context(self, about: Json, plan: Plan, full: Reference | None) -> Json:
        ctx, batching = about["ctx"], Batching(**about["batching"])
        base = self._record(about, plan, batching)
        made: list[Json] = []
        with contextlib.closing(base):
            base.load_output(self.payload["model"])
            for row in self.rows:
                made.append(self._row(row, about, plan, batching, base, full))
        found = {
            "ctx": ctx,
            "rows": made,
            "domains": list(plan.domains),
            "first": plan.first,
            "chunks": len(plan.tokens),
        }
        if self.payload["attention"]:
            found["attention"] = self._attention(plan)
        return found

    # --- f16 ---

    def _record(self, about: Json, plan: Plan, batching: Batching) -> ApexReference:
        """The model with a cache of f16, recorded; from an earlier run where that is complete."""
        path = Path(about["base"])
        if not path.exists():
            payload = {
                **self.payload["record"], "spec": about["spec"], "out": str(path), "state": f"{path}.state",
                "stock": False, "form": "auto", "copy_output": False, "experts": 0, "model": self.payload["model"],
                "save_seconds": self.payload["save_seconds"],
            }  # fmt: skip
            with self.contexts.open(Pair("f16", "f16"), plan.ctx, batching, observer=self.contexts.recording):
                lane = Lane(self.session, self.contexts.recording)
                recorder = Recorder(lane, plan, payload, self._of_record(about, plan), self.scorer)
                try:
                    recorder.run(batching, self.stop)
                finally:
                    recorder.file.close()
        else:
            self.resumed += self._units(about, plan)
        self.done += self._units(about, plan)
        self._tick()
        return ApexReference(path)

    def _of_record(self, about: Json, plan: Plan) -> Emit:
        def emit(event: Json) -> None:
            self._tick(event["done"] * self._units(about, plan) // max(event["planned"], 1))

        return emit

    # --- pairs ---

    def _row(self, row: Json, about: Json, plan: Plan, batching: Batching, base: ApexReference,
             full: Reference | None) -> Json:  # fmt: skip
        """Measure one pair, or read what an earlier run measured; gives where the numbers are, or what went wrong."""
        path, spec = Path(f"{about['prefix']}-{row['id']}.state"), f"{about['spec']} {row['id']}"
        units = self._units(about, plan)
        known = State.load(path, spec)
        if known is None or not known.finished:
            known = State(spec, finished=True, done=len(plan.tokens))
            try:
                self._measure(row, plan, batching, base, full, known, units)
            except (ResourceError, NativeError) as error:
                known.facts = {"problem": error.message}
                known.arrays = {}
            else:
                known.save(path)
        else:
            self.resumed += units
        self.done += units
        self._tick()
        return {"id": row["id"], "state": str(path), "batching": vars(batching), **known.facts}

    def _measure(self, row: Json, plan: Plan, batching: Batching, base: ApexReference, full: Reference | None,
                 known: State, units: int) -> None:  # fmt: skip
        asked, simulated = Pair(row["k"], row["v"]), bool(row["simulated"])
        pair, tap, flash = asked, None, None
        if simulated:
            tap = CacheTap(*self._roundings(asked))
            pair, flash = Pair("f32", "f32"), "on"
        shape = (len(plan.tokens), plan.scored)
        arrays: dict[str, NDArray[Any]] = {"kld": np.zeros(shape, np.float32), "nll": np.zeros(shape, np.float32)}
        arrays["top1"] = np.zeros(shape, np.bool_)
        if full is not None:
            arrays["kld_full"] = np.zeros(shape, np.float32)
        with self.contexts.open(
            pair, plan.ctx, batching, rotation=row["rotation"], observer=tap, flash=flash
        ) as caches:
            for steps in plan.steps(0, batching):
                if tap is not None:
                    tap.begin()
                for step in steps:
                    self.session.decode(step.tokens, position=step.position, outputs=step.outputs)
                    if self.stop.is_set():
                        raise Stopped
                    if step.rows:
                        self._score(step, plan, base, full, arrays)
                self._tick(steps[0].chunks.stop * units // len(plan.tokens))
        known.arrays = {**arrays, "chunk_hash": hash_chunks(plan.tokens), "domain": plan.domain}
        known.facts = {
            "cells": caches[0].cells,
            "k_mib": round(sum(one.k_mib for one in caches), 2),
            "v_mib": round(sum(one.v_mib for one in caches), 2),
            "rotated": [caches[0].rotated[0], caches[0].rotated[1]],
            "layers": tap.errors() if tap is not None else [],
        }

    def _score(self, step: Any, plan: Plan, base: ApexReference, full: Reference | None,
               arrays: dict[str, NDArray[Any]]) -> None:  # fmt: skip
        where = (slice(step.chunks.start, step.chunks.stop), step.scored)
        targets = plan.targets()[where].reshape(-1)
        logits = self.session.logits()
        shape = (len(step.chunks), -1)
        try:
            found = self.scorer.divergence(base.take(step)[0], logits, targets, floor=base.floor)
            for name in ("kld", "nll", "top1"):
                arrays[name][where] = getattr(found, name).reshape(shape)
            if full is not None:
                other = self.scorer.divergence(full.take(step)[0], logits, targets, floor=full.floor)
                arrays["kld_full"][where] = other.kld.reshape(shape)
        except NotFinite as error:
            width = step.rows // len(step.chunks)
            raise NativeError(
                f"{error.whose} gives logits that are NaN or infinite with this cache: chunk "
                f"{step.chunks[error.row // width]}"
            ) from None

    @cached_property
    def _heads(self) -> dict[int, tuple[int, int]]:
        with open_model(self.payload["model"]) as model:
            return head_lengths(model)

    def _roundings(self, pair: Pair, *, rotated: bool = True) -> tuple[LayerRounding, LayerRounding]:
        """Of K and of V."""
        k, v = (layer_rounding(name, part, self._heads, rotated=rotated) for part, name in zip("kv", pair, strict=True))
        return k, v

    # --- attention ---

    def _attention(self, plan: Plan) -> Json:
        """Errors of attention's output by layer for all pairs, on a few chunks, or why there are none."""
        ctx = min(plan.ctx, 512)
        picked = np.linspace(0, len(plan.tokens) - 1, min(_ATTENTION_CHUNKS, len(plan.tokens))).astype(int)
        sums: dict[str, dict[int, list[float]]] = {}
        try:
            for number in picked:
                if self.stop.is_set():
                    raise Stopped
                tap = AttentionTap(ctx)
                with self.contexts.open(Pair("f32", "f32"), ctx, Batching(1, ctx), observer=tap, flash="off"):
                    self.session.decode(plan.tokens[number : number + 1, :ctx])
                for row in self.rows:
                    if row["simulated"] == "check":
                        continue
                    k, v = self._roundings(Pair(row["k"], row["v"]), rotated=row["rotation"])
                    for layer, seen in tap.layers.items():
                        error = attention_error(seen, ctx, k(layer), v(layer))
                        if error is not None:
                            sums.setdefault(row["id"], {}).setdefault(layer, []).append(error)
        except (ApexError, ValueError) as error:
            return {"problem": str(error)}
        means = {name: {layer: float(np.mean(x)) for layer, x in by.items()} for name, by in sums.items()}
        return {"rows": {name: {str(layer): x for layer, x in by.items()} for name, by in means.items()}, "tokens": ctx,
                "chunks": len(picked)}  # fmt: skip

    def _tick(self, more: int = 0) -> None:
        counters = {"done": self.done + more, "planned": self.planned, "resumed": self.resumed}
        self._emit({"event": "progress", "what": "KV cache", "tokens": self._unit, **counters})


def _open(about: Json) -> Reference:
    if about["form"] == "logits":
        return StockLogits(about["path"])
    stored = ApexReference(about["path"])
    stored.load_output(about["source"])
    return stored


def run(payload: Json, emit: Emit, stop: threading.Event, fds: Sequence[int]) -> Json:
    """Entry point of the child process; `payload` as kv.py makes it."""
    with ExitStack() as held:
        return Job(held, payload, emit, stop).run()
