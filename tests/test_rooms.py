"""The house's rooms import downwards only, and only what this table allows (docs/decisions/0009-rooms.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import apex_quant

SOURCES = Path(apex_quant.__file__).parent

# for everybody: errors, the version, sizes in words, where the shipped data lies, the cache folder, other Pythons
COMMON = {"errors", "version", "sizes", "data", "cache", "other_python"}

MAY: dict[str, str] = {
    "gguf": "",
    "model": "gguf",
    "native": "gguf",
    "hub_access": "",
    "importance": "gguf model",
    "text": "gguf hub_access",
    "recipe": "gguf model importance",
    "runtime": "gguf native",
    "calibration": "gguf model importance recipe native runtime text",
    "encode": "gguf model recipe importance native",
    "evaluation": "gguf model native runtime text hub_access",
    "allocation": "gguf model recipe importance native encode runtime evaluation text",
    "report": "gguf model recipe evaluation",
    "doctor": "native",
    "serving": "gguf model recipe native runtime evaluation text doctor",
    "checkpoint": "",
    "hub": "gguf hub_access",
    "hub_checkpoint": "checkpoint hub",
    "converter_source": "",
    "converter_python": "converter_source",
    "converter_child": "",
    "convert": "gguf checkpoint converter_python converter_source hub hub_checkpoint",
    "publishable": "gguf model recipe encode",
    "publish": "gguf model recipe encode hub hub_access publishable",
    "mlx": "gguf model recipe checkpoint hub hub_checkpoint",
    "pipeline": "gguf model recipe importance native text runtime calibration encode evaluation allocation report "
    "hub hub_access hub_checkpoint checkpoint convert converter_python converter_source publish publishable",
}
"""Room or module -> what it may import besides COMMON. `cli` and the package's own surface may import everything."""


def _room(path: Path) -> str:
    inside = path.relative_to(SOURCES)
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


def _imports(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "apex_quant":
            rest = node.module.split(".")[1:]
            yield from ((name, node.lineno) for name in (rest[:1] or [alias.name for alias in node.names]))
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            yield from ((parts[1], node.lineno) for parts in names if parts[0] == "apex_quant" and len(parts) > 1)


@pytest.mark.parametrize("room", sorted(MAY))
def test_a_room_imports_what_it_may(room: str) -> None:
    allowed = {*MAY[room].split(), *COMMON, room}
    files = [path for path in SOURCES.rglob("*.py") if _room(path) == room]
    assert files, f"the table names {room}, which does not exist"
    wrong = [
        f"{path.relative_to(SOURCES)}:{line} imports {name}"
        for path in files
        for name, line in _imports(path)
        if name not in allowed
    ]
    assert not wrong


def test_every_room_is_in_the_table() -> None:
    known = {*MAY, *COMMON, "cli", "__init__", "__main__"}
    assert {_room(path) for path in SOURCES.rglob("*.py")} <= known


def test_there_is_an_order_of_rooms() -> None:
    list(TopologicalSorter({room: set(allowed.split()) for room, allowed in MAY.items()}).static_order())  # CycleError
