"""What is disturbed together, and in which types: tables, and the list of probes that they come to."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

from apex_quant.errors import UsageError
from apex_quant.gguf import TYPES, GGMLType, GGUFModel, ggml_type
from apex_quant.gguf.header import TensorInfo
from apex_quant.model import Role, classify
from apex_quant.model.facts import facts
from apex_quant.recipe.stock_rules import kept_because

KEYS: Final = ("role", "part", "layer", "tensor")
DEFAULT_GROUPS: Final = "tensor"

CANDIDATES: Final = (
    "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "IQ4_XS", "IQ4_NL", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS",
    "IQ2_XXS", "IQ1_M", "IQ1_S", "Q5_1", "Q5_0", "Q4_1", "Q4_0",
)  # fmt: skip
"""Types whose errors are tabled: all that llama-quantize's mixes use, and their fallbacks."""

PROBES: Final = ("Q3_K",)
"""Types of every group's probes."""

SECOND: Final[tuple[tuple[str, tuple[str, ...]], ...]] = ((r"^attn_(v|qkv|kv)", ("Q2_K",)),)
"""Further types by part, first match: where the shape of the error changes between types."""

LADDER: Final = ("Q6_K", "Q5_K", "IQ4_XS", "Q3_K", "IQ3_XXS", "IQ2_S", "IQ2_XXS", "IQ1_S")
"""Joint probes walk over these: every tensor in one of them or of its neighbours, drawn at random."""

FAST: Final = ("Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K")
"""What routed experts of a large model walk over instead, as far up or down: IQ types of four bits and fewer take many
times as long to encode, and how costs combine is learned from errors, whatever type they are of."""

FAST_ABOVE: Final = 5_000_000_000
"""Weights of the routed experts of a large model."""

SPREADS: Final = (0.7, 0.2, 1.4)
"""How unevenly: standard deviation in steps, of parts around the level and of tensors around their part, in turns."""

JOINT: Final = 12


@dataclass(frozen=True)
class GroupPlan:
    """Tensors to be disturbed together."""

    name: str
    tensors: tuple[str, ...]
    role: str
    part: str
    layer: int | None


@dataclass(frozen=True)
class ProbePlan:
    """One decode of the text: `types` by tensor. `group` is its name, or that of a joint probe."""

    group: str
    kind: str  # the type asked for; "" in joint probes
    types: dict[str, str]
    joint: bool = False
    noise: bool = False

    @property
    def key(self) -> str:
        return f"{'joint' if self.joint else 'group'}|{self.group}|{self.kind}{'|noise' if self.noise else ''}"

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "key": self.key}


def quantizable(model: GGUFModel) -> dict[str, TensorInfo]:
    """Tensors that llama-quantize would quantize and whose rows have room for blocks, in file order."""
    return {
        name: info
        for name, info in model.tensors.items()
        if kept_because(name, info.shape, model.architecture) is None and info.shape[0] % 32 == 0
    }


def make_groups(model: GGUFModel, by: str, names: Collection[str]) -> list[GroupPlan]:
    """`by`: 'tensor', or some of role, part and layer with commas: 'role,layer'. Raises UsageError.

    Tensors outside layers (embedding, output) stay alone unless grouped by nothing but role.
    """
    keys = [word.strip() for word in by.split(",")]
    if not keys or any(key not in KEYS for key in keys) or len(set(keys)) != len(keys):
        raise UsageError(f"--groups {by!r}: write tensor, or some of role,part,layer", hint="--groups role,layer")
    if keys == ["layer"]:
        raise UsageError("groups of whole layers say nothing about types", hint="--groups role,layer")
    trunk = facts(model).trunk_layers
    groups: dict[str, list[str]] = {}
    about: dict[str, tuple[str, str, int | None]] = {}
    for name in names:
        role = classify(name, model.tensors[name].shape, model.architecture, trunk_layers=trunk)
        if role.role is Role.projector:
            continue
        values = {"role": role.role.value, "part": role.part, "layer": str(role.layer), "tensor": name}
        alone = role.layer is None or "tensor" in keys
        key = name if alone else " ".join(f"{k} {values[k]}" if k == "layer" else values[k] for k in keys)
        groups.setdefault(key, []).append(name)
        parts = role.part if alone or "part" in keys else ""
        about[key] = (role.role.value, parts, role.layer if alone or "layer" in keys else None)
    return [GroupPlan(key, tuple(members), *about[key]) for key, members in groups.items()]


def usable_types(info: TensorInfo, types: Sequence[str], *, importance: bool) -> list[GGMLType]:
    """Those of `types` that rows of this tensor can hold, with or without importance."""
    found = [ggml_type(name) for name in types]
    return [t for t in found if info.shape[0] % t.block == 0 and (importance or t.imatrix != "needed")]


