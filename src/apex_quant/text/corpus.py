"""Original text that ships in this package: the built-in corpus, which calibrates, held-out text, which judges, probe
text, on which sensitivities are measured, and validation text, by which recipes are chosen.

No two of them share a run of 13 words (tests count them). The name of a file, but for the corpus, is its domain.

`python -m apex_quant.text` prints the statistics.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib import resources
from typing import NamedTuple

from apex_quant.errors import InputError
from apex_quant.text.documents import KINDS, Document, document_of


class Share(NamedTuple):
    """How much there is of one kind in one language."""

    kind: str
    lang: str
    pieces: int
    characters: int


def builtin() -> list[Document]:
    """All documents of the built-in corpus, by file name and line. InputError for a line that breaks the form."""
    return _documents("corpus", "builtin")


def heldout() -> list[Document]:
    """All documents of the held-out text, by file name and line; `source` is 'heldout/DOMAIN.jsonl:LINE'."""
    return _documents("heldout", "heldout")


def probe() -> list[Document]:
    """All documents that sensitivities are measured on, in the same form; `source` is 'probe/DOMAIN.jsonl:LINE'."""
    return _documents("probe", "probe")


def validation() -> list[Document]:
    """All documents that measured recipes are chosen by; `source` is 'validation/DOMAIN.jsonl:LINE'."""
    return _documents("validation", "validation")


def _documents(folder: str, label: str) -> list[Document]:
    files = resources.files("apex_quant.text").joinpath(folder).iterdir()
    named = {file.name: file for file in files if file.name.endswith(".jsonl")}
    found: list[Document] = []
    for name in sorted(named):
        for number, line in enumerate(named[name].read_text(encoding="utf-8").split("\n"), 1):
            if not line:
                continue
            where = f"{label}/{name}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{where}: is not JSON: {error}") from None
            document = document_of(row, where)
            if document is None or row.get("kind") not in KINDS or not document.lang:
                raise InputError(f"{where}: a piece needs text, one of the kinds {', '.join(KINDS)}, and a lang")
            found.append(document)
    return found


def statistics(documents: Iterable[Document]) -> list[Share]:
    """Pieces and characters by kind and language, kinds in the order of KINDS, largest language first."""
    table: dict[tuple[str, str], list[int]] = {}
    for document in documents:
        counts = table.setdefault((document.kind, document.lang), [0, 0])
        counts[0] += 1
        counts[1] += document.characters
    shares = [Share(*key, *counts) for key, counts in table.items()]
    return sorted(shares, key=lambda share: (KINDS.index(share.kind), -share.characters, share.lang))


def table(documents: Iterable[Document]) -> str:
    """The statistics as a Markdown table with a sum."""
    shares = statistics(documents)
    total = Share("all", "", sum(s.pieces for s in shares), sum(s.characters for s in shares))
    rows = [f"| {s.kind} | {s.lang} | {s.pieces} | {s.characters} |" for s in (*shares, total)]
    return "\n".join(["| kind | language | pieces | characters |", "|---|---|---:|---:|", *rows])
