"""Files and folders: what is read, in which order, and how each kind of broken input is refused by place."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from apex_quant.errors import InputError, ResourceError, UsageError
from apex_quant.text import Document, builtin, load, loaders

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello ✓"}]}


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfEins\r\n---\nzwei \xe4\xbd\xa0")
    assert load([path]) == [Document("text", text="Eins\r\n---\nzwei 你", source=str(path))]


def test_lines_of_json(tmp_path: Path) -> None:
    rows = [
        '{"text": "a\\u2028b", "kind": "long", "lang": "en"}',
        "",
        json.dumps(CHAT),
        '{"prompt": "p", "response": "r"}',
    ]
    path = write(tmp_path / "a.JSONL", "\ufeff" + "\r\n".join(rows))
    found = load([path])
    assert [d.kind for d in found] == ["long", "chat", "chat"]
    assert [d.source for d in found] == [f"{path}:{n}" for n in (1, 3, 4)]
    assert found[0].text == "a\u2028b"
    assert found[1].messages[1]["content"] == "Hello ✓"


def test_folders_are_read_sorted_and_say_what_they_leave_out(tmp_path: Path) -> None:
    for name in ("b/z.txt", "b/a.md", "a.raw", "c.jsonl", "image.png", ".git/x.txt", ".hidden.txt"):
        write(tmp_path / name, '{"text": "x"}')
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    said: list[str] = []
    names = [document.source.removeprefix(f"{tmp_path}/") for document in load([tmp_path], said.append)]
    assert names == ["a.raw", "b/a.md", "b/z.txt", "c.jsonl:1"]
    assert said == [f"{tmp_path}: 1 files left out, whose endings are none of .txt, .raw, .md, .jsonl, .parquet"]


def test_sources_in_order_and_builtin(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "x")
    found = load([path, "builtin", str(path)])
    assert found == [*load([path]), *builtin(), *load([path])]


def test_rows_without_text_are_counted(tmp_path: Path) -> None:
    said: list[str] = []
    path = write(tmp_path / "a.jsonl", '{"text": " "}\n{"text": "x"}\n{"messages": []}\n')
    assert [d.text for d in load([path], said.append)] == ["x"]
    assert said == [f"{path}: 2 rows without text left out"]


def outcome(path: Path) -> list[Document] | str:
    """The documents, or the error's message; nothing else may happen."""
    try:
        return load([path])
    except InputError as error:
        return error.message


BROKEN: dict[str, tuple[str, str | bytes, str]] = {
    "empty": ("a.txt", "", "a.txt: is empty"),
    "blank": ("a.txt", " \n\t", "a.txt: is empty"),
    "zeros": ("a.txt", bytes(4096), "a.txt: a NUL byte at byte 0"),
    "binary": ("a.txt", b"GGUF\3\0\0", "a.txt: a NUL byte at byte 5"),
    "latin-1": ("a.txt", "señal".encode("latin-1"), "a.txt: byte 2 is not UTF-8"),
    "utf-16": ("a.txt", "señal".encode("utf-16"), "a.txt: a NUL byte at byte 3"),
    "no rows": ("a.jsonl", "\n\n", "a.jsonl: holds no text"),
    "only blank rows": ("a.jsonl", '{"text": ""}', "a.jsonl: holds no text"),
    "torn": ("a.jsonl", '{"text": "x"}\n{"text": "y', "a.jsonl:2: is not JSON: Unterminated"),
    "array": ("a.jsonl", "[1]", "a.jsonl:1: must be an object"),
    "pretty": ("a.jsonl", '{\n"text": "x"\n}', "a.jsonl:1: is not JSON"),
    "no known key": ("a.jsonl", '{"text": "x"}\n{"body": "x"}', "a.jsonl:2: none of text, messages"),
    "NUL line": ("a.jsonl", b'{"text": "x"}\n\0\0\0', "a.jsonl:2: a NUL byte at byte 14"),
    "NUL escape": ("a.jsonl", '{"text": "x\\u0000"}', "a.jsonl:1: text: a NUL character at character 1"),
    "surrogate": ("a.jsonl", '{"text": "\\ud800"}', "a.jsonl:1: text: half a surrogate pair"),
    "bad bytes": ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}', "a.jsonl:2: byte 24 is not UTF-8"),
    "deep": ("a.jsonl", "[" * 200_000, "a.jsonl:1: nested too deeply"),
    "long number": ("a.jsonl", '{"text": ' + "1" * 10_000 + "}", "a.jsonl:1: is not JSON"),
    "ending": ("a.pdf", "x", "a.pdf: is not text that can be read; known endings: .txt"),
    "role": ("a.jsonl", '{"messages": [{"role": "x", "content": "y"}]}', r"a.jsonl:1: messages\[0\]: the role 'x'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_by_place(name: str, tmp_path: Path) -> None:
    file, content, message = BROKEN[name]
    with pytest.raises(InputError, match=message) as caught:
        load([write(tmp_path / file, content)])
    assert caught.value.message.startswith(str(tmp_path))


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.txt")
    (tmp_path / "empty").mkdir()
    for source, message in (
        ("missing.txt", "cannot be opened: No such file"),
        ("missing", "missing: no such file"),
        ("fifo.txt", "is not a regular file"),
        ("a\0b.txt", "cannot be opened"),
        ("empty", "holds no text"),
    ):
        with pytest.raises(InputError, match=message):
            load([tmp_path / source])
    with pytest.raises(UsageError, match="no source of text"):
        load([])


def test_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = write(tmp_path / "large.txt", "x")
    os.truncate(sparse, loaders.MAX_FILE_BYTES + 1)
    with pytest.raises(InputError, match=r"large\.txt: \d+ bytes, more than the \d+ that are read"):
        load([sparse])
    line = write(tmp_path / "line.jsonl", b'{"text": "' + b"x" * loaders.MAX_LINE_BYTES + b'"}')
    with pytest.raises(InputError, match=r"line\.jsonl:1: \d+ bytes, at most \d+ in a line"):
        load([line])
    rows = write(tmp_path / "rows.jsonl", '{"text": "four"}\n' * 9)
    monkeypatch.setattr(loaders, "MAX_DOCUMENTS", 8)
    with pytest.raises(InputError, match=r"rows\.jsonl:9: more than 8 documents"):
        load([rows])
    monkeypatch.setattr(loaders, "MAX_DOCUMENTS", 100)
    monkeypatch.setattr(
        loaders.Loading.__init__, "__defaults__", (30, *(loaders.Loading.__init__.__defaults__ or ())[1:])
    )
    with pytest.raises(InputError, match=r"rows\.jsonl:8: more than \d+ characters in all"):
        load([rows])
    monkeypatch.setattr(loaders, "MAX_FILES", 1)
    with pytest.raises(InputError, match="more than 1 files"):
        load([tmp_path])


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.sampled_from([".txt", ".jsonl"]), st.binary(max_size=200))
@example(".jsonl", b'{"messages": [{"role": "tool", "content": {}, "tool_calls": [{}]}]}')
def test_any_bytes_give_documents_or_one_clear_error(tmp_path: Path, suffix: str, content: bytes) -> None:
    found = outcome(write(tmp_path / f"f{suffix}", content))
    assert found[0] if isinstance(found, list) else f"f{suffix}" in found


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "text", "messages", "tool_calls", "function", "name", "arguments", "tools"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(JSONS)
def test_any_json_gives_a_document_or_one_clear_error(tmp_path: Path, row: Any) -> None:
    found = outcome(write(tmp_path / "f.jsonl", json.dumps(row)))
    assert len(found) == 1 if isinstance(found, list) else "f.jsonl" in found