def fitting(kind: str, info: TensorInfo, *, importance: bool) -> str | None:
    """The type that this tensor really gets when `kind` is asked for: llama.cpp's fallbacks, and where importance is
    lacking a type of as many bits that does without."""
    found = ggml_type(kind)
    if found.imatrix == "needed" and not importance:
        found = min((TYPES[n] for n in ("Q2_K", "Q3_K", "Q4_K")), key=lambda t: abs(t.bpw - found.bpw))
    while info.shape[0] % found.block:
        if found.fallback is None:
            return None
        found = ggml_type(found.fallback)
    return found.name


def single_probes(
    model: GGUFModel,
    groups: Sequence[GroupPlan],
    types: Sequence[str],
    with_importance: Collection[str],
    *,
    noise: bool,
) -> list[ProbePlan]:
    """Probes of single groups: the first type of all, in an order that covers all depths early, then second types."""
    first: list[ProbePlan] = []
    later: list[ProbePlan] = []
    for group in spread_out(groups):
        second = next((more for pattern, more in SECOND if re.search(pattern, group.part)), ())
        for number, kind in enumerate(dict.fromkeys((*types, *second))):
            chosen = {
                name: fit
                for name in group.tensors
                if (fit := fitting(kind, model.tensors[name], importance=name in with_importance)) is not None
            }
            if chosen:
                (later if number else first).append(ProbePlan(group.name, kind, chosen, noise=noise))
    unique = {(probe.group, tuple(probe.types.items())): probe for probe in reversed([*first, *later])}
    return list(reversed(unique.values()))


def spread_out(groups: Sequence[GroupPlan]) -> list[GroupPlan]:
    """Groups in rounds: one of each role and part, from the middle of the model, then a second of each, far from the
    first, and so on, so that a run that is cut short can be filled in from what is alike. Embeddings, which stand for
    nothing else, end the first round."""
    alike: dict[tuple[str, str], list[GroupPlan]] = {}
    for group in sorted(groups, key=lambda group: (group.layer is None, group.layer or 0)):
        alike.setdefault((group.role, group.part), []).append(group)
    rounds = [[members[place] for place in _halving(len(members))] for members in alike.values()]
    return [one for several in itertools.zip_longest(*rounds) for one in several if one is not None]


def _halving(count: int) -> list[int]:
    """0 to count - 1: the middle, the middles of both halves, of the quarters, ..."""
    order, spans = [], [(0, count)]
    for first, last in spans:
        if first < last:
            middle = (first + last) // 2
            order.append(middle)
            spans += [(first, middle), (middle + 1, last)]
    return order


def experts_ladder(model: GGUFModel, names: Sequence[str]) -> tuple[str, ...]:
    """The types that routed experts among `names` walk over in joint probes."""
    weights = sum(model.tensors[name].n_elements for name in names if _is_expert(model, name))
    return FAST if weights > FAST_ABOVE else LADDER


def _is_expert(model: GGUFModel, name: str) -> bool:
    return classify(name, model.tensors[name].shape, model.architecture).role is Role.routed_expert


def joint_probes(
    model: GGUFModel, names: Sequence[str], count: int, with_importance: Collection[str], seed: int
) -> list[ProbePlan]:
    """`count` random recipes from many bits to few. A level is a step of the ladder; each part (attn_v, ffn_down, ...)
    lies above or below it by chance, and each tensor above or below its part: a little in some probes, by several steps
    in others, since even and uneven recipes of one size differ by how costs combine. Experts have experts_ladder()."""
    draw = random.Random(f"joint:{seed}")
    parts = {name: classify(name, model.tensors[name].shape, model.architecture).part for name in names}
    fast = experts_ladder(model, names)
    ladders = {name: fast if _is_expert(model, name) else LADDER for name in names}
    probes = []
    for number in range(count):
        level = (len(LADDER) - 1) * (number + 0.5) / max(count, 1)
        types = {}
        spread = SPREADS[number % len(SPREADS)]
        shift = {part: draw.gauss(0, spread) for part in sorted(set(parts.values()))}
        for name in names:
            ladder, place = ladders[name], level + shift[parts[name]] + draw.gauss(0, spread)
            share = min(max(place / (len(LADDER) - 1), 0.0), 1.0)  # of the way down
            fit = fitting(
                ladder[round(share * (len(ladder) - 1))], model.tensors[name], importance=name in with_importance
            )
            if fit is not None:
                types[name] = fit
        probes.append(ProbePlan(f"joint {number}", "", types, joint=True))
    # the middle of the ladder first: a run that is cut short has learned most from it
    return sorted(probes, key=lambda probe: abs(int(probe.group.split()[1]) - count // 2))
