"""Grammars of requests: JSON schemas made into GBNF, and both bounded before the library's parser sees them.

llama.cpp reads grammars by recursion and copies what is repeated. What is refused here is no grammar that anybody
writes by hand; the client is told why, and nothing was started for it. That a grammar passes says nothing about what it
costs: `grammar_masks` bounds that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

MAX_TEXT: Final = 1 << 16  # characters of a grammar, and of a schema as JSON
MAX_DEPTH: Final = 256  # brackets in one another
MAX_REPEATED: Final = 1000  # the sum of all counts
MAX_NESTED: Final = 256  # the product of counts in one another, which the sampler's time grows with the square of
_TOKEN: Final = re.compile(
    r"#[^\r\n]*|\"(?:\\.|[^\"\\])*\"|\[(?:\\.|[^\]\\])*\]|\{\s*(\d*)\s*(,?)\s*(\d*)\s*\}|[()+]", re.DOTALL
)
_PATTERN_TOKEN: Final = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|\{\s*(\d*)\s*(,?)\s*(\d*)\s*\}|[()+]", re.DOTALL)
_COUNTS: Final = ("minLength", "maxLength", "minItems", "maxItems")


class GrammarError(ValueError):
    """A grammar or schema that cannot be read, or is larger than what is served."""


def check_grammar(text: str) -> None:
    """Raises GrammarError for a grammar that is too large, too deep, or repeats too much."""
    if len(text) > MAX_TEXT:
        raise GrammarError(f"the grammar has {len(text):,} characters, more than {MAX_TEXT:,}")
    _check_repeats(text, _TOKEN, "the grammar")


def _check_repeats(text: str, token: re.Pattern[str], what: str) -> None:
    """Nesting and counts of brackets. A group's own count is known only behind it, so that what a bracket holds is
    kept until its end: the largest product of counts inside. `+` counts as two, since the library writes what it
    repeats twice."""
    inside = [1.0]  # of each open bracket, and of the whole
    total = 0.0
    group, end = 1.0, -1  # what the last bracket held, and where it ended, spaces and comments behind it included
    for match in token.finditer(text):
        word = match[0]
        behind = end >= 0 and not text[end : match.start()].strip()
        repeated = group if behind else 1.0
        if word == "(":
            inside.append(1.0)
            if len(inside) > MAX_DEPTH:
                raise GrammarError(f"{what} has more than {MAX_DEPTH} brackets in one another")
        elif word == ")":
            group = inside.pop() if len(inside) > 1 else 1.0
            inside[-1] = max(inside[-1], group)
            end = match.end()
            continue
        elif word == "+":
            inside[-1] = max(inside[-1], _product(2.0, repeated, what))
        elif word.startswith("{"):
            least, most = (min(float(digits or 0), MAX_REPEATED + 1.0) for digits in match.group(1, 3))
            if match[3] and least > most:
                raise GrammarError(f"{what} repeats at least {match[1][:9]} and at most {match[3][:9]} times")
            total += _product(max(least, most, 1.0), repeated, what)
            if total > MAX_REPEATED:
                raise GrammarError(f"{what} repeats more than {MAX_REPEATED:,} times")
            inside[-1] = max(inside[-1], max(least, most, 1.0) * repeated)
        end = match.end() if behind and word.startswith("#") else -1


def _product(count: float, inner: float, what: str) -> float:
    if inner > 1 and count * inner > MAX_NESTED:
        raise GrammarError(f"{what} repeats more than {MAX_NESTED} times in one another")
    return count * inner


def check_schema(schema: Any) -> None:
    """Raises GrammarError for a JSON schema that would make a grammar too large."""
    try:
        size = len(json.dumps(schema))
    except (RecursionError, ValueError) as error:
        raise GrammarError(f"the JSON schema cannot be read: {error}") from None
    if size > MAX_TEXT:
        raise GrammarError(f"the JSON schema has {size:,} characters, more than {MAX_TEXT:,}")
    level: list[Any] = [schema]
    for _ in range(MAX_DEPTH):
        for one in level:
            if isinstance(one, dict):
                _check_counts(one)
        level = [item for one in level for item in _items(one)]
        if not level:
            return
    raise GrammarError(f"the JSON schema is nested more than {MAX_DEPTH} times")


def _items(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _check_counts(schema: dict[str, Any]) -> None:
    for key in _COUNTS:
        count = schema.get(key)
        # each optional one more is a bracket in the last one
        if isinstance(count, int | float) and not isinstance(count, bool) and not 0 <= count < MAX_DEPTH:
            raise GrammarError(f"the JSON schema has {key} {count}, which is not between 0 and {MAX_DEPTH - 1}")
    pattern = schema.get("pattern")
    if isinstance(pattern, str):
        _check_repeats(pattern, _PATTERN_TOKEN, "a pattern of the JSON schema")


def schema_grammar(schema: Any) -> str:
    """GBNF that admits what `schema` describes. Raises GrammarError."""
    return _converted(_read(schema), {})


def calls_grammar(functions: Sequence[Mapping[str, Any]], *, reply: bool) -> str:
    """GBNF of `{"tool_call": {"name", "arguments"}}` for one of `functions` (each with name and parameters), or with
    `reply` of `{"response": TEXT}` instead. Raises GrammarError."""
    parts: dict[str, Any] = {}
    for index, function in enumerate(functions):
        parts[f"function-{index}"] = _read(function["parameters"])
    every = [
        _object(tool_call=_object(name={"const": function["name"]}, arguments=part))
        for function, part in zip(functions, parts.values(), strict=True)
    ]
    return _converted({"anyOf": [*every, *([_object(response={"type": "string"})] if reply else [])]}, parts)


def _read(schema: Any) -> Any:
    """A copy. A reference at the root, as of a model that refers to itself, becomes the one choice: the converter looks
    for no others beside a reference. Raises GrammarError."""
    check_schema(schema)
    copy = json.loads(json.dumps(schema))
    if isinstance(copy, dict) and "$ref" in copy:
        copy["oneOf"] = [{"$ref": copy.pop("$ref")}]
    return copy


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _converted(schema: Any, parts: Mapping[str, Any]) -> str:
    """`parts`: schemas within `schema`, whose `#/...` references are to themselves; both are changed."""
    from llama_cpp.llama_grammar import SchemaConverter

    class Converter(SchemaConverter):  # type: ignore[misc]
        def _resolve_ref(self, ref: str) -> str:
            """Its own takes references that end alike for the same."""
            name = re.sub(r"[^A-Za-z0-9]+", "-", ref)
            if name not in self._rules and ref not in self._refs_being_resolved:
                self._refs_being_resolved.add(ref)
                name = self.visit(self._refs[ref], name)
                self._refs_being_resolved.remove(ref)
            return name

    converter = Converter(prop_order={}, allow_fetch=False, dotall=False, raw_pattern=False)
    try:
        for name, part in parts.items():
            converter.resolve_refs(part, name)
        converter.visit(converter.resolve_refs(schema, "schema"), "")
        text: str = converter.format_grammar()
    except Exception as error:  # whatever a schema that it was not written for makes it raise
        raise GrammarError(f"the JSON schema cannot be made a grammar: {str(error) or type(error).__name__}") from None
    check_grammar(text)
    return text
