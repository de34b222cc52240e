"""Where what can be made again is kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """XDG_CACHE_HOME/apex-quant, where absent ~/.cache/apex-quant. Not created."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "apex-quant"  # noqa: PTH117
