"""Evaluation texts: files as they are, documents by domain."""

from __future__ import annotations

from pathlib import Path

import pytest

from apex_quant import embedded_model
from apex_quant.errors import InputError
from apex_quant.evaluation.texts import domain_of, read_texts
from apex_quant.gguf import open_model
from apex_quant.text import Document


def test_a_file_loses_one_newline(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("ä <|im_start|>\r\n\n\n".encode())
    with open_model(embedded_model()) as model:
        found = read_texts(model, [tmp_path / "a.txt"])
    assert found.texts == ({"name": "a.txt", "pieces": [["ä <|im_start|>\r\n\n", False]]},)


def test_names_are_unique(tmp_path: Path) -> None:
    files = [tmp_path / "a" / "x.txt", tmp_path / "b" / "x.txt", tmp_path / "y.txt"]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text("text")
    with open_model(embedded_model()) as model:
        names = [text["name"] for text in read_texts(model, files).texts]
    assert names == [str(files[0]), str(files[1]), "y.txt"]


@pytest.mark.parametrize(("data", "message"), [(b"\xff", "not UTF-8 at byte 0"), (None, "no such file")])
def test_files_that_are_no_text(data: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    if data is not None:
        path.write_bytes(data)
    with open_model(embedded_model()) as model, pytest.raises(InputError, match=message):
        read_texts(model, [path])


@pytest.mark.parametrize(
    ("source", "domain"),
    [("heldout/prose.jsonl:12", "prose"), ("prose.jsonl", "prose"), ("prose", "prose"), ("", "chat")],
)
def test_domains(source: str, domain: str) -> None:
    assert domain_of(Document("chat", text="x", source=source)) == domain
