"""YAML from strangers: mappings, lists, text, numbers, true and false, null, and the line of each; nothing else.

PyYAML's safe loader reads it. What that loader would still do is bounded or refused here: aliases that grow a few
bytes to gigabytes, depth that exhausts the stack, tags that make dates or sets, numbers of thousands of digits, and
keys given twice, of which it silently takes the last.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from apex_quant.errors import InputError

MAX_BYTES: Final = 1 << 18
MAX_DEPTH: Final = 16
MAX_VALUES: Final = 2_000  # with aliases followed
MAX_TEXT: Final = 4096  # characters of a value or key
MAX_PLAIN: Final = 64  # and of a number
_TAGS: Final = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null"))

Key = tuple[str | int, ...]


@dataclass(frozen=True)
class Located:
    """Values of a file and the line (from 1) of each, by the keys that lead to it."""

    values: dict[str, Any]
    lines: dict[Key, int]


def read_yaml(path: str | Path) -> Located:
    """The mapping in a file. Raises InputError with the line, for what cannot be read, parsed or is too much."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if len(raw) > MAX_BYTES:
        raise InputError(f"{path}: longer than {MAX_BYTES >> 10} KiB, not a configuration")
    try:
        return parse_yaml(raw.decode("utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise InputError(f"{path}, line {line}: not UTF-8 text") from None


def parse_yaml(text: str, where: str) -> Located:
    """The mapping in a text; `where` names it in errors. An empty text is an empty mapping."""
    values, lines = _parsed(text, where)
    if values is None and not lines:
        return Located({}, {})
    if not isinstance(values, dict):
        raise InputError(f"{where}, line 1: must be lines of KEY: VALUE", hint="apex run --init writes an example")
    return Located(values, lines)


def parse_value(text: str, where: str) -> Any:
    """A text that is one value of any kind; null where it is empty. Raises InputError as parse_yaml."""
    return _parsed(text, where)[0]


def _parsed(text: str, where: str) -> tuple[Any, dict[Key, int]]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses depth and length while the tree is built: deeper trees would end in the interpreter's own limit."""

        depth = 0
        nodes = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.depth += 1
            self.nodes += 1
            if self.nodes > 2 * MAX_VALUES:  # keys are nodes too
                raise InputError(f"{where}, line {self.line + 1}: more than {MAX_VALUES} values, aliases included")
            if self.depth > MAX_DEPTH:
                raise InputError(f"{where}, line {self.line + 1}: nested more than {MAX_DEPTH} levels deep")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    loader = Loader(_printable(text, where))
    try:
        root = loader.get_single_node()
        if root is None:
            return None, {}
        tree = _Tree(where, loader)
        return tree.value(root, ()), tree.lines
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{where}{line}: not YAML: {str(error.problem)[:200]}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{where}: not YAML: {' '.join(str(error).split())[:200]}") from None


def _printable(text: str, where: str) -> str:
    """PyYAML says where a forbidden character is as an offset: as a line it can be found."""
    import yaml

    found = yaml.reader.Reader.NON_PRINTABLE.search(text)
    if found:
        line = text[: found.start()].count("\n") + 1
        raise InputError(f"{where}, line {line}: the character {ord(found[0]):#x} is not allowed")
    return text


class _Tree:
    """Nodes to values, counting."""

    def __init__(self, where: str, loader: Any) -> None:
        self.where, self.loader = where, loader
        self.lines: dict[Key, int] = {}
        self.count = 0

    def value(self, node: Any, key: Key) -> Any:
        import yaml

        line = node.start_mark.line + 1
        self.count += 1
        if self.count > MAX_VALUES or len(key) > MAX_DEPTH:
            raise InputError(f"{self.where}, line {line}: more than {MAX_VALUES} values, aliases included")
        self.lines[key] = line
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, key)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(one, (*key, number)) for number, one in enumerate(node.value)]
        if len(node.value) > MAX_TEXT:
            raise InputError(f"{self.where}, line {line}: a text of {len(node.value)} characters, not a configuration")
        if node.tag not in _TAGS:
            tag = node.tag.removeprefix("tag:yaml.org,2002:")[:40]
            raise InputError(
                f"{self.where}, line {line}: {node.value[:40]!r} is a {tag} to YAML", hint="put it in quotes for text"
            )
        if node.tag != _TAGS[0] and len(node.value) > MAX_PLAIN:
            raise InputError(f"{self.where}, line {line}: a number of {len(node.value)} characters")
        try:
            return self.loader.construct_object(node)
        except (ValueError, OverflowError, KeyError, IndexError):  # !!int "x" and the like
            raise InputError(f"{self.where}, line {line}: {node.value[:40]!r} is not what its tag says") from None

    def _mapping(self, node: Any, key: Key) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name_node, value_node in node.value:
            line = name_node.start_mark.line + 1
            name = self.value(name_node, (*key, "?")) if name_node.id == "scalar" else None
            if not isinstance(name, str):
                told = repr(getattr(name_node, "value", ""))[:40] if name_node.id == "scalar" else "a list or mapping"
                raise InputError(
                    f"{self.where}, line {line}: {told} as a key is not text", hint="put it in quotes for text"
                )
            if name in found:
                before = self.lines[(*key, name)]
                raise InputError(f"{self.where}, line {line}: {name[:80]!r} is given twice; first in line {before}")
            found[name] = self.value(value_node, (*key, name))
            self.lines[(*key, name)] = line  # of the key: the value of a section begins a line later
        return found
