"""Sizes, counts and contexts as people write them: '16GiB', '500M' bytes; '50k', '1.5M' tokens; a context of '32k'."""

from __future__ import annotations

import re
from typing import Final

from apex_quant.errors import UsageError

_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE | re.ASCII)
_CONTEXT: Final = re.compile(r"(\d{1,12})([km]?)", re.IGNORECASE | re.ASCII)
_COUNT: Final = re.compile(r"(\d+(?:\.\d+)?)([km]?)", re.IGNORECASE | re.ASCII)


def parse_size(text: str) -> int:
    """'16GiB', '48G', '500M', '1234' to bytes; i means powers of 1024, else of 1000. Raises UsageError."""
    found = _SIZE.fullmatch(text.strip())
    size = float(found[1]) * (1024 if found[3] else 1000) ** " kmgt".index(found[2].lower() or " ") if found else 0
    if not 0 < size < 1 << 62:
        raise UsageError(f"{text!r} is not a size; write 16GiB, 48G or 500M")
    return int(size)


def parse_memory(text: str) -> int:
    """As parse_size(), and '0' and 'none' for no such memory. Raises UsageError."""
    return 0 if text.strip() in ("0", "none") else parse_size(text)


def parse_count(text: str) -> int:
    """'50k', '1.5M', '8192' to a number. Raises UsageError."""
    found = _COUNT.fullmatch(text.strip())
    number = float(found[1]) * {"": 1, "k": 1_000, "m": 1_000_000}[found[2].lower()] if found else 0
    if not 1 <= number < 1 << 40:
        raise UsageError(f"{text!r} is not a number of tokens; write 50k or 8192")
    return int(number)


def parse_ctx(text: str) -> int:
    """'32k' to 32768, '40000' to 40000; k is 1024 and m its square, as contexts are named. Raises UsageError."""
    found = _CONTEXT.fullmatch(text.strip())
    tokens = int(found[1]) * 1024 ** " km".index(found[2].lower() or " ") if found else 0
    if not 0 < tokens < 1 << 31:
        raise UsageError(f"{text!r} is not a context; write 32k or 40000")
    return tokens
