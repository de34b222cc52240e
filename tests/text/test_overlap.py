"""13-word overlap."""

from __future__ import annotations

from apex_quant.text import builtin, render
from apex_quant.text.overlap import WORDS, overlap

SENTENCE = "one two three four five six seven eight nine ten eleven twelve thirteen"


def test_counts_runs_of_thirteen_words() -> None:
    found = overlap([f"{SENTENCE} fourteen fifteen"], [f"Before: {SENTENCE.upper()}, fourteen!"])
    assert (found.shared, found.runs, found.share) == (2, 3, 2 / 3)
    assert found.example == SENTENCE


def test_short_texts_and_borders_have_none() -> None:
    assert overlap(["a b c"], ["a b c"]) == (0, 0, "")
    words = SENTENCE.split()
    assert overlap([SENTENCE], [" ".join(words[:7]), " ".join(words[7:])]).shared == 0
    assert overlap(["a b c"], ["a b c"]).share == 0.0


def test_chinese_counts_by_character() -> None:
    text = "今天的天气很好我们一起去公园散步吧"
    found = overlap([text], ["“" + text + "”"])
    assert found.runs == len(text) - WORDS + 1
    assert found.share == 1


def test_the_built_in_corpus_hardly_repeats_itself() -> None:
    """Pieces are written one by one: what a piece shares with all others is little, schemas aside."""
    texts = [render(document, None) for document in builtin() if document.kind != "tools"]
    alone = sum(overlap([text], texts[:i] + texts[i + 1 :]).shared for i, text in enumerate(texts[:20]))
    assert alone <= 0.02 * sum(overlap([text], []).runs for text in texts[:20])
