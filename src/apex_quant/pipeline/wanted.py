"""The files a run is to make: tiers, llama.cpp mixes and sizes, by the name that they have in the state."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from apex_quant.encode.tasks import uses_importance
from apex_quant.errors import ApexError, UsageError, did_you_mean
from apex_quant.pipeline.config import RunConfig
from apex_quant.recipe.mixes import MIXES, mix_name
from apex_quant.recipe.planned import PlanOptions
from apex_quant.recipe.tiers import Tier, find_tier, tier_names
from apex_quant.sizes import parse_size

_FIELDS: Final = {field.name for field in fields(PlanOptions)}


@dataclass(frozen=True)
class Wanted:
    """One output. `asked` is what plan() and quantize() take, None for a size; `weighted`: it is encoded with the
    importance matrix; `parameters` decide its recipe."""

    name: str
    asked: str | None
    size: int | None
    weighted: bool
    parameters: dict[str, Any]


def wanted(config: RunConfig) -> list[Wanted]:
    """All outputs, each name once. Raises UsageError or InputError for tier files that cannot be used."""
    found = [_tier(config, name) for name in config.wanted_tiers]
    found += [_size(config, size) for size in config.sizes]
    ceilings(config, found)
    names = [one.name for one in found]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two of the tiers are called {name}", hint="give one of them another name")
    return found


def ceilings(config: RunConfig, outputs: Sequence[Wanted]) -> dict[str, float]:
    """The user's highest mean KLD by the name of an output. A key is a name as `tiers` and `sizes` take it, in any
    case; one that this run does not make is allowed.

    Raises UsageError for a key that is no tier, mix or size, and for an output with two.
    """
    ours = {one.name.lower(): one.name for one in outputs}
    ours |= {found: one.name for one in outputs if (found := _proper_name(one.name)) is not None}
    limits: dict[str, float] = {}
    for key, value in config.verify.kld_ceiling.items():
        proper = _proper_name(key)
        name = ours.get(key.lower()) or ours.get(proper or "", proper)
        if name is None:
            known = [*ours.values(), *tier_names(), *MIXES]
            raise UsageError(
                f"verify.kld_ceiling: no tier or size is called {key!r}.{did_you_mean(key, known)}",
                hint=f"this run makes {', '.join(one.name for one in outputs)}",
            )
        if name in limits:
            raise UsageError(f"verify.kld_ceiling: {name} has two ceilings, {limits[name]:g} and {value:g}")
        limits[name] = value
    return limits


def _proper_name(name: str) -> str | None:
    """What a tier, mix or size of that name is called here; None for another word, such as a tier of the user's own."""
    with suppress(ApexError):
        tier = find_tier(name)
        return mix_name(name) if tier is None else tier.name
    with suppress(UsageError):
        return size_name(parse_size(name))
    return None


def needing_importance(config: RunConfig) -> bool:
    """Whether any output is encoded with an importance matrix."""
    return any(one.weighted for one in wanted(config))


def plan_options(config: RunConfig, **more: Any) -> PlanOptions:
    """What the configuration asks of every plan."""
    given = config.quantize
    values = {name: getattr(given, name) for name in _FIELDS if hasattr(given, name)}
    return PlanOptions(**{**values, "split_max_size": given.split, **more})


def _decides(config: RunConfig, *, weighted: bool) -> dict[str, Any]:
    """The keys of `quantize` that are not at their defaults; how many threads encode decides nothing, nor how a matrix
    is filled where none is used."""
    default = type(config.quantize)().model_dump(mode="json", exclude={"threads"})
    given = config.quantize.model_dump(mode="json", exclude={"threads"})
    del given["fill"]
    fill = {"fill": config.quantize.fill} if weighted else {}
    return {**fill, **{key: value for key, value in given.items() if value != default[key]}}


def _tier(config: RunConfig, asked: str) -> Wanted:
    tier: Tier | None = find_tier(asked)
    if tier is None:
        mix = mix_name(asked)
        weighted = uses_importance(MIXES[mix].default)
        return Wanted(mix, asked, None, weighted, {"mix": mix, **_decides(config, weighted=weighted)})
    own = asked.lower().endswith(".toml")
    name = tier.name if own else asked.lower()
    table = tier.model_dump(mode="json", exclude_none=True, exclude={"summary", "aliases"})
    path = str(Path(asked)) if own else asked
    weighted = tier.importance != "none"
    return Wanted(name, path, None, weighted, {"tier": table, **_decides(config, weighted=weighted)})


def size_name(size: int) -> str:
    return f"{size / 1e9:.9g}GB" if size >= 10**8 else f"{size / 1e6:.9g}MB"


def _size(config: RunConfig, size: int) -> Wanted:
    given = config.optimize
    about = {"tokens": given.tokens, "types": list(given.types)}
    return Wanted(size_name(size), None, size, True, {"size": size, **about, **_decides(config, weighted=True)})
