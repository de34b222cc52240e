"""What llama-bench prints: Markdown tables, CSV, JSON and lines of JSON (tools/llama-bench/llama-bench.cpp)."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from apex_quant.errors import InputError
from apex_quant.report.imports_rows import Row, parsed, whole

_FIELDS: Final = ("model_filename", "n_prompt", "n_gen", "avg_ts")
_TEST = re.compile(r"(pp|tg)(\d{1,9})(?: *@ *d(\d{1,9}))?", re.ASCII)
_RATE = re.compile(r"(\d{1,12}(?:\.\d{1,6})?)(?: *± *(\d{1,12}(?:\.\d{1,6})?))?", re.ASCII)
_SIZE = re.compile(r"(\d{1,9}\.\d{1,6}) (MiB|GiB)", re.ASCII)
_UNITS: Final = {"MiB": 1 << 20, "GiB": 1 << 30}
_MOST_ROWS: Final = 100_000
_SIZE_NOTE: Final = "the size is that of the tensors, without the header: llama-bench says no other"


def bench_json(text: str, stem: str) -> list[Row] | None:
    """-o json, a list of tests, or -o jsonl, one a line."""
    head = text.lstrip()[:1]
    if head not in ("[", "{"):
        return None
    try:
        found = json.loads(text)
    except RecursionError:
        return None
    except ValueError:
        try:
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
        except (ValueError, RecursionError):
            if head == "[" and '"avg_ts"' in text:
                raise InputError("a llama-bench document that is cut short") from None
            return None
    tests = [found] if isinstance(found, dict) else found
    if not isinstance(tests, list) or not tests or not all(isinstance(one, dict) for one in tests):
        return None
    if not all(name in tests[0] for name in _FIELDS):
        return None
    return _tests(tests)


def bench_csv(text: str, stem: str) -> list[Row] | None:
    """-o csv."""
    heading = text.partition("\n")[0]
    if not all(name in heading for name in _FIELDS):
        return None
    try:
        return _tests(csv.DictReader(io.StringIO(text), strict=True))
    except csv.Error as error:
        raise InputError(f"not a CSV table: {error}") from None


def bench_markdown(text: str, stem: str) -> list[Row] | None:
    """-o md, the default: names no file, so the model is called by its type and the table's file."""
    rows: dict[str, Row] = {}
    columns: list[str] = []
    for line in text.splitlines()[:_MOST_ROWS]:
        if not line.lstrip().startswith("|") or len(line) > 4096:
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if "test" in cells and "t/s" in cells and "model" in cells:
            columns = cells
            continue
        if not columns or len(cells) != len(columns):
            continue
        row = dict(zip(columns, cells, strict=True))
        test, rate, size = (
            _TEST.fullmatch(row["test"]),
            _RATE.fullmatch(row["t/s"]),
            _SIZE.fullmatch(row.get("size", "")),
        )
        if test is None or rate is None:
            continue
        name = row["model"][:200]
        one = rows.setdefault(name, Row(name))
        if size is not None:
            one.bytes = round(float(size[1]) * _UNITS[size[2]])
            one.warnings = [_SIZE_NOTE]
        _put(one, test, parsed(rate[1], "t/s"), None if rate[2] is None else parsed(rate[2], "t/s"), None)
        speed = one.metrics["speed"]
        speed["device"] = row.get("backend", "")[:200]
    if not columns:
        return None
    made = list(rows.values())
    if len(made) == 1:
        made[0].name = stem
    return made


def _tests(tests: Iterable[Mapping[str, Any]]) -> list[Row]:
    rows: dict[str, Row] = {}
    for number, test in enumerate(tests):
        if number >= _MOST_ROWS:
            raise InputError(f"more than {_MOST_ROWS} tests")
        path = test.get("model_filename")
        if not isinstance(path, str) or not path:
            raise InputError(f"test {number + 1} names no model")
        prompt, generated, depth = (_count(test.get(key), key) for key in ("n_prompt", "n_gen", "n_depth"))
        if bool(prompt) == bool(generated):
            continue  # prompts and generation in one test have no place in results.json
        name = path.replace("\\", "/").rpartition("/")[2][:250]
        row = rows.setdefault(path, Row(name))
        kind = f"pp{prompt}" if prompt else f"tg{generated}"
        found = _TEST.fullmatch(kind + (f" @ d{depth}" if depth else ""))
        if found is None:
            raise InputError(f"test {number + 1}: impossible numbers of tokens")
        samples = test.get("samples_ts")
        _put(row, found, _real(test.get("avg_ts"), "avg_ts"), _real(test.get("stddev_ts", 0), "stddev_ts"),
             len(samples) if isinstance(samples, list) else None)  # fmt: skip
        size = _count(test.get("model_size"), "model_size")
        if size:
            row.bytes, row.warnings = size, [_SIZE_NOTE]
            weights = _count(test.get("model_n_params"), "model_n_params")
            row.bpw = round(8 * size / weights, 4) if weights else None
        speed = row.metrics["speed"]
        device = str(test.get("gpu_info") or "") if _count(test.get("n_gpu_layers"), "n_gpu_layers") else ""
        speed |= {"device": (device or str(test.get("cpu_info") or ""))[:200],
                  "threads": _count(test.get("n_threads"), "n_threads"),
                  "build": str(test.get("build_commit") or "")[:80]}  # fmt: skip
    if not rows:
        raise InputError("no test of a prompt or of generation alone")
    return list(rows.values())


def _put(row: Row, test: re.Match[str], value: float, deviation: float | None, n: int | None) -> None:
    name = test[1] + test[2] + (f"@d{test[3]}" if test[3] else "")
    row.put(name, value, deviation=None if n is not None and n < 2 else deviation, n=n)


def _count(value: Any, what: str) -> int:
    """A number of things; llama-bench's -1 (all layers) counts as 1."""
    if value in (None, ""):
        return 0
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise InputError(f"{what}: not a number of things")
    if str(value).strip() == "-1":
        return 1
    return whole(str(value), what)


def _real(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise InputError(f"{what}: not a number")
    return parsed(value if isinstance(value, str) else repr(value), what)
