"""Every line of the built-in corpus: its form, its text, and that all kinds and languages are there."""

from __future__ import annotations

import json
import subprocess
import sys
import unicodedata
from collections import Counter
from importlib import resources
from typing import Any

import pytest

from apex_quant.text import Document, builtin
from apex_quant.text.corpus import statistics, table
from apex_quant.text.documents import document_of

KINDS = ("chat", "code", "reasoning", "tools", "long")
KEYS = {
    frozenset({"kind", "lang", "text"}),
    frozenset({"kind", "lang", "messages"}),
    frozenset({"kind", "lang", "tools", "messages"}),
}
MESSAGE_KEYS = {
    "system": [{"role", "content"}],
    "user": [{"role", "content"}],
    "assistant": [{"role", "content"}, {"role", "tool_calls"}, {"role", "content", "tool_calls"}],
    "tool": [{"role", "name", "content"}],
}
FENCES = {"python": 1, "js": 1, "ts": 1, "c": 1, "rust": 1, "go": 1, "sql": 1, "shell": 1}
ALSO = {
    "javascript": "js",
    "jsx": "js",
    "typescript": "ts",
    "tsx": "ts",
    "bash": "shell",
    "sh": "shell",
    "py": "python",
}


def lines() -> list[tuple[str, Any]]:
    folder = resources.files("apex_quant.text").joinpath("corpus")
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".jsonl")), key=lambda file: file.name)
    found = []
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert text.endswith("\n"), file.name
        for number, line in enumerate(text[:-1].split("\n"), 1):
            found.append((f"{file.name}:{number}", json.loads(line)))
    return found


LINES = lines()


def strings(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for key, item in value.items() for text in (key, *strings(item))]
    if isinstance(value, list):
        return [text for item in value for text in strings(item)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize(("where", "row"), LINES, ids=[where for where, _ in LINES])
def test_line(where: str, row: dict[str, Any]) -> None:
    assert frozenset(row) in KEYS
    assert row["kind"] in KINDS
    assert row["lang"].isalpha()
    document = document_of(row, where)
    assert document is not None
    assert document.characters >= 40
    for text in strings(row):
        odd = {char for char in text if unicodedata.category(char) in ("Cc", "Cf", "Co", "Cs") and char not in "\n\t"}
        assert not odd - {"\u200d"}, odd  # joined emoji
        assert "\ufffd" not in text
    waiting: list[str] = []
    for message in row.get("messages", []):
        assert set(message) in MESSAGE_KEYS[message["role"]]
        if message["role"] == "tool":
            assert message["name"] in waiting
            waiting.remove(message["name"])
            continue
        waiting = [call["name"] for call in message.get("tool_calls", [])]
        assert all(set(call) == {"name", "arguments"} for call in message.get("tool_calls", []))
    for tool in row.get("tools", []):
        assert set(tool) == {"name", "description", "parameters"}
        assert isinstance(tool["parameters"], dict)


def test_tools_are_called_and_answer_and_fail() -> None:
    """Most tool pieces carry schemas and structured calls; some are written in a vendor's own style, as text."""
    rows = [row for _, row in LINES if row["kind"] == "tools"]
    structured = [row for row in rows if "tools" in row]
    assert len(structured) >= len(rows) / 2
    for row in structured:
        names = {tool["name"] for tool in row["tools"]}
        called = {call["name"] for message in row["messages"] for call in message.get("tool_calls", [])}
        assert called & names or not called, row["messages"][0]
    results = [text["content"] for row in structured for text in row["messages"] if text["role"] == "tool"]
    assert len(results) >= 20
    assert any("error" in result.lower() for result in results)


def test_nothing_stands_in_it_twice() -> None:
    bodies = Counter(json.dumps([row.get("text"), row.get("messages")], sort_keys=True) for _, row in LINES)
    assert [body[:80] for body, count in bodies.items() if count > 1] == []
    openings = Counter(
        message["content"]
        for _, row in LINES
        for message in row.get("messages", [])
        if message["role"] == "assistant" and len(message.get("content", "")) > 80
    )
    assert [text[:80] for text, count in openings.items() if count > 1] == []


def test_all_kinds_and_languages_are_there() -> None:
    shares = statistics(builtin())
    assert {share.kind for share in shares} == set(KINDS)
    assert {share.lang for share in shares if share.kind == "chat"} >= {"en", "es", "de", "fr", "zh"}
    code = "\n".join(text for _, row in LINES if row["kind"] == "code" for text in strings(row))
    fences = Counter(
        ALSO.get(word, word) for word in (line[3:].strip() for line in code.split("\n") if line[:3] == "```")
    )
    assert {name for name, least in FENCES.items() if fences[name] < least} == set()
    assert max(document.characters for document in builtin() if document.kind == "long") > 6000
    turns = [len(row["messages"]) for _, row in LINES if row["kind"] == "chat" and "messages" in row]
    assert max(turns) >= 6


def test_it_is_large_enough() -> None:
    """About 50k tokens, at some four bytes for each."""
    assert sum(document.size for document in builtin()) > 180_000


def test_statistics() -> None:
    documents = [
        Document("code", "en", "abc"),
        Document("chat", "en", "a"),
        Document("chat", "zh", "你好"),
        Document("chat", "en", "b"),
    ]
    assert statistics(documents) == [("chat", "en", 2, 2), ("chat", "zh", 1, 2), ("code", "en", 1, 3)]
    assert table(documents).split("\n")[-1] == "| all |  | 4 | 7 |"


def test_statistics_are_printed() -> None:
    done = subprocess.run([sys.executable, "-m", "apex_quant.text"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == table(builtin())
    assert done.stderr == ""
