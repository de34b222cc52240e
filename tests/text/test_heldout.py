"""The held-out text: five domains, its form, and nothing of it in what calibrates."""

from __future__ import annotations

from collections import Counter

from apex_quant.evaluation.texts import domain_of
from apex_quant.text import builtin, heldout, render
from apex_quant.text.overlap import WORDS, overlap


def test_domains() -> None:
    pieces = Counter(domain_of(document) for document in heldout())
    characters = Counter[str]()
    for document in heldout():
        characters[domain_of(document)] += document.characters
    assert set(pieces) == {"chat", "code", "reasoning", "tools", "prose"}
    assert min(pieces.values()) >= 20
    assert min(characters.values()) >= 50_000


def test_nothing_stands_in_it_twice() -> None:
    texts = [render(document, None) for document in heldout()]
    assert len(set(texts)) == len(texts)


def test_nothing_of_it_calibrates() -> None:
    ours = [render(document, None) for document in heldout()]
    found = overlap(ours, [render(document, None) for document in builtin()])
    assert found.runs > 30_000
    assert found.shared == 0, found.example
    # the same check finds what is there: 13 words of one piece behind one another
    words = ours[0].split()[: WORDS * 3]
    assert overlap([" ".join(words)], ours).shared > 0
