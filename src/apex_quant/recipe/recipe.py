"""A recipe: which type each tensor gets, as an ordered map, and its text, JSON and GGUF forms.

The text form is llama-quantize's --tensor-type-file: white-space separated PATTERN=TYPE, where PATTERN is an
unanchored regular expression in lower case and the first match wins. We write anchored lines, so that reading a
recipe back, here or in llama.cpp, names exactly the tensors it was made for.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from apex_quant.errors import InputError, UsageError
from apex_quant.gguf import GGMLType, GGUFModel, ggml_type
from apex_quant.recipe.mixes import Override, compile_pattern

MAX_RECIPE_BYTES = 16 << 20
MAX_LINE = 8192
MAX_RECIPE_LINES = 100_000  # as many as a file may have tensors
MAX_SEARCHES = 1 << 23
"""Patterns times names: bounds the time a recipe may take to seconds."""

_WORD = re.compile(r"[^ \t\n\v\f\r]+")  # white space as C's isspace has it, not Unicode's
_LOWER = str.maketrans({chr(upper): chr(upper + 32) for upper in range(ord("A"), ord("Z") + 1)})


@dataclass(frozen=True)
class Recipe:
    """Types of the tensors that are quantized (`types`, in file order) on top of a llama-quantize mix (`base`)."""

    base: str
    types: Mapping[str, GGMLType]

    def text(self) -> str:
        """The tensor-type file, one anchored line a tensor, ending in a newline."""
        return "".join(f"{anchored(name)}={kind.name}\n" for name, kind in self.types.items())

    def overrides(self) -> list[Override]:
        """The same as (pattern, type) pairs, as llama_model_quantize_params.tt_overrides takes them."""
        return [(anchored(name), kind) for name, kind in self.types.items()]

    def to_json(self) -> dict[str, object]:
        return {"base": self.base, "types": {name: kind.name for name, kind in self.types.items()}}

    @property
    def sha256(self) -> str:
        """Hash of base and text: equal recipes have equal hashes, whatever file they were read from."""
        return hashlib.sha256(f"{self.base}\n{self.text()}".encode()).hexdigest()


def _escape(name: str) -> str:
    # what is special in a pattern, and as \xHH what the text form would lower-case, split at or cut off
    escaped = re.sub(r"([\\^$.|?*+()\[\]{}])", r"\\\1", name)
    return re.sub(r"[A-Z =]", lambda found: f"\\x{ord(found[0]):02x}", escaped)


def anchored(name: str) -> str:
    """The pattern that matches this tensor and no other, the same in upper and lower case."""
    return f"^{_escape(name)}$"


def parse_override(text: str, *, lower: bool) -> Override:
    """'PATTERN=TYPE' to a checked (pattern, type). `lower` lower-cases the pattern as the command line tool does."""
    if len(text) > MAX_LINE:
        raise UsageError(f"'{text[:100]}...' is longer than {MAX_LINE} characters")
    pattern, separator, kind = text.partition("=")
    if not separator or not pattern or not kind:
        raise UsageError(f"{text!r} is not of the form PATTERN=TYPE, such as 'blk\\.3\\.ffn_up=Q5_K'")
    found = ggml_type(kind)
    if not found.encodable:
        raise UsageError(f"{found.name} cannot be encoded ({text})")
    pattern = pattern.translate(_LOWER) if lower else pattern
    compile_pattern(pattern)
    return pattern, found


def parse_recipe(text: str, where: str) -> list[Override]:
    """A recipe in either form (JSON when it starts with a brace) to overrides. Raises InputError naming `where`."""
    try:
        if text.lstrip().startswith("{"):
            return _from_json(text)
        words = _WORD.findall(text)
        if len(words) > MAX_RECIPE_LINES:
            raise UsageError(f"{len(words)} lines, at most {MAX_RECIPE_LINES} are allowed")
        return [parse_override(word, lower=True) for word in words]
    except UsageError as error:
        raise InputError(f"{where}: {error.message}", hint=error.hint) from None


def _from_json(text: str) -> list[Override]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also for numbers of thousands of digits
        raise UsageError(f"not valid JSON: {error}") from None
    types = data.get("types") if isinstance(data, dict) else None
    if not isinstance(types, dict) or not all(isinstance(kind, str) for kind in types.values()):
        raise UsageError('a recipe in JSON is {"base": MIX, "types": {TENSOR: TYPE, ...}}')
    if len(types) > MAX_RECIPE_LINES:
        raise UsageError(f"{len(types)} types, at most {MAX_RECIPE_LINES} are allowed")
    return [parse_override(f"{anchored(name)}={kind}", lower=False) for name, kind in types.items()]


def read_recipe(path: Path) -> list[Override]:
    """The overrides of a recipe file. Raises InputError."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_RECIPE_BYTES + 1)
        if len(raw) > MAX_RECIPE_BYTES:
            raise InputError(f"{path}: longer than {MAX_RECIPE_BYTES >> 20} MiB, not a recipe")
        text = raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    overrides = parse_recipe(text, str(path))
    if not overrides:
        raise InputError(f"{path}: holds no PATTERN=TYPE line")
    return overrides


def recipe_of(model: GGUFModel) -> dict[str, GGMLType]:
    """The types of every tensor of a file: 'the same types as this GGUF'."""
    return {name: info.type for name, info in model.tensors.items()}


def match_overrides(overrides: Sequence[Override], names: Iterable[str]) -> dict[str, GGMLType]:
    """First match wins, unanchored: the type each name is given, for the names that any pattern hits."""
    return {name: overrides[place][1] for name, place in first_matches(overrides, names).items()}


def first_matches(overrides: Sequence[Override], names: Iterable[str]) -> dict[str, int]:
    """For every name that any pattern hits, the place of the first that does. Raises UsageError beyond MAX_SEARCHES."""
    exact = {anchored(name): name for name in names}
    places: dict[str, int] = {}  # of the lines we write ourselves, which need no search
    searched: dict[str, int] = {}
    for place, (pattern, _) in enumerate(overrides):
        if pattern in exact:
            places.setdefault(exact[pattern], place)
        else:
            searched.setdefault(pattern, place)
    if len(searched) * len(exact) > MAX_SEARCHES:
        raise UsageError(f"{len(searched)} patterns for {len(exact)} tensors are too many to search")
    patterns = [(compile_pattern(pattern), place) for pattern, place in searched.items()]
    found = {}
    for name in exact.values():
        limit = places.get(name, len(overrides))
        hit = next((place for pattern, place in patterns if place < limit and pattern.search(name)), limit)
        if hit < len(overrides):
            found[name] = hit
    return found
