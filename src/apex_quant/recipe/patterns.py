"""Tensor-name patterns as llama.cpp matches them: ECMAScript regular expressions of std::regex_search.

Python's re differs (what $, \\d and \\w mean, escapes, brackets, flags inside the pattern) and may take
exponential time, so a pattern is parsed here and matched by bits: every step maps the set of positions
reached so far, one bit of an int each, to the set of positions reached after it. All starts are tried
at once and the time is bounded by pattern length times name length, whatever the pattern. Only whether
a name matches matters, so greedy and lazy quantifiers and both kinds of groups are the same thing.

Names and patterns are matched as UTF-8 bytes, as std::regex over char does. What C++ libraries match
in different ways (back references, assertions of position inside a lookahead, equivalence classes,
control escapes, bytes above 127 in brackets) is refused with a message.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from apex_quant.errors import UsageError
from apex_quant.recipe.pattern_steps import (
    Step,
    Text,
    any_number_of,
    at_end,
    at_start,
    either,
    literal,
    lookahead,
    one_of,
    repeat,
    sequence,
    word_boundary,
)

MAX_PATTERN: Final = 4096
MAX_DEPTH: Final = 50
MAX_REPEAT: Final = 1000

_ALL: Final = frozenset(range(256))
_DIGIT: Final = frozenset(b"0123456789")
_LOWER: Final = frozenset(range(ord("a"), ord("z") + 1))
_UPPER: Final = frozenset(range(ord("A"), ord("Z") + 1))
_WORD: Final = _DIGIT | _LOWER | _UPPER | {ord("_")}
_SPACE: Final = frozenset(b" \t\n\v\f\r")
_GRAPH: Final = frozenset(range(33, 127))
_ANY: Final = _ALL - frozenset(b"\n\r")

_ESCAPED_CLASS: Final = {
    "d": _DIGIT, "D": _ALL - _DIGIT,
    "w": _WORD, "W": _ALL - _WORD,
    "s": _SPACE, "S": _ALL - _SPACE,
}  # fmt: skip
_NAMED_CLASS: Final = {
    "alnum": _DIGIT | _LOWER | _UPPER,
    "alpha": _LOWER | _UPPER,
    "blank": frozenset(b" \t"),
    "cntrl": frozenset(range(32)) | {127},
    "digit": _DIGIT,
    "graph": _GRAPH,
    "lower": _LOWER,
    "print": _GRAPH | {32},
    "punct": _GRAPH - _DIGIT - _LOWER - _UPPER,
    "space": _SPACE,
    "upper": _UPPER,
    "xdigit": frozenset(b"0123456789abcdefABCDEF"),
}
_ESCAPED_CHAR: Final = {"f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}


_Atom = int | frozenset[int] | Step


def _as_step(atom: _Atom) -> Step:
    if isinstance(atom, int):
        return literal(bytes([atom]))
    return one_of(atom) if isinstance(atom, frozenset) else atom


class _Parser:
    """Recursive descent over the grammar of ECMAScript as the C++ standard amends it."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        # one character a byte, so that every char below is what std::regex over char sees
        self.source = pattern.encode("utf-8", "surrogateescape").decode("latin-1")
        self.at = 0
        self.depth = 0
        self.lookaheads = 0
        if len(self.source) > MAX_PATTERN:
            raise self.error(f"longer than {MAX_PATTERN} bytes")
        if "\0" in self.source:
            raise self.error("a zero byte")

    def error(self, what: str) -> UsageError:
        shown = self.pattern if len(self.pattern) <= 100 else self.pattern[:100] + "..."
        return UsageError(
            f"tensor pattern {shown!r}: {what} at character {self.at + 1}.",
            hint="patterns are ECMAScript regular expressions searched in tensor names, as in llama-quantize",
        )

    def peek(self, text: str) -> bool:
        return self.source.startswith(text, self.at)

    def take(self, text: str) -> bool:
        found = self.peek(text)
        if found:
            self.at += len(text)
        return found

    def next(self, missing: str) -> str:
        if self.at >= len(self.source):
            raise self.error(missing)
        self.at += 1
        return self.source[self.at - 1]

    def parse(self) -> Step:
        step = self.disjunction()
        if self.at < len(self.source):
            what = "an unmatched ')'" if self.peek(")") else f"{self.source[self.at]!r} with nothing to repeat"
            raise self.error(what)
        return step

    def disjunction(self) -> Step:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.error(f"groups nested more than {MAX_DEPTH} deep")
        branches = [self.alternative()]
        while self.take("|"):
            branches.append(self.alternative())
        self.depth -= 1
        return either(branches)

    def alternative(self) -> Step:
        steps: list[Step] = []
        run = bytearray()  # plain characters in a row are searched as one string

        def flush() -> None:
            if run:
                steps.append(literal(bytes(run)))
                run.clear()

        while self.at < len(self.source) and self.source[self.at] not in "|)*+?{":
            assertion = self.assertion()
            if assertion is not None:
                flush()
                steps.append(assertion)
                continue
            atom = self.quantified(self.atom())
            if isinstance(atom, int):
                run.append(atom)
            else:
                flush()
                steps.append(_as_step(atom))
        flush()
        return sequence(steps)

    def assertion(self) -> Step | None:
        start = self.at
        for text, step in (("^", at_start), ("$", at_end)):
            if self.take(text):
                return self.outside_lookahead(step, text, start)
        for text, wanted in (("\\b", True), ("\\B", False)):
            if self.take(text):
                return self.outside_lookahead(word_boundary(wanted), text, start)
        for text, wanted in (("(?=", True), ("(?!", False)):
            if self.take(text):
                self.lookaheads += 1
                body = self.group()
                self.lookaheads -= 1
                return lookahead(body, wanted)
        return None

    def outside_lookahead(self, step: Step, text: str, start: int) -> Step:
        # libstdc++ starts a lookahead as if the name began there; other libraries do not
        if self.lookaheads and text != "$":
            self.at = start
            raise self.error(f"{text} inside a lookahead, which C++ libraries match differently,")
        return step

    def group(self) -> Step:
        body = self.disjunction()
        if not self.take(")"):
            raise self.error("a missing ')'")
        return body

    def atom(self) -> _Atom:
        if self.take("."):
            return _ANY
        if self.take("(?:"):
            return self.group()
        if self.peek("(?"):
            raise self.error("(? that begins neither (?: nor (?= nor (?!")
        if self.take("("):
            return self.group()
        if self.take("["):
            return self.bracket()
        if self.take("\\"):
            return self.escape()
        return ord(self.next("nothing to match"))

    def escape(self, in_bracket: bool = False) -> int | frozenset[int]:
        char = self.next("a lone backslash")
        if char in _ESCAPED_CLASS:
            return _ESCAPED_CLASS[char]
        if char in _ESCAPED_CHAR:
            return ord(_ESCAPED_CHAR[char])
        if char in "xu":
            digits = self.source[self.at : self.at + (2 if char == "x" else 4)]
            try:
                value = int(digits, 16) if digits.isalnum() else 256
            except ValueError:
                value = 256
            if value > 127 or len(digits) != (2 if char == "x" else 4):
                raise self.error(f"\\{char} that names no ASCII character")
            self.at += len(digits)
            return value
        if char.isdigit():
            raise self.error("a back reference, which patterns of tensor names cannot use,")
        if char == "b" and in_bracket:
            return ord("\b")
        if char.isalpha() or char == "_":
            raise self.error(f"the unknown escape \\{char}")
        return ord(char)

    def bracket(self) -> frozenset[int]:
        negated = self.take("^")
        if self.peek("]"):
            raise self.error("an empty bracket")
        members: set[int] = set()
        # what a '-' would continue: a character, or a class (which it must not), or nothing
        last: int | frozenset[int] | None = None
        while not self.take("]"):
            if self.take("-"):
                if self.peek("]") or last is None:
                    last = ord("-")
                    members.add(last)
                    continue
                end = self.member()
                if not (isinstance(last, int) and isinstance(end, int) and last <= end):
                    raise self.error("a bad range in a bracket")
                members.update(range(last, end + 1))
                last = None
                continue
            last = self.member()
            members.update({last} if isinstance(last, int) else last)
        return _ALL - members if negated else frozenset(members)

    def member(self) -> int | frozenset[int]:
        if self.take("[:"):
            end = self.source.find(":]", self.at)
            name = self.source[self.at : end].lower() if end >= 0 else ""
            if name not in _NAMED_CLASS:
                raise self.error("an unknown character class")
            self.at = end + 2
            return _NAMED_CLASS[name]
        if self.peek("[.") or self.peek("[="):
            raise self.error("a collating element")
        char = self.next("a missing ']'")
        if char == "\\":
            return self.escape(in_bracket=True)
        if ord(char) > 127:
            raise self.error("a character outside ASCII in a bracket")
        return ord(char)

    def quantified(self, atom: _Atom) -> _Atom:
        while True:
            if self.take("*"):
                low, high = 0, None
            elif self.take("+"):
                low, high = 1, None
            elif self.take("?"):
                low, high = 0, 1
            elif self.take("{"):
                low, high = self.bounds()
            else:
                return atom
            self.take("?")  # lazy: the same names match
            if high is None and low <= 1 and not callable(atom):
                members = frozenset({atom}) if isinstance(atom, int) else atom
                many = any_number_of(members)
                atom = many if low == 0 else sequence([one_of(members), many])
            else:
                atom = repeat(_as_step(atom), low, high)

    def bounds(self) -> tuple[int, int | None]:
        low = self.count()
        if low is None:
            raise self.error("a bad {count}")
        high: int | None = low
        if self.take(","):
            high = self.count()
        if not self.take("}") or (high is not None and high < low):
            raise self.error("a bad {count}")
        return low, high

    def count(self) -> int | None:
        start = self.at
        while self.at < len(self.source) and self.source[self.at] in "0123456789":
            self.at += 1
        digits = self.source[start : self.at]
        if not digits:
            return None
        if len(digits) > 6 or int(digits) > MAX_REPEAT:
            raise self.error(f"a count above {MAX_REPEAT}")
        return int(digits)


@lru_cache(maxsize=4096)
def _text(name: str) -> Text:
    return Text(name.encode("utf-8", "surrogateescape"))


class Pattern:
    """A compiled pattern; `search(name)` says whether llama.cpp's regex_search would find it in name."""

    __slots__ = ("_step", "source")

    def __init__(self, pattern: str) -> None:
        self.source = pattern
        self._step = _Parser(pattern).parse()

    def search(self, name: str) -> bool:
        text = _text(name)
        text.done.clear()
        return self._step(text, text.full) != 0

    def __repr__(self) -> str:
        return f"Pattern({self.source!r})"


@lru_cache(maxsize=4096)
def compile_pattern(pattern: str) -> Pattern:
    """The compiled pattern. Raises UsageError naming the place of what cannot be matched as std::regex."""
    return Pattern(pattern)
