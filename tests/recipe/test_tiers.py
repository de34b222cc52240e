"""The nine tiers against the table of the published method, and tier files of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from apex_quant.errors import InputError, UsageError
from apex_quant.gguf import TYPES
from apex_quant.recipe.tiers import (
    MAX_TIER_BYTES,
    Tier,
    find_tier,
    published_lines,
    published_tiers,
    read_tiers,
    tier_names,
    with_cells,
)

# name: routed edge/near/middle, shared edge/middle, attention edge/middle, base, importance
METHOD = {
    "quality": ("Q6_K Q5_K IQ4_XS", "Q8_0 Q8_0", "Q6_K Q6_K", "Q6_K", "none"),
    "i-quality": ("Q6_K Q5_K IQ4_XS", "Q8_0 Q8_0", "Q6_K Q6_K", "Q6_K", "required"),
    "balanced": ("Q6_K Q5_K Q5_K", "Q8_0 Q8_0", "Q6_K Q6_K", "Q6_K", "none"),
    "i-balanced": ("Q6_K Q5_K Q5_K", "Q8_0 Q8_0", "Q6_K Q6_K", "Q6_K", "required"),
    "compact": ("Q4_K Q3_K Q3_K", "Q6_K Q6_K", "Q4_K Q4_K", "Q4_K_M", "none"),
    "i-compact": ("Q4_K Q3_K Q3_K", "Q6_K Q6_K", "Q4_K Q4_K", "Q4_K_M", "required"),
    "mini": ("Q3_K Q3_K IQ2_S", "Q5_K Q4_K", "Q4_K Q3_K", "Q3_K_M", "required"),
    "nano": ("Q3_K IQ2_S IQ2_XXS", "Q5_K Q4_K", "Q4_K Q3_K", "IQ2_XXS", "required"),
    "micro": ("Q3_K IQ2_XS IQ1_M", "Q5_K Q4_K", "Q4_K Q3_K", "IQ1_M", "required"),
}

OWN = """
name = "mine"
base = "q4_k"
routed = { edge = "q5_k", middle = "iq3_s" }
shared = "Q8_0"
attention = { edge = "Q6_K", middle = "Q5_K" }
"""


def cells(tier: Tier) -> tuple[str, str, str, str, str]:
    assert tier.shared.near == tier.shared.middle
    return (
        f"{tier.routed.edge} {tier.routed.near} {tier.routed.middle}",
        f"{tier.shared.edge} {tier.shared.middle}",
        f"{tier.attention.edge} {tier.attention.middle}",
        tier.base,
        tier.importance,
    )


def test_published_cells() -> None:
    assert {tier.name: cells(tier) for tier in published_tiers()} == METHOD
    assert all(tier.ssm is None and tier.dense is None and tier.summary for tier in published_tiers())


def test_names() -> None:
    names = tier_names()
    assert len(names) == len(set(names)) == 12
    assert set(names) == {*METHOD, "i-mini", "i-nano", "i-micro"}
    assert len({cells(tier) for tier in published_tiers()}) == 9
    for alias, name in {"i-mini": "mini", "I-Nano": "nano", "MICRO": "micro", "Quality": "quality"}.items():
        found = find_tier(alias)
        assert found is not None
        assert found.name == name


@pytest.mark.parametrize(
    ("name", "asked", "title"),
    [
        ("i-quality", None, "I-Quality"),
        ("mini", None, "Mini"),
        ("mini", "i-mini", "I-Mini"),
        ("micro", "I-MICRO", "I-Micro"),
        ("compact", "compact", "Compact"),
    ],
)
def test_titles(name: str, asked: str | None, title: str) -> None:
    tier = find_tier(name)
    assert tier is not None
    assert tier.title(asked) == title


def test_titles_of_own_names() -> None:
    (tier,) = read_tiers(OWN.replace("mine", "my own-tier"), "x")
    assert tier.title() == "My-Own-Tier"


@pytest.mark.parametrize(
    ("name", "near"),
    [("qualty", "quality"), ("i-minni", "i-mini"), ("Q4_KM", "Q4_K_M"), ("iq4xs", "IQ4_XS"), ("al", "all")],
)
def test_did_you_mean(name: str, near: str) -> None:
    with pytest.raises(UsageError, match=rf"called '{name}'. Did you mean {near}\?"):
        find_tier(name)


def test_mix_names_are_no_tiers() -> None:
    assert find_tier("Q4_K_M") is None
    assert find_tier("iq4_xs") is None
    assert find_tier("F16") is None
    with pytest.raises(UsageError, match=r"no tier or llama\.cpp mix is called 'zzzzzz'\.$"):
        find_tier("zzzzzz")


# --- tier files ---


def test_own_tier(tmp_path: Path) -> None:
    """At the top level or in a table, types in any case, near defaults to middle, one type for a whole column."""
    for text in (OWN, "[[tier]]" + OWN):
        path = tmp_path / "mine.TOML"
        path.write_text(text)
        tier = find_tier(str(path))
        assert tier is not None
        assert cells(tier) == ("Q5_K IQ3_S IQ3_S", "Q8_0 Q8_0", "Q6_K Q5_K", "q4_k", "optional")
        assert tier.name == "mine"
    full = OWN + 'ssm = "Q6_K"\ndense = { edge = "Q6_K", near = "Q5_K", middle = "Q4_K" }\nimportance = "required"\n'
    (tier,) = read_tiers(full, "x")
    assert tier.ssm is not None
    assert tier.dense is not None
    assert (tier.ssm.edge, tier.ssm.middle, tier.dense.near) == ("Q6_K", "Q6_K", "Q5_K")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("name =", "nam ="), r"where: .*name: Field required.*nam: is not known. Did you mean name\?"),
        (("shared =", "shard ="), r"tier 'mine': .*shared: Field required.*shard: is not known. Did you mean shared\?"),
        (("edge =", "egde ="), r"routed.egde: is not known. Did you mean edge\?"),
        (('middle = "Q5_K"', 'near = "Q5_K"'), r"attention.middle: Field required.*attention.near: is not known."),
        (("iq3_s", "iq3_z"), r"tier 'mine': no tensor type is called 'iq3_z'. Did you mean"),
        (("iq3_s", "Q8_K"), "Q8_K cannot be encoded"),
        (('"iq3_s"', "3"), "routed.middle: Input should be a valid string"),
        (('"Q8_0"', "[1]"), "shared: Input should be"),
        (('"q4_k"', '"q4_kk"'), r"no llama.cpp mix is called 'q4_kk'. Did you mean Q4_K"),
        (('"q4_k"', '"F16"'), "base F16: llama-quantize takes no types for single tensors"),
        (('"mine"', '"../../mine"'), "name: String should match"),
        (('"mine"', '""'), "name: String should match"),
        (("attention", "attention.middle.x"), r"attention"),
        (("base", "importance = 'sometimes'\nbase"), "importance: Input should be 'none', 'optional' or 'required'"),
        (("base", "base = 'Q4_K_M'\nbase"), "not valid TOML"),
        (("}\nshared", "\nshared"), "not valid TOML"),
        (("base", "x = " + "[" * 9000 + "\nbase"), "not valid TOML"),
        (("base", "x = " + "9" * 9000 + "\nbase"), "not valid TOML"),
    ],
)
def test_broken_tier_files(change: tuple[str, str], message: str) -> None:
    text = OWN.replace(*change, 1)
    assert text != OWN
    with pytest.raises(InputError, match=message) as caught:
        read_tiers(text, "where")
    assert caught.value.message.startswith("where: ")


def test_missing_columns() -> None:
    with pytest.raises(InputError, match="routed: Field required; shared: Field required; attention: Field required"):
        read_tiers('name = "x"\nbase = "Q6_K"', "x")
    with pytest.raises(InputError, match=r"routed\.middle: Field required"):
        read_tiers(OWN.replace(', middle = "iq3_s"', ', near = "iq3_s"'), "x")


def test_several_tiers(tmp_path: Path) -> None:
    two = f"[[tier]]{OWN}[[tier]]{OWN.replace('mine', 'other')}"
    assert [tier.name for tier in read_tiers(two, "x")] == ["mine", "other"]
    path = tmp_path / "two.toml"
    path.write_text(two)
    with pytest.raises(InputError, match="holds 2 tiers"):
        find_tier(str(path))
    with pytest.raises(InputError, match="no tier in the file"):
        read_tiers("tier = []", "x")
    with pytest.raises(InputError, match="basis: not known beside"):
        read_tiers("basis = 1\n" + two, "x")
    with pytest.raises(InputError, match="valid dictionary"):
        read_tiers("tier = [1]", "x")


def test_unreadable_tier_files(tmp_path: Path) -> None:
    for name in ("none.toml", "folder.toml", "binary.toml", "large.toml"):
        path = tmp_path / name
        if name == "folder.toml":
            path.mkdir()
        if name == "binary.toml":
            path.write_bytes(bytes(range(256)))
        if name == "large.toml":
            path.write_bytes(b"#" * (MAX_TIER_BYTES + 1))
        with pytest.raises(InputError, match=f"{name}: (cannot be read|longer than)"):
            find_tier(str(path))


# --- single cells ---


def test_cells() -> None:
    tier = find_tier("quality")
    assert tier is not None
    assert with_cells(tier, []) is tier
    changed = with_cells(tier, ["routed.middle=iq3_s", " attention.edge=Q8_0 ", "ssm.middle=Q5_K", "dense.near=Q4_K"])
    assert cells(changed)[:3] == ("Q6_K Q5_K IQ3_S", "Q8_0 Q8_0", "Q8_0 Q6_K")
    assert changed.ssm is not None
    assert changed.dense is not None
    # a column that did not exist starts from the one it defaults to
    assert (changed.ssm.edge, changed.ssm.middle) == ("Q8_0", "Q5_K")
    assert (changed.dense.edge, changed.dense.near, changed.dense.middle) == ("Q8_0", "Q4_K", "Q8_0")
    assert (changed.name, changed.aliases, changed.title()) == ("quality-custom", (), "Quality-Custom")
    assert (changed.base, changed.importance) == ("Q6_K", "none")
    assert tier.routed.middle == "IQ4_XS"


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("routed=IQ3_S", "not of the form"),
        ("routed.middle", "not of the form"),
        ("routd.middle=IQ3_S", r"no column is called 'routd'. Did you mean routed\?"),
        ("name.x=Q8_0", "no column is called 'name'"),
        ("routed.midle=IQ3_S", r"no zone is called 'midle'.*edge, middle, near. Did you mean middle\?"),
        ("attention.near=IQ3_S", "no zone is called 'near': column attention has the zones edge, middle"),
        ("routed.middle=IQ3_SS", r"no tensor type is called 'IQ3_SS'. Did you mean"),
        ("routed.middle=Q8_K", "Q8_K cannot be encoded"),
    ],
)
def test_bad_cells(cell: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        with_cells(published_tiers()[0], [cell])


# --- the lines of the published files ---


def test_published_lines() -> None:
    """Fifteen unanchored lines a layer, with the absolute zones at any depth."""
    tier = find_tier("mini")
    assert tier is not None
    lines = dict(published_lines(tier, 40))
    assert len(lines) == 40 * 15
    assert lines[r"blk\.0\.ffn_gate_exps"] is TYPES["Q3_K"]
    assert [lines[rf"blk\.{i}\.ffn_down_exps"].name for i in (9, 10, 29, 30)] == ["Q3_K", "IQ2_S", "IQ2_S", "Q3_K"]
    assert [lines[rf"blk\.{i}\.ffn_up_shexp"].name for i in (4, 5, 34, 35)] == ["Q5_K", "Q4_K", "Q4_K", "Q5_K"]
    assert [lines[rf"blk\.{i}\.attn_qkv"].name for i in (2, 3, 36, 37)] == ["Q4_K", "Q3_K", "Q3_K", "Q4_K"]
    assert [lines[rf"blk\.{i}\.ssm_out"].name for i in (2, 3)] == ["Q4_K", "Q3_K"]
    shallow = dict(published_lines(tier, 20))
    assert not any(kind.name == "IQ2_S" for kind in shallow.values())
