"""Recipes as text, JSON and copies of a file; what a hostile recipe file may do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apex_quant.errors import InputError, UsageError
from apex_quant.gguf import TYPES, open_model
from apex_quant.recipe.recipe import (
    MAX_RECIPE_BYTES,
    MAX_RECIPE_LINES,
    Recipe,
    anchored,
    first_matches,
    match_overrides,
    parse_override,
    parse_recipe,
    read_recipe,
    recipe_of,
)
from tests.helpers.random_models import Models

ENCODABLE = [kind for kind in TYPES.values() if kind.encodable]
NAMES = [f"blk.{i}.{part}.weight" for i in (1, 10, 11) for part in ("ffn_up", "ffn_up_exps", "attn_k", "attn_k_b")]


def types(overrides: list[tuple[str, str]], names: list[str] = NAMES) -> dict[str, str]:
    found = match_overrides([(pattern, TYPES[kind]) for pattern, kind in overrides], names)
    return {name: kind.name for name, kind in found.items()}


# --- our own form ---


def test_text_is_anchored() -> None:
    recipe = Recipe("Q6_K", {"blk.1.ffn_up.weight": TYPES["Q4_K"], "output.weight": TYPES["IQ4_XS"]})
    assert recipe.text() == "^blk\\.1\\.ffn_up\\.weight$=Q4_K\n^output\\.weight$=IQ4_XS\n"
    assert recipe.overrides() == parse_recipe(recipe.text(), "x")
    assert match_overrides(recipe.overrides(), [*NAMES, "output.weight", "xoutput.weight"]) == recipe.types


def test_hash() -> None:
    one = Recipe("Q6_K", {"a.weight": TYPES["Q4_K"]})
    assert one.sha256 == Recipe("Q6_K", {"a.weight": TYPES["Q4_K"]}).sha256
    assert one.sha256 != Recipe("Q8_0", {"a.weight": TYPES["Q4_K"]}).sha256
    assert one.sha256 != Recipe("Q6_K", {"a.weight": TYPES["Q5_K"]}).sha256
    assert re.fullmatch("[0-9a-f]{64}", one.sha256)


# tensor names as the reader lets them through: printable, at most 63 bytes
tensor_names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=63).filter(
    lambda name: name.isprintable() and len(name.encode()) <= 63
)
recipes = st.builds(
    Recipe,
    st.sampled_from(["Q6_K", "IQ1_M"]),
    st.dictionaries(tensor_names | st.sampled_from(NAMES), st.sampled_from(ENCODABLE), max_size=8),
)


@given(recipes)
def test_round_trip(recipe: Recipe) -> None:
    """Any names at all, upper case, white space and '=' included, by every form."""
    names = list(recipe.types)
    near = [name + "x" for name in names] + ["x" + name for name in names] + [name.swapcase() for name in names]
    near = [name for name in near if name not in recipe.types]
    for overrides in (
        parse_recipe(recipe.text(), "text"),
        parse_recipe(json.dumps(recipe.to_json()), "json"),
        recipe.overrides(),
    ):
        assert match_overrides(overrides, names) == recipe.types
        assert match_overrides(overrides, near) == {}
        assert len(overrides) == len(names)


@given(tensor_names)
def test_anchored_patterns_are_what_other_engines_read(name: str) -> None:
    """The same in Python's own engine, before and after lower-casing."""
    for pattern in (anchored(name), anchored(name).encode().lower().decode()):
        assert re.fullmatch(pattern[1:-1], name)
        assert not re.search(r"[\s=]", pattern)


# --- llama.cpp's form ---


def test_first_match_wins_unanchored() -> None:
    found = types([("blk.1.ffn_up", "Q8_0"), ("ffn_up", "Q4_K"), ("ffn_up_exps", "Q2_K"), (r"attn_k\.", "Q5_K")])
    assert found == {
        "blk.1.ffn_up.weight": "Q8_0",
        "blk.1.ffn_up_exps.weight": "Q8_0",
        "blk.10.ffn_up.weight": "Q4_K",
        "blk.10.ffn_up_exps.weight": "Q4_K",
        "blk.11.ffn_up.weight": "Q4_K",
        "blk.11.ffn_up_exps.weight": "Q4_K",
        "blk.1.attn_k.weight": "Q5_K",
        "blk.10.attn_k.weight": "Q5_K",
        "blk.11.attn_k.weight": "Q5_K",
    }


def test_order_between_anchored_and_searched() -> None:
    exact = anchored("blk.1.ffn_up.weight")
    assert types([("ffn_up", "Q4_K"), (exact, "Q8_0")])["blk.1.ffn_up.weight"] == "Q4_K"
    assert types([(exact, "Q8_0"), ("ffn_up", "Q4_K")])["blk.1.ffn_up.weight"] == "Q8_0"
    assert types([(exact, "Q8_0"), (exact, "Q4_K")]) == {"blk.1.ffn_up.weight": "Q8_0"}
    assert first_matches([("x", TYPES["Q4_K"]), ("a", TYPES["Q8_0"]), ("a", TYPES["Q4_K"])], ["ba"]) == {"ba": 1}


def test_white_space_and_case() -> None:
    text = "\n\tFFN_UP=q4_k  \r\n\v\fffn_down=IQ4_xs attn_[A-Z]=F16\n"
    assert [(p, k.name) for p, k in parse_recipe(text, "x")] == [
        ("ffn_up", "Q4_K"),
        ("ffn_down", "IQ4_XS"),
        ("attn_[a-z]", "F16"),
    ]
    # only C's white space separates, only ASCII is lower-cased
    assert parse_recipe("a\u00a0\u0130=Q8_0", "x") == [("a\u00a0\u0130", TYPES["Q8_0"])]


