"""Perplexity, divergence and routers: what is planned for the child, and what its numbers come to."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apex_quant.errors import NativeError, UsageError
from apex_quant.evaluation import summary
from apex_quant.evaluation.identity import identity, sampled
from apex_quant.evaluation.reference import describe, vocabulary_size
from apex_quant.evaluation.state import State
from apex_quant.evaluation.steps import Batching, Scored, first_scored
from apex_quant.evaluation.texts import read_texts
from apex_quant.gguf import GGUFModel, open_model
from apex_quant.model.facts import facts
from apex_quant.native import Child, library_info
from apex_quant.runtime.options import SessionOptions

WORKER = "apex_quant.evaluation.worker"
CTX = 2048
_FORMAT = 1  # of the state on disk and of what its numbers mean; part of what a resumed run must agree on


@dataclass(frozen=True)
class EvaluationProgress:
    """How far a measurement is: `done` of `planned` chunks of `tokens` tokens, or tasks (`tokens` 0); `resumed` of
    them were done by an earlier run."""

    what: str
    done: int
    planned: int
    resumed: int
    tokens: int


Report = Callable[[EvaluationProgress], None]
Found = tuple[str, dict[str, Any], dict[str, Any] | None]  # metric, value, numbers per token


class TokenJob:
    """The measurements on text of one call of evaluate()."""

    def __init__(
        self,
        model: GGUFModel,
        reference: str | Path | None,
        source: str | Path | None,
        options: SessionOptions,
        out: Path,
        report: Report,
        save_seconds: float,
    ) -> None:
        self.model, self.options, self.out = model, options, out
        self.report, self.save_seconds = report, save_seconds
        self.facts = facts(model)
        self.notes: list[str] = []
        self.reference: dict[str, Any] | None = None
        self.stored: Any = None
        if reference is not None:
            self.reference, self.stored = describe(reference, source, model)

    def plan(self, text: Sequence[str | Path] | None, ctx: int, chunks: int | None, scored: Scored) -> None:
        """What is to be run: the child's payload, and its hash."""
        live = self.reference is not None and self.reference["form"] == "gguf"
        texts: tuple[dict[str, Any], ...] = ()
        if self.stored is None:
            read = read_texts(self.model, text)
            texts = read.texts
            self.notes += read.notes
        else:
            ctx, scored = self._stored_settings(text, ctx)
        if ctx < 16:
            raise UsageError(f"a context of {ctx} tokens is too short: at least 16")
        if chunks is not None and chunks < 1:
            raise UsageError(f"{chunks} chunks: at least 1")
        batching = Batching.of(ctx, vocabulary_size(self.model), 2 if live else 1)
        run = {"ctx": ctx, "sequences": batching.sequences, "decode_tokens": batching.tokens}
        run["ubatch"] = max(16, batching.tokens)
        self.options = self.options.model_copy(update=run)
        experts = self.facts.experts_used(None) if self.facts.is_moe and self.reference is not None else 0
        self.payload: dict[str, Any] = {
            "batching": vars(batching),
            "experts_used": experts,
            "texts": texts,
            "scored": scored,
            "chunks": chunks,
            "reference": self.reference,
        }
        options = self.options.model_dump(mode="json", exclude={"threads"})
        first = [sampled(self.model), _FORMAT, library_info().version]
        said = json.dumps([*first, self.payload, options], sort_keys=True)
        self.spec = hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()
        self.settings = {
            "ctx": ctx,
            "chunks": chunks,
            "scored": scored,
            "first_scored": first_scored(ctx, scored),
            "texts": [one["name"] for one in texts] if self.stored is None else list(self.stored.domains),
            "sequences": batching.sequences,
            "decode_tokens": batching.tokens,
            "options": options,
        }

    def _stored_settings(self, text: Sequence[str | Path] | None, ctx: int) -> tuple[int, Scored]:
        if text:
            raise UsageError("the text is that of the reference file", hint="leave --text away")
        if ctx not in (CTX, self.stored.ctx):
            raise UsageError(f"the reference file has a context of {self.stored.ctx} tokens, not {ctx}")
        scored: Scored = "half" if self.stored.first == first_scored(self.stored.ctx, "half") else "all"
        return self.stored.ctx, scored

    def measure(self, child: Child, wanted: Sequence[str], lock: int, *, floor: bool) -> tuple[list[Found], list[str]]:
        """Run what has to be run, and give the metrics with their numbers per token, and warnings."""
        alone = list(wanted) == ["ppl"]
        payload = dict(self.payload)
        if alone and self.stored is None:
            payload |= {"reference": None, "experts_used": 0}
        what = "perplexity" if alone else "divergence"
        made = self._run(child, payload, self._state_path(what), self.model.path, what, lock)
        tokens = summary.Tokens(made)
        about = {"spec": self.spec, "seconds": round(made.facts["seconds"], 3)}
        about["tokens_per_second"] = round(made.facts["tokens_per_second"], 1)
        self.settings["threads"] = made.facts["threads"]
        found: list[Found] = []
        if "ppl" in wanted:
            found.append(("ppl", *summary.perplexity(tokens)))
            if self.payload["scored"] == "all":
                found.append(("ppl_all", *summary.perplexity(tokens, everything=True)))
        if "kld" in wanted:
            value, arrays = summary.divergence(tokens)
            if floor:
                value["floor"] = self._floor(lock)
            found.append(("kld", value, arrays))
        if "router" in wanted and (routers := summary.routers(tokens)) is not None:
            found.append(("router", routers, None))
        return [(name, {**value, **about}, arrays) for name, value, arrays in found], made.facts["warnings"]

    def clean(self) -> None:
        """Remove unfinished and finished work: its numbers are in the results."""
        for what in ("perplexity", "divergence", "floor"):
            self._state_path(what).unlink(missing_ok=True)

    def about_reference(self) -> dict[str, Any] | None:
        """What results say of the reference; hashes the reference's GGUF."""
        if self.reference is None:
            return None
        about = {key: value for key, value in self.reference.items() if key not in ("name", "source", "spec")}
        about["path"] = self.reference["name"]
        if self.reference["form"] == "gguf":
            with open_model(self.reference["path"]) as other:
                known = identity(other)
            about |= {"sha256": known.sha256, "model_sha256": known.sha256, "bytes": known.bytes}
        return about

    def _run(self, child: Child, payload: dict[str, Any], path: Path, model: Path, what: str, lock: int) -> State:
        def on_event(event: dict[str, Any]) -> None:
            counters = {key: event[key] for key in ("done", "planned", "resumed")}
            self.report(EvaluationProgress(what=event["what"], tokens=self.options.ctx, **counters))

        spec = hashlib.sha256(f"{self.spec} {what}".encode()).hexdigest()
        payload = {
            **payload,
            "model": str(model),
            "options": self.options.model_dump(mode="json"),
            "spec": spec,
            "state": str(path),
            "save_seconds": self.save_seconds,
            "what": what,
        }
        child.run(f"{WORKER}:run", payload, on_event, step=f"evaluating {model.name}", pass_fds=[lock])
        made = State.load(path, spec)
        if made is None or not made.finished:
            raise NativeError(f"{path}: the numbers are gone or damaged", hint="evaluate again")
        return made

    def _state_path(self, metric: str) -> Path:
        return self.out.with_name(f"{self.out.name}.{metric}.state")

    def _floor(self, lock: int) -> dict[str, Any]:
        """Divergence of a uniform Q8_0 file of the reference: what the backend's rounding of activations costs."""
        assert self.reference is not None
        whole = Path(self.reference["path"] if self.reference["form"] == "gguf" else self.reference.get("source") or "")
        if not whole.is_file():
            raise UsageError("the floor needs the reference's GGUF", hint="--source MODEL-BF16.gguf")
        with tempfile.TemporaryDirectory(prefix="apex-floor-", dir=self.out.parent) as folder:
            uniform = Path(folder) / "uniform-Q8_0.gguf"
            with Child(WORKER) as child:
                child.run(
                    f"{WORKER}:uniform",
                    {"model": str(whole), "out": str(uniform), "threads": self.options.threads},
                    lambda _: None,
                    step=f"making a Q8_0 file of {whole.name}",
                )
            path = self._state_path("floor")
            with Child(WORKER) as child:
                tokens = summary.Tokens(
                    self._run(child, {**self.payload, "experts_used": 0}, path, uniform, "floor", lock)
                )
            found, _ = summary.divergence(tokens)
        kept = {key: found[key] for key in ("mean", "median", "p99", "p99_9", "top1_agreement")}
        return {"type": "Q8_0", **kept}
