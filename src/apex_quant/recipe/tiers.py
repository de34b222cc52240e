"""Tiers: a small table of types by role and depth, and how it becomes a list of overrides for one model.

The nine published tiers are data (tiers.toml); a user's file has the same form. The result is what llama-quantize
would be given: a base mix and an ordered list of (pattern, type), so that stock tools can repeat it.
"""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints, ValidationError, model_validator

from apex_quant.errors import ApexError, InputError, UsageError, did_you_mean
from apex_quant.gguf.types import GGMLType, ggml_type
from apex_quant.model import ModelFacts, Role, TensorRole, ZoneRule
from apex_quant.recipe.mixes import MIXES, mix_name

Importance = Literal["none", "optional", "required"]


def _type_name(name: str) -> str:
    kind = ggml_type(name)
    if not kind.encodable:
        raise UsageError(f"{kind.name} cannot be encoded")
    return kind.name


TypeName = Annotated[str, AfterValidator(_type_name)]

MAX_TIER_BYTES: Final = 1 << 20
# names become part of file names and of the metadata
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ExpertCells(_Strict):
    """Types of one expert column by zone; `near` defaults to `middle`."""

    edge: TypeName
    middle: TypeName
    near: TypeName

    @model_validator(mode="before")
    @classmethod
    def _near_is_middle(cls, data: Any) -> Any:
        if isinstance(data, str):
            return {"edge": data, "near": data, "middle": data}
        if isinstance(data, Mapping) and "middle" in data:
            return {"near": data["middle"], **data}
        return data


class AttentionCells(_Strict):
    """Types of one always-active column by zone."""

    edge: TypeName
    middle: TypeName

    @model_validator(mode="before")
    @classmethod
    def _one_for_all(cls, data: Any) -> Any:
        return {"edge": data, "middle": data} if isinstance(data, str) else data


class Tier(_Strict):
    """One tier. Column meanings stand at the top of tiers.toml.

    >>> find_tier("quality").routed.middle
    'IQ4_XS'
    """

    name: Name
    summary: str = ""
    aliases: tuple[Name, ...] = ()
    base: str
    importance: Importance = "optional"
    routed: ExpertCells
    shared: ExpertCells
    attention: AttentionCells
    ssm: AttentionCells | None = None
    dense: ExpertCells | None = None

    @model_validator(mode="after")
    def _base_is_a_mix(self) -> Tier:
        mix = mix_name(self.base)  # raises UsageError with the nearest known name
        if not MIXES[mix].default.is_quantized:
            raise UsageError(f"base {mix}: llama-quantize takes no types for single tensors with this mix")
        return self

    def title(self, asked: str | None = None) -> str:
        """The form used in file names: I-Quality for i-quality."""
        return "-".join(part.capitalize() for part in re.split(r"[-\s]+", asked or self.name) if part)

    def column(self, role: TensorRole, facts: ModelFacts) -> ExpertCells | AttentionCells | None:
        """The column that decides a tensor, or None where the base mix does."""
        match role.role:
            case Role.routed_expert:
                return self.routed
            case Role.shared_expert:
                return self.shared
            case Role.dense_ffn:
                # leading dense layers of a MoE are always active like shared experts; a wholly dense model
                # has nothing else to shrink
                return (self.dense or self.shared) if facts.is_moe else self.routed
            case Role.attention:
                return self.attention
            case Role.ssm:
                return self.ssm or self.attention
            case Role.nextn:
                return self.attention
        return None

    def type_of(self, role: TensorRole, facts: ModelFacts, zones: ZoneRule) -> GGMLType | None:
        """The type a tensor's cell asks for, before shape fallbacks; None where the base mix decides.

        Tensors outside any layer (a decoder's relative biases, NextN glue) count as edge.
        """
        column = self.column(role, facts)
        if column is None:
            return None
        if role.layer is None:
            return ggml_type(column.edge)
        if isinstance(column, AttentionCells):
            return ggml_type(getattr(column, zones.attention_zone(role.layer)))
        return ggml_type(getattr(column, zones.expert_zone(role.layer)))


_EXPERT_COLUMNS: Final = ("routed", "shared", "dense")
_COLUMNS: Final = (*_EXPERT_COLUMNS, "attention", "ssm")


def with_cells(tier: Tier, cells: Iterable[str]) -> Tier:
    """The tier with single cells replaced, given as 'routed.middle=IQ3_S'. Raises UsageError."""
    data = tier.model_dump(exclude_none=True)
    changed = False
    for cell in cells:
        found = re.fullmatch(r"(\w+)\.(\w+)=(\w+)", cell.strip())
        if not found:
            raise UsageError(f"cell {cell!r} is not of the form column.zone=TYPE, such as routed.middle=IQ3_S")
        column, zone, kind = found.groups()
        if column not in _COLUMNS:
            raise UsageError(f"no column is called {column!r}.{did_you_mean(column, list(_COLUMNS))}")
        default = {"ssm": data["attention"], "dense": data["shared"]}
        zones = list((ExpertCells if column in _EXPERT_COLUMNS else AttentionCells).model_fields)
        if zone not in zones:
            known = f"column {column} has the zones {', '.join(zones)}"
            raise UsageError(f"no zone is called {zone!r}: {known}.{did_you_mean(zone, zones)}")
        data[column] = {**data.get(column, default.get(column, {})), zone: _type_name(kind)}
        changed = True
    return Tier.model_validate({**data, "name": f"{tier.name}-custom"[:64], "aliases": ()}) if changed else tier


