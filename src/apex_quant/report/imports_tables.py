"""Tables of others: the JSON results that the original project publishes, and CSV with a heading.

Field names of the JSON are those of mudler/apex-quant (benchmark_results, 2026-05): its sizes are in units of 2^30
bytes and its accuracies in percent.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from apex_quant.errors import InputError
from apex_quant.report.imports_rows import PARTS, Row, parsed, whole
from apex_quant.report.quantities import QUANTITIES, TASK_KEYS

PUBLISHED: Final = {
    "perplexity": "ppl", "kl_mean": "kld", "kl_max": "kld_max", "kl_99_9": "kld_p99_9", "kl_median": "kld_median",
    "hellaswag": "hellaswag", "winogrande": "winogrande", "mmlu": "mmlu", "arc_challenge": "arc",
    "truthfulqa": "truthfulqa", "pp512_ts": "pp512", "tg128_ts": "tg128",
}  # fmt: skip
PUBLISHED_TASKS: Final = {"hellaswag": 400, "winogrande": 400, "mmlu": 1548, "arc": 299, "truthfulqa": 817}
"""Numbers of tasks: all published accuracies are shares of them to the last decimal."""

_MAKERS: Final = {"apex": "APEX", "unsloth": "Unsloth", "bartowski": "bartowski"}
_COMMENT = re.compile(r"# *(\w{1,40}): *(.{0,1000})", re.ASCII)
_SPEED = re.compile(r"(?:pp|tg)\d{1,9}(?:@d\d{1,9})?", re.ASCII)
_SIZES: Final = {"bytes": 1, "size_gb": 10**9, "size_gib": 1 << 30}
_SHARES: Final = (*TASK_KEYS, "top1", "router", "router_moved")
_MOST_ROWS: Final = 10_000
_LONGEST: Final = 100_000


def published_json(text: str, stem: str) -> list[Row] | None:
    """One object of the project's fields, or a list of them."""
    if text.lstrip()[:1] not in ("{", "["):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    items = found if isinstance(found, list) else [found]
    if not items or len(items) > _MOST_ROWS or not all(isinstance(one, dict) for one in items):
        return None
    if not all("model" in one and len({"size_gb", *PUBLISHED} & set(one)) >= 2 for one in items):
        return None
    return [_published(one, stem) for one in items]


def _published(item: Mapping[str, Any], stem: str) -> Row:
    name = item["model"]
    if not isinstance(name, str) or not name.strip():
        raise InputError("a model without a name")
    row = Row(name.strip()[:250], source="published results of mudler/apex-quant's form")
    maker = next((made for word, made in _MAKERS.items() if stem.lower().startswith(word)), None)
    row.model = {"family": maker} if maker else {}
    if item.get("size_gb") is not None:
        row.bytes = round(_real(item["size_gb"], "size_gb") * (1 << 30))
        row.warnings.append("the size is known to 0.1 GiB only")
    for field, key in PUBLISHED.items():
        if item.get(field) is None:
            continue
        value = _real(item[field], field)
        if key in PUBLISHED_TASKS:
            row.put_task(key, value / 100, PUBLISHED_TASKS[key], 4)
        else:
            error = item.get("ppl_error") if key == "ppl" else None
            row.put(key, value, error=None if error is None else _real(error, "ppl_error"))
    return row


def _real(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{what} is not a number")
    return parsed(repr(value), what)


def table_csv(text: str, stem: str) -> list[Row] | None:
    """A table with a heading. Lines '# key: value' before it say what holds for all rows; docs/report.md has all."""
    about: dict[str, str] = {}
    warnings: list[str] = []
    lines = text.splitlines()
    while lines and (not lines[0].strip() or lines[0].startswith("#")):
        found = _COMMENT.fullmatch(lines.pop(0).strip())
        if found and found[1] == "warning":
            warnings.append(found[2])
        elif found:
            about[found[1]] = found[2].strip()
    if not lines or len(lines) > _MOST_ROWS or any(len(line) > _LONGEST for line in lines):
        return None
    columns = [column.strip().lower() for column in lines[0].split(",")]
    if "name" not in columns or not any(_quantity(column) for column in columns):
        return None
    unknown = [column for column in columns if column and not _known(column)]
    if len(set(columns)) < len(columns):
        raise InputError("a column is there twice")
    rows = []
    try:
        for number, cells in enumerate(csv.reader(io.StringIO("\n".join(lines[1:])), strict=True), 2):
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(columns):
                raise InputError(f"row {number} has {len(cells)} cells, the heading {len(columns)}")
            pairs = zip(columns, cells, strict=True)
            rows.append(_row({name: cell.strip() for name, cell in pairs if cell.strip()}, about, number))
    except csv.Error as error:
        raise InputError(f"not a CSV table: {error}") from None
    if not rows:
        raise InputError("a table without rows")
    if unknown:
        warnings.append(f"columns that are not known were left out: {', '.join(unknown)[:200]}")
    for row in rows:
        row.warnings += warnings
    return rows


def _row(cells: Mapping[str, str], about: Mapping[str, str], number: int) -> Row:
    if "name" not in cells:
        raise InputError(f"row {number} has no name")
    row = Row(cells["name"][:250], tier=cells.get("tier"), source=about.get("source"))
    row.model = {key: cells[key] for key in ("family", "sha256") if key in cells}
    row.reference = {"path": about["reference"]} if "reference" in about and "kld" in cells else None
    row.settings = {"ctx": whole(about["ctx"], "ctx")} if "ctx" in about else {}
    if "text" in about:
        row.settings["texts"] = [about["text"]]
    for column, unit in _SIZES.items():
        if column in cells:
            row.bytes = round(parsed(cells[column], column) * unit)
    if "bpw" in cells:
        row.bpw = parsed(cells["bpw"], "bpw")
    for column, cell in cells.items():
        if _quantity(column):
            _put(row, column, cell, {**about, **cells})
    if "speed" in row.metrics and "device" in about:
        row.metrics["speed"]["device"] = about["device"]
    return row


def _put(row: Row, key: str, cell: str, said: Mapping[str, str]) -> None:
    value = parsed(cell, key)
    whole_is = 100.0 if key in _SHARES and value > 1 else 1.0  # shares may be in percent
    parts = {part: parsed(said[f"{key}_{part}"], f"{key}_{part}") for part in PARTS if f"{key}_{part}" in said}
    n = whole(said[f"{key}_n"], f"{key}_n") if "n" in parts else None
    if key in TASK_KEYS and "low" not in parts:
        digits = len(cell.partition(".")[2]) + (0 if whole_is != 1 else -2)
        row.put_task(key, value / whole_is, n, digits)
        return
    row.put(key, value / whole_is, **{name: n if name == "n" else part / whole_is for name, part in parts.items()})


def _quantity(column: str) -> bool:
    return (column in QUANTITIES and column not in ("pp", "tg")) or bool(_SPEED.fullmatch(column))


def _known(column: str) -> bool:
    base, _, part = column.rpartition("_")
    named: Sequence[str] = ("name", "family", "tier", "bpw", "sha256", *_SIZES)
    return column in named or _quantity(column) or (part in PARTS and _quantity(base))
