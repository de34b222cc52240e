"""The child's job: chunks of text through the model, and beside it the reference; numbers of each scored token.

Only per-token arrays leave the child, in a file (state.py); logits are reduced decode by decode.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from apex_quant.errors import InputError, NativeError, ResourceError, UsageError
from apex_quant.evaluation.pertoken import hash_chunks
from apex_quant.evaluation.reference import ApexReference
from apex_quant.evaluation.scores import Blocks, NotFinite, Scorer, scorer
from apex_quant.evaluation.state import State
from apex_quant.evaluation.steps import Batching, Plan, Step, plan_texts
from apex_quant.evaluation.stock_logits import StockLogits
from apex_quant.evaluation.watch import Routing, Watcher, watcher
from apex_quant.native.bindings import bindings
from apex_quant.native.worker import Emit, Json, Stopped
from apex_quant.runtime.options import SessionOptions
from apex_quant.runtime.session import Session, library
from apex_quant.runtime.tensors import F32, I32

with contextlib.suppress(ImportError):  # early, while the parent still reads the text; Session says what is missing
    bindings()

_CONTEXT_TOKENS = 48  # shown before the token with the largest divergence


class Lane:
    """One loaded model that goes through the steps."""

    def __init__(self, session: Session, watcher: Watcher | None) -> None:
        self.session, self.watcher = session, watcher

    def decode(self, step: Step) -> None:
        if self.watcher is not None:
            self.watcher.begin()
        self.session.decode(step.tokens, position=step.position, outputs=step.outputs)

    def routing(self, step: Step) -> Routing | None:
        return self.watcher.routing(np.tile(step.outputs, len(step.chunks))) if self.watcher is not None else None


class Reference(Protocol):
    """Where the reference's numbers come from."""

    floor: float | None
    """Of log-probabilities that are known; None for logits of all tokens."""

    def take(self, step: Step) -> tuple[Blocks, Routing | None]:
        """The reference's logits for the scored tokens of this step, in blocks of the vocabulary, and its routers'
        choices. Steps come in their order, those without scored tokens too."""


class LiveReference:
    """A second model in the same process."""

    floor: float | None = None

    def __init__(self, lane: Lane) -> None:
        self.lane = lane

    def take(self, step: Step) -> tuple[Blocks, Routing | None]:
        self.lane.decode(step)
        return ([(0, self.lane.session.logits())] if step.rows else []), self.lane.routing(step)


