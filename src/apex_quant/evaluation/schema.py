"""The schema of results.json, apex.results/1: what each key means and which types it has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator

from apex_quant.errors import InputError, UsageError
from apex_quant.evaluation import pertoken
from apex_quant.evaluation.pertoken import Arrays

SCHEMA: Final = "apex.results/1"
MAJOR: Final = 1
TASKS: Final = ("hellaswag", "winogrande", "mmlu", "arc", "truthfulqa")

_SCHEMA = re.compile(r"apex\.results/(\d{1,9})(?:\.\d{1,9})?", re.ASCII)


class NotResultsError(InputError):
    """A JSON document of something else."""


class _Part(BaseModel):
    """Numbers are numbers: "1.5" is not one. Unknown keys stay."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, validate_assignment=True,
                              populate_by_name=True, protected_namespaces=())  # fmt: skip


class Estimate(_Part):
    """A value from `n` observations with its interval; null where there were too few, and `note` says of what."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = Field(default=None, ge=0)
    note: str | None = None


class Perplexity(_Part):
    """`error` is llama-perplexity's: perplexity times the standard error of the mean nll over single tokens."""

    value: float | None = None
    error: float | None = None
    n: int | None = Field(default=None, ge=0)
    texts: dict[str, Any] = {}


class Divergence(_Part):
    """Kullback-Leibler divergence from the reference, in nats per token, over all scored tokens."""

    mean: Estimate | None = None
    median: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None
    p99_9: Estimate | float | None = None
    max: dict[str, Any] | float | None = None
    top1_agreement: Estimate | None = None
    delta_p_rms: float | None = None
    reverse_mean: float | None = None
    ppl_ratio: float | None = None
    by_position: list[Any] = []
    by_domain: dict[str, Any] = {}
    floor: dict[str, Any] | None = None
    note: str | None = None


class Router(_Part):
    """Shares of tokens whose top-k experts differ from the reference's, and probability moved, by layer."""

    layers: list[dict[str, Any]] = []
    changed: float | None = None
    mass_moved: float | None = None
    worst: list[Any] = []


class Task(Estimate):
    """Accuracy in llama.cpp's scoring, with the Wilson interval over tasks."""

    wording: str | None = None
    file_sha256: str | None = None
    mc2: dict[str, Any] | float | None = None


class Rate(_Part):
    """Tokens per second, its standard deviation over `n` repetitions."""

    value: float | None = None
    deviation: float | None = None
    n: int | None = Field(default=None, ge=0)


KNOWN: Final[dict[str, type[_Part]]] = {
    "ppl": Perplexity, "ppl_all": Perplexity, "kld": Divergence, "router": Router, **dict.fromkeys(TASKS, Task),
}  # fmt: skip
"""Metrics with a model of their own; of others only the name and that they are objects is known."""


class ModelInfo(_Part):
    """The measured file. `sha256` of its bytes is its identity: `path` may have changed since."""

    path: str
    sha256: str | None = None
    bytes: int | None = Field(default=None, ge=0)
    bpw: float | None = None
    architecture: str | None = None
    recipe_sha256: str | None = None
    tier: str | None = None


class PerToken(_Part):
    """The archive of numbers per token, named relative to results.json."""

    path: str
    sha256: str

    @field_validator("path")
    @classmethod
    def _beside(cls, path: str) -> str:
        parts = PurePosixPath(path.replace("\\", "/"))
        if not path or parts.is_absolute() or ".." in parts.parts or "\0" in path:
            raise ValueError("must be the name of a file beside results.json")
        return path


class Results(_Part):
    """All of results.json. `metrics` maps names to objects; those in KNOWN are checked, `metric` gives them typed."""

    schema_: str = Field(default=SCHEMA, alias="schema")
    model: ModelInfo
    reference: dict[str, Any] | None = None
    metrics: dict[str, dict[str, Any]] = {}
    settings: dict[str, Any] = {}
    environment: dict[str, Any] = {}
    per_token: PerToken | None = None
    warnings: list[str] = []
    _path: Path | None = PrivateAttr(None)

    @field_validator("schema_")
    @classmethod
    def _readable(cls, schema: str) -> str:
        found = _SCHEMA.fullmatch(schema)
        if found is None or int(found[1]) != MAJOR:
            raise ValueError(f"{schema!r} is not {SCHEMA}")
        return schema

    @field_validator("metrics")
    @classmethod
    def _known(cls, metrics: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, value in metrics.items():
            if name in KNOWN:
                try:
                    KNOWN[name].model_validate(value)
                except ValidationError as error:
                    raise ValueError(f"{name}: {_first(error)}") from None
            elif name == "speed":
                for test, rate in value.items():
                    if isinstance(rate, dict) and ("value" in rate or "deviation" in rate):
                        try:
                            Rate.model_validate(rate)
                        except ValidationError as error:
                            raise ValueError(f"speed.{test}: {_first(error)}") from None
        return metrics

    @property
    def path(self) -> Path | None:
        """Where it was read from or saved to."""
        return self._path

    @property
    def name(self) -> str:
        """The model's file name without .gguf."""
        return self.model.path.replace("\\", "/").rpartition("/")[2].removesuffix(".gguf") or self.model.path

    def metric(self, name: str) -> Any:
        """The metric as its model in KNOWN (None when it was not measured), others as they are."""
        value = self.metrics.get(name)
        return value if value is None or name not in KNOWN else KNOWN[name].model_validate(value)

    def arrays(self) -> Arrays:
        """The numbers per token; none kept gives {}. Raises InputError when the archive is not the one named."""
        if self.per_token is None:
            return {}
        if self._path is None:
            raise UsageError("results that were never read or saved have no numbers per token")
        return pertoken.read(self._path.parent / self.per_token.path, self.per_token.sha256)

    def to_json(self) -> dict[str, Any]:
        """The document of results.json, unknown keys included."""
        return self.model_dump(by_alias=True)


def different_references(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether both say which full-precision model they are of, and it is not the same one.

    The model's hash decides where both have it (one may be a .apexref, the other the GGUF), else the file's.
    """
    for key in ("model_sha256", "sha256"):
        if a.get(key) and b.get(key):
            return bool(a[key] != b[key])
    return False


def parse(document: Any, path: str | Path) -> Results:
    """A read document as Results. Raises InputError for other documents, a newer major version and wrong types."""
    schema = document.get("schema") if isinstance(document, dict) else None
    if not isinstance(schema, str) or not schema.startswith("apex.results/"):
        raise NotResultsError(f"{path}: not results of apex eval: no schema {SCHEMA}")
    found = _SCHEMA.fullmatch(schema)
    if found is not None and int(found[1]) > MAJOR:
        raise InputError(f"{path}: schema {schema[:40]} is newer than {SCHEMA}", hint="update apex-quant to read it")
    try:
        return Results.model_validate(document)
    except ValidationError as error:
        raise InputError(f"{path}: {_first(error)}") from None


def _first(error: ValidationError) -> str:
    """The first complaint in one line: 'metrics: kld: mean.value: Input should be ...'."""
    detail = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in detail["loc"])
    text = detail["msg"].removeprefix("Value error, ")
    return f"{where}: {text}" if where else text
