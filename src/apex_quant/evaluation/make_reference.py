"""`make_reference`: a full-precision model's predictions into one small file, once, for all its quantizations.

make_reference("MODEL-BF16.gguf", "MODEL.apexref")
evaluate("MODEL-I-Quality.gguf", reference="MODEL.apexref")
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from apex_quant.errors import ResourceError, UsageError
from apex_quant.evaluation import environment, state
from apex_quant.evaluation.identity import identity, sampled
from apex_quant.evaluation.reference import SCHEMA, vocabulary_size
from apex_quant.evaluation.steps import Batching, Scored
from apex_quant.evaluation.texts import read_texts
from apex_quant.evaluation.token_job import CTX, EvaluationProgress, Report
from apex_quant.gguf import open_model
from apex_quant.model.facts import facts, quantized_already
from apex_quant.native import Child, library_info
from apex_quant.runtime.options import SessionOptions

RECORDER = "apex_quant.evaluation.record"
SAVE_SECONDS = 30.0
_FORMAT = 1


@dataclass(frozen=True)
class MadeReference:
    """A finished file. `error` is the KLD of the predictions rebuilt from it, measured on `error["tokens"]` tokens;
    `stock_bytes` what a _logits_ file of the same text would have."""

    path: Path
    form: str
    bytes: int
    stock_bytes: int
    chunks: int
    tokens: int
    error: dict[str, Any] | None
    seconds: float
    resumed: int
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "path": str(self.path), "warnings": list(self.warnings)}


def make_reference(
    model: str | Path,
    out: str | Path,
    *,
    text: Sequence[str | Path] | None = None,
    ctx: int = CTX,
    chunks: int | None = None,
    scored: Scored = "half",
    form: Literal["auto", "logprobs", "stock"] = "auto",
    copy_output: bool = False,
    options: SessionOptions | None = None,
    force: bool = False,
    progress: Report | None = None,
    save_seconds: float = SAVE_SECONDS,
) -> MadeReference:
    """Run text through `model` and keep what it predicts in `out`; the same call after an interruption goes on.

    `text`, `ctx`, `chunks`, `scored` as for evaluate(). `form`: "auto" keeps final hidden states where logits can be
    rebuilt from them within a mean KLD of 1e-6, else log-probabilities in 16 bits; "stock" writes llama-perplexity's
    _logits_ file. `copy_output` puts the output matrix into the file, which then needs no GGUF beside it.

    Raises UsageError, InputError, ResourceError or NativeError; there is never a broken file under the name `out`.
    """
    started, out = time.monotonic(), Path(out)
    options, stock = options or SessionOptions(), form == "stock"
    if stock and scored != "half":
        raise UsageError("a _logits_ file has the second half of each chunk, nothing else")
    if not out.parent.is_dir():
        raise UsageError(f"{out.parent}: no such folder")
    if out.exists() and not force:
        raise UsageError(f"{out} exists already", hint="--force replaces it")
    if ctx < 16 or (chunks is not None and chunks < 1):
        raise UsageError(f"a context of {ctx} tokens and {chunks} chunks: at least 16 and 1")
    problem = library_info().problem
    if problem:
        raise ResourceError(f"{problem}, so nothing can be run", hint="`apex doctor` says how to get it")
    report = progress or (lambda _: None)
    with Child(RECORDER) as child, open_model(model) as opened, ExitStack() as held:
        lock = held.enter_context(state.locked(out))
        texts = read_texts(opened, text)
        vocabulary = vocabulary_size(opened)
        batching = Batching.of(ctx, vocabulary, 1)
        run = {"ctx": ctx, "sequences": batching.sequences, "decode_tokens": batching.tokens}
        options = options.model_copy(update={**run, "ubatch": max(16, batching.tokens)})
        known, about = facts(opened), identity(opened)
        payload: dict[str, Any] = {
            "model": str(opened.path),
            "identity": {
                "name": opened.path.name,
                "sha256": about.sha256,
                "bytes": about.bytes,
                "architecture": opened.architecture,
            },
            "environment": environment.collect(),
            "schema": SCHEMA,
            "options": options.model_dump(mode="json"),
            "batching": vars(batching),
            "texts": texts.texts,
            "scored": scored,
            "chunks": chunks,
            "experts_used": known.experts_used(None) if known.is_moe else 0,
            "experts": known.n_expert,
            "form": form,
            "stock": stock,
            "copy_output": copy_output,
            "save_seconds": save_seconds,
        }
        decides = {key: value for key, value in payload.items() if key not in ("save_seconds", "options")}
        run_options = options.model_dump(mode="json", exclude={"threads"})
        said = json.dumps([_FORMAT, sampled(opened), decides, run_options], sort_keys=True)
        spec = hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()
        payload |= {"spec": spec, "out": str(out), "state": str(out.with_name(out.name + ".state"))}

        def on_event(event: dict[str, Any]) -> None:
            counters = {key: event[key] for key in ("done", "planned", "resumed")}
            report(EvaluationProgress(what=event["what"], tokens=ctx, **counters))

        step = f"making a reference of {opened.path.name}"
        result = child.run(f"{RECORDER}:run", payload, on_event, step=step, pass_fds=[lock])
    words = 2 * ((vocabulary + 1) // 2) + 4
    count = result["chunks"]
    return MadeReference(
        path=out,
        form="stock" if stock else result["form"],
        bytes=out.stat().st_size,
        stock_bytes=20 + 4 * ctx * count + 2 * words * (ctx - 1 - ctx // 2) * count,
        chunks=count,
        tokens=count * result["scored"],
        error=result["error"],
        seconds=time.monotonic() - started,
        resumed=result["resumed"],
        warnings=(*quantized_already(opened), *texts.notes),
    )
