"""`load_config`: the keys of `apex run` from a YAML file, from the command line or both.

config = load_config("run.yaml", {"evaluate.suite": "all"})      # what the command line says wins
config = load_config(None, {"source": "Qwen/Qwen3.5-35B-A3B", "tiers": ["i-quality"], "sizes": ["12GB"]})

What is wrong is said before anything is done, all of it at once: the key, its line, and what it may have meant.
A per-model file of the published project is read as well (migration.py), and what each key became is said.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ValidationError

from apex_quant.errors import InputError, UsageError, did_you_mean
from apex_quant.pipeline.keys import (
    CODE_TASKS,
    DEFAULT_TIERS,
    HARNESS_TASKS,
    METRICS,
    PHASES,
    Convert,
    Phase,
    Phases,
    RunConfig,
    Section,
)
from apex_quant.pipeline.migration import is_published, migrate, published_keys
from apex_quant.pipeline.values import SOURCE_ID
from apex_quant.pipeline.yaml_text import Key, Located, read_yaml

__all__ = [
    "CODE_TASKS", "DEFAULT_TIERS", "HARNESS_TASKS", "METRICS", "PHASES", "Convert", "Phase", "Phases", "RunConfig",
    "Section", "anywhere", "is_word", "load_config", "make_config", "sections",
]  # fmt: skip

_MOST_PROBLEMS: Final = 5
_LONGEST: Final = 600  # characters of one
_HINT: Final = "docs/config.md has every key; apex run --init writes a commented example"
# pydantic's names of problems -> what to say
_MUST: Final = {
    "string_type": "must be text",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "tuple_type": "must be a list",
    "dict_type": "must be lines of KEY: VALUE",
    "model_type": "must be a section with keys of its own",
}
_ONE_OF: Final = ("phase", "from", "only")  # one of them given on the command line replaces another in the file
# keys that name files -> words in their place that are none
_FILES: Final[dict[str, re.Pattern[str]]] = {
    "source": SOURCE_ID,
    "work": re.compile(r"(?!)"),
    "tiers": re.compile(r".*(?<!\.toml)", re.IGNORECASE),
    "convert.python": re.compile(r"[^/]+"),
    "convert.mmproj": re.compile(r"[^:]+/[^:]+:.+|[^/.]*"),
    "reference.text": re.compile(r"(?!)"),
    "calibrate.corpus": re.compile(r"builtin|hub:.*"),
    "calibrate.imatrix": re.compile(r"(?!)"),
    "optimize.sensitivity": re.compile(r"measure"),
    "evaluate.task_files": re.compile(r"hub:.*"),
}


def load_config(
    path: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    say: Callable[[str], None] | None = None,
) -> RunConfig:
    """The configuration in the YAML file `path`, with `overrides` in place of its own: nested as the file, or by
    dotted keys ("evaluate.suite"); a section in them changes the keys that it names and leaves the others.

    Names of files in it are relative to its folder. `say` gets a line for each key of a published file: what it
    became. Raises InputError for what is wrong in the file, with lines, and UsageError for what is wrong in
    `overrides`.
    """
    if path is None:
        return make_config({}, overrides)
    path = Path(path)
    found = read_yaml(path)
    values, lines, where = found.values, found.lines, str(path)
    if is_published(values, where, RunConfig.model_fields):
        values, notes = migrate(values, where)
        lines = _lines_of_published(values, found)
        for note in notes if say else ():
            assert say is not None
            say(note)
    values = _beside(values, path.parent)
    return make_config(values, overrides, where=where, lines=lines)


def make_config(
    values: Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    *,
    where: str = "",
    lines: Mapping[Key, int] | None = None,
) -> RunConfig:
    """Nested `values` and dotted `overrides`, checked. `where` and `lines` tell where `values` come from."""
    merged = _sections_given(values)
    given = dict(_flat(overrides or {}))
    phases = merged.get("phases")
    if isinstance(phases, dict) and any(("phases", name) in given for name in _ONE_OF):
        merged["phases"] = {name: value for name, value in phases.items() if name not in _ONE_OF}
    for dotted, value in given.items():
        _put(merged, dotted, value)
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        problems = dict(_problems(error, merged))  # one for each key: a union tells of every member
    told, in_file = [], False
    for key, text in reversed(problems.items()):
        theirs = any(key[: len(one)] == one for one in given)
        in_file = in_file or (bool(where) and not theirs)
        line = next((lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in lines), None) if lines else None
        place = f"line {line}: " if line and not theirs and text != "is needed" else ""
        told.append(f"{place}{'.'.join(str(part)[:60] for part in key)}{':' if key else ''} {text}")
    if len(told) > _MOST_PROBLEMS:
        told = [*told[:_MOST_PROBLEMS], f"and {len(told) - _MOST_PROBLEMS} more"]
    message = "; ".join(told)
    if in_file:
        raise InputError(f"{where}: {message}", hint=_HINT)
    raise UsageError(message, hint=_HINT)


def is_word(key: str, value: str) -> bool:
    """Whether a value of a key that names files is a word in their place: builtin, hub:NAME."""
    return bool(_FILES[key].fullmatch(value))


def anywhere(config: RunConfig) -> dict[str, Any]:
    """All keys as to_json() has them, with absolute names of files: they mean the same from every folder."""
    return _beside(config.to_json(), Path.cwd())


def sections(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section with its dotted name, the whole ('') first."""
    yield prefix, model
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from sections(field.annotation, f"{prefix}.{name}".lstrip("."))


