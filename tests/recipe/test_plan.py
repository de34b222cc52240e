"""Plans: types by zone and role, what flags change, what is reported, and the size to the byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from apex_quant.errors import InputError, UsageError
from apex_quant.gguf import GGUFModel, open_model
from apex_quant.recipe.plan import plan
from apex_quant.recipe.planned import Plan, PlanOptions
from apex_quant.recipe.tiers import find_tier, read_tiers
from tests.helpers.imatrix import random_imatrix
from tests.helpers.random_models import Models, write_random_gguf


def kinds(decided: Plan, part: str) -> dict[int | None, str]:
    """Layer -> type of the tensors blk.N.`part`.weight."""
    return {t.role.layer: t.type.name for t in decided.tensors if t.name.endswith(f".{part}.weight")}


def types(decided: Plan) -> dict[str, str]:
    return {t.name: t.type.name for t in decided.tensors}


def written(decided: Plan, path: Path) -> GGUFModel:
    """The planned file with a hole for its data, opened."""
    (layout,) = decided.layouts
    with path.open("wb") as file:
        file.write(layout.header)
        file.truncate(layout.total_bytes)
    return open_model(path)


def warned(decided: Plan, text: str) -> str:
    """The one warning with this text."""
    (found,) = [warning for warning in decided.warnings if text in warning]
    return found


def options(**given: Any) -> PlanOptions:
    return PlanOptions(**given)


# --- zones and columns ---


def test_published_zones(real: Models) -> None:
    """40 layers and a NextN block, which is edge: cell by cell."""
    decided = plan(real("qwen35moe"), "mini")
    assert str(decided.zones).startswith("published zones for 40 layers: expert edge 5, near-edge 5, attention edge 3")
    for part in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"):
        assert kinds(decided, part) == {i: "IQ2_S" if 10 <= i < 30 else "Q3_K" for i in range(41)}
    for part in ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"):
        assert kinds(decided, part) == {i: "Q4_K" if 5 <= i < 35 else "Q5_K" for i in range(41)}
    attention = {i: "Q3_K" if 3 <= i < 37 else "Q4_K" for i in range(41)}
    for part in ("attn_q", "attn_k", "attn_v", "attn_output", "attn_qkv", "attn_gate", "ssm_out", "ssm_alpha"):
        found = kinds(decided, part)
        assert found
        assert found == {i: attention[i] for i in found if i is not None}
    assert kinds(decided, "eh_proj") == {40: "Q4_K"}


def test_near_edge(real: Models) -> None:
    quality = kinds(plan(real("qwen3moe"), "quality"), "ffn_down_exps")
    assert [quality[i] for i in (0, 4, 5, 9, 10, 37, 38, 42, 43, 47)] == (
        ["Q6_K"] * 2 + ["Q5_K"] * 2 + ["IQ4_XS"] * 2 + ["Q5_K"] * 2 + ["Q6_K"] * 2
    )
    micro = kinds(plan(real("qwen3moe"), "micro"), "ffn_down_exps")
    assert [micro[i] for i in (4, 5, 10, 38, 43)] == ["Q3_K", "IQ2_XS", "IQ1_M", "IQ2_XS", "Q3_K"]


def test_scaled_zones(models: Models) -> None:
    """8 trunk layers: one edge and one near-edge layer at each end, one attention layer."""
    decided = plan(models("qwen35moe"), "micro")
    assert str(decided.zones).startswith("scaled zones for 8 layers: expert edge 1, near-edge 1, attention edge 1")
    assert list(kinds(decided, "ffn_up_exps").values()) == (
        ["Q3_K", "IQ2_XS"] + ["IQ1_M"] * 4 + ["IQ2_XS", "Q3_K"] + ["Q3_K"]
    )
    assert list(kinds(decided, "ffn_up_shexp").values()) == ["Q5_K"] + ["Q4_K"] * 6 + ["Q5_K"] * 2
    assert kinds(decided, "ssm_out") == {0: "Q4_K", 1: "Q3_K", 2: "Q3_K", 4: "Q3_K", 5: "Q3_K", 6: "Q3_K"}
    assert kinds(decided, "attn_output") == {3: "Q3_K", 7: "Q4_K", 8: "Q4_K"}
    # the old files knew the absolute zones only: no middle here
    old = plan(models("qwen35moe"), "micro", options=options(published=True))
    assert list(kinds(old, "ffn_up_exps").values())[:8] == ["Q3_K"] * 8
    assert str(old.zones).startswith("published zones for 8 layers: expert edge 5")


def test_leading_dense_layers_follow_the_shared_column(real: Models) -> None:
    decided = plan(real("deepseek2"), "compact")
    assert kinds(decided, "ffn_up") == {0: "Q6_K", 1: "Q6_K", 2: "Q6_K"}
    assert kinds(decided, "ffn_up_exps")[3] == "Q4_K"
    assert kinds(decided, "attn_kv_a_mqa")[30] == "Q4_K"
    assert not [warning for warning in decided.warnings if "dense model" in warning]
    dense = plan(real("deepseek2"), "compact", options=options(cell=["dense.edge=Q8_0"]))
    assert kinds(dense, "ffn_up") == {0: "Q8_0", 1: "Q8_0", 2: "Q8_0"}
    assert (dense.tier, dense.title) == ("compact-custom", "APEX-Compact-Custom")
    # the old files did not name them
    old = plan(real("deepseek2"), "micro", options=options(published=True))
    assert set(kinds(old, "ffn_up").values()) == {"IQ1_M"}
    assert "9 tensors have no line" in warned(old, "published files")


def test_dense_models_follow_the_routed_column(real: Models) -> None:
    decided = plan(real("llama"), "quality")
    for part in ("ffn_gate", "ffn_up", "ffn_down"):
        found = kinds(decided, part)
        assert [found[i] for i in (4, 5, 10, 69, 70, 79)] == ["Q6_K", "Q5_K", "IQ4_XS", "IQ4_XS", "Q5_K", "Q6_K"]
    assert warned(decided, "a dense model: its feed-forwards follow the routed-expert column")
    old = plan(real("llama"), "quality", options=options(published=True))
    assert set(kinds(old, "ffn_up").values()) == {"Q6_K"}
    assert "240 tensors have no line" in warned(old, "published files")


def test_ssm_follows_attention_unless_it_has_a_column(models: Models) -> None:
    path = models("nemotron_h_moe")
    plain = plan(path, "mini")
    assert kinds(plain, "ssm_in") == {0: "Q4_K", 2: "Q3_K", 5: "Q3_K"}
    own = plan(path, "mini", options=options(cell=["ssm.edge=Q8_0", "ssm.middle=Q6_K"]))
    assert kinds(own, "ssm_in") == {0: "Q8_0", 2: "Q6_K", 5: "Q6_K"}
    assert kinds(own, "attn_q") == kinds(plain, "attn_q")


def test_base_decides_the_rest(models: Models) -> None:
    """token_embd and output by the base's rules; norms and routers are kept."""
    found = types(plan(models("qwen35moe"), "micro"))
    assert (found["token_embd.weight"], found["output.weight"]) == ("Q2_K", "Q5_K")
    assert found["blk.0.ffn_gate_inp.weight"] == found["output_norm.weight"] == "F32"
    assert found["blk.0.ssm_conv1d.weight"] == "F32"
    kept = {t.name: t.why for t in plan(models("qwen35moe"), "micro").tensors if t.kept}
    assert kept["blk.0.ffn_gate_inp.weight"] == "kept: router"


