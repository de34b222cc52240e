"""sensitivity.json: how much the model's output moves when a group of its weights is quantized, and by how much
each type disturbs each tensor. Schema apex.sensitivity/1; what is measured, and how, is in measure.py.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from apex_quant.errors import InputError
from apex_quant.evaluation.pertoken import read_bounded
from apex_quant.gguf import TYPES
from apex_quant.gguf.atomic import write_file

KINDS: Final = ("real", "noise", "estimated", "guessed", "unknown")
SCHEMA: Final = "apex.sensitivity/1"
MAX_BYTES: Final = 256 << 20  # 2,000 tensors with 25 types take 4 MB
_SCHEMA = re.compile(r"apex\.sensitivity/(\d{1,9})(?:\.\d{1,9})?", re.ASCII)

Number = Annotated[float, Field(ge=-1e30, le=1e30)]
Positive = Annotated[float, Field(ge=0, le=1e30)]
Count = Annotated[int, Field(ge=0, le=1 << 53)]


class _Part(BaseModel):
    """Numbers are numbers: "1.5" is not one. Unknown keys stay."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, frozen=True, protected_namespaces=())


class Measured(_Part):
    """The mean KLD of the disturbed model from the undisturbed one, in nats per token, over `n` chunks of text.

    `error` is the standard error over chunks. `flips` is the share of (token, layer) choices of experts that changed.
    """

    kld: Number
    error: Positive
    n: Count
    flips: Positive | None = None


class Probe(Measured):
    """All tensors of a group in one type, everything else untouched.

    `weighted_error` is the mean over the group's tensors of their relative weighted error in this type (the same
    quantity as in `errors`, but of all rows that were really written). `kind` real: the encoder's own blocks;
    noise: a random matrix of rank 32 of the same error instead; estimated: not measured, from the same part of the
    nearest layers; guessed: not measured, and nothing like it was: from its error, at the scale of what was measured.
    """

    type: str
    kind: Literal["real", "noise", "estimated", "guessed"] = "real"
    weighted_error: Positive


class Group(_Part):
    """Tensors that were disturbed together. `role` and `part` as model/roles.py names them; no layer: null."""

    name: str
    tensors: list[str] = Field(min_length=1)
    role: str
    part: str = ""
    layer: int | None = None
    probes: list[Probe] = []


class Joint(Measured):
    """Many tensors disturbed at once: `types` by tensor; what is not named stays as it is."""

    name: str
    types: dict[str, str] = Field(min_length=1)


class Distortion(_Part):
    """Squared error of a tensor in a type over its sum of squares, plain and weighted by importance."""

    relative: Positive
    weighted: Positive


class ModelFacts(_Part):
    """The model that was measured. `loaded`: the file that was disturbed, where it is another form of it."""

    name: str
    sha256: str
    architecture: str
    loaded: str | None = None


class TextFacts(_Part):
    """The text: `tokens` were decoded in each probe, `scored` of them compared. `sha256` of the token ids."""

    name: str
    tokens: Count
    chunks: Count
    scored: Count
    sha256: str


class Sensitivities(_Part):
    """All of sensitivity.json.

    `errors`: tensor -> type -> Distortion, for every tensor that can be quantized, with all types that its rows can
    hold; `floor`: the same measurement with nothing disturbed; `joint`: probes of whole recipes, from which cost.py
    learns where costs do not add up; `rounding`: a Q8_0 file, whose divergence is mostly that of rounded activations.
    """

    schema_: str = Field(default=SCHEMA, alias="schema")
    model: ModelFacts
    imatrix: dict[str, Any] | None = None
    text: TextFacts
    settings: dict[str, Any] = {}
    groups: list[Group]
    errors: dict[str, dict[str, Distortion]]
    joint: list[Joint] = []
    floor: Measured | None = None
    rounding: Joint | None = None
    tokens_spent: Count = 0
    seconds: Positive = 0.0
    warnings: list[str] = []

    model_config = ConfigDict(populate_by_name=True)

    @field_validator("schema_")
    @classmethod
    def _readable(cls, schema: str) -> str:
        found = _SCHEMA.fullmatch(schema)
        if found is None or int(found[1]) != 1:
            raise ValueError(f"{schema[:40]!r} is not {SCHEMA}")
        return schema

    @model_validator(mode="after")
    def _whole(self) -> Sensitivities:
        """Every tensor is in at most one group, and all types exist."""
        seen: set[str] = set()
        for group in self.groups:
            for name in group.tensors:
                if name in seen:
                    raise ValueError(f"{name[:80]!r} is in two groups")
                seen.add(name)
                if name not in self.errors:
                    raise ValueError(f"{name[:80]!r} has no errors")
        used = {probe.type for group in self.groups for probe in group.probes}
        used.update(kind for row in self.errors.values() for kind in row)
        used.update(kind for joint in self.joint for kind in joint.types.values())
        unknown = sorted(used - set(TYPES))
        if unknown:
            raise ValueError(f"no tensor type is called {unknown[0][:40]!r}")
        return self

    @property
    def kinds(self) -> dict[str, int]:
        """How many groups were measured with real weights, with noise, estimated, guessed, and not known at all."""
        first = [group.probes[0].kind if group.probes else "unknown" for group in self.groups]
        return {kind: first.count(kind) for kind in KINDS if kind in first}

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(by_alias=True, exclude_none=False)

    def save(self, path: str | Path) -> Path:
        """Write the file, whole or not at all. Raises ResourceError."""
        return write_file(path, json.dumps(_rounded(self.to_json()), indent=1, allow_nan=False) + "\n")


def load(path: str | Path) -> Sensitivities:
    """Read sensitivity.json. Raises InputError for one that is missing, broken or of a newer apex."""
    path = Path(path)
    text = read_bounded(path, MAX_BYTES, "sensitivities")
    try:
        document = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise InputError(f"{path}: not a whole JSON document: {reason[:200]}") from None
    return parse(document, path)


def parse(document: Any, path: str | Path) -> Sensitivities:
    """A read document. Raises InputError for other documents, a newer major version and wrong types."""
    schema = document.get("schema") if isinstance(document, dict) else None
    if not isinstance(schema, str) or not schema.startswith("apex.sensitivity/"):
        raise InputError(f"{path}: not the sensitivities that `apex measure` writes: no schema {SCHEMA}")
    found = _SCHEMA.fullmatch(schema)
    if found is not None and int(found[1]) > 1:
        raise InputError(f"{path}: schema {schema[:40]} is newer than {SCHEMA}", hint="update apex-quant to read it")
    try:
        return Sensitivities.model_validate(document)
    except (ValidationError, RecursionError) as error:
        raise InputError(f"{path}: {_first(error)}") from None


def _first(error: ValidationError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "nested too deep"
    detail = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part)[:80] for part in detail["loc"])
    text = detail["msg"].removeprefix("Value error, ")
    return f"{where}: {text}" if where else text


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")


def _rounded(value: Any) -> Any:
    """Seven digits are more than any of these numbers has."""
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else value
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return value
