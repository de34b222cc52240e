"""A document: one text, or one conversation with its tools, in the one form that everything else here works on.

Data sets write conversations in many ways (OpenAI's messages, ShareGPT's conversations, prompt and response);
`document_of` reads them all from one JSON object, so that loaders only have to find the objects.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from apex_quant.errors import InputError

Json = dict[str, Any]

KINDS: Final = ("chat", "code", "reasoning", "tools", "long", "text")
# ShareGPT's names of the roles, and others that are in use
_ROLES: Final = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "developer": "system",
}
ROLES: Final = ("system", "user", "assistant", "tool")
MAX_MESSAGES: Final = 10_000
_REASONING: Final = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True, slots=True)
class Document:
    """One piece of text. Either `text`, or `messages` (with `tools`), never both.

    A message is {"role", "content"} and, where it has them, "reasoning_content", "name", "tool_calls":
    [{"name", "arguments": {...}}]; content is always a string. `lang` is "" where the source does not say.
    `source` names where it comes from, for messages to the user.
    """

    kind: str
    lang: str = ""
    text: str | None = None
    messages: tuple[Json, ...] = ()
    tools: tuple[Json, ...] = ()
    source: str = ""

    @property
    def characters(self) -> int:
        """Characters of all that is said in it."""
        return sum(map(len, self._said()))

    @property
    def size(self) -> int:
        """UTF-8 bytes of all that is said in it: over languages, nearer to tokens than characters are."""
        return sum(len(part.encode()) for part in self._said())

    def _said(self) -> Iterator[str]:
        if self.text is not None:
            yield self.text
        for message in self.messages:
            yield message["content"]
            yield message.get("reasoning_content", "")
            yield from (json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls", ()))
        yield from (json.dumps(tool, ensure_ascii=False) for tool in self.tools)


def document_of(row: object, where: str) -> Document | None:
    """The document in one JSON object, or None when its text is blank. InputError naming `where`.

    Understood, in this order: "messages", "conversations", "prompt" with "response" or "completion", "text".
    A "kind" that is not one of KINDS is another data set's word and not taken.
    """
    if not isinstance(row, dict):
        raise InputError(f"{where}: must be an object, is {_kind_of(row)}")
    present = {key: value for key, value in row.items() if value is not None}
    form = next((form for needs, form in _FORMS if all(key in present for key in needs)), None)
    if form is None:
        raise InputError(
            f"{where}: none of text, messages, conversations, prompt with response or completion; "
            f"its keys are {', '.join(map(repr, list(row)[:10])) or 'none'}"
        )
    text, messages = form(present, where)
    tools = _tools(present.get("tools"), where) if text is None else ()
    lang = present.get("lang")
    default = "text" if text is not None else "tools" if tools else "chat"
    document = Document(
        kind=present["kind"] if present.get("kind") in KINDS else default,
        lang=lang if isinstance(lang, str) else "",
        text=text,
        messages=messages,
        tools=tools,
        source=where,
    )
    blank = not text.strip() if text is not None else not any(_says(message) for message in messages)
    return None if blank else document


def check_text(text: str, where: str) -> str:
    """The text itself. InputError when it holds NUL or half a surrogate pair, which no tokenizer takes."""
    at = text.find("\0")
    if at >= 0:
        raise InputError(f"{where}: a NUL character at character {at}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: half a surrogate pair at character {error.start}") from None
    return text


def _text(row: Json, where: str) -> tuple[str, tuple[Json, ...]]:
    return _string(row["text"], f"{where}: text"), ()


def _messages(key: str) -> Callable[[Json, str], tuple[None, tuple[Json, ...]]]:
    def read(row: Json, where: str) -> tuple[None, tuple[Json, ...]]:
        found = row[key]
        if not isinstance(found, list):
            raise InputError(f"{where}: {key} must be a list, is {_kind_of(found)}")
        if len(found) > MAX_MESSAGES:
            raise InputError(f"{where}: {len(found)} messages, at most {MAX_MESSAGES}")
        return None, tuple(_message(item, f"{where}: {key}[{i}]") for i, item in enumerate(found))

    return read


def _pair(answer: str) -> Callable[[Json, str], tuple[None, tuple[Json, ...]]]:
    def read(row: Json, where: str) -> tuple[None, tuple[Json, ...]]:
        asked, answered = (_string(row[key], f"{where}: {key}") for key in ("prompt", answer))
        return None, ({"role": "user", "content": asked}, {"role": "assistant", "content": answered})

    return read


_Form = Callable[[Json, str], tuple[str | None, tuple[Json, ...]]]
_FORMS: Final[tuple[tuple[tuple[str, ...], _Form], ...]] = (
    (("messages",), _messages("messages")),
    (("conversations",), _messages("conversations")),
    (("prompt", "response"), _pair("response")),
    (("prompt", "completion"), _pair("completion")),
    (("text",), _text),
)


def _message(item: object, where: str) -> Json:
    if not isinstance(item, dict):
        raise InputError(f"{where}: must be an object, is {_kind_of(item)}")
    role = item.get("role") or item.get("from")
    role = _ROLES.get(role, role) if isinstance(role, str) else None
    if role not in ROLES:
        shown = item.get("role") or item.get("from")
        raise InputError(f"{where}: the role {shown!r} is not one of {', '.join((*ROLES, *_ROLES))}")
    content = item.get("content") if item.get("content") is not None else item.get("value")
    calls = item.get("tool_calls")
    if content is None and not calls:
        raise InputError(f"{where}: has neither content nor tool_calls")
    message: Json = {"role": role, "content": "" if content is None else _content(content, where)}
    reasoning = next((item[key] for key in _REASONING if item.get(key)), None)
    if reasoning is not None:
        message["reasoning_content"] = _string(reasoning, f"{where}: reasoning_content")
    if isinstance(item.get("name"), str) and item["name"]:
        message["name"] = check_text(item["name"], where)
    if calls:
        if not isinstance(calls, list):
            raise InputError(f"{where}: tool_calls must be a list, is {_kind_of(calls)}")
        message["tool_calls"] = [_call(call, f"{where}: tool_calls[{i}]") for i, call in enumerate(calls)]
    return message


def _content(content: object, where: str) -> str:
    """A string, or OpenAI's list of parts, of which only text can be used."""
    if not isinstance(content, list):
        return _string(content, f"{where}: content")
    texts: list[str] = []
    for i, part in enumerate(content):
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise InputError(f"{where}: content[{i}] is not text, the only kind of content that is used here")
        texts.append(_string(part["text"], f"{where}: content[{i}]"))
    return "".join(texts)


