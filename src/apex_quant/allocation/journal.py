"""Finished probes on disk, one JSON line each, so that a kill costs at most the probe in hand."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from apex_quant.errors import ResourceError
from apex_quant.native.worker import Json

MAX_BYTES = 1 << 30
ROUNDING = "file|Q8_0"
"""The key of the row of a whole file; those of probes are ProbePlan.key."""


class Journal:
    """Finished probes by key, one JSON line each, after a first line that says what they belong to."""

    def __init__(self, path: Path, spec: str) -> None:
        self.path, self.spec = path, spec
        self.header, self.rows = read_journal(path, spec)
        if not self.header:
            self.path.write_bytes(b"")

    def add(self, row: Json) -> None:
        """A line, on disk when this returns; the first one is the header. Raises ResourceError."""
        if not self.header:
            row = {**row, "spec": self.spec}
            self.header = row
        else:
            self.rows[row["key"]] = row
        try:
            with self.path.open("ab") as file:
                file.write(json.dumps(row).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ResourceError(f"{self.path}: cannot be written: {error.strerror}") from None


def is_of_another(path: Path, spec: str) -> bool:
    """Whether there is work of another measurement under this name, or something that is no journal."""
    try:
        with path.open("rb") as file:
            begun = b"\n" in file.read(MAX_BYTES)  # a torn first line is no work
    except OSError:
        return False
    return begun and not read_journal(path, spec)[0]


def _is_number(value: object) -> bool:
    """Earlier versions kept divergences that were none; such a probe is measured again."""
    return isinstance(value, int | float) and math.isfinite(value)


def read_journal(path: Path, spec: str) -> tuple[Json, dict[str, Json]]:
    """Header and probes of the measurement `spec`; ({}, {}) for another's, a torn line is passed over and cut off."""
    try:
        if path.stat().st_size > MAX_BYTES:
            return {}, {}
        data = path.read_bytes()
    except OSError:
        return {}, {}
    whole = data[: data.rfind(b"\n") + 1]
    rows = []
    for line in whole.split(b"\n")[:-1]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return {}, {}
        if not isinstance(row, dict):
            return {}, {}
        rows.append(row)
    if not rows or rows[0].get("spec") != spec or any("key" not in row for row in rows[1:]):
        return {}, {}
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    return rows[0], {row["key"]: row for row in rows[1:] if _is_number(row.get("kld", 0.0))}
