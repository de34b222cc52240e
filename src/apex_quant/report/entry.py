"""One file of a report: what its results say, and what lies beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from apex_quant.errors import ApexError
from apex_quant.evaluation.schema import Results
from apex_quant.report import tokens as per_token
from apex_quant.report.precision import PrecisionMap, from_gguf, from_plan
from apex_quant.report.quantities import QUANTITIES, Absent, Number, number, number_at
from apex_quant.report.tokens import BadToken, Distribution


@dataclass(frozen=True)
class RouterLayer:
    """Shares of a layer: tokens whose set of experts changed, and weight that went elsewhere."""

    layer: int
    changed: Number
    mass_moved: Number | None


@dataclass
class Entry:
    """One model file. `sources` are its results (several where metrics were measured into several files); numbers come
    from the first that has them. `gguf`: the file itself, when it lies beside them; `plan`: a plan of it."""

    label: str
    family: str
    sources: tuple[Results, ...]
    files: tuple[str, ...]
    """What traces call the results files, one for each source: their names, with folders where those are alike."""
    gguf: Path | None = None
    plan: Path | None = None
    is_reference: bool = False
    missing: list[str] = field(default_factory=list)
    """Sentences about what could not be read or was not measured."""

    @property
    def results(self) -> Results:
        return self.sources[0]

    @property
    def name(self) -> str:
        """The model file's name without .gguf."""
        return self.results.name

    @property
    def file_name(self) -> str:
        """The model file's name."""
        return self.results.model.path.replace("\\", "/").rpartition("/")[2] or self.results.model.path

    @property
    def bytes(self) -> int | None:
        return next((one.model.bytes for one in self.sources if one.model.bytes is not None), None)

    @property
    def bpw(self) -> float | None:
        return next((one.model.bpw for one in self.sources if one.model.bpw is not None), None)

    @property
    def sha256(self) -> str | None:
        return self.results.model.sha256

    @property
    def tier(self) -> str | None:
        return self.results.model.tier

    @property
    def imported(self) -> Mapping[str, Any] | None:
        """Where numbers of others are from ("source", "sha256", ...); None for those of apex eval."""
        found = self.results.settings.get("imported")
        return found if isinstance(found, Mapping) else None

    @property
    def warnings(self) -> list[str]:
        return list(dict.fromkeys(line for one in self.sources for line in one.warnings))

    @property
    def numbers(self) -> dict[str, Number]:
        """All quantities of QUANTITIES that were measured."""
        found = {key: self.number(key) for key in QUANTITIES}
        return {key: value for key, value in found.items() if value is not None}

    def number(self, key: str) -> Number | None:
        """The quantity, None when there is none (`absence` says why)."""
        found = self._look_up(key)
        return found if isinstance(found, Number) else None

    def absence(self, key: str) -> str:
        """Why there is no such number: "not measured", or the note of the results file."""
        found = self._look_up(key)
        return found.note if isinstance(found, Absent) else ""

    def source_of(self, key: str) -> Results:
        """The results that `number(key)` is from; those of the entry where there is none."""
        metric = QUANTITIES[key].place[0]
        return next((one for one in self.sources if one.metrics.get(metric)), self.results)

    def file_of(self, source: Results) -> str:
        """What traces call the file of one of the sources."""
        return next(file for one, file in zip(self.sources, self.files, strict=True) if one is source)

    def domains(self, key: str = "kld") -> dict[str, Number]:
        """By domain of the text: mean KLD ("kld"), agreement ("top1") or perplexity ("ppl")."""
        source = self.source_of(key)
        metric, part = ("ppl", "texts") if key == "ppl" else ("kld", "by_domain")
        rows = source.metrics.get(metric, {}).get(part)
        inner = {"kld": "mean", "top1": "top1_agreement"}.get(key)
        made = {}
        for name, row in rows.items() if isinstance(rows, Mapping) else ():
            found = row.get(inner) if inner and isinstance(row, Mapping) else row
            pointer = f"/metrics/{metric}/{part}/{escaped(name)}" + (f"/{inner}" if inner else "")
            value = number_at(found, self.file_of(source), pointer)
            if isinstance(value, Number):
                made[str(name)] = value
        return made

    def routers(self) -> list[RouterLayer]:
        """By layer, where routers were compared."""
        source = self.source_of("router")
        rows = source.metrics.get("router", {}).get("layers")
        made = []
        for place, row in enumerate(rows if isinstance(rows, list) else ()):
            layer = row.get("layer") if isinstance(row, Mapping) else None
            if not isinstance(layer, int):
                continue
            pointer = f"/metrics/router/layers/{place}"
            changed, moved = (
                number_at(row.get(name), self.file_of(source), f"{pointer}/{name}")
                for name in ("changed", "mass_moved")
            )
            if isinstance(changed, Number):
                made.append(RouterLayer(layer, changed, moved if isinstance(moved, Number) else None))
        return sorted(made, key=lambda row: row.layer)

    @cached_property
    def precision(self) -> PrecisionMap | None:
        """Types of its tensors, from the GGUF's header or from a plan; None where neither lies beside the results."""
        for path, read in ((self.gguf, from_gguf), (self.plan, from_plan)):
            if path is not None:
                try:
                    return read(path)
                except ApexError as error:
                    self.missing.append(f"{self.label}: no precision map: {error.message}")
        return None

    @cached_property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """The kld arrays per token ("kld/..."); {} where none were kept or the archive cannot be read. Large: they are
        read anew by `distribution` and `worst`, which keep only what they need."""
        source = self.source_of("kld")
        if not source.metrics.get("kld") or source.per_token is None:
            return {}
        try:
            return {name: array for name, array in source.arrays().items() if name.startswith("kld/")}
        except ApexError as error:
            self.missing.append(f"{self.label}: no numbers per token: {error.message}")
            return {}

    @cached_property
    def distribution(self) -> Distribution | None:
        """Of the KLD per token."""
        return self._of_tokens[0]

    @cached_property
    def worst(self) -> list[BadToken]:
        """The tokens with the largest KLD, with text where a vocabulary lies beside the results."""
        return self._of_tokens[1]

    @cached_property
    def _of_tokens(self) -> tuple[Distribution | None, list[BadToken]]:
        try:
            decode = per_token.vocabulary(self.gguf) if self.gguf is not None and self.arrays else None
            return per_token.distribution(self.arrays), per_token.worst_tokens(self.arrays, decode)
        except ApexError as error:
            self.missing.append(f"{self.label}: numbers per token are unusable: {error.message}")
            return None, []
        finally:
            self.__dict__.pop("arrays", None)

    def not_measured(self) -> list[str]:
        """Titles of quantities without a number, with the reason where the file gives one."""
        rows = []
        for key, quantity in QUANTITIES.items():
            if self.number(key) is None and key != "kld_floor":
                note = self.absence(key)
                rows.append(quantity.title if note == "not measured" else f"{quantity.title} ({note})")
        return rows

    def to_json(self, *, tensors: bool = True, per_token: bool = True) -> dict[str, Any]:
        """All of it as JSON holds it; `tensors`: each tensor of the precision map; `per_token`: the archive is read."""
        made: dict[str, Any] = {
            "label": self.label,
            "family": self.family,
            "name": self.name,
            "file_name": self.file_name,
            "tier": self.tier,
            "bytes": self.bytes,
            "bpw": self.bpw,
            "sha256": self.sha256,
            "is_reference": self.is_reference,
            "files": list(self.files),
            "numbers": {key: value.to_json() for key, value in self.numbers.items()},
            "not_measured": self.not_measured(),
            "domains": {
                key: {name: one.to_json() for name, one in self.domains(key).items()} for key in ("kld", "ppl")
            },
            "routers": [
                {"layer": row.layer, "changed": row.changed.to_json(),
                 "mass_moved": None if row.mass_moved is None else row.mass_moved.to_json()}
                for row in self.routers()
            ],
            "precision": None if self.precision is None else self.precision.to_json(tensors=tensors),
            "imported": None if self.imported is None else dict(self.imported),
            "reference": self.source_of("kld").reference,
            "settings": self.results.settings,
            "environment": self.results.environment,
            "warnings": self.warnings,
        }  # fmt: skip
        if per_token:
            made["distribution"] = None if self.distribution is None else self.distribution.to_json()
            made["worst"] = [token.to_json() for token in self.worst]
        made["missing"] = list(self.missing)
        return made

    def _look_up(self, key: str) -> Number | Absent:
        source = self.source_of(key)
        return number(source, key, file=self.file_of(source))


def escaped(name: object) -> str:
    """A key as a part of a JSON pointer."""
    return str(name).replace("~", "~0").replace("/", "~1")
