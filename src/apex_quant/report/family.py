"""Families of files, which plots give a colour and a marker of their own: who made them, told from their names."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from apex_quant.errors import UsageError
from apex_quant.report.labels import printable

OURS: Final = "APEX"
REFERENCE: Final = "reference"
OTHERS: Final = "other files"

_APEX_NAME = re.compile(r"(?:^|[-_. ])APEX(?:[-_. ]|$)", re.I | re.ASCII)
_STARTS = re.compile(r"(?:^|(?<=[-_./ ]))(?=[^-_./ ])", re.ASCII)
_MOST = 64


class Family(NamedTuple):
    """`pattern` is a glob, matched without case from the start of a file's name or of a part of it."""

    name: str
    pattern: str


def parse_families(texts: Sequence[str]) -> list[Family]:
    """'Unsloth=UD-*' and the like. Raises UsageError for other forms and for more than 64."""
    if len(texts) > _MOST:
        raise UsageError(f"{len(texts)} families, at most {_MOST}")
    made = []
    for text in texts:
        name, equals, pattern = text.partition("=")
        if not equals or not name.strip() or not pattern.strip():
            raise UsageError(f"{text!r} is not of the form NAME=GLOB, such as 'Unsloth=UD-*'")
        if len(pattern) > 200:
            raise UsageError(f"the pattern of family {name.strip()[:40]!r} is longer than 200 characters")
        made.append(Family(printable(name)[:60], pattern.strip()))
    return made


def family_of(name: str, model: Mapping[str, Any], families: Sequence[Family], *, is_reference: bool = False) -> str:
    """The family of the file called `name`; `model` is what its results say of it. The first of `families` that fits
    wins, then what an import says ("family"), then ours, told by a tier of apex or by the name."""
    for family in families:
        if matches(name, family.pattern):
            return family.name
    if is_reference:
        return REFERENCE
    said = model.get("family")
    if isinstance(said, str) and said.strip():
        return printable(said)[:60] or OTHERS
    if model.get("tier") or model.get("recipe_sha256") or _APEX_NAME.search(name):
        return OURS
    return OTHERS


def matches(name: str, pattern: str) -> bool:
    """Whether the glob fits the name (without folder and .gguf), or what follows one of its separators."""
    stem = name.replace("\\", "/").rpartition("/")[2].removesuffix(".gguf")[:500].lower()
    # translate() turns "**" into one star, so that the time stays bounded by name times pattern
    fits = re.compile(fnmatch.translate(re.sub(r"\*+", "*", pattern.lower().removesuffix(".gguf"))))
    return any(fits.match(stem, found.start()) is not None for found in _STARTS.finditer(stem))
