"""How a conversation is put to a template, from the richest form to the one that every template takes.

Templates differ in what they understand: some know no tools, or no system role, want turns to alternate, or expect
tool arguments as JSON text. Each form says more in plain words than the one before; the first one whose rendering
loses nothing is taken. The last resort is a transcript without any template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Final

from apex_quant.text.documents import Document

Json = dict[str, Any]
Messages = list[Json]

_CALL: Final = "<tool_call>\n{}\n</tool_call>"
_RESULT: Final = "<tool_response>\n{}\n</tool_response>"
_WORD: Final = re.compile(r"\w+")


def native(document: Document) -> Json:
    """OpenAI's form, as transformers documents it: tool schemas and calls wrapped, arguments as objects."""
    messages: Messages = []
    waiting: list[str] = []  # ids of calls that have no result yet; Mistral's templates want nine characters
    for message in document.messages:
        made: Json = {"role": message["role"], "content": message["content"]}
        if "name" in message:
            made["name"] = message["name"]
        if "reasoning_content" in message:
            made |= dict.fromkeys(("reasoning_content", "thinking"), message["reasoning_content"])
        if "tool_calls" in message:
            waiting = [f"call{len(messages):03d}{i:02d}" for i in range(len(message["tool_calls"]))]
            made["tool_calls"] = [
                {"id": name, "type": "function", "function": dict(call)}
                for name, call in zip(waiting, message["tool_calls"], strict=True)
            ]
        if message["role"] == "tool" and waiting:
            made["tool_call_id"] = waiting.pop(0)
        messages.append(made)
    tools = [{"type": "function", "function": tool} for tool in document.tools]
    return {"messages": messages, "tools": tools or None}


def arguments_as_text(document: Document) -> Json:
    """As `native`, with the arguments of calls as JSON text, which is what goes over OpenAI's wire."""
    request = native(document)
    for message in request["messages"]:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = _json(call["function"]["arguments"])
    return request


def no_tools_listed(document: Document) -> Json:
    """As `native`, with an empty list where there are no tools: templates for tools alone walk through it."""
    request = native(document)
    return {**request, "tools": request["tools"] or []}


def tools_as_text(document: Document) -> Json:
    """Schemas in the system message, calls and results in what assistant and user say."""
    messages: Messages = []
    for message in document.messages:
        calls = [_CALL.format(_json(call)) for call in message.get("tool_calls", ())]
        said = [message["content"]] if message["content"] else []
        made = {**message, "content": "\n".join([*said, *calls])}
        made.pop("tool_calls", None)
        if message["role"] == "tool":
            made = {"role": "user", "content": _RESULT.format(message["content"])}
        messages.append(made)
    if document.tools:
        schemas = "\n".join(["Functions that can be called:", *map(_json, document.tools)])
        if messages and messages[0]["role"] == "system":
            messages[0]["content"] = f"{messages[0]['content']}\n\n{schemas}"
        else:
            messages.insert(0, {"role": "system", "content": schemas})
    return {"messages": messages, "tools": None}


def turns_merged(document: Document) -> Json:
    """As `tools_as_text`, with what the system says in the user's turn, and only turns that alternate."""
    merged: Messages = []
    for message in tools_as_text(document)["messages"]:
        role = "user" if message["role"] == "system" else message["role"]
        if merged and merged[-1]["role"] == role:
            merged[-1]["content"] += f"\n\n{message['content']}"
        else:
            merged.append({"role": role, "content": message["content"]})
    return {"messages": merged, "tools": None}


# what is said of documents that took a later form than the first
FORMS: Final[tuple[tuple[str, Callable[[Document], Json]], ...]] = (
    ("", native),
    ("tool arguments as JSON text", arguments_as_text),
    ("an empty list of tools", no_tools_listed),
    ("tools, calls and results as plain text", tools_as_text),
    ("turns merged until they alternate", turns_merged),
)
PLAIN: Final = "plain transcript without the template"


def plain(document: Document) -> str:
    """A transcript: 'role: content', a blank line between turns. A text as it is."""
    if document.text is not None:
        return document.text
    turns = []
    for message in tools_as_text(document)["messages"]:
        thought = [message["reasoning_content"]] if message.get("reasoning_content") else []
        turns.append(f"{message['role']}: " + "\n".join([*thought, message["content"]]))
    return "\n\n".join(turns) + "\n"


def missing(document: Document, text: str) -> str:
    """What of the document the rendered text lacks, or ''. A test by words, since templates may quote and trim.

    What the assistant says is not asked for: templates leave out the thoughts of earlier turns on purpose.
    """
    for tool in document.tools:
        if tool["name"] not in text or _longest_word(str(tool.get("description", ""))) not in text:
            return "tool schemas"
    for message in document.messages:
        if any(call["name"] not in text for call in message.get("tool_calls", ())):
            return "tool calls"
        if message["role"] != "assistant" and _longest_word(message["content"]) not in text:
            return f"what the {message['role']} says"
    return ""


def _longest_word(text: str) -> str:
    return max(_WORD.findall(text), key=len, default="")


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
