"""Whole files of candidate recipes, encoded in one pass and measured against the full-precision model.

Costs of single tensors do not say all: they were measured one at a time and on finite text, and the least of many noisy
sums is too low. So a few recipes are built and measured jointly, on text that neither calibrated, nor made the costs,
nor will judge them.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from apex_quant.allocation.measure import CTX
from apex_quant.allocation.space import Predicted, plan_of
from apex_quant.allocation.texts import VALIDATION, ProbeTexts, stored_text, validation_texts
from apex_quant.encode.job import EXECUTOR, JobProgress, run_job
from apex_quant.encode.quantize import refuse_unsafe, usable_cpus
from apex_quant.errors import InputError, ResourceError
from apex_quant.evaluation import token_job
from apex_quant.evaluation.compare import A_LOWER, compare
from apex_quant.evaluation.evaluate import evaluate
from apex_quant.evaluation.identity import sampled
from apex_quant.evaluation.make_reference import make_reference
from apex_quant.evaluation.results import Results, load
from apex_quant.evaluation.token_job import EvaluationProgress
from apex_quant.gguf import GGUFModel, open_model
from apex_quant.importance import Importance
from apex_quant.importance.fill import prior_of
from apex_quant.native import Child, library_info
from apex_quant.recipe.planned import Plan, PlanOptions
from apex_quant.runtime.options import SessionOptions

_FORMAT: Final = 2  # of what is kept in the folder


@dataclass(frozen=True)
class Candidate:
    """A measured recipe: `name` says how it was made, `path` is the encoded file, `results` what was measured."""

    name: str
    file: Predicted
    path: Path
    results: Results

    @property
    def kld(self) -> dict[str, Any]:
        """{"value", "low", "high", "n"} of the mean KLD."""
        return dict(self.results.metrics["kld"]["mean"])

    @property
    def value(self) -> float:
        return float(self.kld["value"])

    def to_json(self) -> dict[str, Any]:
        file = self.file
        return {
            "name": self.name,
            "recipe_sha256": file.plan.recipe.sha256,
            "total_bytes": file.plan.total_bytes,
            "predicted_kld": file.predicted,
            "measured_kld": self.kld,
            "p99_9": self.results.metrics["kld"].get("p99_9"),
        }


@dataclass
class Validator:
    """Encodes and measures recipes of one model in `folder`; what was measured there before is not measured again.

    Names of kept files say by hashes of what they are: model, matrix, text, reference, options, library.

    `reference`: a GGUF, or a file of predictions, which has its own text and context; None makes a .apexref
    of the model on the validation text (or on `text`) in chunks of `ctx` tokens, in `folder`. `keep`: the encoded
    files, not only what was measured.
    """

    model: GGUFModel
    folder: Path
    importance: Importance | None
    imatrix: Path | None
    options: PlanOptions
    reference: Path | None = None
    text: Sequence[str | Path] | None = None
    ctx: int = CTX
    chunks: int | None = None
    session: SessionOptions = field(default_factory=SessionOptions)
    threads: int | None = None
    encoding: Callable[[JobProgress], None] | None = None
    measuring: Callable[[EvaluationProgress], None] | None = None
    keep: bool = True
    known: dict[str, Candidate] = field(default_factory=dict)

    def measure(self, recipes: Mapping[str, Predicted]) -> list[Candidate]:
        """Encode and measure; equal recipes once. Raises what quantize() and evaluate() raise."""
        new: dict[str, Predicted] = {}
        for name, file in recipes.items():
            sha = file.plan.recipe.sha256
            if sha not in self.known and all(sha != other.plan.recipe.sha256 for other in new.values()):
                new[name] = file
        paths = {name: self._path(file) for name, file in new.items()}
        todo = {name: path for name, path in paths.items() if not self._measured(path)}
        self.encode([(new[name], path) for name, path in todo.items()])
        for name, path in paths.items():
            self.known[new[name].plan.recipe.sha256] = Candidate(name, new[name], path, self._results(path))
        if not self.keep:
            self.drop([self.known[file.plan.recipe.sha256] for file in new.values()])
        return [self.known[file.plan.recipe.sha256] for file in recipes.values()]

    def encode(self, pairs: Sequence[tuple[Predicted, Path]]) -> None:
        """All files in one pass over the model."""
        if not pairs:
            return
        problem = library_info().problem
        if problem:
            raise ResourceError(f"{problem}, so nothing can be encoded", hint="--no-validate only solves")
        for file, _ in pairs:
            refuse_unsafe(file.plan, self.options, has_matrix=self.importance is not None)
        threads = self.threads or usable_cpus()
        with Child(EXECUTOR, single_blas=True) as child:
            run_job(
                self.model,
                [(self._whole(file), path) for file, path in pairs],
                imatrix=self.imatrix,
                imatrix_sha256=self.importance.sha256 if self.importance else None,
                threads=threads,
                about={"command": sys.argv, "threads": threads},
                progress=self.encoding,
                child=child,
            )

    def _whole(self, file: Predicted) -> Plan:
        """A candidate is one file, whatever shards are asked for in the end."""
        if len(file.plan.layouts) == 1:
            return file.plan
        options = replace(self.options, split_max_size=None, keep_split=False)
        return plan_of(self.model, file.types, self.importance, options)

    def drop(self, candidates: Sequence[Candidate]) -> None:
        """Remove their files; what was measured stays."""
        for candidate in candidates:
            candidate.path.unlink(missing_ok=True)
            candidate.path.with_name(candidate.path.name + ".journal").unlink(missing_ok=True)

    @cached_property
    def about(self) -> dict[str, Any]:
        """What recipes are measured by, with hashes of all content: what repeats it, and tells it from other runs."""
        own = self._stored
        return {
            "text": None if own else self._about_text(),
            "reference": self._about_reference(),
            "ctx": None if own else self.ctx,
            "chunks": None if own else self.chunks,
            "session": self.session.model_dump(mode="json", exclude={"threads"}),
        }

    @cached_property
    def texts(self) -> ProbeTexts:
        """What recipes are measured on. Raises InputError."""
        if self.reference is not None and self._stored:
            return stored_text(self.model, self.reference)
        return validation_texts(self.model, self.text)

    @cached_property
    def _stored(self) -> bool:
        return self.reference is not None and not is_model(self.reference)

    def _about_text(self) -> dict[str, Any]:
        return {"name": self.texts.name, "sha256": self.texts.sha256, "notes": list(self.texts.notes)}

    def _about_reference(self) -> dict[str, Any]:
        if self.reference is None:
            return {"name": self.model.path.name, "samples_sha256": self._encoded_from["model"]}
        if not self._stored:
            with open_model(self.reference) as other:
                return {"name": self.reference.name, "samples_sha256": sampled(other)}
        try:
            with self.reference.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise InputError(f"{self.reference}: cannot be read: {error.strerror}") from None
        return {"name": self.reference.name, "sha256": digest}

    @cached_property
    def _encoded_from(self) -> dict[str, Any]:
        """What decides the bytes of a candidate besides its recipe."""
        return {
            "model": sampled(self.model),
            "imatrix": self.importance.sha256 if self.importance is not None else None,
            "fill": prior_of(self.importance, self.options.fill) if self.importance is not None else None,
            "library": library_info().version,
        }

    def _path(self, file: Predicted) -> Path:
        return self.folder / f"{file.plan.recipe.sha256[:16]}-{_digest(self._encoded_from)}.gguf"

    @cached_property
    def _key(self) -> str:
        """What decides the measurement besides the file."""
        return _digest({**self.about, "format": _FORMAT, "library": library_info().version})

    def _out(self, path: Path) -> Path:
        return path.with_name(f"{path.stem}.{self._key}.json")

    def _measured(self, path: Path) -> bool:
        return self._out(path).exists() and "kld" in load(self._out(path)).metrics

    def _results(self, path: Path) -> Results:
        out = self._out(path)
        if self._measured(path):
            return load(out)
        reference, source = self._reference()
        live = self.reference is not None and not self._stored
        return evaluate(
            path,
            reference=reference,
            source=source,
            only=("kld",),
            text=self._files if live else None,
            ctx=self.ctx if live else token_job.CTX,  # a stored reference has its own
            chunks=self.chunks if live else None,
            scored="all" if live else "half",
            out=out,
            options=self.session,
            progress=self.measuring,
        )

    def _reference(self) -> tuple[Path, Path | None]:
        """(what to compare with, the model whose output matrix it needs)."""
        if self.reference is not None:
            return self.reference, self.model.path if self._stored else None
        made = self.folder / f"validation.{self._key}.apexref"
        if not made.exists():
            make_reference(
                self.model.path,
                made,
                text=self._files,
                ctx=self.ctx,
                chunks=self.chunks,
                scored="all",
                options=self.session,
                progress=self.measuring,
            )
        return made, self.model.path

    @property
    def _files(self) -> list[str | Path]:
        """The validation text for evaluate()."""
        return list(self.text or [VALIDATION])


def is_model(path: Path) -> bool:
    """Whether a reference is a model, which any text can be run through, and no file of predictions. Raises
    InputError."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _digest(document: Mapping[str, Any]) -> str:
    """Eight digits of a hash."""
    said = json.dumps(document, sort_keys=True).encode("utf-8", "surrogatepass")
    return hashlib.sha256(said).hexdigest()[:8]


def best_of(candidates: Sequence[Candidate]) -> Candidate:
    """The candidate of least measured KLD."""
    return min(candidates, key=lambda one: one.value)


def shown_lower(candidate: Candidate, than: Candidate) -> bool:
    """Whether the paired interval shows that `candidate` has the lower mean KLD."""
    return candidate is not than and compare([candidate.results, than.results], ["kld"])[0].verdict == A_LOWER