# --- problems in words ---


def _problems(error: ValidationError, values: Mapping[str, Any]) -> Iterator[tuple[Key, str]]:
    """Keys, and what is wrong with them."""
    for problem in reversed(error.errors()):  # a dict keeps the last of equal keys: the first problem
        kind, full = problem["type"], tuple(problem["loc"])
        key = full if kind in ("missing", "extra_forbidden") else _there(full, values)
        if kind == "extra_forbidden":
            known, name = _known_keys(full[:-1]), str(full[-1])
            text = f"is not known.{did_you_mean(name, known)}{_elsewhere(name) if name not in known else ''}"
        elif kind == "missing":
            text = "is needed"
        elif kind in _MUST:
            text = f"{_MUST[kind]}, is {_shown(problem['input'])}"
            if kind == "string_type" and not isinstance(problem["input"], list | dict):
                text += ": put it in quotes"
        elif kind == "literal_error":
            expected = str(problem["ctx"]["expected"])
            text = f"must be {expected}, is {_shown(problem['input'])}."
            text += did_you_mean(str(problem["input"]), re.findall(r"'([^']+)'", expected))
        else:
            text = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
            if not problem["msg"].startswith("Value error"):
                text += f", is {_shown(problem['input'])}"
        yield key, text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, bool) else str(value).lower()
    return text if len(text) <= 60 else text[:57] + "..."


def _there(key: Key, values: Any) -> Key:
    """The part of a key that leads through the values: pydantic adds the kind that it tried."""
    for number, part in enumerate(key):
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            return key[:number]
    return key


def _known_keys(section: Key) -> list[str]:
    model = dict(sections()).get(".".join(map(str, section)))
    return [field.alias or name for name, field in model.model_fields.items()] if model else []


def _elsewhere(name: str) -> str:
    """A key that another section has."""
    homes = [f"{prefix}.{name}".lstrip(".") for prefix, model in sections() if name in model.model_fields]
    return f" There is {' and '.join(homes)}." if homes else ""


# --- merging ---


def _sections_given(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A copy; a section of which everything is commented out is null to YAML and means the defaults."""
    known = dict(sections())
    copied: dict[str, Any] = {}
    for name, value in values.items():
        inner = f"{prefix}.{name}".lstrip(".")
        if inner in known and value is None:
            continue
        copied[name] = _sections_given(value, inner) if inner in known and isinstance(value, Mapping) else value
    return copied


def _flat(overrides: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[tuple[str, ...], Any]]:
    """Dotted keys and nested sections: (key, value). Paths become text, which the keys hold."""
    known = dict(sections())
    for name, value in overrides.items():
        inner = f"{prefix}.{name}".lstrip(".")
        if inner in known and isinstance(value, Mapping):
            yield from _flat(value, inner)
        elif inner not in known or value is not None:
            yield tuple(inner.split(".")), _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return {name: _plain(one) for name, one in value.items()} if isinstance(value, Mapping) else value


def _put(values: dict[str, Any], key: tuple[str, ...], value: Any) -> None:
    for part in key[:-1]:
        inner = values.setdefault(part, {})
        if not isinstance(inner, dict):
            return  # what the file has there is no section, which validation will say
        values = inner
    values[key[-1]] = value


def _beside(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The same with names of files relative to `folder`."""
    moved = _sections_given(values)

    def place(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [place(name, one) for one in value]
        if isinstance(value, dict):
            return {inner: place(name, one) for inner, one in value.items()}
        if not isinstance(value, str) or not value:
            return value
        parts = [part.strip() for part in value.split(",")] if name == "tiers" else [value]
        return ",".join(str(folder / Path(part).expanduser()) if is_file(name, part) else part for part in parts)

    def is_file(name: str, value: str) -> bool:
        return not is_word(name, value) or (name == "source" and (folder / value).exists())

    for name in _FILES:
        *outer, last = name.split(".")
        section: Any = moved
        for part in outer:
            section = section.get(part) if isinstance(section, dict) else None
        if isinstance(section, dict) and last in section:
            section[last] = place(name, section[last])
    return moved


def _lines_of_published(values: Mapping[str, Any], found: Located) -> dict[Key, int]:
    """Lines of the published keys that new ones came from."""
    lines: dict[Key, int] = {}

    def walk(inner: Any, key: Key) -> None:
        if isinstance(inner, Mapping):
            for name, value in inner.items():
                walk(value, (*key, name))
        for old in published_keys(".".join(map(str, key))):
            if (old,) in found.lines:
                lines.setdefault(key, found.lines[(old,)])

    walk(values, ())
    return lines
