"""The probe text: five domains, and nothing of it in what calibrates or in what judges."""

from __future__ import annotations

from collections import Counter

import pytest

from apex_quant.evaluation.texts import domain_of
from apex_quant.text import Document, builtin, heldout, render
from apex_quant.text.corpus import probe
from apex_quant.text.overlap import overlap


def test_domains() -> None:
    characters = Counter[str]()
    for document in probe():
        characters[domain_of(document)] += document.characters
    assert set(characters) == {"chat", "code", "reasoning", "tools", "prose"}
    assert min(characters.values()) >= 5_000
    texts = [render(document, None) for document in probe()]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("others", [builtin(), heldout()], ids=["calibration", "evaluation"])
def test_disjoint(others: list[Document]) -> None:
    ours = [render(document, None) for document in probe()]
    found = overlap(ours, [render(document, None) for document in others])
    assert found.runs > 6_000
    assert found.shared == 0, found.example
