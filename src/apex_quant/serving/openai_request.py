"""Requests of OpenAI's API made into what the bindings' server takes, or refused: nothing is left out in silence.

The bindings know neither tool choices but a named function, nor JSON schemas, nor `max_completion_tokens`. Tools become
a grammar of `{"tool_call": {"name", "arguments"}}` or `{"response": TEXT}` (as llama.cpp does for templates without a
form of their own); `openai_answer` makes OpenAI's messages of what is generated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final

from apex_quant.serving.grammars import GrammarError, calls_grammar, check_grammar, schema_grammar

_UNSUPPORTED: Final = {
    "functions": "functions are out of date: send tools", "function_call": "function_call is out of date: send tools",
    "audio": "this server has no audio", "web_search_options": "this server does not search",
}  # fmt: skip
_BIAS: Final = 100.0
_MOST_BIASES: Final = 1024  # texts to bias, each of which is made tokens while everybody waits
_MOST_STOPS, _STOP_CHARACTERS = 16, 4096  # looked for after each token
_WITHOUT_EFFECT: Final = frozenset({
    "metadata", "modalities", "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_retention",
    "safety_identifier", "service_tier", "store",
})  # fmt: skip
"""Of OpenAI's API, and kept here without doing anything: they change no answer."""


class BadRequest(ValueError):
    """What is wrong with a request, for the client."""


@dataclass(frozen=True)
class Model:
    """What requests are checked against. `vocabulary`: tokens; `template`: of chats, "" without one; `fields`: what the
    bindings read of a request, for each path."""

    alias: str
    vocabulary: int
    template: str = ""
    fields: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def knows(self, *words: str) -> bool:
        """Whether the chat template mentions one of these."""
        return any(word in self.template for word in words)


@dataclass
class Asked:
    """What becomes of the answer to one request. `calls`: what is generated follows calls_grammar(); `usage`: a stream
    ends with the counts of tokens, which the server writes down here; `gone`: nobody waits for the answer any more."""

    calls: bool = False
    usage: bool = False
    gone: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0


ASKED: ContextVar[Asked] = ContextVar("asked")
"""Of the request that is being answered, in every thread and task that works on it."""


def rewritten(path: str, found: Any, model: Model) -> tuple[dict[str, Any], Asked]:
    """The request for the bindings, and what becomes of their answer. Raises BadRequest."""
    if not isinstance(found, dict):
        raise BadRequest("the request body must be a JSON object")
    chat = path.endswith("/chat/completions")
    request, asked = {**found, "model": model.alias}, Asked()
    for key, words in _UNSUPPORTED.items():
        if request.get(key) is not None:
            raise BadRequest(words)
    if request.get("modalities", ["text"]) not in (["text"], None):
        raise BadRequest("this server answers with text alone")
    for key in ("n", "best_of"):
        if request.pop(key, None) not in (None, 1):
            raise BadRequest(f"{key} must be 1: this server makes one answer")
    _limit(request, chat)
    _bias(request, model.vocabulary)
    _stop(request.get("stop"))
    asked.usage = _wants_usage(request)
    try:
        if request.get("grammar") is not None:
            if not isinstance(request["grammar"], str):
                raise BadRequest("grammar must be a text")
            check_grammar(request["grammar"])
        if chat:
            request["messages"] = [_message(one, model) for one in _list(request, "messages")]
            _format(request)
            asked.calls = _tools(request, model)
    except GrammarError as error:
        raise BadRequest(str(error)) from None
    prompt = request.get("prompt", "")
    if not chat and not isinstance(prompt, str):
        if not isinstance(prompt, list) or len(prompt) != 1 or not isinstance(prompt[0], str):
            raise BadRequest("prompt must be one text")
        request["prompt"] = prompt[0]
    return _known(request, model.fields.get(path)), asked


