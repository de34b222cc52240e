"""The texts that probes run on and that recipes are chosen by: a third and a fourth set, which share no run of 13 words
with each other, with what calibrates or with what evaluates.

Files may be given instead; then the shared runs are counted and reported.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apex_quant.evaluation import texts as evaluation_texts
from apex_quant.gguf import GGUFModel
from apex_quant.text import ChatTemplate, Document, builtin, heldout, render
from apex_quant.text.corpus import probe
from apex_quant.text.overlap import WORDS, overlap

BUILTIN = "probe"
VALIDATION = evaluation_texts.VALIDATION


@dataclass(frozen=True)
class ProbeTexts:
    """`texts` as evaluation/steps.py takes them; `name` and `sha256` of their content."""

    name: str
    texts: tuple[dict[str, Any], ...]
    sha256: str
    notes: tuple[str, ...] = ()


def read_texts(model: GGUFModel, files: Sequence[str | Path] | None) -> ProbeTexts:
    """The built-in probe text by domain in the model's chat format, or files, each a text. Raises InputError."""
    if files:
        return _given(model, files)
    texts, notes = _builtin(model)
    return ProbeTexts(BUILTIN, texts, _digest(texts), tuple(notes))


def validation_texts(model: GGUFModel, files: Sequence[str | Path] | None) -> ProbeTexts:
    """The built-in validation text, or files; as evaluate() reads VALIDATION or these files. Raises InputError."""
    if files:
        return _given(model, files)
    read = evaluation_texts.read_texts(model, [VALIDATION])
    return ProbeTexts(VALIDATION, read.texts, _digest(read.texts), read.notes)


def _given(model: GGUFModel, files: Sequence[str | Path]) -> ProbeTexts:
    read = evaluation_texts.read_texts(model, files)
    name = ", ".join(Path(file).name for file in files)
    return ProbeTexts(name, read.texts, _digest(read.texts), (*read.notes, *_shared(read.texts)))


def _digest(texts: Sequence[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


def _builtin(model: GGUFModel) -> tuple[tuple[dict[str, Any], ...], Sequence[str]]:
    by_domain: dict[str, list[Document]] = {}
    for document in probe():
        by_domain.setdefault(evaluation_texts.domain_of(document), []).append(document)
    template = ChatTemplate.of(model)
    try:
        return tuple(
            {
                "name": name,
                "pieces": [
                    [render(document, template) + "\n", document.text is None and template is not None]
                    for document in every
                ],
            }
            for name, every in by_domain.items()
        ), list(template.notes) if template is not None else []
    finally:
        if template is not None:
            template.close()


def _shared(texts: Sequence[dict[str, Any]]) -> list[str]:
    """What given files have in common with the built-in texts of calibration and evaluation."""
    ours = [piece[0] for text in texts for piece in text["pieces"]]
    notes = []
    for what, documents in (("calibration", builtin()), ("held-out evaluation", heldout())):
        found = overlap(ours, [render(document, None) for document in documents])
        if found.shared:
            notes.append(
                f"{found.shared} of {found.runs} runs of {WORDS} words of the given text stand in the built-in {what} "
                f"text too, such as: {found.example[:80]}"
            )
    return notes
