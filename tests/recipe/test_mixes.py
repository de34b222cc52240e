"""Mixes without the library: names, numbers, fallbacks, refusals; with it, the tables against its own."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import pytest

from apex_quant.errors import InputError, UsageError
from apex_quant.gguf.types import TYPES, GGMLType
from apex_quant.recipe.mixes import (
    MIXES,
    allows_quantization,
    fallback_type,
    kept_because,
    mix_name,
    requires_imatrix,
    stock_types,
)


@dataclass(frozen=True)
class Facts:
    architecture: str = "qwen3moe"
    n_layer_all: int = 2
    n_expert: int = 4
    n_gqa: int = 2
    is_70b: bool = False


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...] = (256, 8)
    type: GGMLType = TYPES["BF16"]


@pytest.mark.parametrize(
    ("asked", "name"),
    [("q4_k", "Q4_K_M"), ("Q5_K", "Q5_K_M"), ("q3_k", "Q3_K_M"), ("iq2_s", "IQ2_S"), ("15", "Q4_K_M"), ("0", "F32")],
)
def test_names_and_aliases(asked: str, name: str) -> None:
    assert mix_name(asked) == name


@pytest.mark.parametrize(("wrong", "near"), [("Q4_KM", "Q4_K_M"), ("IQ4XS", "IQ4_XS"), ("99", "")])
def test_unknown_names(wrong: str, near: str) -> None:
    with pytest.raises(UsageError, match=f"Did you mean {near}" if near else "no llama.cpp mix"):
        mix_name(wrong)


def test_ftype_numbers_are_the_library_s() -> None:
    lib = pytest.importorskip("llama_cpp")
    for name, (ftype, _) in MIXES.items():
        if name != "COPY":
            stem = "ALL" if name == "F32" else "MOSTLY"
            assert getattr(lib, f"LLAMA_FTYPE_{stem}_{name}", ftype) == ftype


def test_encoders_that_need_importance_are_refused() -> None:
    lib = pytest.importorskip("llama_cpp")
    needs = lib.llama_cpp._lib.ggml_quantize_requires_imatrix
    needs.restype = ctypes.c_bool
    for kind in TYPES.values():
        if kind.encodable and needs(kind.id):
            for name in ("token_embd.weight", "output.weight", "blk.0.attn_k.weight"):
                assert requires_imatrix(name, kind, "Q4_K_M"), (kind.name, name)


@pytest.mark.parametrize(
    ("name", "kind", "mix", "needed"),
    [
        ("blk.0.ffn_up.weight", "IQ3_XXS", "Q4_K_M", True),
        ("blk.0.ffn_up.weight", "IQ3_S", "IQ3_S", False),
        ("blk.0.ffn_up.weight", "Q2_K", "Q2_K", False),
        ("blk.0.ffn_up.weight", "Q2_K", "q2_k_s", True),
        ("token_embd.weight", "Q2_K", "Q2_K_S", False),
        ("token_embd.weight", "IQ2_S", "IQ2_S", False),
        ("output.weight", "IQ1_M", "IQ1_M", False),
    ],
)
def test_requires_imatrix(name: str, kind: str, mix: str, needed: bool) -> None:
    assert requires_imatrix(name, TYPES[kind], mix) is needed


@pytest.mark.parametrize(
    ("kind", "width", "given"),
    [
        ("Q4_K", 512, "Q4_K"),
        ("Q4_K", 576, "Q5_0"),
        ("Q6_K", 576, "Q8_0"),
        ("IQ2_XXS", 576, "IQ4_NL"),
        ("Q3_K", 96, "Q4_0"),
        ("Q8_0", 100, "F16"),
        ("IQ1_M", 100, "F16"),
        ("Q2_0", 96, "Q4_0"),
        ("F16", 7, "F16"),
    ],
)
def test_fallbacks(kind: str, width: int, given: str) -> None:
    assert fallback_type(TYPES[kind], width) is TYPES[given]


def test_no_fallback() -> None:
    with pytest.raises(InputError, match=r"tensor blk\.0\.attn_q\.weight: Q1_0 needs rows of a multiple of 128"):
        stock_types(Facts(), [Tensor("blk.0.attn_q.weight", (576, 2))], "Q1_0")


def test_kept_tensors_say_why() -> None:
    assert kept_because("blk.0.ffn_gate_inp.weight", (256, 8), "qwen3moe") == "router"
    assert kept_because("output_norm.weight", (256,), "llama") == "1-D"
    assert kept_because("blk.0.attn_k_b.weight", (256, 8), "glm5-next") == "latent attention"
    assert allows_quantization("blk.0.attn_k_b.weight", (256, 8), "deepseek2")
    assert not allows_quantization("output.weight", (256, 8), "llama", leave_output=True)


def test_choices_explain_themselves() -> None:
    names = ["output.weight", "blk.0.ffn_down_exps.weight", "blk.0.attn_v.weight", "blk.0.attn_norm.weight"]
    tensors = [Tensor(name, (288, 8)) for name in names]
    choices = stock_types(Facts(), tensors, "Q4_K_M", overrides=[("attn_v", TYPES["Q6_K"])])
    assert [(c.name, str(c.type), str(c.wanted), c.why, c.detail) for c in choices] == [
        ("output.weight", "Q8_0", "Q8_0", "mix", ""),
        ("blk.0.attn_norm.weight", "BF16", "BF16", "kept", "norm"),
        ("blk.0.attn_v.weight", "Q8_0", "Q6_K", "override", "attn_v"),
        ("blk.0.ffn_down_exps.weight", "Q5_0", "Q4_K", "mix", ""),
    ]


def test_manual_types_are_overrides_by_name() -> None:
    tensors = [Tensor(f"blk.{i}.attn_v.weight") for i in range(2)] + [Tensor("output.weight")]
    manual = {"blk.0.attn_v.weight": TYPES["Q5_0"], "output.weight": TYPES["Q4_0"]}
    by_name = stock_types(Facts(), tensors, "Q4_K_M", manual=manual, overrides=[("blk.0|output", TYPES["Q8_0"])])
    by_pattern = stock_types(
        Facts(), tensors, "Q4_K_M", overrides=[(r"^blk\.0", TYPES["Q5_0"]), ("^output", TYPES["Q4_0"])]
    )
    assert [c.type for c in by_name] == [c.type for c in by_pattern]
    assert all(c.why == "mix" for c in stock_types(Facts(), tensors, "F16", manual=manual))


def test_layer_out_of_range() -> None:
    with pytest.raises(InputError, match=r"tensor blk\.7\.ffn_up\.weight: layer 7 in its name"):
        stock_types(Facts(), [Tensor("blk.7.ffn_up.weight")], "Q4_K_M")