def _call(call: object, where: str) -> Json:
    """A tool call, OpenAI's form or the bare one; arguments may be an object or its JSON."""
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise InputError(f"{where}: must be an object with name and arguments")
    arguments = inner.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise InputError(f"{where}: the arguments are not JSON") from None
    if not isinstance(arguments, dict | None):
        raise InputError(f"{where}: arguments must be an object, is {_kind_of(arguments)}")
    return {"name": inner["name"], "arguments": _checked(arguments or {}, where)}


def _tools(tools: object, where: str) -> tuple[Json, ...]:
    """Function schemas without OpenAI's wrapping; some data sets keep the whole list as JSON text."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else []
        except (ValueError, RecursionError):
            raise InputError(f"{where}: tools are not JSON") from None
    if not isinstance(tools, list | None):
        raise InputError(f"{where}: tools must be a list, is {_kind_of(tools)}")
    inner = [tool.get("function", tool) if isinstance(tool, dict) else tool for tool in tools or ()]
    for i, tool in enumerate(inner):
        if not isinstance(tool, dict) or not isinstance(tool.get("name"), str):
            raise InputError(f"{where}: tools[{i}] must be an object with a name")
        _checked(tool, f"{where}: tools[{i}]")
    return tuple(inner)


def _checked(part: Json, where: str) -> Json:
    try:
        check_text(json.dumps(part, ensure_ascii=False), where)
    except RecursionError:
        raise InputError(f"{where}: nested too deeply") from None
    return part


def _string(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where} must be a string, is {_kind_of(value)}")
    return check_text(value, where)


def _says(message: Mapping[str, Any]) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls"))


_NAMES: Final = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}


def _kind_of(value: object) -> str:
    return _NAMES.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
