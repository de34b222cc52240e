"""Evaluation texts: files as they are, documents by domain."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from apex_quant import embedded_model
from apex_quant.errors import InputError
from apex_quant.evaluation import texts
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


def _archive(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_texts_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By name, by address, out of an archive; a path of the same name comes first."""
    asked = []

    def have(name: str, most: int) -> Path:
        asked.append(name)
        return tmp_path / name.rpartition("/")[2]

    monkeypatch.setattr(texts, "hub_file", have)
    (tmp_path / "a.txt").write_bytes(b"plain\n")
    _archive(tmp_path / "wikitext-2-raw-v1.zip", **{"wikitext-2-raw/wiki.test.raw": b" = Title = \n\n"})
    with open_model(embedded_model()) as model:
        read = read_texts(model, ["hub:me/data/a.txt", "wikitext-2-raw"]).texts
        assert [text["pieces"] for text in read] == [[["plain", False]], [[" = Title = \n", False]]]
        assert asked == ["hub:me/data/a.txt", "hub:ggml-org/ci/wikitext-2-raw-v1.zip"]
        monkeypatch.chdir(tmp_path)
        Path("wikitext-2-raw").write_text("mine")
        assert read_texts(model, ["wikitext-2-raw"]).texts[0]["pieces"] == [["mine", False]]

        for name, data, message in (
            ("bomb.zip", b"0" * 5000, "more than"),
            ("empty.zip", None, "has no inside.txt"),
            ("none.zip", b"", "not a zip file"),
        ):
            path = tmp_path / name
            if data == b"":
                path.write_bytes(b"PK and no more")
            else:
                _archive(path, **({} if data is None else {"inside.txt": data}))
            monkeypatch.setattr(texts, "MAX_BYTES", 1000)
            with pytest.raises(InputError, match=message):
                read_texts(model, [f"hub:me/data/{name}#inside.txt"])
