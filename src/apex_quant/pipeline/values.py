"""Kinds of values in a configuration: each takes what people write, and says what it may have been of the rest."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from pydantic import BeforeValidator

from apex_quant.errors import ApexError, UsageError, did_you_mean
from apex_quant.hub import BASELINE, HUB_ID
from apex_quant.recipe.tiers import find_tier
from apex_quant.sizes import parse_count, parse_size
from apex_quant.text import parse_mix

SOURCE_ID: Final = re.compile(rf"(?!.*\.(gguf|ya?ml)$){HUB_ID.pattern}", re.ASCII | re.IGNORECASE)
"""A source that is downloaded, unless there is such a folder."""
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+-]{0,127}")


def checked(check: Callable[[Any], Any]) -> BeforeValidator:
    """A validator whose UsageError becomes part of the answer, with the key that it is about."""

    def run(value: Any) -> Any:
        try:
            return check(value)
        except ApexError as error:
            raise ValueError(error.message + (f" ({error.hint})" if error.hint else "")) from None

    return BeforeValidator(run)


def listed(value: Any) -> Any:
    """One word, words with commas between, or a list: a list."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, list) else value


def wrapped(value: Any) -> Any:
    """One value or a list of them, for values that may hold commas."""
    return (value,) if isinstance(value, str | int) and not isinstance(value, bool) else sequence(value)


def sequence(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def as_size(value: Any) -> Any:
    return parse_size(value) if isinstance(value, str) else value


def as_count(value: Any) -> Any:
    return parse_count(value) if isinstance(value, str) else value


def choices(known: Sequence[str], what: str, elsewhere: Mapping[str, str] | None = None) -> Callable[[Any], Any]:
    """One of the words known; `elsewhere`: what others call them."""

    def check(value: Any) -> Any:
        if isinstance(value, str) and value not in known:
            if elsewhere and value in elsewhere:
                raise UsageError(f"{value!r} is no {what}: it is called {elsewhere[value]} here")
            raise UsageError(f"{value!r} is no {what}.{did_you_mean(value, list(known))} Known: {', '.join(known)}")
        return value

    return check


def known_tier(value: Any) -> Any:
    # a file of the user's own is read by the phase that needs it: it may lie on another disk by then
    if isinstance(value, str) and value != "all" and not value.lower().endswith(".toml"):
        find_tier(value)
    return value


def known_mix(value: Any) -> Any:
    if isinstance(value, str):
        parse_mix(value)
    return value


def as_baseline(value: Any) -> Any:
    """repo:pattern:label, or the same as a mapping."""
    if isinstance(value, Mapping):
        if unknown := [key for key in value if key not in ("repo", "revision", "pattern", "label")]:
            near = did_you_mean(str(unknown[0]), ["repo", "revision", "pattern", "label"])
            raise UsageError(f"{unknown[0]!r} is no key of a baseline.{near} Known: repo, revision, pattern, label")
        if not all(isinstance(part, str) for part in value.values()) or not {"repo", "pattern"} <= value.keys():
            raise UsageError("a baseline needs repo and pattern, both text")
        revision = f"@{value['revision']}" if "revision" in value else ""
        value = f"{value['repo']}{revision}:{value['pattern']}" + (f":{value['label']}" if "label" in value else "")
    if isinstance(value, str) and not BASELINE.fullmatch(value):
        raise UsageError(f"{value!r} is not REPO[@REVISION]:PATTERN[:LABEL], such as ORG/X-GGUF:*-Q4_K_M*:theirs")
    return value


def matching(pattern: re.Pattern[str], what: str) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if isinstance(value, str) and not pattern.fullmatch(value):
            raise UsageError(f"{value!r} is not {what}")
        return value

    return check
