"""Every key of `apex run` in words: the tables of docs/config.md and the example that `apex run --init` writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from pydantic import BaseModel

from apex_quant.pipeline.config import sections
from apex_quant.pipeline.keys import Section

_SIZES: Final = ("split", "shards")
PLACEHOLDER: Final = "ORG/NAME"
"""The source in the example, until somebody edits it."""


@dataclass(frozen=True)
class KeyRow:
    """A key, its default as YAML (None: it has to be given) and what it means."""

    name: str
    default: str | None
    text: str


def rows(model: type[BaseModel]) -> Iterator[KeyRow]:
    """The keys of one section that are no sections themselves."""
    for name, field in model.model_fields.items():
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, Section)):
            default = None if field.is_required() else _yaml(name, field.get_default())
            yield KeyRow(field.alias or name, default, field.description or "")


def _yaml(name: str, value: Any) -> str:
    """A default as it would be written."""
    if name in _SIZES and isinstance(value, int):
        return f"{value // 10**9}GB"
    if isinstance(value, tuple):
        return "[" + ", ".join(_yaml("", one) for one in value) + "]"
    if isinstance(value, str):
        return value
    return json.dumps(value)


def markdown() -> str:
    """The tables of docs/config.md."""
    lines: list[str] = []
    for name, model in sections():
        doc = " ".join((model.__doc__ or "").split())
        lines += [f"### {name or 'The whole'}", doc, "", "| key | default | |", "|---|---|---|"]
        for row in rows(model):
            text = row.text.replace("*", "\\*")
            lines.append(f"| `{row.name}` | {f'`{row.default}`' if row.default else 'needed'} | {text} |")
        lines.append("")
    return "\n".join(lines)


def template(source: str | None = None) -> str:
    """A commented YAML file: a line `# key: value` shows a default, `##` begins a remark."""
    lines = [
        "## What `apex run` makes of one model: apex run THIS_FILE",
        "## A line that begins with `# ` shows a default; take the # away to change it (of its section as well).",
        "## Names of files are relative to this file.",
    ]
    for name, model in sections():
        depth = name.count(".") + 1 if name else 0
        if name:
            lines += ["", f"## {' '.join((model.__doc__ or '').split())}"]
            lines.append(f"# {'  ' * (depth - 1)}{name.rpartition('.')[2]}:")
        for row in rows(model):
            if row.default is None:
                lines.append(f"{row.name}: {json.dumps(source) if source else PLACEHOLDER}  # {row.text}")
            else:
                lines.append(f"# {'  ' * depth}{row.name}: {row.default}  # {row.text}")
    return "\n".join(lines) + "\n"
