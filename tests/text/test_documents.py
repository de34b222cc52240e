"""Every form of a conversation becomes the same document, and what is none is refused by place."""

from __future__ import annotations

import json
from typing import Any

import pytest

from apex_quant.errors import InputError
from apex_quant.text.documents import KINDS, MAX_MESSAGES, Document, document_of

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
CALL = {"name": "f", "arguments": {"a": 1}}
SCHEMA = {"name": "f", "parameters": {"type": "object"}}


def made(row: dict[str, Any]) -> Document:
    document = document_of(row, "x:1")
    assert document is not None
    return document


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ANSWER]},
        {"messages": [USER, ANSWER], "text": "both", "prompt": "p", "response": "r"},
        {"messages": None, "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"prompt": "Hi", "response": "Hello"},
        {"prompt": "Hi", "completion": "Hello", "response": None},
        {"messages": [{**USER, "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}, ANSWER]},
        {"messages": [{**USER, "tool_calls": None, "name": None}, {**ANSWER, "tool_calls": []}], "tools": None},
    ],
)
def test_forms_of_a_conversation(row: dict[str, Any]) -> None:
    assert made(row) == Document("chat", messages=(USER, ANSWER), source="x:1")


def test_text() -> None:
    assert made({"text": "a b", "kind": "long", "lang": "en"}) == Document("long", "en", "a b", source="x:1")
    assert made({"text": "a b", "kind": "sci-fi", "lang": 3}) == Document("text", text="a b", source="x:1")


@pytest.mark.parametrize(
    ("calls", "tools"),
    [
        ([CALL], [SCHEMA]),
        ([{"id": "1", "type": "function", "function": CALL}], [{"type": "function", "function": SCHEMA}]),
        ([{"function": {**CALL, "arguments": json.dumps(CALL["arguments"])}}], json.dumps([SCHEMA])),
    ],
)
def test_forms_of_tool_calls(calls: list[Any], tools: Any) -> None:
    row = {"tools": tools, "messages": [USER, {"role": "assistant", "content": None, "tool_calls": calls}]}
    assert made(row) == Document(
        "tools",
        messages=(USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}),
        tools=(SCHEMA,),
        source="x:1",
    )


def test_reasoning_and_names_are_kept() -> None:
    row = {"messages": [{**ANSWER, "thinking": "hm"}, {"from": "function", "name": "f", "value": "1"}]}
    assert made(row).messages == (
        {**ANSWER, "reasoning_content": "hm"},
        {"role": "tool", "name": "f", "content": "1"},
    )


def test_sizes_count_all_that_is_said() -> None:
    assert made({"text": "añ"}).characters == 2
    assert made({"text": "añ"}).size == 3
    row = {"tools": [SCHEMA], "messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]}
    assert made(row).characters == len("Hi" + json.dumps(CALL) + json.dumps(SCHEMA))


@pytest.mark.parametrize("row", [{"text": " \n"}, {"messages": []}, {"messages": [{**USER, "content": ""}]}])
def test_blank_ones_are_none(row: dict[str, Any]) -> None:
    assert document_of(row, "x:1") is None


DEEP: list[Any] = []
for _ in range(100_000):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["a"], "x:1: must be an object, is a list"),
        ({}, "none of text, messages, conversations, prompt .* its keys are none"),
        ({"prompt": "a", "body": 1}, "its keys are 'prompt', 'body'"),
        ({"text": 3}, "x:1: text must be a string, is a number"),
        ({"text": "a\0b"}, "a NUL character at character 1"),
        ({"text": "a\ud800"}, "half a surrogate pair at character 1"),
        ({"messages": "a"}, "messages must be a list, is a string"),
        ({"messages": [USER] * (MAX_MESSAGES + 1)}, "10001 messages, at most 10000"),
        ({"messages": [1]}, r"x:1: messages\[0\]: must be an object, is a number"),
        ({"messages": [{"content": "a"}]}, r"the role None is not one of system, user"),
        ({"messages": [{"role": "narrator", "content": "a"}]}, "the role 'narrator'"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "the role"),
        ({"messages": [USER, {"role": "assistant"}]}, r"messages\[1\]: has neither content nor tool_calls"),
        ({"messages": [{**USER, "content": {"a": 1}}]}, "content must be a string, is an object"),
        ({"messages": [{**USER, "content": [{"type": "image_url"}]}]}, r"content\[0\] is not text"),
        ({"messages": [{**ANSWER, "tool_calls": {"a": 1}}]}, "tool_calls must be a list"),
        ({"messages": [{**ANSWER, "tool_calls": [{"name": ""}]}]}, r"tool_calls\[0\]: must be an object with name"),
        ({"messages": [{**ANSWER, "tool_calls": [{"name": "f", "arguments": "{"}]}]}, "arguments are not JSON"),
        ({"messages": [{**ANSWER, "tool_calls": [{"name": "f", "arguments": [1]}]}]}, "arguments must be an object"),
        ({"messages": [{**ANSWER, "tool_calls": [{"name": "f", "arguments": {"a": DEEP}}]}]}, "nested too deeply"),
        ({"messages": [{**ANSWER, "tool_calls": [{"name": "f", "arguments": {"a": "\ud800"}}]}]}, "surrogate"),
        ({"messages": [USER], "tools": "["}, "tools are not JSON"),
        ({"messages": [USER], "tools": 3}, "tools must be a list"),
        ({"messages": [USER], "tools": [{"type": "function"}]}, r"tools\[0\] must be an object with a name"),
    ],
)
def test_what_is_no_document(row: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        document_of(row, "x:1")
    assert caught.value.message.startswith("x:1")


def test_kinds_are_those_of_the_mix() -> None:
    assert set(KINDS) == {"chat", "code", "reasoning", "tools", "long", "text"}
