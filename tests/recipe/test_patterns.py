"""Tensor-name patterns: the library's own std::regex as oracle, bounded time, refusals that name the place."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from apex_quant.errors import UsageError
from apex_quant.recipe.patterns import MAX_PATTERN, Pattern, compile_pattern
from tests.helpers.dry_run import DryRun, dry_runs
from tests.helpers.generic_models import write_generic

NAMES = (
    "blk.0.ffn_gate_exps.weight",
    "blk.3.ffn_down.weight",
    "blk.13.ffn_down_exps.weight",
    "blk.31.attn_k_b.weight",
    "dec.blk.3.cross_attn_v.weight",
    "a-b_c.weight",
    "aab[]{}^$weight",
    "A1\u00e9.weight",
    "token x.weight",
    "Zz/~`@.weight",
)

PATTERNS = (
    *("", "a", "attn_k", "blk.3.", r"blk\.3\.", "^blk", "^a", "weight$", "^$", "$^", r"^blk\.\d+\.", "^.*$"),
    *(r"\.(0|1|2)\.", r"blk\.([0-9]|1[0-5])\.", r"blk\.(?:3|1[3-9])\.", "ffn_(up|gate|down)_exps", "(a|)b"),
    *("a*", "a+b", "a?ab", "a{2}", "a{2,}b", "a{0,1}b", "a{1,2}?", "(a|b){3}", "(?:a{1,2}){2}b", "a**", "a{2}{1}"),
    *(r"ffn_down(?!_)", r"ffn(?=_gate)", "^(?!.*exps).*ffn", "(?=.*k)(?=.*b)", "(?!)a", "(?=)", r"\b3\b", r"\Bk"),
    *("[a-c]-", "[-a]b", "[a-]b", "[^a-z]", "[.]w", r"[\.]w", r"[\d]", r"[^\W]", "[[:upper:]]", "[[:d:]]", "[[a]"),
    *("[+--]", "[a-c-e]-", "[^]", "[]", "[]a]", r"[\]]", r"[\b]", r"[\w-a]", "[z-a]", "[a", "[a-", "[--/]", "[/-]"),
    *(r"\x61", r"\u0041", r"\x6", r"\xg1", r"\/", r"\-", r"\~", r"\@", r"\.", r"\s", r"\S\s\S", r"\t", "]", "}"),
    *("{", "a{", "a{,2}", "a{2,1}", "a{x}", "*a", "+", "?", "a|*", "(", ")", "(a", "a)", "()", "(?", "(?a)", "(?<a>b)"),
    *("^*", r"\b+", "(?=a)+", "\\", "a|", "|", "a||b", "\u00e9", "\u00e9+", ".\\.weight", "[\u00e9]", "(?i)A", r"\p"),
    *(r"(a)\1", r"\1", r"\0", r"\ca", "[[.a.]]", "[[=a=]]", "[[:bad:]]", "(?=^a)", r"(?=\bk)", r"\_", r"\A", r"\Z"),
)
# what we refuse although this build of the library takes it: C++ libraries do not agree on it
REFUSED = {
    *("[]", "[^]", "[]a]", "[[:d:]]", "[\u00e9]", r"\p", r"(a)\1", r"\0", r"\ca", "[[.a.]]", "[[=a=]]", "(?=^a)"),
    *(r"(?=\bk)", r"\_", r"\A", r"\Z"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("names") / "names.gguf"
    return write_generic(path, "llama", dict.fromkeys(NAMES, ((256, 2), "F16")))


def found_by_library(model: Path, patterns: list[str]) -> list[set[str] | None]:
    """Names that each pattern hits in the library, None where it refuses the pattern."""
    pytest.importorskip("llama_cpp")
    q5_1 = 7
    outcomes = dry_runs([DryRun(str(model), 7, overrides=[(pattern, q5_1)]) for pattern in patterns])
    return [None if o.error else {name for name, _, kind in o.types if kind == "q5_1"} for o in outcomes]


def found_by_us(pattern: str) -> set[str] | None:
    try:
        compiled = Pattern(pattern)
    except UsageError:
        return None
    return {name for name in NAMES if compiled.search(name)}


def test_same_as_library(model: Path) -> None:
    patterns = list(PATTERNS)
    for pattern, library in zip(patterns, found_by_library(model, patterns), strict=True):
        ours = found_by_us(pattern)
        if pattern in REFUSED:
            assert ours is None, pattern
        else:
            assert ours == library, pattern


def test_random_patterns_same_as_library(model: Path) -> None:
    rng = random.Random(1)
    pieces = [
        *"ab.k_3^$|()[]*+?-",
        r"\.",
        r"\d",
        r"\w",
        r"\b",
        "[a-c]",
        "[^.]",
        "(?:",
        "(?=",
        "(?!",
        "{2}",
        "ffn",
        "blk",
    ]
    patterns = ["".join(rng.choices(pieces, k=rng.randint(1, 6))) for _ in range(600)]
    agreed = 0
    for pattern, library in zip(patterns, found_by_library(model, patterns), strict=True):
        ours = found_by_us(pattern)
        if ours is not None:
            assert ours == library, pattern
            agreed += 1
        elif library is not None:  # refused for one of the documented reasons
            assert re.search(r"\[\^?\]|\(\?[=!].*(\^|\\b)", pattern), pattern
    assert agreed > 200


@pytest.mark.parametrize(
    ("pattern", "place"),
    [
        ("blk[", "a missing ']' at character 5"),
        ("a(b", "a missing ')' at character 4"),
        ("a)", "an unmatched ')' at character 2"),
        ("ab|*c", "'*' with nothing to repeat at character 4"),
        (r"(\d)\1", "a back reference"),
        (r"attn\p", r"the unknown escape \p"),
        ("a{3,1}", "a bad {count}"),
        ("a{9999}", "a count above 1000"),
        ("[[:number:]]", "an unknown character class"),
        ("(?<n>a)", "(? that begins neither"),
        ("a" * (MAX_PATTERN + 1), "longer than"),
        ("(" * 51 + ")" * 51, "nested more than"),
        ("a\0b", "a zero byte"),
    ],
)
def test_refusals_name_the_place(pattern: str, place: str) -> None:
    with pytest.raises(UsageError, match=re.escape(place)) as caught:
        compile_pattern(pattern)
    assert caught.value.hint


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$x",
        "(a|aa)*(a|aa)*c",
        ".*" * 60 + "x",
        "(" * 49 + "a" + "?){9}" * 49 + "x",
        "a" + "?" * 200 + "x",
        "(?=.*" * 40 + "x" + ")" * 40,
        "((a{1,3}){1,3}b?){1,1000}x",
    ],
)
def test_no_pattern_takes_long(pattern: str) -> None:
    """Patterns that a backtracking matcher would never finish."""
    name = "blk.0." + "a" * 57
    assert not Pattern(pattern).search(name)


def test_names_are_bytes() -> None:
    assert compile_pattern("^..$").search("\u00e9")
    assert compile_pattern("^.$").search("\udcff")
    assert not compile_pattern(r"\w").search("\u00e9")
    assert not compile_pattern("^a$").search("a\n")
