"""Divergence of two streams, and a conversation with the embedded model beside itself and beside another tier."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apex_quant import embedded_model
from apex_quant.errors import ResourceError
from apex_quant.serving.chat import Conversation, chat, diverge

PIECES = st.lists(st.text("abé ", min_size=1, max_size=3), max_size=8)


@given(PIECES, PIECES)
def test_diverge(a: list[str], b: list[str]) -> None:
    found = diverge(a, b)
    first, second = "".join(a), "".join(b)
    if found is None:
        assert first == second
        return
    n = found.characters
    assert first[:n] == second[:n] == found.common
    assert first[n : n + 1] != second[n : n + 1]
    assert first[n:].startswith(found.a)
    assert second[n:].startswith(found.b)
    assert bool(found.a) == (len(first) > n)
    assert len("".join(a[: found.pieces])) <= n
    assert found.sentence


def test_examples() -> None:
    found = diverge(["The", " cat", " sat"], ["The", " cat", " ran"])
    assert found is not None
    assert (found.characters, found.pieces, found.common, found.a, found.b) == (8, 2, "The cat ", "sat", "ran")
    other = diverge(["ab"], ["a", "b", "c"])
    assert other is not None
    assert (other.a, other.b) == ("", "c")
    assert "its end and 'c'" in other.sentence


@pytest.mark.slow
def test_two_files_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    heard: dict[int, str] = {0: "", 1: ""}

    def hear(side: int, piece: str) -> None:
        heard[side] += piece

    with chat(embedded_model(), vs=embedded_model(), ctx=256, threads=1, system="Be kind.") as conversation:
        reply = conversation.ask("Hello", max_tokens=12, on_text=hear)
        assert reply.divergence is None
        assert reply.texts[0] == reply.texts[1] == heard[0] == heard[1]
        assert len(conversation.messages) == 3
        again = conversation.ask("Hello", max_tokens=12)
        assert again.to_json()["divergence"] is None
        long = "word " * 400
        with pytest.raises(ResourceError, match="context"):
            conversation.ask(long)
        assert len(conversation.messages) == 5
        conversation.forget()
        assert conversation.ask("Hello", max_tokens=12).texts == reply.texts
        conversation.services[0].stop()
        with pytest.raises(ResourceError, match="stopped answering"):
            conversation.ask("Hello")
    assert isinstance(conversation, Conversation)