def test_lower_casing_turns_classes_around() -> None:
    """The command line tool makes \\d of \\D; a flag's pattern is taken as it is."""
    assert parse_recipe(r"blk\.\D=Q8_0", "x") == [(r"blk\.\d", TYPES["Q8_0"])]
    assert parse_override(r"blk\.\D=Q8_0", lower=False) == (r"blk\.\D", TYPES["Q8_0"])
    assert len(types([(r"blk\.\d+\.ffn_up\.", "Q8_0")])) == 3
    assert types([(r"blk\.\D", "Q8_0")]) == {}


def test_first_equals_sign_separates() -> None:
    with pytest.raises(InputError, match="no tensor type is called 'b=Q8_0'"):
        parse_recipe("a=b=Q8_0", "x")
    assert parse_recipe("(?=ffn)ffn_up=Q8_0".replace("(?=ffn)", ""), "x")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("ffn_up", "not of the form PATTERN=TYPE"),
        ("=Q8_0", "not of the form"),
        ("ffn_up=", "not of the form"),
        ("ffn_up=Q9_0", "no tensor type is called 'Q9_0'. Did you mean Q"),
        ("ffn_up=Q8_K", "Q8_K cannot be encoded"),
        ("ffn_up=I32", "I32 cannot be encoded"),
        ("ffn_(up=Q8_0", "missing '\\)'"),
        ("*=Q8_0", "nothing to repeat"),
        ("a\0b=Q8_0", "zero byte"),
        ("#", "not of the form"),
        ("a" * 1_000_000 + "=Q8_0", "longer than"),
        ("(" * 100_000 + "=Q8_0", "longer than"),
        ("(" * 1000 + "=Q8_0", "nested"),
        ("a" * 1_000_000, "longer than"),
        ("a=" + "Q" * 1_000_000, "longer than"),
    ],
)
def test_bad_lines(word: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_recipe(f"ffn_down=Q8_0\n{word}\n", "where")
    assert caught.value.message.startswith("where: ")
    assert len(caught.value.message) < 2_000


# --- JSON ---


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "{}",
        '{"types": []}',
        '{"types": {"a": 1}}',
        '{"types": {"a": null}}',
        '{"types": {"a": "Q9"}}',
        '{"types": {"a": "Q8_K"}}',
        '{"types": ' * 50_000,
        '{"types": ' + "[" * 1_000_000,
        '{"types": ' + "9" * 10_000 + "}",
        '{"types": {"a": "Q8_0"}} trailing',
        json.dumps({"types": {"a" * 10_000: "Q8_0"}}),
    ],
)
def test_bad_json(text: str) -> None:
    with pytest.raises(InputError, match=r"^where: "):
        parse_recipe(text, "where")


def test_json_names_are_not_patterns() -> None:
    (override,) = parse_recipe(' \n{"types": {"blk.1.ffn_up.weight": "q4_k"}}', "x")
    assert override[1] is TYPES["Q4_K"]
    assert list(match_overrides([override], [*NAMES, "blk_1.ffn_up.weight"])) == ["blk.1.ffn_up.weight"]


# --- files ---


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"", "holds no PATTERN=TYPE line"),
        (b" \n ", "holds no PATTERN=TYPE line"),
        (bytes(range(256)) * 100, "cannot be read"),
        (b"GGUF\x03\x00\x00\x00" + b"\0" * 100, "not of the form"),
        (b"a" * (MAX_RECIPE_BYTES + 1), "not a recipe"),
        (b"a=Q8_0\n" * 1_000_000, f"at most {MAX_RECIPE_LINES}"),
        (b'{"types": {' + b",".join(b'"%d": "Q8_0"' % i for i in range(MAX_RECIPE_LINES + 1)) + b"}}", "at most"),
        (b"{" + b'"types":{' * 100_000, "not valid JSON"),
    ],
    ids=["missing", "empty", "blank", "binary", "gguf", "huge", "lines", "names", "deep"],
)
def test_hostile_files(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_recipe(path)
    assert str(path) in caught.value.message


def test_folders_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_recipe(tmp_path)


def test_too_many_searches() -> None:
    names = [f"blk.{i}.ffn_up.weight" for i in range(1000)]
    with pytest.raises(UsageError, match="too many to search"):
        match_overrides([(f"a{i}", TYPES["Q8_0"]) for i in range(10_000)], names)
    # but a recipe of our own is never refused, however many tensors
    many = {f"blk.{i}.ffn_up.weight": TYPES["Q8_0"] for i in range(20_000)}
    assert match_overrides(Recipe("Q8_0", many).overrides(), many) == many


def test_evil_patterns() -> None:
    """What takes a backtracking engine forever."""
    for pattern in ("(a+)+$", "(a*)*b", "(a|a)*$", "(.*.*)*x", "((a{1,50}){1,50}){1,50}$", "a?" * 500 + "a" * 500):
        assert match_overrides([(pattern, TYPES["Q8_0"])], ["a" * 50 + "!"]) in ({}, {"a" * 50 + "!": TYPES["Q8_0"]})


def test_recipe_of_a_file(models: Models) -> None:
    with open_model(models("qwen3moe")) as model:
        found = recipe_of(model)
        assert found == {name: info.type for name, info in model.tensors.items()}
    assert found["token_embd.weight"] is TYPES["BF16"]
    assert found["output_norm.weight"] is TYPES["F32"]
