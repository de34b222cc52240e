"""Plans against llama_model_quantize's own decisions: its dry run on sparse files at real shapes, in its order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from apex_quant.gguf import TYPES
from apex_quant.recipe.mixes import MIXES, Override
from apex_quant.recipe.plan import plan
from apex_quant.recipe.planned import Plan, PlanOptions
from apex_quant.recipe.tiers import find_tier, published_lines, published_tiers
from tests.helpers.dry_run import DryRun, dry_runs
from tests.helpers.imatrix import random_imatrix
from tests.helpers.random_models import Models, write_random_gguf
from tests.helpers.shapes import ARCHITECTURES

pytest.importorskip("llama_cpp")

TIERS = [tier.name for tier in published_tiers()]
LAYERS = {"qwen35moe": 40, "glm4moe": 46, "llama": 80, "qwen3moe": 48, "deepseek2": 61, "gemma4": 30, "gpt-oss": 24}
"""Trunk layers at real scale; the NextN blocks of the first two are not among them."""


@dataclass
class Pair:
    """A plan and the library's run that must decide the same."""

    path: Path
    decided: Plan
    overrides: Sequence[Override] = ()
    scalars: dict[str, Any] = field(default_factory=dict)
    prune: Sequence[int] = ()

    def job(self) -> DryRun:
        overrides = [(pattern, kind.id) for pattern, kind in self.overrides]
        ftype = MIXES[self.decided.recipe.base].ftype
        return DryRun(str(self.path), ftype, self.decided.importance, overrides, self.scalars, self.prune)


def check(pairs: Sequence[Pair]) -> None:
    """Same tensors, same order, same types, same number of fallbacks."""
    wrong = []
    for pair, stock in zip(pairs, dry_runs([pair.job() for pair in pairs]), strict=True):
        where = f"{pair.path.stem} {pair.decided.tier} {pair.scalars}"
        assert not stock.error, f"{where}: {stock.error}"
        ours = [(t.name, t.source_type.name.lower(), t.type.name.lower()) for t in pair.decided.tensors]
        theirs = [(name, source.lower(), target.lower()) for name, source, target in stock.types]
        wrong += [f"{where}: {a}, library {b}" for a, b in zip(ours, theirs, strict=True) if a != b][:3]
        if pair.overrides != pair.decided.recipe.overrides():  # a recipe names what fallbacks led to
            assert sum(t.fallback_from is not None for t in pair.decided.tensors) == stock.fallbacks, where
    assert not wrong, "\n".join(wrong[:20])


def published(path: Path, tier: str, layers: int, imatrix: bool = False) -> Pair:
    """The published file's own lines, as the published script gave them to llama-quantize."""
    found = find_tier(tier)
    assert found is not None
    importance = random_imatrix(path, skip="^") if imatrix else None
    decided = plan(path, tier, imatrix=importance, options=PlanOptions(published=True))
    return Pair(path, decided, published_lines(found, layers))


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_published_files(architecture: str, real: Models) -> None:
    """What the old files do, holes included: the tensors without a line fall to the base mix."""
    path = real(architecture)
    layers = LAYERS.get(architecture) or len(ARCHITECTURES[architecture].real[0])
    pairs = [published(path, tier, layers) for tier in ("quality", "micro")]
    check([*pairs, published(path, "i-compact", layers, imatrix=True)])


@pytest.mark.parametrize(("architecture", "imatrix"), [("gemma4", False), ("gpt-oss", True)])
def test_all_published_tiers(architecture: str, imatrix: bool, real: Models) -> None:
    check([published(real(architecture), tier, LAYERS[architecture], imatrix) for tier in TIERS])


