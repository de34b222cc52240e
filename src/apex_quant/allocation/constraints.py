"""What an allocation must keep besides the size: which types, the least for some roles, which tensors go together.

Everything here is data; space.py applies it.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from apex_quant.errors import InputError, UsageError, did_you_mean
from apex_quant.gguf import TYPES, GGMLType, ggml_type
from apex_quant.model import Role

K_TYPES: Final = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K")
IQ_TYPES: Final = ("IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")
DEFAULT_TYPES: Final = tuple(sorted((*K_TYPES, *IQ_TYPES), key=lambda name: -TYPES[name].bpw))
"""All types of blocks of 256 that stock llama.cpp makes well, and Q8_0. Rows that they do not divide get the types
that llama.cpp puts in their place."""

SIBLINGS: Final[Mapping[str, tuple[frozenset[str], ...]]] = {
    # llama.cpp's CUDA backend multiplies gate and up in one kernel when their types are equal
    # (ggml-cuda.cu, ggml_cuda_should_fuse_mul_mat)
    "gate_up": (frozenset({"ffn_gate", "ffn_up"}),),
    "qkv": (frozenset({"attn_q", "attn_k", "attn_v"}), frozenset({"attn_q_a", "attn_kv_a_mqa"})),
    "ffn": (frozenset({"ffn_gate", "ffn_up", "ffn_down"}),),
}
"""Parts of one layer and role that share a type when asked; some engines compute them in one kernel."""

EQUAL: Final = ("gate_up",)
"""Siblings that share a type where nothing is asked. The validation loop may part them then, and says so."""

ROLE_NAMES: Final = tuple(str(role) for role in Role)
MAX_SPEED_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class Constraints:
    """`types`: what tensors may become. `minimum`: role -> the type whose bits a tensor of it has at least. `equal`:
    some of SIBLINGS. `fixed`: tensor name or role -> the type it has to have. `speeds` and `max_slowdown`: a second
    budget (Speeds), as a multiple of the time that the speed table's `reference` type takes throughout.
    """

    types: tuple[str, ...] = DEFAULT_TYPES
    minimum: Mapping[str, str] = field(default_factory=dict)
    equal: tuple[str, ...] = EQUAL
    fixed: Mapping[str, str] = field(default_factory=dict)
    speeds: Speeds | None = None
    max_slowdown: float = 1.0

    def __post_init__(self) -> None:
        for name in (*self.types, *self.minimum.values(), *self.fixed.values()):
            if not ggml_type(name).encodable:
                raise UsageError(f"{name} cannot be encoded")
        if not self.types:
            raise UsageError("no type is allowed")
        for role in self.minimum:
            if role not in ROLE_NAMES:
                raise UsageError(
                    f"no role is called {role!r}.{did_you_mean(role, list(ROLE_NAMES))}",
                    hint="roles are " + ", ".join(ROLE_NAMES),
                )
        for key in self.fixed:
            try:
                re.compile(key)
            except (re.error, RecursionError) as error:
                raise UsageError(f"--fix {key!r} is neither a role nor a pattern: {error}") from None
        for name in self.equal:
            if name not in SIBLINGS:
                raise UsageError(
                    f"no siblings are called {name!r}.{did_you_mean(name, list(SIBLINGS))}",
                    hint="known: " + ", ".join(SIBLINGS),
                )
        if self.speeds is None and self.max_slowdown != 1.0:
            raise UsageError("a slowdown is one of a speed table, and none is given", hint="--speed-aware TABLE.toml")
        if self.speeds is not None and not 0 < self.max_slowdown < 1e6:
            raise UsageError(f"a slowdown of {self.max_slowdown}: give a factor such as 1.05")

    def allowed(self) -> list[GGMLType]:
        """The types, largest first, in the same order in every process."""
        return sorted({ggml_type(name) for name in self.types}, key=lambda kind: (-kind.bpw, kind.name))

    def to_json(self) -> dict[str, object]:
        return {
            "types": list(self.types),
            "minimum": dict(self.minimum),
            "equal": list(self.equal),
            "fixed": dict(self.fixed),
            "speeds": self.speeds.to_json() if self.speeds else None,
            "max_slowdown": self.max_slowdown if self.speeds else None,
        }


@dataclass(frozen=True)
class Speeds:
    """Seconds that generating one token spends for 10^9 weights of a type, measured on one machine.

    Routed experts count with the share of them that a token uses; a token embedding that is only looked up counts
    nothing.
    """

    machine: str
    reference: str
    seconds: Mapping[str, float]

    def of(self, kind: GGMLType) -> float:
        """Raises UsageError for a type that was not measured."""
        found = self.seconds.get(kind.name)
        if found is None:
            raise UsageError(f"the speed table of {self.machine} has no {kind.name}", hint="measure it too")
        return found

    def to_json(self) -> dict[str, object]:
        return {"machine": self.machine, "reference": self.reference, "seconds": dict(self.seconds)}


def read_speeds(path: str | Path) -> Speeds:
    """A speed table: TOML with machine, reference and a table [seconds_per_gigaweight]. Raises InputError."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_SPEED_BYTES + 1)
        if len(raw) > MAX_SPEED_BYTES:
            raise InputError(f"{path}: longer than {MAX_SPEED_BYTES >> 20} MiB, not a speed table")
        data = tomllib.loads(raw.decode("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid TOML: {error}") from None
    rows, machine, reference = (data.get(key) for key in ("seconds_per_gigaweight", "machine", "reference"))
    if not isinstance(rows, dict) or not isinstance(machine, str) or not isinstance(reference, str):
        raise InputError(f"{path}: a speed table has machine, reference and [seconds_per_gigaweight]")
    found: dict[str, float] = {}
    for name, value in rows.items():
        if name.upper() not in TYPES or isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{path}: {name[:40]!r} = {str(value)[:40]} is not a type and its seconds")
        if not 0 < value < 1e6:
            raise InputError(f"{path}: {name}: {value} seconds")
        found[name.upper()] = float(value)
    if reference.upper() not in found:
        raise InputError(f"{path}: the reference type {reference[:40]!r} is not in the table")
    return Speeds(machine, reference.upper(), found)


def minimums(words: list[str] | tuple[str, ...]) -> dict[str, str]:
    """['attention=Q4_K', ...] as a mapping. Raises UsageError."""
    found = {}
    for word in words:
        key, equals, kind = word.partition("=")
        if not equals or not key or not kind:
            raise UsageError(f"{word!r} is not of the form ROLE=TYPE, such as attention=Q4_K")
        found[key] = ggml_type(kind).name
    return found


def as_types(names: str | list[str] | tuple[str, ...] | None) -> tuple[str, ...]:
    """'q8_0,q6_k' or a list to type names, None to the default ones. Raises UsageError."""
    if names is None:
        return DEFAULT_TYPES
    words = names.split(",") if isinstance(names, str) else [part for name in names for part in name.split(",")]
    return tuple(dict.fromkeys(ggml_type(word.strip()).name for word in words if word.strip()))
