"""The probe and validation texts: five domains each, and nothing of one in the other, in what calibrates or judges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from apex_quant.evaluation.texts import VALIDATION, domain_of, read_texts
from apex_quant.gguf import open_model
from apex_quant.text import Document, builtin, heldout, render
from apex_quant.text.corpus import probe, validation
from apex_quant.text.overlap import overlap

DOMAINS = {"chat", "code", "reasoning", "tools", "prose"}


@pytest.mark.parametrize("read", [probe, validation])
def test_domains(read: Callable[[], list[Document]]) -> None:
    characters = Counter[str]()
    for document in read():
        characters[domain_of(document)] += document.characters
    assert set(characters) == DOMAINS
    assert min(characters.values()) >= 4_500
    texts = [render(document, None) for document in read()]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("others", [builtin, heldout, validation], ids=["calibration", "evaluation", "validation"])
def test_probe_is_disjoint(others: Callable[[], list[Document]]) -> None:
    found = overlap(*([render(document, None) for document in texts()] for texts in (probe, others)))
    assert found.runs > 6_000
    assert found.shared == 0, found.example


@pytest.mark.parametrize("others", [builtin, heldout], ids=["calibration", "evaluation"])
def test_validation_is_disjoint(others: Callable[[], list[Document]]) -> None:
    found = overlap(*([render(document, None) for document in texts()] for texts in (validation, others)))
    assert found.runs > 4_000
    assert found.shared == 0, found.example


def test_validation_by_name() -> None:
    """In the chat format of the model, by domain, as the held-out text."""
    from apex_quant import embedded_model

    with open_model(embedded_model()) as model:
        texts = read_texts(model, [VALIDATION]).texts
    assert {text["name"] for text in texts} == DOMAINS
    chat = next(text for text in texts if text["name"] == "chat")
    assert all(marks and "<|im_start|>" in piece for piece, marks in chat["pieces"])