def test_published_files_below_24_layers(models: Models) -> None:
    """The absolute zones at any depth."""
    for architecture in ("qwen35moe", "nemotron_h_moe"):
        layers = len(ARCHITECTURES[architecture].tiny[0].replace("N", ""))
        check([published(models(architecture), tier, layers) for tier in ("balanced", "nano")])


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_our_recipes(architecture: str, real: Models) -> None:
    """The recipe as llama.cpp's overrides, on the same base, gives the plan."""
    pairs = []
    for tier in ("i-balanced", "compact", "nano"):
        decided = plan(real(architecture), tier)
        pairs.append(Pair(real(architecture), decided, decided.recipe.overrides()))
    check(pairs)


def test_our_tiers_line_by_line(real: Models) -> None:
    """One line for each cell and nothing else: what has no column is the library's to decide."""
    lines = {
        r"^blk\.(\d|1[0-9]|2[0-9]|3[0-9]|40)\.ssm_conv": "Q4_0",  # never quantized, whatever a line says
        r"^blk\.([0-4]|3[5-9]|40)\.ffn_.*_exps\.": "Q3_K",
        r"^blk\.([5-9]|3[0-4])\.ffn_.*_exps\.": "IQ2_S",
        r"\.ffn_.*_exps\.": "IQ2_XXS",
        r"^blk\.([0-4]|3[5-9]|40)\.ffn_.*_shexp\.": "Q5_K",
        r"\.ffn_.*_shexp\.": "Q4_K",
        r"^blk\.([0-2]|3[7-9]|40)\.(attn|ssm|nextn)": "Q4_K",
        r"\.(attn|ssm)": "Q3_K",
    }
    overrides = [(pattern, TYPES[kind]) for pattern, kind in lines.items()]
    check([Pair(real("qwen35moe"), plan(real("qwen35moe"), "nano"), overrides)])


@pytest.mark.parametrize(
    ("given", "scalars"),
    [
        ({}, {}),
        ({"pure": True}, {"pure": True}),
        ({"leave_output_tensor": True}, {"quantize_output_tensor": False}),
        ({"output_tensor_type": "q5_0"}, {"output_tensor_type": 6}),
        ({"token_embedding_type": "Q4_1"}, {"token_embedding_type": 3}),
        (
            {"output_tensor_type": "F16", "token_embedding_type": "BF16", "pure": True},
            {"output_tensor_type": 1, "token_embedding_type": 30, "pure": True},
        ),
        ({"override": [r"blk\.[0-3]\.attn_v=Q8_0", "ffn_down_exps=IQ4_NL"]}, {}),
    ],
)
def test_mixes_and_flags(given: dict[str, Any], scalars: dict[str, Any], real: Models) -> None:
    pairs = []
    overrides = [(p, TYPES[k]) for p, _, k in (text.partition("=") for text in given.get("override", ()))]
    for architecture in ("qwen3moe", "gemma4"):
        # the library has no fallback from Q1_0 and stops on rows of 2112, as we do
        every = [mix for mix in MIXES if (mix, architecture) != ("Q1_0", "gemma4")]
        for mix in ("Q4_K_M", "IQ3_XXS", "MXFP4_MOE") if given else every:
            decided = plan(real(architecture), mix, options=PlanOptions(**given))
            assert decided.zones is None
            copy = {"only_copy": True} if mix == "COPY" else {}
            pairs.append(Pair(real(architecture), decided, overrides, scalars | copy))
    check(pairs)


def test_like_and_recipes_without_a_tier(models: Models, tmp_path: Path) -> None:
    """The base that is chosen for them makes llama.cpp take every type of theirs."""
    path, recipe, pairs = models("deepseek2"), tmp_path / "recipe.txt", []
    for tier, override in (
        ("micro", "attn=F16"),
        ("Q8_0", "(ffn|embd|output)=F16"),
        ("F16", None),
        ("IQ4_XS", "ffn=Q4_1"),
    ):
        source = plan(path, tier, options=PlanOptions(override=[override] if override else []))
        recipe.write_text(source.recipe.text())
        decided = plan(path, options=PlanOptions(recipe=recipe))
        assert [t.type for t in decided.tensors] == [t.type for t in source.tensors]
        pairs.append(Pair(path, decided, decided.recipe.overrides()))
    check(pairs)


