"""Cache types by name: pairs of them, their bits, which a llama-server offers, and what the library's log confirms."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from apex_quant.errors import NativeError, ResourceError, UsageError, did_you_mean
from apex_quant.evaluation.programs import said
from apex_quant.evaluation.server import find_server
from apex_quant.evaluation.turbo.codec import TURBO
from apex_quant.gguf.types import CACHE_TYPES, TYPES

STOCK: Final = ("f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
"""What is measured unless told, each for both K and V; f16 is what the others are compared with."""
MIXED: Final = (("q8_0", "q5_1"), ("q8_0", "q4_0"), ("q5_0", "q4_0"))
"""And pairs that spend more on K, whose errors the softmax multiplies."""
BASE: Final = ("f16", "f16")
_ALLOWED = re.compile(r"--cache-type-[kv]\b.*?allowed values:\s*((?:\w+\s*,\s*)*\w+)", re.DOTALL)
_SIZE = re.compile(
    r"(llama_kv_cache|llama_memory_recurrent)\w*: size = +([\d.]+) MiB \( *(\d+) cells, +(\d+) layers.*?\), "
    r"[KR] \((\w+)\): +([\d.]+) MiB, [VS] \((\w+)\): +([\d.]+) MiB"
)
_ROTATION = re.compile(r"attn_rot_([kv]) = (\d+), n_embd_head_k_all = (-?\d+)")


class Pair(NamedTuple):
    """Types of K and V."""

    k: str
    v: str

    @property
    def name(self) -> str:
        return f"{self.k}/{self.v}"

    @property
    def bits(self) -> float:
        """Bits a value, the mean of K and V: where their rows are as long, as in most models."""
        return (bits_of(self.k) + bits_of(self.v)) / 2

    @property
    def turbo(self) -> bool:
        return self.k in TURBO or self.v in TURBO


@dataclass(frozen=True)
class CacheLog:
    """What the library said of a context's caches. `heads`: length of K and V heads, -1 where layers differ, 0 for
    none; `rotated`: whether K and V are rotated before they are quantized, None where the library did not say."""

    k: str
    v: str
    cells: int
    k_mib: float
    v_mib: float
    rotated: tuple[bool | None, bool | None]
    heads: tuple[int, int]


def bits_of(name: str) -> float:
    """Bits a value, scales included: 8.5 for q8_0, 3.125 for turbo3. Raises UsageError for other names."""
    if name in TURBO:
        return TURBO[name].bits_per_value
    if name not in CACHE_TYPES:
        known = [*CACHE_TYPES, *TURBO]
        raise UsageError(f"no cache type is called {name!r}.{did_you_mean(name, known)}", hint=", ".join(known))
    kind = TYPES[name.upper()]
    return 8 * kind.bytes / kind.block


def parse_pair(text: str | Sequence[str]) -> Pair:
    """'q8_0' for both, 'q8_0/q5_1' (or with a colon or +) for K and V; or two names. Raises UsageError."""
    words = [word.strip() for word in re.split(r"[/:+]", text)] if isinstance(text, str) else list(text)
    if not 1 <= len(words) <= 2:
        raise UsageError(f"{text!r} is no pair of cache types: K/V, as q8_0/q5_1")
    for word in words:
        bits_of(word)
    return Pair(words[0], words[-1])


def all_pairs(types: Iterable[str | Sequence[str]], pairs: Iterable[str | Sequence[str]]) -> list[Pair]:
    """What is to be measured, f16 first, each once. Raises UsageError."""
    return list(dict.fromkeys([Pair(*BASE), *map(parse_pair, types), *map(parse_pair, pairs)]))


def stock_pair(pair: Pair) -> Pair:
    """The stock pair with the most bits that takes no more than `pair`; the smallest there is when none does. K never
    has fewer bits than V."""
    names = sorted(STOCK, key=bits_of)
    every = [Pair(k, v) for k in names for v in names if bits_of(k) >= bits_of(v)]
    fits = [one for one in every if one.bits <= pair.bits]
    if fits:
        return max(fits, key=lambda one: (one.bits, -bits_of(one.k)))
    return Pair("q4_0", "q4_0")


# --- what a server has ---


def server_types(text: str) -> tuple[str, ...]:
    """Cache types that the text of `llama-server --help` lists; none where it lists none."""
    found = _ALLOWED.search(text)
    return tuple(word.strip() for word in found[1].split(",")) if found else ()


def offered_types() -> tuple[str, ...]:
    """Cache types of the llama-server of this user (LLAMA_CPP_DIR, PATH); none without one. It is asked for its help
    and never trusted with more: at most 30 s, its output as text."""
    try:
        found = find_server()
    except ResourceError:
        return ()
    if found.kind != "llama-server":
        return ()
    try:
        return server_types(said([*found.command, "--help"]))
    except ResourceError:
        return ()


def require_offered(pairs: Iterable[Pair], offered: Iterable[str] | None = None) -> None:
    """Raises UsageError for turbo types that no llama-server of this user has, naming the stock pair to take instead.
    `offered`: its types, when known."""
    wanted = [pair for pair in pairs if pair.turbo]
    if not wanted:
        return
    known = set(offered_types() if offered is None else offered)
    for pair in wanted:
        missing = next((name for name in pair if name in TURBO and name not in known), None)
        if missing is None:
            continue
        other = stock_pair(pair)
        fits = "" if other.bits <= pair.bits else ", the smallest that stock llama.cpp has"
        raise UsageError(
            f"{pair.name}: {missing} is not in stock llama.cpp, and no llama-server here lists it; {other.name} takes "
            f"{other.bits:g} bits a value{fits}, {pair.name} would take {pair.bits:g}",
            hint=f"`apex kv MODEL --simulate {pair.name}` predicts its damage on this model, without a fork",
        )


# --- what the library did ---


class CacheSize(NamedTuple):
    """A line of the library's log on one cache; of a recurrent one `k` is the convolution's inputs, `v` the states."""

    kind: str
    mib: float
    cells: int
    layers: int
    k: str
    k_mib: float
    v: str
    v_mib: float


def cache_size(line: str) -> CacheSize | None:
    """None for other lines."""
    found = _SIZE.search(line)
    if found is None:
        return None
    kind, mib, cells, layers, k, k_mib, v, v_mib = found.groups()
    return CacheSize(kind, float(mib), int(cells), int(layers), k, float(k_mib), v, float(v_mib))


def read_log(lines: Iterable[str]) -> list[CacheLog]:
    """The caches of one context that attention reads, in the order of their making (a windowed model has two)."""
    sizes: list[CacheSize] = []
    rotations: list[tuple[str, ...]] = []
    for line in lines:
        if (size := cache_size(line)) is not None:
            sizes += [size] if size.kind == "llama_kv_cache" else []
        elif found := _ROTATION.search(line):
            rotations.append(found.groups())
    made = []
    for number, size in enumerate(sizes):
        said = {part: (bool(int(on)), int(head)) for part, on, head in rotations[2 * number : 2 * number + 2]}
        rotated = tuple(said[part][0] if part in said else None for part in "kv")
        heads = tuple(said[part][1] if part in said else -1 for part in "kv")
        made.append(
            CacheLog(size.k, size.v, size.cells, size.k_mib, size.v_mib, (rotated[0], rotated[1]), (heads[0], heads[1]))
        )
    return made


def confirm(pair: Pair, caches: Sequence[CacheLog], name: str) -> None:
    """Raises NativeError where the log names other types than were asked for, or no cache at all."""
    if not caches:
        raise NativeError(f"{name}: the library's log names no cache, so nothing shows that {pair.name} was used")
    for cache in caches:
        if (cache.k.lower(), cache.v.lower()) != (pair.k, pair.v):
            raise NativeError(f"{name}: asked for a cache of {pair.name}, the library made one of {cache.k}/{cache.v}")