def test_towers_are_kept(tmp_path: Path) -> None:
    from tests.helpers.generic_models import generic_tensors, write_generic

    tensors = generic_tensors(layers=4, odd=False) | {"v.blk.0.attn_v.weight": ((512, 64), "F16")}
    keys = {"expert_count": 6, "expert_used_count": 2}
    path = write_generic(tmp_path / "seeing.gguf", "qwen3moe", tensors, layers=4, **keys)
    decided = plan(path, "quality")
    assert types(decided)["v.blk.0.attn_v.weight"] == "F16"
    assert types(decided)["blk.0.attn_v.weight"] == "Q6_K"
    assert "1 tensors" in warned(decided, "towers are kept")
    # a projector file is copied whole, and keeps what it says of itself
    tensors = {f"v.blk.{i}.{part}.weight": ((512, 64), "F16") for i in range(3) for part in ("attn_v", "ffn_up")}
    path = write_generic(tmp_path / "mmproj.gguf", "clip", tensors, **{"/general__file_type": 1})
    decided = plan(path, "micro")
    assert set(types(decided).values()) == {"F16"}
    assert (decided.file_type, decided.needs_importance, decided.missing_importance) == (1, False, ())
    assert len(decided.warnings) == 1
    with pytest.raises(InputError, match="they have no layers"):  # where llama-quantize aborts
        plan(path, "IQ2_XS")