def test_awkward_names(tmp_path: Path) -> None:
    """Upper case, white space and '=' in a name: the library finds them by our patterns too."""
    from tests.helpers.generic_models import generic_tensors, write_generic

    odd = {
        f"blk.0.{part}.weight": ((512, 64), "F16") for part in ("Attn_K", "a b=c", "x(y)[z]", "a+b*c?", "é", "^$|{}")
    }
    path = write_generic(
        tmp_path / "odd.gguf", "llama", generic_tensors(layers=2, experts=False, odd=False) | odd, layers=2
    )
    decided = plan(path, "Q4_K_M", options=PlanOptions(override=[r"^blk\.0\.(Attn_K|a b.c|x|a\+|é|\^)=Q5_0"]))
    assert sum(t.type.name == "Q5_0" for t in decided.tensors) == len(odd)
    check([Pair(path, decided, decided.recipe.overrides())])


# --- pruned layers ---


@pytest.mark.parametrize(
    ("architecture", "gone"),
    [
        ("qwen35moe", (0, 11, 40)),
        ("deepseek2", (1, 2, 3, 60)),
        ("glm4moe", (45, 46)),
        ("gemma4", (5, 29)),
        ("nemotron_h_moe", (2, 3, 51)),
        ("llama", (7,)),
    ],
)
def test_pruned_layers(architecture: str, gone: tuple[int, ...], real: Models) -> None:
    """Names, order and types; llama.cpp decides with the whole model's counts."""
    path, pairs = real(architecture), []
    for tier in ("Q4_K_M", "Q3_K_M", "IQ2_M", "quality"):
        decided = plan(path, tier, options=PlanOptions(prune_layers=gone))
        overrides = decided.recipe.overrides() if tier == "quality" else ()
        pairs.append(Pair(path, decided, overrides, prune=gone))
        assert len({t.role.layer for t in decided.tensors} - {None}) == len(ARCHITECTURES[architecture].real[0]) - len(
            gone
        )
    check(pairs)


def test_pruned_zones(real: Models) -> None:
    """Zones count the layers that are left."""
    decided = plan(real("qwen3moe"), "quality", options=PlanOptions(prune_layers=(0, 1, 2, 3, 4, 20, 20)))
    assert decided.zones is not None
    assert decided.zones.n_trunk == 42
    found = {t.role.layer: t.type.name for t in decided.tensors if ".ffn_up_exps." in t.name}
    assert [found[i] for i in (4, 5, 9, 10, 31, 32, 36, 37)] == (
        ["Q6_K", "Q5_K", "Q5_K", "IQ4_XS", "IQ4_XS", "Q5_K", "Q5_K", "Q6_K"]
    )
    source = {t.name: t.source for t in decided.tensors}
    assert source["blk.0.attn_q.weight"] == "blk.5.attn_q.weight"
    assert source["blk.41.attn_q.weight"] == "blk.47.attn_q.weight"


@pytest.mark.parametrize(
    ("architecture", "gone", "keys"),
    [
        ("nemotron_h_moe", (1, 2), {"attention.head_count_kv": [0, 2, 0, 0, 0]}),
        ("gemma4", (1, 6), {"attention.sliding_window_pattern": [True, True, False, True, True]}),
        ("glm4moe", (0, 6), {"leading_dense_block_count": 0, "nextn_predict_layers": 0}),
        ("qwen35moe", (0,), {"nextn_predict_layers": 1}),
        ("deepseek2", (2,), {"leading_dense_block_count": 1}),
    ],
)
def test_pruned_metadata(
    architecture: str, gone: tuple[int, ...], keys: dict[str, Any], models: Models, tmp_path: Path
) -> None:
    """What is said layer by layer follows: llama.cpp loads the file (its own pruning leaves some unloadable)."""
    from apex_quant.gguf import open_model

    decided = plan(models(architecture), "Q8_0", options=PlanOptions(prune_layers=gone))
    path = tmp_path / "pruned.gguf"
    with path.open("wb") as file:
        file.write(decided.layouts[0].header)
        file.truncate(decided.total_bytes)
    with open_model(path) as model:
        found = {key: model.get(f"{{arch}}.{key}") for key in keys}
        count = model.get("{arch}.block_count")
    assert {key: list(v) if hasattr(v, "__len__") else v for key, v in found.items()} == keys
    assert count == len(ARCHITECTURES[architecture].tiny[0]) - len(gone)
    (loaded,) = dry_runs([DryRun(str(path), 7, scalars={"only_copy": True})])
    assert not loaded.error
    assert [name for name, _, _ in loaded.types] == [t.name for t in decided.tensors]


