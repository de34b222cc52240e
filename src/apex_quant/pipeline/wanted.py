"""The files a run is to make: tiers, llama.cpp mixes and sizes, by the name that they have in the state."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from apex_quant.encode.tasks import uses_importance
from apex_quant.errors import UsageError
from apex_quant.pipeline.config import RunConfig
from apex_quant.recipe.mixes import MIXES, mix_name
from apex_quant.recipe.planned import PlanOptions
from apex_quant.recipe.tiers import Tier, find_tier

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
    names = [one.name for one in found]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two of the tiers are called {name}", hint="give one of them another name")
    return found


def needing_importance(config: RunConfig) -> bool:
    """Whether any output is encoded with an importance matrix."""
    return any(one.weighted for one in wanted(config))


def plan_options(config: RunConfig, **more: Any) -> PlanOptions:
    """What the configuration asks of every plan."""
    given = config.quantize
    values = {name: getattr(given, name) for name in _FIELDS if hasattr(given, name)}
    return PlanOptions(**{**values, "split_max_size": given.split, **more})


def _decides(config: RunConfig) -> dict[str, Any]:
    """The keys of `quantize` that are not at their defaults; how many threads encode decides nothing."""
    default = type(config.quantize)().model_dump(mode="json", exclude={"threads"})
    given = config.quantize.model_dump(mode="json", exclude={"threads"})
    return {key: value for key, value in given.items() if value != default[key] or key == "fill"}


def _tier(config: RunConfig, asked: str) -> Wanted:
    tier: Tier | None = find_tier(asked)
    if tier is None:
        mix = mix_name(asked)
        return Wanted(mix, asked, None, uses_importance(MIXES[mix].default), {"mix": mix, **_decides(config)})
    own = asked.lower().endswith(".toml")
    name = tier.name if own else asked.lower()
    table = tier.model_dump(mode="json", exclude_none=True, exclude={"summary", "aliases"})
    path = str(Path(asked)) if own else asked
    return Wanted(name, path, None, tier.importance != "none", {"tier": table, **_decides(config)})


def _size(config: RunConfig, size: int) -> Wanted:
    given = config.optimize
    about = {"tokens": given.tokens, "types": list(given.types)}
    name = f"{size / 1e9:.9g}GB" if size >= 10**8 else f"{size / 1e6:.9g}MB"
    return Wanted(name, None, size, True, {"size": size, **about, **_decides(config)})
