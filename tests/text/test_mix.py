"""Mixes: read with care, and any beginning of a mixed sequence has the shares that were asked for."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apex_quant.errors import UsageError
from apex_quant.text import DEFAULT_MIX, KINDS, Document, builtin, mixed, parse_mix
from apex_quant.text.mix import utf8_bytes


def test_parse() -> None:
    assert parse_mix("chat=30,code=25,reasoning=25,tools=20") == pytest.approx(
        {"chat": 0.3, "code": 0.25, "reasoning": 0.25, "tools": 0.2}
    )
    assert parse_mix(" long = 100 ") == {"long": 1.0}
    assert parse_mix("chat=33.33,code=33.33,text=33.34") == pytest.approx(
        {"chat": 0.3333, "code": 0.3333, "text": 0.3334}
    )
    assert sum(parse_mix(DEFAULT_MIX).values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chta=100", r"'chta' is no kind of text\. Did you mean chat\?"),
        ("", "'' is no kind"),
        ("chat=50,chat=50", "names chat twice"),
        ("chat", "share of chat must be"),
        ("chat=x", "share of chat must be"),
        ("chat=nan", "share of chat must be"),
        ("chat=-5,code=105", "share of chat must be"),
        ("chat=0,code=100", "share of chat must be"),
        ("chat=30,code=30", "make 60, not 100"),
    ],
)
def test_parse_refuses(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_mix(text)


PIECES = st.lists(
    st.tuples(st.sampled_from(KINDS), st.sampled_from(["en", "es", "zh"]), st.integers(1, 400)), min_size=1, max_size=60
)


def documents_of(pieces: list[tuple[str, str, int]]) -> list[Document]:
    return [Document(kind, lang, "x" * size, source=str(i)) for i, (kind, lang, size) in enumerate(pieces)]


@given(PIECES, st.integers(0, 5), st.data())
def test_each_once_and_shares_hold_in_any_beginning(
    pieces: list[tuple[str, str, int]], seed: int, data: st.DataObject
) -> None:
    documents = documents_of(pieces)
    present = sorted({document.kind for document in documents})
    weights = {kind: data.draw(st.integers(1, 10)) / 10 for kind in present}
    order = list(mixed(documents, weights, seed))
    assert Counter(order) == Counter(documents)
    taken = dict.fromkeys(present, 0.0)
    left = Counter(document.kind for document in documents)
    largest = {kind: max(d.size for d in documents if d.kind == kind) for kind in present}
    for document in order:
        kind = document.kind
        taken[kind] += document.size
        left[kind] -= 1
        # a kind is never ahead of one that still has documents by more than the largest of these
        for other in present:
            if left[other]:
                assert taken[kind] / weights[kind] <= (taken[other] + largest[other]) / weights[other] + 1e-6


@given(PIECES, st.integers(0, 5), st.randoms(use_true_random=False))
def test_the_same_seed_gives_the_same_order(pieces: list[tuple[str, str, int]], seed: int, chance: object) -> None:
    documents = documents_of(pieces)
    assert list(mixed(documents, None, seed)) == list(mixed(documents, None, seed))


def test_seeds_differ() -> None:
    documents = documents_of([("chat", "en", 10)] * 50)
    orders = {tuple(d.source for d in mixed(documents, {"chat": 1.0}, seed)) for seed in range(5)}
    assert len(orders) == 5


def test_the_built_in_corpus_follows_the_default_mix() -> None:
    weights = parse_mix(DEFAULT_MIX)
    taken: Counter[str] = Counter()
    langs: set[str] = set()
    for document in mixed(builtin(), weights, seed=1):
        taken[document.kind] += document.size
        langs.add(document.lang)
        if taken.total() > 60_000:
            break
    assert langs >= {"en", "es", "de", "fr", "zh"}
    for kind, weight in weights.items():
        assert taken[kind] / taken.total() == pytest.approx(weight, abs=0.12)


def test_kinds_without_share_are_left_out_and_missing_ones_told() -> None:
    documents = documents_of([("chat", "en", 10), ("code", "en", 10)])
    assert [d.kind for d in mixed(documents, {"code": 1.0})] == ["code"]
    assert [d.kind for d in mixed(documents, {"code": 1.0, "tools": 0.0})] == ["code"]
    with pytest.raises(UsageError, match="asks for tools and long, but the text has none") as caught:
        mixed(documents, {"chat": 0.4, "tools": 0.3, "long": 0.3})
    assert "it has chat, code" in str(caught.value.hint)


def test_a_size_of_ones_own() -> None:
    documents = documents_of([("chat", "en", 1)] * 10 + [("code", "en", 300)] * 10)
    first = [d.kind for d in mixed(documents, {"chat": 0.5, "code": 0.5}, size=lambda document: 1)][:10]
    assert Counter(first) == {"chat": 5, "code": 5}
    assert utf8_bytes(documents[0]) == 1
