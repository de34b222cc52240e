"""Calibration text: documents of the corpora asked for, in the model's own chat format, as pieces for the child."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from apex_quant.calibration.state import Piece
from apex_quant.errors import InputError
from apex_quant.gguf import GGUFModel
from apex_quant.text import DEFAULT_MIX, ChatTemplate, Document, load, mixed, parse_mix, render

BUILTIN = "builtin"
# Text drawn for a token asked for: more than a tokenizer of any language needs, so that the child never runs short
_CHARACTERS = 8


@dataclass
class Texts:
    """`pieces` in the order of use; `pool`: further ones by kind, for experts that these do not reach."""

    pieces: list[Piece] = field(default_factory=list)
    pool: dict[str, list[Piece]] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_texts(
    model: GGUFModel,
    corpus: Sequence[str],
    *,
    mix: Mapping[str, float] | None,
    tokens: int,
    seed: int,
    cover_tokens: int,
) -> Texts:
    """Load, mix and render. Raises InputError for files that cannot be read or hold no text."""
    said: list[str] = []
    documents = load(corpus, said.append)
    if mix is None and list(corpus) == [BUILTIN]:
        kinds = {document.kind for document in documents}
        mix = {kind: share for kind, share in parse_mix(DEFAULT_MIX).items() if kind in kinds}
    if not documents:
        raise InputError(f"{', '.join(corpus)}: no text", hint="give files with text in them, or leave --corpus away")
    names = tuple(name if name == BUILTIN or name.startswith("hub:") else Path(name).name for name in corpus)
    texts = Texts(names=names)
    template = ChatTemplate.of(model)
    try:
        drawn: set[int] = set()
        characters = 0
        for document in mixed(documents, mix, seed):
            texts.pieces.append(_piece(document, template))
            drawn.add(id(document))
            characters += len(texts.pieces[-1][0])
            if characters >= tokens * _CHARACTERS:
                break
        if not any(text.strip() for text, _, _ in texts.pieces):
            raise InputError(f"{', '.join(corpus)}: the text is empty", hint="or the mix asks for none of its kinds")
        if cover_tokens:
            further = [d for d in documents if id(d) not in drawn]
            if BUILTIN not in corpus:
                further += load([BUILTIN])
            _fill_pool(texts.pool, further, template, cover_tokens)
        texts.notes = (*said, *(template.notes if template is not None else ()))
    finally:
        if template is not None:
            template.close()
    for piece in texts.pieces[:-1]:
        if not piece[0].endswith("\n"):
            piece[0] += "\n"
    return texts


def _piece(document: Document, template: ChatTemplate | None) -> Piece:
    marks = document.text is None and template is not None  # marks such as <|im_start|> are tokens only there
    return [render(document, template), marks, _kind(document)]


def _kind(document: Document) -> str:
    return f"{document.kind}/{document.lang}" if document.lang else document.kind


def _fill_pool(
    pool: dict[str, list[Piece]], documents: Sequence[Document], template: ChatTemplate | None, tokens: int
) -> None:
    """Pieces by kind and language, of each at most what could be drawn in all."""
    characters: dict[str, int] = {}
    for document in documents:
        kind = _kind(document)
        if characters.get(kind, 0) >= tokens * _CHARACTERS:
            continue
        piece = _piece(document, template)
        if not piece[0].endswith("\n"):
            piece[0] += "\n"
        pool.setdefault(kind, []).append(piece)
        characters[kind] = characters.get(kind, 0) + len(piece[0])