def _known(request: dict[str, Any], fields: frozenset[str] | None) -> dict[str, Any]:
    """What is given of the request; the bindings leave out what they do not know."""
    kept = {key: value for key, value in request.items() if value is not None and key not in _WITHOUT_EFFECT}
    if fields is not None and (unknown := sorted(kept.keys() - fields)):
        raise BadRequest(f"this server has no {', '.join(unknown)[:200]}")
    return kept


def _list(request: dict[str, Any], key: str) -> list[dict[str, Any]]:
    found = request.get(key)
    if not isinstance(found, list) or not found or not all(isinstance(one, dict) for one in found):
        raise BadRequest(f"{key} must be a list of objects")
    return found


def _limit(request: dict[str, Any], chat: bool) -> None:
    """max_tokens under its one name; 0 and less mean no limit to the bindings, and something else to OpenAI."""
    newer = request.pop("max_completion_tokens", None) if chat else None
    limit = request.get("max_tokens")
    if newer is not None and limit is not None and newer != limit:
        raise BadRequest("max_tokens and max_completion_tokens differ")
    limit = limit if newer is None else newer
    if limit is None:
        request.pop("max_tokens", None)
    elif isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise BadRequest("max_tokens must be a whole number of at least 1")
    else:
        request["max_tokens"] = limit


def _bias(request: dict[str, Any], vocabulary: int) -> None:
    bias = request.get("logit_bias")
    if bias is None:
        return
    if not isinstance(bias, dict):
        raise BadRequest("logit_bias must be an object of token ids")
    if len(bias) > _MOST_BIASES and request.get("logit_bias_type") == "tokens":
        raise BadRequest(f"logit_bias has more than {_MOST_BIASES:,} texts")
    for key, value in bias.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not -_BIAS <= value <= _BIAS:
            raise BadRequest(f"logit_bias must be between -{_BIAS:g} and {_BIAS:g}")
        if request.get("logit_bias_type") == "tokens":
            continue
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < vocabulary):
            raise BadRequest(f"logit_bias has token {key[:20]!r}, but ids are 0 to {vocabulary - 1}")


def _stop(given: Any) -> None:
    texts = [one for one in given if isinstance(one, str)] if isinstance(given, list) else [str(given or "")]
    if len(texts) > _MOST_STOPS or sum(map(len, texts)) > _STOP_CHARACTERS:
        raise BadRequest(f"stop is at most {_MOST_STOPS} texts of {_STOP_CHARACTERS:,} characters together")


def _wants_usage(request: dict[str, Any]) -> bool:
    options = request.pop("stream_options", None)
    if options is None:
        return False
    if not request.get("stream") or not isinstance(options, dict):
        raise BadRequest("stream_options is an object, and for streams alone")
    return bool(options.get("include_usage"))


def _message(one: dict[str, Any], model: Model) -> dict[str, Any]:
    """A message as every template takes it: its content a text; what the template has no words for becomes JSON."""
    role, content = one.get("role"), _text(one.get("content"))
    made: dict[str, Any] = {"role": "system" if role == "developer" else role, "content": content}
    if role == "tool":
        name = one.get("tool_call_id")
        if not isinstance(name, str):
            raise BadRequest("a tool's message must have its tool_call_id")
        if model.knows("'tool'", '"tool"'):
            return {**made, "tool_call_id": name}
        return {"role": "user", "content": json.dumps({"tool_response": content}, ensure_ascii=False)}
    if calls := one.get("tool_calls"):
        if role != "assistant" or not isinstance(calls, list):
            raise BadRequest("tool_calls is a list in a message of the assistant")
        calls = [_call(call) for call in calls]
        if model.knows("tool_calls"):
            return {**made, "tool_calls": calls}
        written = [
            json.dumps({"tool_call": {**call["function"], "arguments": arguments(call)}}, ensure_ascii=False)
            for call in calls
        ]
        made["content"] = "\n".join([*([content] if content else []), *written])
    return made


