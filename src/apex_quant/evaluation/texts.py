"""Evaluation text: files as they are, or the built-in held-out text by domain, in the model's own chat format."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from apex_quant.errors import InputError
from apex_quant.evaluation.taskhub import hub_file
from apex_quant.gguf import GGUFModel
from apex_quant.text import ChatTemplate, Document, heldout, render
from apex_quant.text.corpus import validation

BUILTIN = "heldout"
VALIDATION = "builtin:validation"
"""The name of the built-in text that measured allocations are chosen by, wherever files of text are named."""
MAX_BYTES = 1 << 30
KNOWN: Final = {"wikitext-2-raw": "hub:ggml-org/ci/wikitext-2-raw-v1.zip#wikitext-2-raw/wiki.test.raw"}
"""Texts that have a name: the one that published perplexities are of, from where llama.cpp's own script takes it."""


@dataclass(frozen=True)
class Texts:
    """`texts`: {"name", "pieces": [[text, whether marks such as <|im_start|> are tokens in it], ...]}."""

    texts: tuple[dict[str, Any], ...]
    notes: tuple[str, ...] = ()


def read_texts(model: GGUFModel, files: Sequence[str | Path] | None) -> Texts:
    """Files, each a text of its own whose name it has, or without any the held-out text, one text for each domain.
    VALIDATION alone is that text, likewise.

    A file is a path, one of KNOWN or hub:USER/DATA/FILE, of an archive hub:USER/DATA/FILE.zip#MEMBER. It is read as
    llama-perplexity -f does: whole, as UTF-8, without one newline at its end. Raises InputError; ResourceError for what
    cannot be had from the hub.
    """
    chosen = [str(one) for one in files or ()] == [VALIDATION]
    if files and not chosen:
        return Texts(tuple({"name": name, "pieces": [[_file(path), False]]} for name, path in _named(files)))
    by_domain: dict[str, list[Document]] = {}
    for document in validation() if chosen else heldout():
        by_domain.setdefault(domain_of(document), []).append(document)
    template = ChatTemplate.of(model)
    try:
        texts = tuple({"name": name, "pieces": _pieces(every, template)} for name, every in by_domain.items())
        return Texts(texts, tuple(template.notes) if template is not None else ())
    finally:
        if template is not None:
            template.close()


def domain_of(document: Document) -> str:
    """The name of the file it is from, or its kind."""
    name = Path(document.source.rpartition(":")[0] or document.source).name
    return name.removesuffix(".jsonl") or document.kind


def _pieces(documents: Sequence[Document], template: ChatTemplate | None) -> list[list[Any]]:
    """Documents behind one another, each from a new line."""
    pieces: list[list[Any]] = []
    for document in documents:
        if pieces and not pieces[-1][0].endswith("\n"):
            pieces[-1][0] += "\n"
        pieces.append([render(document, template), document.text is None and template is not None])
    return pieces


def _named(files: Sequence[str | Path]) -> list[tuple[str, Path]]:
    """Each file with a name of its own: the file's, or its path where two have the same."""
    paths = [Path(one) for one in files]
    names = [path.name for path in paths]
    return [(name if names.count(name) == 1 else str(path), path) for name, path in zip(names, paths, strict=True)]


def _file(path: Path) -> str:
    name = str(path) if path.exists() else KNOWN.get(str(path), str(path))
    data = _from_hub(name) if name.startswith("hub:") else _from_disk(path)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}") from None
    return text[:-1] if text.endswith("\n") else text


def _from_disk(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise InputError(f"{path}: no such file" if not path.exists() else f"{path}: not a file")
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path}: a text of more than {MAX_BYTES >> 30} GiB")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _from_hub(name: str) -> bytes:
    file, _, member = name.partition("#")
    path = hub_file(file, MAX_BYTES)
    if not member:
        return _from_disk(path)
    try:
        with zipfile.ZipFile(path) as archive, archive.open(member) as inside:
            data = inside.read(MAX_BYTES + 1)  # what the archive says of its size may be a lie
    except KeyError:
        raise InputError(f"{file}: has no {member}") from None
    except (zipfile.BadZipFile, zipfile.LargeZipFile, OSError, EOFError, RuntimeError, NotImplementedError) as error:
        raise InputError(f"{file}: {error}") from None
    if len(data) > MAX_BYTES:
        raise InputError(f"{name}: a text of more than {MAX_BYTES >> 30} GiB")
    return data