def test_own_tier_object(models: Models) -> None:
    (own,) = read_tiers(
        'name = "flat"\nbase = "Q4_K_M"\nrouted = "Q5_0"\nshared = "Q8_0"\nattention = "Q5_1"\nimportance = "none"', "x"
    )
    decided = plan(models("qwen35moe"), own)
    assert (decided.tier, decided.title, decided.file_name) == ("flat", "APEX-Flat", "qwen35moe-APEX-Flat.gguf")
    assert set(kinds(decided, "ffn_up_exps").values()) == {"Q5_0"}
    assert set(kinds(decided, "attn_q").values()) == {"Q5_1"}


# --- names ---


@pytest.mark.parametrize(
    ("asked", "given", "tier", "title"),
    [
        ("Quality", {}, "quality", "APEX-Quality"),
        ("i-quality", {}, "i-quality", "APEX-I-Quality"),
        ("mini", {}, "mini", "APEX-Mini"),
        ("I-MINI", {}, "i-mini", "APEX-I-Mini"),
        ("quality", {"override": ["attn=Q8_0"]}, "quality", "APEX-Quality-Custom"),
        ("i-mini", {"cell": ["routed.middle=Q2_K"]}, "mini-custom", "APEX-Mini-Custom"),
        ("q4_k", {}, "Q4_K_M", "Q4_K_M"),
        ("Q4_K_M", {"override": ["attn=Q8_0"]}, "Q4_K_M", "APEX-Custom"),
        (None, {"override": ["weight=Q8_0"]}, "custom", "APEX-Custom"),
    ],
)
def test_labels_and_titles(asked: str | None, given: dict[str, Any], tier: str, title: str, models: Models) -> None:
    decided = plan(models("qwen3moe"), asked, options=options(**given))
    assert (decided.tier, decided.title) == (tier, title)
    assert decided.file_name == f"qwen3moe-{title}.gguf"


def test_label_of_a_tier_file_is_not_its_path(models: Models, tmp_path: Path) -> None:
    path = tmp_path / "file-name.toml"
    path.write_text('name = "mine"\nbase = "Q6_K"\nrouted = "Q5_K"\nshared = "Q8_0"\nattention = "Q6_K"\n')
    decided = plan(models("qwen3moe"), str(path))
    assert (decided.tier, decided.title) == ("mine", "APEX-Mine")
    assert b"file-name" not in decided.layouts[0].header