def _text(content: Any) -> str:
    """Of a message; the parts of one are joined, since templates of text models take no parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    raise BadRequest("the content of a message must be a text, or parts of type text")


def _call(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not all(isinstance(function.get(key), str) for key in ("name", "arguments")):
        raise BadRequest("each of tool_calls must have a function with name and arguments, both texts")
    return {"id": str(call.get("id", "")), "type": "function",
            "function": {"name": function["name"], "arguments": function["arguments"]}}  # fmt: skip


def arguments(call: dict[str, Any]) -> Any:
    """Of a tool call as an object, as templates want it; the text itself where it is none."""
    text = call["function"]["arguments"]
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return found if isinstance(found, dict) else text


def _format(request: dict[str, Any]) -> None:
    """A response format with a schema becomes a grammar: the bindings would answer a schema that they cannot read with
    any JSON."""
    given = request.get("response_format")
    if given is None:
        return
    kind = given.get("type") if isinstance(given, dict) else None
    if kind not in ("text", "json_object", "json_schema"):
        raise BadRequest("response_format has type text, json_object or json_schema")
    schema = given.get("schema")
    if kind == "json_schema":
        inner = given.get("json_schema")
        schema = inner.get("schema") if isinstance(inner, dict) else None
        if not isinstance(schema, dict):
            raise BadRequest("response_format json_schema has no schema")
    if kind == "text" or schema is not None:
        del request["response_format"]
    if kind != "text" and request.get("grammar") is not None:
        raise BadRequest("response_format and grammar cannot both be kept")
    if kind != "text" and schema is not None:
        request["grammar"] = schema_grammar(schema)


def _tools(request: dict[str, Any], model: Model) -> bool:
    """Make tools and choice a grammar, and tell the model of them. Whether the answer may be a call."""
    choice = request.pop("tool_choice", None)
    if request.get("tools") in (None, []):
        request.pop("tools", None)
        if choice not in (None, "none", "auto"):
            raise BadRequest("tool_choice goes with tools")
        return False
    functions = [_function(tool) for tool in _list(request, "tools")]
    name = None
    if isinstance(choice, dict):
        named = choice.get("function")
        name = named.get("name") if isinstance(named, dict) else None
        functions = [one for one in functions if one["name"] == name]
        if not functions:
            raise BadRequest(f"tool_choice names {str(name)[:100]!r}, which is none of tools")
    elif choice not in (None, "none", "auto", "required"):
        raise BadRequest("tool_choice is none, auto, required or a function of tools")
    if choice == "none":
        del request["tools"]
        return False
    if request.get("grammar") is not None or request.get("response_format") is not None:
        raise BadRequest("tools go with neither response_format nor grammar; tool_choice none leaves them out")
    reply = choice in (None, "auto")
    request["grammar"] = calls_grammar(functions, reply=reply)
    request["tools"] = [{"type": "function", "function": one} for one in functions]
    listed = [] if model.knows("tools") else [json.dumps(functions, ensure_ascii=False)]
    words = 'Answer with JSON: {"tool_call": {"name": NAME, "arguments": {...}}} to call a function' + (
        ', or {"response": TEXT} to answer.' if reply else "."
    )
    _tell(request["messages"], "\n".join([*(["These functions can be called:"] if listed else []), *listed, words]))
    return True


def _function(tool: dict[str, Any]) -> dict[str, Any]:
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRequest("each of tools must be a function with a name")
    schema = function.get("parameters")
    if schema is not None and not isinstance(schema, dict):
        raise BadRequest("parameters of a function must be a JSON schema")
    description = function.get("description")
    return {"name": function["name"], **({"description": description} if isinstance(description, str) else {}),
            "parameters": schema or {"type": "object", "properties": {}}}  # fmt: skip


def _tell(messages: list[dict[str, Any]], text: str) -> None:
    """Add to the system message, which some templates take at the beginning alone."""
    if messages[0]["role"] == "system":
        messages[0] = {**messages[0], "content": f"{messages[0]['content']}\n\n{text}".lstrip()}
    else:
        messages.insert(0, {"role": "system", "content": text})
