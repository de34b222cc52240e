"""Records golden.json: what transformers renders for the templates in templates/.

Run by hand, in an environment with transformers (5.23.0 made the present file): python tests/text/record_golden.py
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from apex_quant.text import sandbox
from apex_quant.text.documents import document_of
from apex_quant.text.forms import arguments_as_text, native

HERE = Path(__file__).parent
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
SCHEMA = {
    "name": "get_weather",
    "description": "Weather of a <place> & its 'mood'",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "unit": {"enum": ["°C", "°F"]}},
        "required": ["city"],
    },
}
CALL = {"name": "get_weather", "arguments": {"city": "Málaga <b>", "days": 2, "deep": {"x": [1.5, None, True]}}}
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "chat": {
        "messages": [
            {"role": "user", "content": "Is 1 < 2 && 'a' == \"a\"?\n\n  Indented 你好."},
            {"role": "assistant", "content": "<think>Easy.</think>\n\nYes & no."},
            {"role": "user", "content": "¿Y en español?"},
            {"role": "assistant", "content": "Sí.", "reasoning_content": "Same again."},
        ]
    },
    "system": {
        "messages": [
            {"role": "system", "content": "Be brief.\n"},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": " Hello "},
        ]
    },
    "tools": {
        "tools": [SCHEMA, {**SCHEMA, "name": "get_tide"}],
        "messages": [
            {"role": "system", "content": "Use functions."},
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "tool_calls": [CALL, {"name": "get_tide", "arguments": {}}]},
            {"role": "tool", "name": "get_weather", "content": '{"temp": 21, "sky": "klar"}'},
            {"role": "tool", "name": "get_tide", "content": "error: <no sea>"},
            {"role": "assistant", "content": "21 °C."},
        ],
    },
}


def requests() -> dict[str, dict[str, Any]]:
    """What templates get, by name: every conversation natively, tool arguments as JSON text too."""
    documents = {name: document_of(conversation, name) for name, conversation in CONVERSATIONS.items()}
    made = {name: native(document) for name, document in documents.items() if document is not None}
    assert documents["tools"] is not None
    return {**made, "tools, arguments as text": arguments_as_text(documents["tools"])}


def record() -> dict[str, Any]:
    """{template: {conversation: text, or null where the template raises}}."""
    import transformers.utils.chat_template_utils as reference

    class Frozen(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return sandbox.TODAY

    reference.datetime = Frozen
    golden: dict[str, Any] = {}
    for path in sorted((HERE / "templates").glob("*.jinja")):
        for name, request in requests().items():
            try:
                rendered = reference.render_jinja_template(
                    [request["messages"]], tools=request["tools"], chat_template=path.read_text("utf-8"), **TOKENS
                )
                golden.setdefault(path.stem, {})[name] = rendered[0][0]
            except Exception:
                golden.setdefault(path.stem, {})[name] = None
    return golden


if __name__ == "__main__":
    text = json.dumps(record(), ensure_ascii=False, indent=1)
    (HERE / "golden.json").write_text(text + "\n", "utf-8")