def test_contradictions(models: Models) -> None:
    path = models("qwen3moe")
    for tier, given, message in (
        (None, {}, "nothing says which types to use"),
        ("Q4_K_M", {"cell": ["routed.edge=Q8_0"]}, "--cell concerns a tier's table"),
        ("Q4_K_M", {"published": True}, "--published concerns a tier's table"),
        ("quality", {"keep_split": True, "split_max_size": 1000}, "exclude each other"),
        ("quality", {"keep_split": True, "prune_layers": [1]}, "cannot be combined"),
        ("quality", {"prune_layers": [6]}, "no layer 6"),
        ("quality", {"prune_layers": [-1]}, "no layer -1"),
        ("quality", {"prune_layers": range(6)}, "every layer"),
        ("F16", {"override": ["attn=Q8_0"]}, "takes no types for single tensors with the mix F16"),
        ("quality", {"override": ["attn"]}, "not of the form"),
        ("quality", {"output_tensor_type": "Q8_K"}, "cannot be encoded"),
        ("quality", {"output_tensor_type": "Q4__K"}, "Did you mean Q4_K"),
        ("qualitty", {}, "Did you mean quality"),
    ):
        with pytest.raises(UsageError, match=message):
            plan(path, tier, options=options(**given))


# --- where types come from ---


def test_precedence(models: Models, tmp_path: Path) -> None:
    """--override before --recipe before --like before the tier."""
    path = models("qwen3moe")
    like = tmp_path / "like.gguf"
    written(plan(path, "Q5_1"), like).close()
    recipe = tmp_path / "recipe.txt"
    recipe.write_text("attn_k=Q5_0 attn_v\\.weight=q4_0")
    tier = {"attn_q": "Q6_K", "attn_k": "Q6_K", "attn_v": "Q6_K"}
    for given, expected in (
        ({}, tier),
        ({"like": like}, dict.fromkeys(tier, "Q5_1")),
        ({"recipe": recipe}, tier | {"attn_k": "Q5_0", "attn_v": "Q4_0"}),
        ({"override": ["attn_v=IQ4_NL"]}, tier | {"attn_v": "IQ4_NL"}),
        (
            {"like": like, "recipe": recipe, "override": ["attn_v=IQ4_NL", "attn=Q4_1", "attn_q=Q8_0"]},
            {"attn_q": "Q4_1", "attn_k": "Q4_1", "attn_v": "IQ4_NL"},
        ),
        ({"like": like, "recipe": recipe}, {"attn_q": "Q5_1", "attn_k": "Q5_0", "attn_v": "Q4_0"}),
    ):
        decided = plan(path, "quality", options=options(**given))
        assert {part: kinds(decided, part)[2] for part in tier} == expected
        assert types(decided)["blk.0.ffn_gate_inp.weight"] == "F32"


def test_like(models: Models, tmp_path: Path) -> None:
    """All types of the other file, labelled with the mix of the most common quantized one."""
    path = models("qwen35moe")
    for tier, base in (("quality", "Q6_K"), ("Q5_K_M", "Q5_K_S"), ("F16", "F16"), ("MXFP4_MOE", "MXFP4_MOE")):
        other = plan(path, tier, options=options(allow_requantize=True))
        with written(other, tmp_path / "other.gguf") as file:
            assert {name: info.type.name for name, info in file.tensors.items()} == types(other)
        decided = plan(path, options=options(like=tmp_path / "other.gguf"))
        assert types(decided) == types(other)
        assert (decided.recipe.base, decided.tier, decided.title) == (base, "like", "APEX-Custom")


def test_like_of_mostly_floats_does_not_become_all_floats(models: Models, tmp_path: Path) -> None:
    """With a base of F16 llama-quantize would ignore every type."""
    path = models("llama")
    other = plan(path, "Q8_0", options=options(override=["(ffn|embd|output)=F16"]))
    written(other, tmp_path / "other.gguf").close()
    decided = plan(path, options=options(like=tmp_path / "other.gguf"))
    assert types(decided) == types(other)
    assert set(types(decided).values()) == {"Q8_0", "F16", "F32"}
    assert decided.recipe.base == "Q8_0"


