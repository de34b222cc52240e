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

from apex_quant.allocation.sensitivity import Sensitivities
from apex_quant.errors import InputError
from apex_quant.evaluation import texts as evaluation_texts
from apex_quant.evaluation.detokenize import vocabulary
from apex_quant.evaluation.reference import describe
from apex_quant.gguf import GGUFModel
from apex_quant.text import ChatTemplate, Document, builtin, heldout, render
from apex_quant.text.corpus import probe
from apex_quant.text.overlap import WORDS, overlap

BUILTIN = "probe"
VALIDATION = evaluation_texts.VALIDATION


@dataclass(frozen=True)
class ProbeTexts:
    """`texts` as evaluation/steps.py takes them; `name` and `sha256` of their content. `heldout`: how many runs of 13
    words they share with the built-in held-out text, None where that cannot be known."""

    name: str
    texts: tuple[dict[str, Any], ...]
    sha256: str
    notes: tuple[str, ...] = ()
    heldout: int | None = 0

    @property
    def parts(self) -> list[str]:
        """A hash of each text's content, whatever it is called."""
        return [_digest(text["pieces"]) for text in self.texts]


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


def judged_by(texts: ProbeTexts, measured: Sensitivities) -> list[str]:
    """What is to be known of the text that a choice is made by: `texts`, after costs by `measured`."""
    made_costs = set(measured.settings.get("texts", []))
    same = [text["name"] for text, part in zip(texts.texts, texts.parts, strict=True) if part in made_costs]
    return list(texts.notes) + (
        [f"{', '.join(same)} made the costs and chooses between candidates too: what is measured looks too good"]
        if same else []
    )  # fmt: skip


def heldout_read(texts: ProbeTexts | None, measured: Sensitivities) -> str:
    """What a choice has seen of the built-in held-out text, in words. `texts`: those that it was made by, if any."""
    counts = {
        "the sensitivities": 0 if measured.text.name == BUILTIN else measured.settings.get("heldout_runs"),
        "the choice between candidates": texts.heldout if texts is not None else 0,
    }
    found = [f"{count} of its runs of {WORDS} words stand in the text of {what}" for what, count in counts.items()
             if count]  # fmt: skip
    found += [f"what the text of {what} has of it is not known" for what, count in counts.items() if count is None]
    return f"heldout ({'; '.join(found) or 'never read here but for this count'})"


def _given(model: GGUFModel, files: Sequence[str | Path]) -> ProbeTexts:
    read = evaluation_texts.read_texts(model, files)
    name = ", ".join(Path(file).name for file in files)
    notes, heldout = _shared("the given text", [piece[0] for text in read.texts for piece in text["pieces"]])
    return ProbeTexts(name, read.texts, _digest(read.texts), (*read.notes, *notes), heldout)


def stored_text(model: GGUFModel, path: Path) -> ProbeTexts:
    """What a stored reference of `model` (a .apexref, or llama-perplexity's _logits_) was made of, as far as its tokens
    can be read again; it has no `texts`. Raises InputError for a file that is none."""
    _, stored = describe(path, model.path, model)
    if stored is None:
        raise InputError(f"{path}: a model has no text of its own")
    try:
        tokens, decode = stored.tokens.reshape(-1), vocabulary(model.path)
    finally:
        stored.close()
    name, sha256 = f"that of {path.name}", hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest()
    if decode is None:
        note = f"the text of {path.name} cannot be read, so nothing says whether it is the held-out text"
        return ProbeTexts(name, (), sha256, (note,), None)
    notes, heldout = _shared(f"the text of {path.name}", [decode(tokens.tolist())])
    return ProbeTexts(name, (), sha256, tuple(notes), heldout)


def _digest(texts: Any) -> str:
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


def _shared(what: str, ours: Sequence[str]) -> tuple[list[str], int]:
    """(what `ours` have in common with the built-in texts of calibration and evaluation, runs of the latter)."""
    notes, shared = [], 0
    for name, documents in (("calibration", builtin()), ("held-out evaluation", heldout())):
        found = overlap(ours, [render(document, None) for document in documents])
        shared = found.shared  # of the last one, the held-out text
        if found.shared:
            notes.append(
                f"{found.shared} of {found.runs} runs of {WORDS} words of {what} stand in the built-in {name} "
                f"text too, such as: {found.example[:80]}"
            )
    return notes, shared
