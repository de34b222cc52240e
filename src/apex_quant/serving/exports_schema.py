"""What other programs document of their files, kept as data, and whether a document keeps to it."""

from __future__ import annotations

import functools
import importlib.resources
import json
import re
from typing import Any, Final

from apex_quant.errors import ApexError

_KINDS: Final[dict[str, tuple[type, ...]]] = {
    "object": (dict,), "array": (list, tuple), "string": (str,), "integer": (int,), "number": (int, float),
    "boolean": (bool,),
}  # fmt: skip


@functools.cache
def targets() -> dict[str, Any]:
    """data/targets.json."""
    text = importlib.resources.files("apex_quant.serving").joinpath("data/targets.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def problems(name: str, document: Any) -> list[str]:
    """Where `document` breaks the schema `name` of targets(); empty where it keeps to it."""
    return list(_walk(targets()[name]["schema"], document, name))


def check(name: str, document: Any) -> None:
    """Raises ApexError (an internal failure) for a document of ours that its target does not document."""
    if found := problems(name, document):
        raise ApexError(
            f"an export for {name} does not keep to what its target documents: {'; '.join(found[:3])}",
            hint=f"the documentation is {targets()[name]['source']}",
        )


def _walk(schema: dict[str, Any], value: Any, where: str) -> list[str]:
    if reference := schema.get("$ref"):
        schema = targets()["definitions"][reference]
    kind = schema.get("type")
    if kind is not None and (not isinstance(value, _KINDS[kind]) or (isinstance(value, bool) and kind != "boolean")):
        return [f"{where} is {type(value).__name__}, not {kind}"]
    found: list[str] = []
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{where} is {value!r}, not one of {', '.join(map(str, schema['enum']))}")
    if "pattern" in schema and not re.search(schema["pattern"], value):
        found.append(f"{where} is {value!r}, which is not of the form {schema['pattern']}")
    if "minimum" in schema and value < schema["minimum"]:
        found.append(f"{where} is {value}, below {schema['minimum']}")
    if "maximum" in schema and value > schema["maximum"]:
        found.append(f"{where} is {value}, above {schema['maximum']}")
    if kind == "array":
        for index, item in enumerate(value):
            found += _walk(schema.get("items", {}), item, f"{where}[{index}]")
    if kind == "object":
        known = schema.get("properties", {})
        found += [f"{where} lacks {key}" for key in schema.get("required", ()) if key not in value]
        for key, item in value.items():
            if key in known:
                found += _walk(known[key], item, f"{where}.{key}")
            elif schema.get("additionalProperties", True) is False:
                found.append(f"{where} has {key}, which is not documented")
    return found


def read_modelfile(text: str) -> dict[str, Any]:
    """An Ollama Modelfile as a document for `check`. Raises ValueError for a line that is no instruction."""
    found: dict[str, Any] = {}
    pattern = re.compile(r'(?P<word>[A-Z]+) +(?:"""(?P<long>.*?)"""|(?P<short>[^\n]*))\n', re.DOTALL)
    position = 0
    while position < len(text):
        if text[position] == "\n" or text[position] == "#":
            position = text.index("\n", position) + 1
            continue
        match = pattern.match(text, position)
        if match is None:
            raise ValueError(f"no instruction at {text[position : position + 40]!r}")
        value = match["long"] if match["long"] is not None else match["short"]
        if match["word"] == "PARAMETER":
            name, _, raw = value.partition(" ")
            parameters = found.setdefault("PARAMETER", {})
            if name == "stop":
                parameters.setdefault("stop", []).append(json.loads(raw))
            else:
                parameters[name] = _number(raw)
        else:
            found[match["word"]] = value
        position = match.end()
    return found


def read_ini(text: str) -> dict[str, dict[str, Any]]:
    """An INI file (systemd unit, llama-server preset) as sections of key and value."""
    found: dict[str, dict[str, Any]] = {}
    section: dict[str, Any] = {}
    for line in text.splitlines():
        if line.startswith("["):
            section = found.setdefault(line.strip("[]"), {})
        elif line and line[0] not in "#;":
            key, separator, value = line.partition("=")
            if not separator:
                raise ValueError(f"no key and value: {line!r}")
            section[key.strip()] = _number(value.strip())
    return found


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text, text)
