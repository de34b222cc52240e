"""docs/errors.md against the source: every message that it lists is raised there, with that exit status."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import apex_quant
from apex_quant import errors

ROOT = Path(apex_quant.__file__).parent
DOCUMENT = ROOT.parents[1] / "docs" / "errors.md"
GAP = "\0"  # what is put in at run time
# words of other programs, which come through a message of ours
THEIRS = ("404 Client Error", "401 Client Error", "Revision Not Found", "Repo id must")
# capitals that are words of the message itself
WORDS = {"GB", "KiB", "NaN", "GGUF", "YAML", "UTF", "KLD", "JSON"}


@dataclass(frozen=True)
class Row:
    status: int
    message: str
    section: str


def rows() -> Iterator[Row]:
    section = ""
    for line in DOCUMENT.read_text().splitlines():
        if line.startswith("## "):
            section = line[3:]
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| ") and len(cells) == 3 and any(cell.isdigit() for cell in cells[:2]):
            status, messages = (cells[0], cells[1]) if cells[0].isdigit() else (cells[1], cells[2])
            for message in re.findall(r"`([^`]+)`", messages):
                if not any(word in message for word in THEIRS):
                    yield Row(int(status), message, section)


@cache
def texts() -> tuple[tuple[str, frozenset[int]], ...]:
    """Every text in the source, with gaps, and the exit statuses of the errors that it is an argument of."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                status = status_of(node.func)
                if status is not None:
                    found += [(flat(argument), frozenset({status})) for argument in node.args[:1]]
            if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp):
                found.append((flat(node), frozenset()))
    return tuple((text, status) for text, status in found if len(text) > 5)


def status_of(function: ast.expr) -> int | None:
    kind = getattr(errors, function.id, None) if isinstance(function, ast.Name) else None
    return kind.exit_code if isinstance(kind, type) and issubclass(kind, errors.ApexError) else None


def flat(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value) if isinstance(node.value, str) else GAP
    if isinstance(node, ast.JoinedStr):
        return "".join(flat(value) for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return flat(node.left) + flat(node.right)
    return GAP


def pieces(message: str) -> list[str]:
    """The parts of a documented message that are the same every time."""
    message = message.replace("...", GAP)
    message = re.sub(r"\b[A-Z][A-Z0-9]*\b", lambda m: m[0] if m[0] in WORDS else GAP, message)
    message = re.sub(r"\b\d+\b", GAP, message)
    return [piece for part in message.split(GAP) if (piece := part.strip(" :/.@"))]


def fits(wanted: list[str], text: str) -> bool:
    place = 0
    for piece in wanted:
        place = text.find(piece, place)
        if place < 0:
            return False
        place += len(piece)
    return True


def parts(piece: str) -> list[str]:
    """The piece itself, then its ends, from long to short, down to two words."""
    words = piece.split(" ")
    ends = [" ".join(words[n:]) for n in range(len(words) - 1)] + [" ".join(words[:n]) for n in range(2, len(words))]
    return sorted((end for end in ends if len(end) >= 8), key=len, reverse=True)


@pytest.mark.parametrize("row", list(rows()), ids=lambda row: f"{row.status} {row.message[:60]}")
def test_documented_messages_are_raised(row: Row) -> None:
    wanted = pieces(row.message)
    # a message that is put together of several texts: its longest part must be there
    fitting = [(text, status) for text, status in texts() if fits(wanted, text)]
    for part in () if fitting else parts(max(wanted, key=len)):
        fitting = fitting or [(text, status) for text, status in texts() if part in text]
    assert fitting, f"no message of the source has {wanted}"
    statuses = {one for _, status in fitting for one in status}
    # from a file the same problem is an input's, from the command line usage: config.py decides
    assert not statuses or row.status in statuses or row.section == "Configuration", statuses


def test_the_failures_that_must_be_there() -> None:
    """test_failures.py makes each of them happen."""
    listed = DOCUMENT.read_text().lower()
    for what in ("no network", "no token", "gated", "disk full", "unknown architecture", "converter failure",
                 "killed worker", "corrupted download", "bad configuration", "busy folder", "quarantined"):  # fmt: skip
        assert f"| {what}" in listed, what


def test_links_lead_somewhere() -> None:
    text = DOCUMENT.read_text()
    anchors = {
        re.sub(r"[^\w -]", "", line[3:].lower()).replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("## ")
    }
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert target[1:] in anchors if target.startswith("#") else (DOCUMENT.parent / target).exists(), target


def test_most_rows_are_checked_with_their_status() -> None:
    """The check above is worth something: nearly all rows are found whole in an error of the stated status."""
    whole = [row for row in rows() if any(row.status in status and fits(pieces(row.message), text)
                                          for text, status in texts())]  # fmt: skip
    assert len(whole) >= 0.8 * len(list(rows()))
