"""Data sets that come with the package: published results of others, each with its source in the file."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Final

from apex_quant.errors import UsageError, did_you_mean

EXAMPLE: Final = "example:"
"""How a place names one: example:qwen3.5-35b-a3b."""

EXAMPLES: Final = ("qwen3.5-35b-a3b",)


def example(name: str) -> Path:
    """The file of an example data set; give it to gather() or import_results(). Raises UsageError for other names."""
    if name not in EXAMPLES:
        raise UsageError(
            f"no example is called {name!r}.{did_you_mean(name, list(EXAMPLES))}", hint=f"known: {', '.join(EXAMPLES)}"
        )
    return Path(str(resources.files("apex_quant.report") / "data" / f"{name}.csv"))