# --- parquet ---


@pytest.fixture
def parquet(tmp_path: Path) -> Callable[..., Path]:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")

    def made(rows: list[dict[str, Any]], name: str = "a.parquet") -> Path:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
        return tmp_path / name

    return made


def test_parquet_rows(parquet: Callable[..., Path]) -> None:
    said: list[str] = []
    call = {"function": {"name": "f", "arguments": '{"a": 1}'}}
    path = parquet(
        [
            {"text": "eins", "messages": None, "id": 1},
            {"text": None, "messages": CHAT["messages"], "id": 2},
            {"text": "", "messages": None, "id": 3},
            {"text": None, "messages": [{"role": "assistant", "content": None, "tool_calls": [call]}], "id": 4},
        ]
    )
    found = load([path], said.append)
    assert [d.text for d in found] == ["eins", None, None]
    assert found[1].messages == tuple(CHAT["messages"])
    assert found[2].messages[0]["tool_calls"] == [{"name": "f", "arguments": {"a": 1}}]
    assert found[2].source == f"{path}: row 4"
    assert said == [f"{path}: 1 rows without text left out"]


def test_broken_parquet(parquet: Callable[..., Path], tmp_path: Path) -> None:
    good = parquet([{"text": "word " * 50 + str(i)} for i in range(300)]).read_bytes()
    for name, content in {
        "torn": good[: len(good) // 2],
        "zeros": bytes(1000),
        "empty": b"",
        "text": b"PAR1 hello PAR1",
    }.items():
        with pytest.raises(InputError, match=rf"{name}\.parquet: is not a readable \.parquet file"):
            load([write(tmp_path / f"{name}.parquet", content)])
    for at in range(0, len(good), 97):
        path = write(tmp_path / "flipped.parquet", good[:at] + bytes([good[at] ^ 0xFF]) + good[at + 1 :])
        found = outcome(path)
        assert isinstance(found, list) or "flipped.parquet" in found
    with pytest.raises(InputError, match="its columns 'label' hold no text"):
        load([parquet([{"label": 1}])])
    with pytest.raises(InputError, match="row 1: text must be a string, is a number"):
        load([parquet([{"text": 1}])])


def test_a_large_parquet_file_is_read_as_far_as_needed(
    parquet: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(loaders, "MAX_FILE_BYTES", 3000)
    path = parquet([{"text": os.urandom(50).hex()} for _ in range(400)])
    taken = len(load([path], said.append))
    assert 30 <= taken < 60
    assert said == [f"{path}: its first {taken} of 400 rows are taken"]


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ResourceError, match=r"a\.parquet: reading \.parquet files needs pyarrow") as caught:
        load([write(tmp_path / "a.parquet", b"PAR1")])
    assert caught.value.hint == "pip install 'apex-quant[parquet]'"