class Scoring:
    """Scores one plan. `state` goes on from an earlier run's."""

    def __init__(
        self, lane: Lane, reference: Reference | None, plan: Plan, payload: Json, emit: Emit, one: Scorer
    ) -> None:
        self.lane, self.reference, self.plan, self.emit, self.scorer = lane, reference, plan, emit, one
        self.path, self.save_seconds = Path(payload["state"]), float(payload["save_seconds"])
        self.what: str = payload["what"]
        self.state = State.load(self.path, payload["spec"]) or State(payload["spec"])
        self.resumed = self.state.done
        self.arrays = self._allocate()
        self._saved_at = time.monotonic()

    def _allocate(self) -> dict[str, NDArray[Any]]:
        """Room for the numbers of all chunks, with those of an earlier run in it."""
        chunks, shape = len(self.plan.tokens), (len(self.plan.tokens), self.plan.scored)
        arrays: dict[str, NDArray[Any]] = {"nll": np.full(shape, np.nan, np.float32)}
        if self.reference is not None:
            for name in ("ref_nll", "kld", "reverse"):
                arrays[name] = np.full(shape, np.nan, np.float32)
            arrays["top1"] = np.zeros(shape, np.bool_)
        done = self.state.done
        for name, known in self.state.arrays.items():
            if name not in arrays:
                arrays[name] = np.zeros((chunks, *known.shape[1:]), known.dtype)
            arrays[name][:done] = known[:done]
        return arrays

    def run(self, batching: Batching, stop: threading.Event) -> None:
        """Decode everything that is still to be decoded. Raises Stopped, after saving, when asked to stop."""
        self._tick()
        try:
            for steps in self.plan.steps(self.state.done, batching):
                for step in steps:
                    self._step(step)
                    if stop.is_set():
                        raise Stopped
                self.state.done = steps[0].chunks.stop
                self._tick()
                if time.monotonic() - self._saved_at >= self.save_seconds:
                    self._save()
        except (Stopped, InputError, NativeError):
            self._save()
            raise

    def finish(self, facts: Json) -> None:
        """Save everything that the results are made of."""
        self.state.finished = True
        self.state.facts |= facts
        self.arrays |= {
            "token": self.plan.targets(),
            "domain": self.plan.domain,
            "chunk_hash": hash_chunks(self.plan.tokens),
        }
        self._save()

    def _step(self, step: Step) -> None:
        self.lane.decode(step)
        blocks, theirs = self.reference.take(step) if self.reference is not None else ([], None)
        if not step.rows:
            return
        logits = self.lane.session.logits()
        where = (slice(step.chunks.start, step.chunks.stop), step.scored)
        targets = self.plan.targets()[where].reshape(-1)
        shape = (len(step.chunks), -1)
        try:
            if self.reference is None:
                self.arrays["nll"][where] = self.scorer.nll(logits, targets).reshape(shape)
            else:
                found = self.scorer.divergence(blocks, logits, targets, floor=self.reference.floor)
                for name in ("nll", "ref_nll", "kld", "reverse", "top1"):
                    self.arrays[name][where] = getattr(found, name).reshape(shape)
        except NotFinite as error:
            width = step.rows // len(step.chunks)
            chunk, position = step.chunks[error.row // width], self.plan.first + step.scored.start + error.row % width
            raise InputError(
                f"{error.whose} gives logits that are NaN or infinite: chunk {chunk}, position {position}",
                hint="the weights are damaged or overflow in this precision; `apex verify` looks for such values",
            ) from None
        ours = self.lane.routing(step)
        if ours is not None and theirs is not None:
            self._routers(step, ours, theirs)

    def _routers(self, step: Step, ours: Routing, theirs: Routing) -> None:
        if ours.layers != theirs.layers or ours.experts.shape[1] != theirs.experts.shape[1]:
            raise InputError(
                f"the model has routers in {len(ours.layers)} layers, the reference in {len(theirs.layers)}: "
                "they are not two forms of one model"
            )
        changed, moved = ours.moved(theirs)
        layers = len(ours.layers)
        self.state.facts["layers"] = list(ours.layers)
        for name, values in (("router_changed", changed), ("router_moved", moved)):
            sums = values.reshape(layers, len(step.chunks), -1).sum(axis=2, dtype=np.float64).T
            if name not in self.arrays:
                self.arrays[name] = np.zeros((len(self.plan.tokens), layers))
            rows = self.arrays[name][step.chunks.start : step.chunks.stop]
            if step.scored.start == 0:
                rows[:] = 0  # a group of chunks that was stopped in its middle starts again
            rows += sums

    def _tick(self) -> None:
        counters = {"done": self.state.done, "planned": len(self.plan.tokens), "resumed": self.resumed}
        self.emit({"event": "progress", "what": self.what, **counters})

    def _save(self) -> None:
        self.state.arrays = self.arrays
        self.state.save(self.path)
        self._saved_at = time.monotonic()


def text_of(session: Session, tokens: I32) -> str:
    """Tokens as text, marks such as <|im_start|> included."""
    lib, _ = library()
    ids = np.ascontiguousarray(tokens, np.int32)
    buffer = ctypes.create_string_buffer(64 * len(ids) + 64)
    pointer = ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
    count = lib.llama_detokenize(session._vocab, pointer, len(ids), buffer, len(buffer), False, True)
    return buffer.raw[:count].decode("utf-8", "replace") if count > 0 else ""


def _largest(session: Session, plan: Plan, kld: F32) -> Json:
    """The token with the largest divergence, in words."""
    chunk, place = divmod(int(np.argmax(kld)), plan.scored)
    position = plan.first + place
    row = plan.tokens[chunk]
    return {
        "value": float(kld[chunk, place]),
        "chunk": chunk,
        "position": position,
        "token": text_of(session, row[position + 1 : position + 2]),
        "context": text_of(session, row[max(0, position + 1 - _CONTEXT_TOKENS) : position + 1]),
        "domain": plan.domains[plan.domain[chunk]],
    }


def _session(held: ExitStack, path: str, options: SessionOptions, used: int) -> Lane:
    watching = watcher(used)
    return Lane(held.enter_context(Session(path, options, watching)), watching)


def _check_vocabulary(session: Session, size: int, name: str) -> None:
    ours = session.vocabulary.size if session.vocabulary is not None else 0
    if ours != size:
        raise InputError(
            f"{session.path.name} has a vocabulary of {ours} tokens, the reference {name} one of {size}: "
            "they are not two forms of one model"
        )


def _stored(asked: Json) -> StockLogits | ApexReference:
    if asked["form"] == "logits":
        return StockLogits(asked["path"])
    stored = ApexReference(asked["path"])
    stored.load_output(asked["source"])
    return stored


def _stored_plan(session: Session, stored: StockLogits | ApexReference, most: int | None) -> Plan:
    """The text of a reference file, at most `most` chunks of each text."""
    bos = session.vocabulary.bos if session.vocabulary is not None and session.vocabulary.add_bos else None
    if isinstance(stored, ApexReference) and stored.bos != bos:
        raise InputError(
            f"{session.path.name} begins a text with {'nothing' if bos is None else f'token {bos}'}, the reference "
            f"with {'nothing' if stored.bos is None else f'token {stored.bos}'}: their tokenizers differ"
        )
    keep = len(stored.tokens)
    if most is not None:
        places = [np.flatnonzero(stored.domain == i)[:most] for i in range(len(stored.domains))]
        keep = sum(map(len, places))
        if keep < len(stored.tokens) and len(stored.domains) > 1:
            raise UsageError("a reference file of several texts is used whole", hint="leave --chunks away")
    return Plan(stored.tokens[:keep], stored.domain[:keep], stored.domains, stored.first, bos)


def uniform(payload: Json, emit: Emit, stop: threading.Event, fds: Sequence[int]) -> Json:
    """Another entry point: a uniform Q8_0 file of a model, by the library itself."""
    lib, log = library()
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.pure = lib.LLAMA_FTYPE_MOSTLY_Q8_0, True, True
    params.nthread = payload["threads"] or 0
    if lib.llama_model_quantize(os.fsencode(payload["model"]), os.fsencode(payload["out"]), ctypes.byref(params)):
        raise ResourceError(f"the library cannot make a Q8_0 file of {payload['model']}: {log.last_problem()}")
    return {}


def run(payload: Json, emit: Emit, stop: threading.Event, fds: Sequence[int]) -> Json:
    """Entry point of the child process; `payload` as evaluate.py makes it."""
    options = SessionOptions.model_validate(payload["options"])
    batching = Batching(**payload["batching"])
    with ExitStack() as held:
        lane = _session(held, payload["model"], options, payload["experts_used"])
        session = lane.session
        warnings = []
        if options.ctx > session.training_context:
            warnings.append(f"the model was trained on {session.training_context} tokens, not on {options.ctx}")
        asked = payload["reference"]
        reference: Reference | None = None
        plan: Plan | None = None
        if asked is None:
            pass
        elif asked["form"] == "gguf":
            other = _session(held, asked["path"], options, payload["experts_used"])
            _check_vocabulary(session, other.session.vocabulary.size if other.session.vocabulary else 0, asked["name"])
            reference = LiveReference(other)
            plan = plan_texts(session, payload["texts"], options.ctx, payload["scored"], payload["chunks"])
            theirs = plan_texts(other.session, payload["texts"], options.ctx, payload["scored"], payload["chunks"])
            if not np.array_equal(plan.tokens, theirs.tokens) or plan.bos != theirs.bos:
                raise InputError(
                    f"{session.path.name} and the reference {asked['name']} make other tokens of the same text"
                )
        else:
            stored = held.enter_context(contextlib.closing(_stored(asked)))
            _check_vocabulary(session, stored.vocabulary, asked["name"])
            plan = _stored_plan(session, stored, payload["chunks"])
            reference = stored
        if plan is None:
            plan = plan_texts(session, payload["texts"], options.ctx, payload["scored"], payload["chunks"])
        one = held.enter_context(scorer(session.threads))
        scoring = Scoring(lane, reference, plan, payload, emit, one)
        if not scoring.state.finished:
            before = time.monotonic()
            scoring.run(batching, stop)
            facts: Json = {
                "domains": list(plan.domains),
                "first": plan.first,
                "ctx": plan.ctx,
                "vocabulary": session.vocabulary.size if session.vocabulary else 0,
                "threads": session.threads,
                "tokens_per_second": (len(plan.tokens) - scoring.resumed) * plan.ctx / (time.monotonic() - before),
                "seconds": time.monotonic() - before,
                "warnings": warnings,
            }
            if reference is not None:
                facts["largest"] = _largest(session, plan, scoring.arrays["kld"])
            scoring.finish(facts)
    return {"resumed": scoring.resumed, "chunks": len(plan.tokens)}