def test_pruned_files(models: Models, tmp_path: Path) -> None:
    """The data of a pruned file is stock's, importance of the right layers included."""
    from apex_quant import quantize
    from apex_quant.gguf import open_model
    from tests.helpers.stock import stock_quantize

    path, gone = models("qwen3moe"), (1, 2, 5)
    random_imatrix(path, seed=3).write(tmp_path / "imatrix.gguf")
    flags = PlanOptions(prune_layers=gone, fill="none")
    (made,) = quantize(path, "i-compact", imatrix=tmp_path / "imatrix.gguf", out=tmp_path, options=flags).outputs
    overrides = [(pattern, kind.id) for pattern, kind in made.plan.recipe.overrides()]
    stock = tmp_path / "stock.gguf"
    stock_quantize(
        path,
        stock,
        made.plan.file_type,
        imatrix=tmp_path / "imatrix.gguf",
        tensor_types=overrides,
        prune_layers=list(gone),
    )
    with open_model(made.path) as ours, open_model(stock) as theirs:
        assert list(ours.tensors) == list(theirs.tensors)
        assert ours.get("{arch}.block_count") == theirs.get("{arch}.block_count") == 3
        for name, info in ours.tensors.items():
            assert info.type is theirs.tensors[name].type
            assert bytes(ours.read(info)) == bytes(theirs.read(theirs.tensors[name])), name


def test_pruning_needs_one_stack_of_layers(tmp_path: Path) -> None:
    from apex_quant.errors import UsageError
    from tests.helpers.generic_models import generic_tensors, write_generic

    path = write_generic(tmp_path / "t5.gguf", "t5", generic_tensors(), attention__head_count_kv=8)
    with pytest.raises(UsageError, match="an encoder and a decoder"):
        plan(path, "Q8_0", options=PlanOptions(prune_layers=(1,)))


def test_sharded_source(real: Models, tmp_path: Path) -> None:
    """keep_split takes tensors by shard and offset, which changes what the mixes count."""
    from apex_quant.gguf import split

    path = write_random_gguf(tmp_path / "whole.gguf", "llama", layers="D" * 20)
    split(path, tmp_path / "part", 3_000_000)
    first = min(tmp_path.glob("part-*.gguf"))
    pairs = [
        Pair(first, plan(first, mix, options=PlanOptions(keep_split=keep)), scalars={"keep_split": keep})
        for mix in ("Q4_K_M", "Q3_K_M")
        for keep in (False, True)
    ]
    assert len(pairs[1].decided.layouts) > 1
    check(pairs)


@pytest.mark.slow
def test_every_architecture(tmp_path: Path) -> None:
    """Tensors of every category under every architecture the library knows, with and without our own table."""
    from tests.helpers.generic_models import ARCHITECTURES, UNLOADABLE, generic_tensors, write_generic

    tensors = generic_tensors()
    for architecture in sorted(set(ARCHITECTURES) - set(UNLOADABLE) - {"clip"}):
        path = write_generic(tmp_path / "model.gguf", architecture, tensors, expert_count=6, expert_used_count=2)
        pairs = []
        for tier in ("quality", "micro"):
            decided = plan(path, tier)
            assert decided.zones is not None
            pairs += [Pair(path, decided, decided.recipe.overrides()), published(path, tier, decided.zones.n_trunk)]
        check(pairs)
