"""What a command prints: for people on a console, for scripts one JSON document."""

from __future__ import annotations

import json
import math
import os
import sys
from typing import Any

from rich.console import Console

_PIPE_WIDTH = 1000  # lines are for tools then, and none is broken


def console_for(as_json: bool = False) -> Console:
    """Where people read: standard output, or standard error when that carries JSON."""
    stream = sys.stderr if as_json else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH
    return Console(file=stream, highlight=False, emoji=False, width=width)


def print_json(document: Any) -> None:
    """The document on standard output, in ASCII, with null for NaN and infinities, which JSON does not have."""
    print(json.dumps(_finite(document), indent=2, ensure_ascii=True, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
