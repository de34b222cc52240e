"""Our version and the one native dependency: what it is called and the only release we work with."""

from __future__ import annotations

from typing import Final

VERSION: Final = "0.1.0"
LIBRARY: Final = "llama-cpp-python"
LIBRARY_VERSION: Final = "0.3.36"
"""Equal to the pin in pyproject.toml (tested): struct layouts move between releases, and a mismatch corrupts memory."""