def test_like_wants_the_same_model(models: Models, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no .* of this shape and \d+ more"):
        plan(models("qwen3moe"), options=options(like=models("llama")))
    wider = write_random_gguf(tmp_path / "wider.gguf", "qwen3moe", ff_exp=512, sparse=True)
    with pytest.raises(InputError, match=r"has no blk\.0\.ffn_down_exps\.weight of this shape"):
        plan(models("qwen3moe"), options=options(like=wider))
    with pytest.raises(InputError):
        plan(models("qwen3moe"), options=options(like=tmp_path / "none.gguf"))


def test_recipe_without_a_tier(models: Models, tmp_path: Path) -> None:
    path = models("qwen3moe")
    source = plan(path, "micro")
    recipe = tmp_path / "recipe.txt"
    recipe.write_text(source.recipe.text())
    decided = plan(path, options=options(recipe=recipe))
    assert types(decided) == types(source)
    assert decided.recipe.text() == source.recipe.text()
    assert not decided.warnings or "importance" in decided.warnings[0]
    # a line short: refused, unless a tier or another flag decides the rest
    lines = source.recipe.text().splitlines(keepends=True)
    recipe.write_text("".join(line for line in lines if "^output" not in line))
    with pytest.raises(UsageError, match=r"names no type for output\.weight$"):
        plan(path, options=options(recipe=recipe))
    for given, kind in ({"output_tensor_type": "Q4_0"}, "Q4_0"), ({"leave_output_tensor": True}, "BF16"):
        assert types(plan(path, options=options(recipe=recipe, **given)))["output.weight"] == kind
    assert types(plan(path, "Q8_0", options=options(recipe=recipe)))["output.weight"] == "Q8_0"
    recipe.write_text("attn=Q8_0")
    with pytest.raises(UsageError, match=r"names no type for output\.weight and \d+ more"):
        plan(path, options=options(recipe=recipe))
    recipe.write_text("".join(line for line in lines if "^token_embd" not in line))
    decided = plan(path, options=options(recipe=recipe, token_embedding_type="Q4_1"))
    assert types(decided)["token_embd.weight"] == "Q4_1"


def test_patterns_that_decide_nothing_are_named(models: Models, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.txt"
    recipe.write_text("attn_k=Q8_0 ffn_upp=Q8_0 attn_k\\.weight=Q4_0")
    decided = plan(
        models("qwen3moe"), "quality", options=options(recipe=recipe, override=["ffn_down_exp=Q8_0", "zz=F16"])
    )
    assert "2 of 3 patterns decide no tensor" in warned(decided, "recipe.txt")
    assert warned(decided, "recipe.txt").endswith("ffn_upp, attn_k\\.weight")
    assert warned(decided, "--override").endswith(": zz")
    assert not plan(models("qwen3moe"), "quality", options=options(override=["attn=Q8_0"])).warnings


# --- hparams ---


def test_override_kv(models: Models, tmp_path: Path) -> None:
    """Overrides reach the file and the decisions: eight experts are special in llama.cpp's mixes."""
    path = models("qwen3moe")
    eight = write_random_gguf(tmp_path / "eight.gguf", "qwen3moe", experts=8, sparse=True)
    given = options(
        override_kv=["qwen3moe.expert_count=int:8", "general.name=str:A Name", "x.y=bool:true", "x.z=float:0.5"]
    )
    decided = plan(path, "Q4_K_M", options=given)
    assert types(decided) == types(plan(eight, "Q4_K_M"))
    assert types(decided) != types(plan(path, "Q4_K_M"))
    with written(decided, tmp_path / "out.gguf") as file:
        assert [file.get(key) for key in ("{arch}.expert_count", "general.name", "x.y", "x.z")] == [
            8,
            "A Name",
            True,
            0.5,
        ]
        assert file.metadata["qwen3moe.expert_count"].type.name == "UINT32"
    with pytest.raises(InputError, match="expert_used_count"):
        plan(path, "Q4_K_M", options=options(override_kv=["qwen3moe.expert_used_count=int:99"]))


# --- what is already quantized ---


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As it ships: experts in MXFP4."""
    path = tmp_path_factory.mktemp("fp4") / "gpt-oss.gguf"
    return write_random_gguf(path, "gpt-oss", sparse=True, expert_dtype="MXFP4")


def test_fp4_experts_are_kept(gpt_oss: Path) -> None:
    for tier in ("quality", "micro", "Q4_K_M"):
        decided = plan(gpt_oss, tier)
        assert set(kinds(decided, "ffn_up_exps").values()) == {"MXFP4"}
        assert decided.requantized == ()
        assert "18 tensors that the source has in MXFP4 are kept" in warned(decided, "--allow-requantize")
    assert set(kinds(decided, "attn_q").values()) == {"Q4_K"}


def test_fp4_experts_are_encoded_again_when_asked(gpt_oss: Path) -> None:
    decided = plan(gpt_oss, "compact", options=options(allow_requantize=True))
    assert kinds(decided, "ffn_up_exps") == {0: "Q4_K", 1: "Q3_K", 2: "Q3_K", 3: "Q3_K", 4: "Q3_K", 5: "Q4_K"}
    assert len(decided.requantized) == 18
    assert not [warning for warning in decided.warnings if "are kept" in warning]
    # an override asks for it too, and is reported for the caller to refuse
    decided = plan(gpt_oss, "compact", options=options(override=["ffn_up_exps=Q8_0"]))
    assert decided.requantized == tuple(f"blk.{i}.ffn_up_exps.weight" for i in range(6))
    assert "12 tensors" in warned(decided, "are kept")
    assert len(plan(gpt_oss, "F16").requantized) == 18
    assert not [warning for warning in plan(gpt_oss, "F16").warnings if "are kept" in warning]


def test_requantized(tmp_path: Path) -> None:
    path = write_random_gguf(tmp_path / "model-Q8_0.gguf", "qwen3moe", dtype="Q8_0", sparse=True)
    decided = plan(path, "quality")
    assert set(decided.requantized) == {t.name for t in decided.tensors if not t.kept}
    assert plan(path, "Q8_0").requantized == ()
    assert plan(path, "COPY").requantized == ()


def test_copy_keeps_the_file_type(models: Models, tmp_path: Path) -> None:
    written(plan(models("qwen3moe"), "Q5_K_M"), tmp_path / "made.gguf").close()
    decided = plan(tmp_path / "made.gguf", "COPY")
    assert decided.file_type == 17
    assert types(decided) == types(plan(models("qwen3moe"), "Q5_K_M"))


# --- importance ---


def test_needed_importance(models: Models) -> None:
    path = models("qwen3moe")
    for tier, needs, missing in (
        ("quality", False, set()),
        ("i-quality", True, set()),
        ("mini", True, {"IQ2_S"}),
        ("micro", True, {"IQ2_XS", "IQ1_M"}),
        ("IQ2_M", False, {"IQ2_S"}),
        ("Q4_K_M", False, set()),
    ):
        decided = plan(path, tier)
        assert decided.needs_importance is needs
        assert not decided.importance
        found = {t.name: t.type.name for t in decided.tensors}
        assert {found[name] for name in decided.missing_importance} == missing
        assert set(decided.missing_importance) >= {n for n, kind in found.items() if kind in missing and "blk" in n}
        assert bool([w for w in decided.warnings if "need an importance matrix" in w]) is bool(missing)
        with_one = plan(path, tier, imatrix=random_imatrix(path))
        assert (with_one.needs_importance, with_one.missing_importance) == (False, ())
        assert with_one.importance is (tier != "quality")


def test_importance_from_a_file(models: Models, tmp_path: Path) -> None:
    path = models("qwen3moe")
    random_imatrix(path).write(tmp_path / "imatrix.gguf")
    assert plan(path, "mini", imatrix=tmp_path / "imatrix.gguf").missing_importance == ()
    with pytest.raises(InputError):
        plan(path, "mini", imatrix=path)


def test_partial_importance(models: Models) -> None:
    path = models("qwen3moe")
    partial = random_imatrix(path, skip=r"^(?!blk\.)|blk\.2\.ffn_(up|down)_exps")
    decided = plan(path, "mini", imatrix=partial)
    assert decided.missing_importance == ("blk.2.ffn_down_exps.weight", "blk.2.ffn_up_exps.weight")
    assert "2 tensors need" in warned(decided, "need an importance matrix")
    assert "4 quantized tensors have no importance" in warned(decided, "have no importance")


def test_unused_importance(models: Models) -> None:
    path = models("qwen3moe")
    decided = plan(path, "quality", imatrix=random_imatrix(path))
    assert warned(decided, "tier quality is encoded without importance: the matrix is not used")
    assert decided.recipe.sha256 == plan(path, "quality").recipe.sha256
    assert decided.layouts == plan(path, "quality").layouts


def test_experts_without_data(models: Models) -> None:
    path = models("qwen3moe")
    uncovered = {"blk.1.ffn_down_exps.weight": [0, 2], "blk.3.ffn_up_exps.weight": [1]}
    decided = plan(path, "i-compact", imatrix=random_imatrix(path, uncovered=uncovered))
    text = warned(decided, "calibration")
    assert text.startswith("3 expert matrices in 2 tensors")
    assert "blk.1.ffn_down_exps.weight: [0, 2]; blk.3.ffn_up_exps.weight: [1]" in text
    # Q8_0 does not look at importance
    assert not [
        w for w in plan(path, "Q8_0", imatrix=random_imatrix(path, uncovered=uncovered)).warnings if "calib" in w
    ]


def test_importance_of_another_model(models: Models, tmp_path: Path) -> None:
    """Refused when the plan is made and not hours later."""
    wider = write_random_gguf(tmp_path / "wider.gguf", "qwen3moe", experts=4, ff_exp=512)
    with pytest.raises(InputError, match=r"importance of blk\.0\.ffn_down_exps\.weight has"):
        plan(models("qwen3moe"), "i-compact", imatrix=random_imatrix(wider))


# --- fallbacks ---


def test_fallbacks_are_named(tmp_path: Path) -> None:
    """Rows of 576, which no block of 256 divides."""
    path = write_random_gguf(tmp_path / "narrow.gguf", "llama", sparse=True, embd=576, heads=9, kv=3, ff=1536)
    decided = plan(path, "quality")
    found = {t.name: (t.fallback_from, t.type.name) for t in decided.tensors}
    assert found["blk.0.attn_q.weight"] == ("Q6_K", "Q8_0")
    assert found["blk.0.ffn_up.weight"] == ("Q6_K", "Q8_0")
    assert found["blk.1.ffn_up.weight"] == ("Q5_K", "Q5_1")
    assert found["blk.2.ffn_up.weight"] == ("IQ4_XS", "IQ4_NL")
    assert found["blk.2.ffn_down.weight"] == (None, "IQ4_XS")  # rows of 1536
    fallen = [t for t in decided.tensors if t.fallback_from]
    text = warned(decided, "take a fallback type")
    assert text.startswith(f"{len(fallen)} tensors (")
    for pair in ("Q6_K -> Q8_0", "Q5_K -> Q5_1", "IQ4_XS -> IQ4_NL"):
        assert pair in text
    assert decided.recipe.types["blk.0.attn_q.weight"].name == "Q8_0"
    assert [t.to_json()["fallback_from"] for t in fallen] == [t.wanted.name for t in fallen]


def test_asked_types_have_no_fallback(tmp_path: Path) -> None:
    path = write_random_gguf(tmp_path / "narrow.gguf", "llama", sparse=True, embd=576, heads=9, kv=3, ff=1536)
    for flag, name in (("output_tensor_type", "output.weight"), ("token_embedding_type", "token_embd.weight")):
        with pytest.raises(UsageError, match=f"{name} cannot be Q4_K: its rows of 576 weights"):
            plan(path, "quality", options=options(**{flag: "Q4_K"}))
        assert types(plan(path, "quality", options=options(**{flag: "Q5_0"})))[name] == "Q5_0"


# --- the whole ---


def test_json(models: Models) -> None:
    decided = plan(models("qwen35moe"), "i-mini")
    data = decided.to_json()
    assert (data["model"], data["tier"], data["base"]) == ("qwen35moe", "i-mini", "Q3_K_M")
    assert data["total_bytes"] == decided.total_bytes
    assert sum(t["bytes"] for t in data["tensors"]) == decided.tensor_bytes
    weights = sum(t.weights for t in decided.tensors)
    assert data["bpw"] == pytest.approx(decided.tensor_bytes * 8 / weights)
    row = next(t for t in data["tensors"] if t["name"] == "blk.0.ffn_up_exps.weight")
    assert {k: row[k] for k in ("role", "layer", "shape", "type", "source_type", "fallback_from")} == {
        "role": "routed_expert", "layer": 0, "shape": [256, 256, 3], "type": "Q3_K", "source_type": "BF16",
        "fallback_from": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("tier", "imatrix", "given", "shards"),
    [
        ("quality", False, {}, 1),
        ("i-quality", True, {}, 1),
        ("compact", False, {"split_max_size": 200_000}, None),
        ("i-compact", True, {"split_max_size": 700_000, "prune_layers": (2, 3)}, None),
    ],
)
def test_total_is_the_finished_file(
    tier: str, imatrix: bool, given: dict[str, Any], shards: int | None, models: Models, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    from apex_quant import quantize

    path = models("qwen35moe")
    if imatrix:
        random_imatrix(path).write(tmp_path / "imatrix.gguf")
    matrix = tmp_path / "imatrix.gguf" if imatrix else None
    decided = plan(path, tier, imatrix=matrix, options=options(**given))
    (made,) = quantize(path, tier, imatrix=matrix, out=tmp_path, options=options(**given)).outputs
    files = sorted(tmp_path.glob("qwen35moe-*.gguf"))
    assert sum(file.stat().st_size for file in files) == decided.total_bytes == made.bytes
    assert [file.stat().st_size for file in files] == [part.total_bytes for part in decided.layouts]
    assert len(files) == shards if shards else len(files) > 1
    with open_model(files[0]) as model:
        assert {name: info.type.name for name, info in model.tensors.items()} == types(decided)
        assert model.get("apex.recipe.sha256") == decided.recipe.sha256


def test_keep_split(models: Models, tmp_path: Path) -> None:
    from apex_quant.gguf import split

    split(models("qwen3moe"), tmp_path / "parts", 400_000)
    first, *more = sorted(tmp_path.glob("parts-*.gguf"))
    assert more
    decided = plan(first, "quality", options=options(keep_split=True))
    assert len(decided.layouts) == len(more) + 1
    with open_model(first) as model:
        assert [t.name for t in decided.tensors] == list(model.tensors)
        assert list(decided.groups) == [info.file for info in model.tensors.values()]
    whole = plan(first, "quality")
    assert len(whole.layouts) == 1
    assert types(whole) == types(decided)
    assert decided.model == whole.model == "parts"


def test_an_open_model_and_a_tier_object_do_too(models: Models) -> None:
    tier = find_tier("compact")
    assert tier is not None
    with open_model(models("qwen3moe")) as model:
        assert plan(model, tier).layouts == plan(models("qwen3moe"), "compact").layouts
    changed = replace(PlanOptions(), pure=True)
    assert types(plan(models("qwen3moe"), "Q4_K_M", options=changed))["output.weight"] == "Q4_K"