def _validated(data: Any, where: str) -> Tier:
    if isinstance(data, dict) and isinstance(data.get("name"), str):
        where = f"{where}: tier {data['name']!r}"
    try:
        return Tier.model_validate(data)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            key = ".".join(str(part) for part in problem["loc"])
            text = problem["msg"].removeprefix("Value error, ")
            if problem["type"] == "extra_forbidden":
                column = str(problem["loc"][0])
                parent = ExpertCells if column in _EXPERT_COLUMNS else AttentionCells
                known = Tier.model_fields if len(problem["loc"]) == 1 else parent.model_fields
                text = f"is not known.{did_you_mean(str(problem['loc'][-1]), list(known))}"
            problems.append(f"{key}: {text}" if key else text)
        raise InputError(f"{where}: {'; '.join(problems)}", hint="the form is described in docs/tiers.md") from None
    except ApexError as error:
        raise InputError(f"{where}: {error.message}", hint=error.hint) from None


def read_tiers(text: str, where: str) -> tuple[Tier, ...]:
    """Tiers of a TOML text: [[tier]] tables, or one tier at the top level. Raises InputError."""
    try:
        data: dict[str, Any] = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also for numbers of thousands of digits
        raise InputError(f"{where}: not valid TOML: {error}") from None
    rows = data.pop("tier") if isinstance(data.get("tier"), list) else [data]
    if data and rows != [data]:
        raise InputError(f"{where}: {', '.join(data)}: not known beside [[tier]] tables")
    tiers = tuple(_validated(row, where) for row in rows)
    if not tiers:
        raise InputError(f"{where}: no tier in the file")
    return tiers


@functools.cache
def published_tiers() -> tuple[Tier, ...]:
    """The nine distinct published tiers, largest families first."""
    text = resources.files("apex_quant.recipe").joinpath("tiers.toml").read_text(encoding="utf-8")
    return read_tiers(text, "tiers.toml")


def tier_names() -> list[str]:
    """Every name a published tier answers to."""
    return [name for tier in published_tiers() for name in (tier.name, *tier.aliases)]


def find_tier(name: str) -> Tier | None:
    """The published tier of that name, the tier in that .toml file, or None for a stock mix name.

    Raises UsageError with the nearest name when it is neither.
    """
    if name.lower().endswith(".toml"):
        path = Path(name)
        try:
            with path.open("rb") as file:
                raw = file.read(MAX_TIER_BYTES + 1)
            if len(raw) > MAX_TIER_BYTES:
                raise InputError(f"{path}: longer than {MAX_TIER_BYTES >> 20} MiB, not a tier file")
            tiers = read_tiers(raw.decode("utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read: {error}") from None
        if len(tiers) != 1:
            raise InputError(f"{path}: holds {len(tiers)} tiers; a tier file given by name must hold one")
        return tiers[0]
    for tier in published_tiers():
        if name.lower() in (tier.name, *tier.aliases):
            return tier
    try:
        mix_name(name)
    except UsageError:
        known = [*tier_names(), *MIXES, "all"]
        raise UsageError(
            f"no tier or llama.cpp mix is called {name!r}.{did_you_mean(name, known)}",
            hint="`apex tiers` lists them; a tier of your own is a .toml file",
        ) from None
    return None


# The names and order of the lines of the published tier files, by column.
_PUBLISHED_LINES: Final[tuple[tuple[Literal["routed", "shared", "attention"], tuple[str, ...]], ...]] = (
    ("routed", ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")),
    ("shared", ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")),
    (
        "attention",
        (
            "attn_q", "attn_k", "attn_v", "attn_output", "attn_gate", "attn_qkv",
            "ssm_alpha", "ssm_beta", "ssm_out",
        ),
    ),
)  # fmt: skip


def published_lines(tier: Tier, n_layers: int) -> list[tuple[str, GGMLType]]:
    """The lines of the published tier file for a model of `n_layers`: (unanchored pattern, type).

    They reproduce the old files, holes included: what they do not name falls to the base mix, attn_k also hits
    attn_k_b and attn_kv_b, and the zones are the absolute ones at any depth.
    """
    zones = ZoneRule("published", n_layers, expert_edge=5, expert_near=5, attention_edge=3)
    lines = []
    for layer in range(n_layers):
        for column, parts in _PUBLISHED_LINES:
            zone = zones.attention_zone(layer) if column == "attention" else zones.expert_zone(layer)
            kind = ggml_type(getattr(getattr(tier, column), zone))
            lines += [(rf"blk\.{layer}\.{part}", kind) for part in parts]
    return lines
