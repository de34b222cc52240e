"""Tensors that calibration did not reach: spared a type that needs importance, unless it was asked for by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from apex_quant import quantize
from apex_quant.errors import UsageError
from apex_quant.gguf import TYPES
from apex_quant.recipe.mixes import requires_imatrix
from apex_quant.recipe.plan import plan
from apex_quant.recipe.planned import Plan, PlanOptions
from apex_quant.recipe.unreached import WITHOUT_IMPORTANCE
from tests.helpers.files import data_section
from tests.helpers.imatrix import random_imatrix
from tests.helpers.random_models import Models, write_random_gguf
from tests.helpers.stock import StockError, stock_quantize

TRUNK_ONLY = r"^(?!blk\.[0-7]\.)"  # the NextN block of the small qwen35moe is blk.8


def spared(decided: Plan) -> dict[str, tuple[str, str]]:
    return {t.name: (t.why, t.type.name) for t in decided.tensors if t.why.startswith("no importance")}


def test_table() -> None:
    """Each is the smallest K type that is not smaller and needs none, for every tensor of any other mix."""
    for kind, other in WITHOUT_IMPORTANCE.items():
        assert TYPES[other].bpw > TYPES[kind].bpw
        assert TYPES[other].block == TYPES[kind].block
        assert not requires_imatrix("blk.0.ffn_up.weight", TYPES[other], "Q4_K_M")
        assert not [k for k in ("Q2_K", "Q3_K") if TYPES[kind].bpw < TYPES[k].bpw < TYPES[other].bpw]
    needed = {kind.name for kind in TYPES.values() if kind.imatrix == "needed"}
    assert needed <= set(WITHOUT_IMPORTANCE)


@pytest.mark.parametrize("mix", ["IQ1_S", "IQ2_XXS", "IQ2_M", "IQ3_XXS", "Q2_K_S"])
def test_nextn_block(mix: str, models: Models) -> None:
    path = models("qwen35moe")
    decided = plan(path, mix, imatrix=random_imatrix(path, skip=TRUNK_ONLY))
    found = spared(decided)
    assert found
    assert all(name.startswith("blk.8.") for name in found)
    for why, kind in found.values():
        given = why.removeprefix("no importance: ")
        assert kind == ("Q3_K" if mix == "Q2_K_S" else WITHOUT_IMPORTANCE[given])
    assert decided.missing_importance == ()
    (warning,) = [text for text in decided.warnings if "calibration did not reach" in text]
    assert all(name in warning for name in found)
    # with importance for all, and without any, the types are the mix's
    reached = plan(path, mix, imatrix=random_imatrix(path))
    assert spared(reached) == {}
    others = {t.name: t.type for t in reached.tensors}
    assert all(others[t.name] is t.type for t in decided.tensors if t.name not in found)
    without = plan(path, mix)
    assert spared(without) == {}
    assert set(found) & set(without.missing_importance)


def test_tier_cells(models: Models) -> None:
    path = models("qwen35moe")
    options = PlanOptions(cell=["routed.edge=IQ2_S"])
    decided = plan(path, "mini", imatrix=random_imatrix(path, skip=TRUNK_ONLY), options=options)
    assert spared(decided) == {
        f"blk.8.ffn_{part}_exps.weight": ("no importance: IQ2_S", "Q2_K") for part in ("down", "gate", "up")
    }


def test_embedding_and_output(models: Models) -> None:
    path = models("qwen3moe")
    decided = plan(path, "IQ2_XXS", imatrix=random_imatrix(path), options=PlanOptions(pure=True))
    assert set(spared(decided)) == {"token_embd.weight", "output.weight"}
    assert decided.missing_importance == ()


def test_trunk_is_not_spared(models: Models) -> None:
    path = models("qwen3moe")
    decided = plan(path, "IQ2_XXS", imatrix=random_imatrix(path, skip=r"^(?!blk\.)|blk\.2\.ffn_up_exps"))
    assert spared(decided) == {}
    assert decided.missing_importance == ("blk.2.ffn_up_exps.weight",)


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ({"override": ["blk.8.ffn_up_exps=IQ2_S"]}, "blk.8.ffn_up_exps.weight"),
        ({"output_tensor_type": "IQ2_XS"}, "output.weight"),
        ({"token_embedding_type": "IQ1_S"}, "token_embd.weight"),
    ],
)
def test_what_the_user_asked_for_is_refused(
    asked: dict[str, object], name: str, models: Models, tmp_path: Path
) -> None:
    path = models("qwen35moe")
    random_imatrix(path, skip=TRUNK_ONLY).write(tmp_path / "m.gguf")
    options = PlanOptions(**asked)  # type: ignore[arg-type]
    decided = plan(path, "i-compact", imatrix=tmp_path / "m.gguf", options=options)
    assert decided.missing_importance == (name,)
    with pytest.raises(UsageError, match="the given one has nothing for them: " + name):
        quantize(path, "i-compact", imatrix=tmp_path / "m.gguf", options=options, dry_run=True)


def test_stock_gives_the_same(tmp_path: Path) -> None:
    """Stock refuses the mix itself for want of importance; with our types named it makes our bytes."""
    path = write_random_gguf(tmp_path / "m-BF16.gguf", "qwen35moe")
    matrix = tmp_path / "m.gguf"
    random_imatrix(path, skip=TRUNK_ONLY).write(matrix)
    with pytest.raises(StockError, match=r"Missing importance matrix for tensor blk\.8\."):
        stock_quantize(path, tmp_path / "refused.gguf", 21, imatrix=matrix)
    (made,) = quantize(path, "Q2_K_S", imatrix=matrix, out=tmp_path / "ours.gguf", fill="none", threads=2).outputs
    assert spared(made.plan)
    overrides = [(pattern, kind.id) for pattern, kind in made.plan.recipe.overrides()]
    stock = tmp_path / "stock.gguf"
    stock_quantize(path, stock, made.plan.file_type, imatrix=matrix, tensor_types=overrides, threads=2)
    assert data_section(made.path) == data_section(stock)
