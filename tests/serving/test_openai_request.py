"""Requests of OpenAI's API as they reach the bindings, the bounds of grammars, and answers made into calls."""

from __future__ import annotations

import json
from typing import Any

import pydantic
import pytest

from apex_quant.serving.grammars import (
    MAX_DEPTH,
    MAX_REPEATED,
    GrammarError,
    calls_grammar,
    check_grammar,
    schema_grammar,
)
from apex_quant.serving.openai_answer import message
from apex_quant.serving.openai_request import BadRequest, Model, rewritten

PLAIN = Model("m", 100)
NATIVE = Model("m", 100, "{{ tools }}{{ tool_calls }}{% if role == 'tool' %}")
TOOLS = [{"type": "function", "function": {"name": "now"}}]
CALL = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": '{"zone": "é"}'}}


def chat(model: Model = PLAIN, **words: Any) -> dict[str, Any]:
    return rewritten("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], **words}, model)[0]


def test_bounds_of_grammars() -> None:
    check_grammar('root ::= "(((" [({] "a"{1000} # (((\n')
    check_grammar("root ::= " + "(" * (MAX_DEPTH - 1))
    check_grammar('root ::= ("a"{20}) "b"{20} ("c"{20})* (("d"+)+ "e")+')
    for bad in (
        "root ::= " + "(" * MAX_DEPTH, "x" * 70_000, 'root ::= "a"{1001}', 'root ::= "a"{0,' + "9" * 5000 + "}",
        'root ::= ("a"{20}){20}', 'root ::= (("a"{20}) "b") {20}', " ".join(['"a"{100}'] * 11),
        'root ::= "\n" ((("a"{0,20}){0,20}){0,20}) "\n"', "root ::= [\n] (([a]{20}){20}) [\n]",
        "root ::= # ends here\r" + "(" * MAX_DEPTH,
    ):  # fmt: skip
        with pytest.raises(GrammarError):
            check_grammar(bad)
    assert MAX_REPEATED == 1000


def test_schemas() -> None:
    assert "root" in schema_grammar({"type": "string", "maxLength": 100})
    deep: Any = {"type": "string"}
    for _ in range(MAX_DEPTH + 1):
        deep = {"type": "array", "items": deep}
    for bad in (deep, {"type": "string", "maxLength": True + 999}, {"enum": ["x" * 70_000]}, {"type": "nothing"}):
        with pytest.raises(GrammarError):
            schema_grammar(bad)


def test_references_are_to_the_function_they_are_in() -> None:
    one, two = (
        {"type": "object", "properties": {"x": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"const": value}}}
        for value in ("first", "second")
    )
    text = calls_grammar([{"name": "a", "parameters": one}, {"name": "b", "parameters": two}], reply=False)
    assert "first" in text
    assert "second" in text
    assert one["properties"] == {"x": {"$ref": "#/$defs/x"}}  # the request's own is left as it was


def test_what_a_template_has_no_words_for_is_written_out() -> None:
    history = [
        {"role": "developer", "content": "Be brief."},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None, "audio": None},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "noon"}]},
    ]
    plain = chat(messages=history, tools=TOOLS)
    system, call, result = plain["messages"]
    assert system["role"] == "system"
    assert system["content"].startswith("Be brief.\n\n")
    assert '"now"' in system["content"]
    assert json.loads(call["content"]) == {"tool_call": {"name": "now", "arguments": {"zone": "é"}}}
    assert (result["role"], json.loads(result["content"])) == ("user", {"tool_response": "noon"})
    native = chat(NATIVE, messages=history, tools=TOOLS)
    system, call, result = native["messages"]
    assert '"now"' not in system["content"]
    assert call == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert result == {"role": "tool", "content": "noon", "tool_call_id": "c1"}


def test_choices() -> None:
    assert "response" in chat(tools=TOOLS)["grammar"]
    assert "response" not in chat(tools=TOOLS, tool_choice="required")["grammar"]
    left = chat(tools=TOOLS, tool_choice="none")
    assert not {"tools", "tool_choice", "grammar"} & set(left)
    other = [*TOOLS, {"type": "function", "function": {"name": "add"}}]
    named = chat(tools=other, tool_choice={"type": "function", "function": {"name": "add"}})
    assert [tool["function"]["name"] for tool in named["tools"]] == ["add"]
    with pytest.raises(BadRequest, match="none of tools"):
        chat(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "add"}})


def test_nothing_is_left_out_in_silence() -> None:
    model = Model("m", 100, fields={"/v1/chat/completions": frozenset({"messages", "model", "seed", "user"})})
    for unknown in ("chat_template_kwargs", "reasoning_effort", "foo"):
        with pytest.raises(BadRequest, match=f"has no {unknown}"):
            chat(model, **{unknown: {"x": 1}})
        assert unknown not in chat(model, **{unknown: None})
    kept = chat(model, seed=1, user="me", store=True, metadata={}, parallel_tool_calls=False, service_tier="auto")
    assert set(kept) == {"messages", "model", "seed", "user"}


def test_stops_are_bounded() -> None:
    for good in (None, "x", ["x"] * 16, ["x" * 256] * 16):
        assert chat(stop=good).get("stop") == good
    for bad in (["x"] * 17, "x" * 4097, ["x" * 257] * 16):
        with pytest.raises(BadRequest, match="stop is at most"):
            chat(stop=bad)
    with pytest.raises(BadRequest, match="texts"):
        chat(logit_bias={f"word {i}": 1 for i in range(2000)}, logit_bias_type="tokens")


def test_a_schema_that_refers_to_itself() -> None:
    """As pydantic writes a model with a field of its own type."""

    class Node(pydantic.BaseModel):
        value: int
        next: Node | None = None

    Node.model_rebuild(_types_namespace={"Node": Node})
    schema = Node.model_json_schema()
    assert "$ref" in schema
    assert '"\\"value\\""' in schema_grammar(schema)
    text = calls_grammar([{"name": "a", "parameters": schema}], reply=True)
    assert '"\\"next\\""' in text
    assert "$ref" in schema  # the request's own is left as it was


def test_limits_have_one_name() -> None:
    assert chat(max_completion_tokens=5)["max_tokens"] == 5
    assert "max_completion_tokens" not in chat(max_completion_tokens=5)
    assert "max_tokens" not in chat(max_tokens=None)
    for wrong in (0, -1, True, "5", 1.5):
        with pytest.raises(BadRequest, match="at least 1"):
            chat(max_tokens=wrong)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('{"tool_call": {"name": "now", "arguments": {"a": "é"}}}', None, [("now", '{"a": "é"}')]),
        ('{"response": "Hi"}', "Hi", []),
        ('{"tool_call": {"name": "no', '{"tool_call": {"name": "no', []),  # cut off
        ("[1]", "[1]", []),
    ],
)
def test_answers(text: str, content: str | None, calls: list[tuple[str, str]]) -> None:
    made = message(text)
    assert made["content"] == content
    found = [(one["function"]["name"], one["function"]["arguments"]) for one in made.get("tool_calls", [])]
    assert found == calls
