"""`convert_mlx`: which bits a module gets, the predicate as a file of its own, and what is said without mlx-lm."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from apex_quant.errors import ApexError, InputError, NativeError, ResourceError, UsageError
from apex_quant.gguf.types import ggml_type
from apex_quant.mlx import choose, convert_mlx, nearest, predicate
from tests.convert.test_checkpoint import make

CONFIG: dict[str, Any] = {"text_config": {"num_hidden_layers": 40, "num_experts": 256}}


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("Q8_0", (8, 64)),
        ("Q6_K", (6, 64)),
        ("Q5_K", (5, 64)),
        ("Q4_K", (4, 64)),
        ("IQ4_XS", (4, 128)),
        ("Q3_K", (3, 64)),
        ("IQ2_S", (2, 64)),
        ("IQ1_M", (2, 128)),
    ],
)
def test_the_nearest_form(kind: str, form: tuple[int, int]) -> None:
    assert nearest(ggml_type(kind)) == form


@pytest.mark.parametrize(
    ("path", "bits"),
    [
        # quality at 40 layers: experts Q6_K in the first 5, Q5_K in the next 5, IQ4_XS in the middle
        ("language_model.model.layers.0.mlp.switch_mlp.up_proj", 6),
        ("model.layers.5.mlp.switch_mlp.down_proj", 5),
        ("model.layers.20.mlp.switch_mlp.gate_proj", 4),
        ("model.layers.20.mlp.experts.3.w1", 4),
        ("model.layers.39.mlp.switch_mlp.gate_proj", 6),
        ("model.layers.20.mlp.shared_expert.gate_proj", 8),
        ("model.layers.20.mlp.shared_experts.down_proj", 8),
        ("model.layers.20.mlp.shared_expert_gate", 8),
        ("model.layers.20.mlp.gate", 8),
        ("model.layers.20.self_attn.q_proj", 6),
        ("model.layers.20.linear_attn.in_proj_qkv", 6),
        ("model.layers.0.mlp.down_proj", 8),
        ("model.embed_tokens", 6),
        ("lm_head", 6),
    ],
)
def test_modules_get_their_cells(path: str, bits: int) -> None:
    assert choose(predicate(CONFIG, "quality"), path)["bits"] == bits


def test_a_dense_model_takes_the_routed_column() -> None:
    table = predicate({"num_hidden_layers": 40}, "quality")
    assert choose(table, "model.layers.20.mlp.down_proj")["bits"] == 4


def test_the_program_stands_alone_and_says_what_is_missing(tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    with pytest.raises(ResourceError, match="needs mlx-lm"):
        convert_mlx(folder, tmp_path / "out", python=sys.executable)
    made = convert_mlx(folder, tmp_path / "out", tier="i-compact", predicate_only=True)
    assert not made.path.exists()
    table = json.loads(made.table.read_text())
    space = runpy.run_path(str(made.predicate))
    assert space["TABLE"] == table
    ask = space["quant_predicate"]

    def module(width: int) -> SimpleNamespace:
        return SimpleNamespace(to_quantized=None, weight=SimpleNamespace(shape=(8, width)))

    path = "model.layers.1.mlp.switch_mlp.up_proj"
    expected = choose(table, path)
    assert ask(path, module(1024)) == {**expected, "mode": "affine"}
    assert ask(path, module(96), {})["group_size"] == 32
    assert ask(path, module(33)) is False
    assert ask(path, SimpleNamespace()) is False


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Did you mean"):
        predicate(CONFIG, "qualty")
    with pytest.raises(InputError, match="num_hidden_layers"):
        predicate({}, "quality")
    with pytest.raises(UsageError, match="exists already"):
        convert_mlx(make(tmp_path / "m"), tmp_path, predicate_only=True)


def test_what_is_no_hub_id_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"/nope: no such directory"):
        convert_mlx("/nope", tmp_path / "out")


@pytest.mark.parametrize(
    ("says", "error", "message"),
    [
        ("Model type tiny not supported.", InputError, "mlx-lm: ValueError: Model type tiny not supported."),
        ("something broke", NativeError, "mlx-lm failed: ValueError: something broke"),
    ],
)
def test_mlx_lm_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, error: type[ApexError], message: str
) -> None:
    """An architecture that it does not know is the checkpoint's matter, all else a failure; no folder is left."""
    for name, text in (("mlx", ""), ("mlx_lm", f"def convert(*_, **__):\n    raise ValueError({says!r})\n")):
        (tmp_path / "packages" / name).mkdir(parents=True)
        (tmp_path / "packages" / name / "__init__.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    with pytest.raises(error, match=message):
        convert_mlx(make(tmp_path / "m"), tmp_path / "out", python=sys.executable)
    assert not (tmp_path / "out").exists()
