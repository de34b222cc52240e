"""KV cache bytes from the header, against what the library says that it allocates, to the last printed digit.

The library loads the models without their weights, so real sizes and long contexts cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apex_quant import embedded_model
from apex_quant.errors import InputError, UsageError
from apex_quant.gguf import open_model
from apex_quant.gguf.types import CACHE_TYPES
from apex_quant.model.kv_cache import KVCache, _row_bytes, kv_cache
from apex_quant.model.kv_rules import FORK_TYPES
from apex_quant.model.kv_rules import LATENT as LATENT_ARCHITECTURES
from apex_quant.serving.memory import LibraryMemory, MemoryQuestion, library_memory
from tests.helpers.random_models import write_random_gguf
from tests.helpers.shapes import (
    ARCHITECTURES,
    BASE,
    TINY,
    TINY_MOE,
    BlockRows,
    Key,
    Shape,
    attention,
    experts,
    feed_forward,
    norms,
    qk_norm,
)

MIB = 1 << 20
PRINTED = 0.00501  # half of the last digit

Files = Callable[[str], Path]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("kv")

    def file(architecture: str) -> Path:
        if architecture == "embedded":
            return embedded_model()
        path = folder / f"{architecture}.gguf"
        return path if path.exists() else write_random_gguf(path, architecture, sparse=True)

    return file


def check(ours: KVCache, theirs: LibraryMemory) -> None:
    """Equal sums, parts and cells of every cache."""
    assert ours.note is None
    by_kind: dict[str, list[Any]] = {}
    for layer in ours.layers:
        by_kind.setdefault(layer.kind, []).append(layer)
    attention = [one for one in theirs.memory if one["kind"] == "llama_kv_cache"]
    kinds = [kind for kind in ("full", "indexer", "sliding") if kind in by_kind]
    if len(attention) > len(kinds):  # the library makes an empty cache for what no layer uses
        attention = [one for one in attention if one["layers"]]
    assert len(attention) == len(kinds)
    for kind, one in zip(kinds, attention, strict=True):
        layers = by_kind[kind]
        assert (one["cells"], one["layers"]) == (layers[0].cells, len(layers))
        assert sum(layer.k_bytes for layer in layers) / MIB == pytest.approx(one["k_mib"], abs=PRINTED)
        assert sum(layer.v_bytes for layer in layers) / MIB == pytest.approx(one["v_mib"], abs=PRINTED)
    states = [one for one in theirs.memory if one["kind"] == "llama_memory_recurrent"]
    assert bool(states) == bool(ours.recurrent_bytes)
    if states:
        assert ours.recurrent_bytes / MIB == pytest.approx(states[0]["mib"], abs=PRINTED)
    assert ours.bytes / MIB == pytest.approx(theirs.kv_mib, abs=len(theirs.memory) * PRINTED)
    assert ours.bytes == ours.attention_bytes + ours.sliding_bytes + ours.recurrent_bytes


def compare(path: Path, questions: list[MemoryQuestion]) -> None:
    answers = library_memory(path, questions)
    with open_model(path) as model:
        for question, answer in zip(questions, answers, strict=True):
            ours = kv_cache(
                model,
                ctx=question.ctx,
                type_k=question.type_k,
                type_v=question.type_v,
                sequences=question.sequences,
                ubatch=question.ubatch,
                unified=question.unified,
                swa_full=question.swa_full,
                flash_attention=question.flash_attention != "off",
            )
            check(ours, answer)


@pytest.mark.parametrize("architecture", ["embedded", "llama", "gemma4", "gpt-oss", "deepseek2"])
def test_every_type(architecture: str, files: Files) -> None:
    compare(files(architecture), [MemoryQuestion(3000, kind, kind) for kind in CACHE_TYPES])


@pytest.mark.parametrize("architecture", ["embedded", "qwen35moe", "gemma4", "nemotron_h_moe", "glm4moe", "qwen3moe"])
def test_mixed_types_and_many_sequences(architecture: str, files: Files) -> None:
    compare(
        files(architecture),
        [
            MemoryQuestion(1, "q8_0", "q5_1"),
            MemoryQuestion(700, "q5_0", "q4_0", sequences=3, ubatch=64),
            MemoryQuestion(700, "f16", "iq4_nl", sequences=3, ubatch=64, unified=True),
            MemoryQuestion(4000, "bf16", "f32", ubatch=100),
            MemoryQuestion(4000, swa_full=True),
            MemoryQuestion(1111, flash_attention="off"),
        ],
    )


@pytest.mark.parametrize(
    "architecture",
    ["qwen35moe", "deepseek2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3moe", "gemma4"))],
)
def test_real_sizes(architecture: str, tmp_path: Path) -> None:
    path = write_random_gguf(tmp_path / "real.gguf", architecture, scale="real", sparse=True)
    compare(path, [MemoryQuestion(131072, "q8_0", "q8_0"), MemoryQuestion(8192, sequences=2)])


def test_published_figures(tmp_path: Path) -> None:
    """MiB at 131072 tokens that others published for these shapes."""
    found = {}
    for architecture in ("qwen35moe", "qwen3moe"):
        path = write_random_gguf(tmp_path / f"{architecture}.gguf", architecture, scale="real", sparse=True)
        with open_model(path) as model:
            for k, v in (("f16", "f16"), ("q8_0", "q8_0"), ("q8_0", "q5_1"), ("q5_0", "q4_0"), ("q4_0", "q4_0")):
                found[architecture, k, v] = kv_cache(model, ctx=131072, type_k=k, type_v=v).attention_bytes / MIB
    assert list(found.values()) == [2560, 1360, 1160, 800, 720, 12288, 6528, 5568, 3840, 3456]


def test_bytes_of_a_token(files: Files) -> None:
    with open_model(files("gemma4")) as model:
        for sequences in (1, 3):
            for unified in (False, True):
                small, large = (
                    kv_cache(model, ctx=ctx, sequences=sequences, unified=unified) for ctx in (16384, 32768)
                )
                step = 16384 * sequences
                assert large.bytes - small.bytes == small.bytes_per_token * step == large.bytes_per_token * step


def test_refusals(files: Files) -> None:
    with open_model(files("deepseek2")) as model, pytest.raises(UsageError, match="one latent row"):
        kv_cache(model, ctx=512, type_k="f16", type_v="q8_0")
    with open_model(files("llama")) as model:
        with pytest.raises(UsageError, match="Did you mean q4"):
            kv_cache(model, ctx=512, type_k="q4_o")
        with pytest.raises(UsageError, match="at least 1"):
            kv_cache(model, ctx=0)


def test_heads_that_blocks_do_not_divide(tmp_path: Path) -> None:
    path = write_random_gguf(tmp_path / "odd.gguf", "llama", head=80, layers="D", embd=320, sparse=True)
    with open_model(path) as model:
        assert kv_cache(model, ctx=256).bytes == 2 * 256 * 80 * 2
        with pytest.raises(UsageError, match="K heads are 80 long"):
            kv_cache(model, ctx=256, type_k="q8_0")


def test_metadata_of_the_wrong_kind(tmp_path: Path) -> None:
    path = write_random_gguf(
        tmp_path / "bad.gguf", "gpt-oss", layers="M", sparse=True, metadata={"gpt-oss.attention.sliding_window": "x"}
    )
    with open_model(path) as model, pytest.raises(InputError, match="sliding_window"):
        kv_cache(model, ctx=256)


DENSE = (*norms("*", "attn_norm", "ffn_norm"), *feed_forward("*"))
INDEXER: dict[str, Key] = {
    "attention.indexer.head_count": "idx_heads", "attention.indexer.key_length": "idx", "attention.indexer.top_k": 64,
}  # fmt: skip
LATENT = TINY_MOE | {"q_lora": 256, "kv_lora": 256, "nope": 128, "rope": 64, "v_head": 128, "idx": 128, "idx_heads": 2}
LAYER_NORMS = ("attn_norm.weight", "post_attention_norm.weight")
MIXTURE = dict(ARCHITECTURES["deepseek2"].keys) | {"leading_dense_block_count": 0}
MIXTURE_BLOCKS = (
    *norms("*", "attn_norm", "ffn_norm"),
    *experts("*"),
    ("*", "exp_probs_b.bias", "experts"),
    *feed_forward("*", "_shexp", "shexp"),
)


def latent(kinds: str, lora: str = "kv_lora") -> BlockRows:
    return (
        (kinds, "attn_q_a.weight", "embd q_lora"),
        (kinds, "attn_q_a_norm.weight", "q_lora"),
        (kinds, "attn_q_b.weight", "q_lora heads*nope+heads*rope"),
        (kinds, "attn_kv_a_mqa.weight", f"embd {lora}+rope"),
        (kinds, "attn_kv_a_norm.weight", lora),
        (kinds, "attn_k_b.weight", f"nope {lora} heads"),
        (kinds, "attn_v_b.weight", f"{lora} v_head heads"),
        (kinds, "attn_output.weight", "heads*v_head embd"),
    )


def indexer(kinds: str) -> BlockRows:
    return (
        (kinds, "indexer.k_norm.weight", "idx"),
        (kinds, "indexer.k_norm.bias", "idx"),
        (kinds, "indexer.proj.weight", "embd idx_heads"),
        (kinds, "indexer.attn_k.weight", "embd idx"),
        (kinds, "indexer.attn_q_b.weight", "q_lora idx_heads*idx"),
    )


OTHERS = {
    # windows by a period of 6, of which the metadata says nothing
    "gemma3": Shape(
        tiny=("D" * 8, TINY),
        real=("", {}),
        keys=BASE | {"attention.sliding_window": 300},
        blocks=(*DENSE, *attention("*"), *qk_norm("*"), *norms("*", "post_attention_norm", "post_ffw_norm")),
    ),
    # a period in the metadata, the first layer of each full
    "cohere2": Shape(
        tiny=("D" * 7, TINY),
        real=("", {}),
        keys=BASE
        | {"attention.sliding_window": 64, "attention.sliding_window_pattern": 3, "logit_scale": 1.0}
        | {"attention.layer_norm_epsilon": 1e-5},
        model=(("token_embd.weight", "embd vocab"), ("output_norm.weight", "embd")),
        blocks=(*norms("*", "attn_norm"), *feed_forward("*"), *attention("*")),
    ),
    # C: short convolution, A: attention, told by the heads
    "lfm2": Shape(
        tiny=("CCACA", TINY),
        real=("", {}),
        keys=BASE | {"attention.head_count_kv": {"C": 0, "A": "kv"}, "shortconv.l_cache": 3},
        model=(("token_embd.weight", "embd vocab"), ("token_embd_norm.weight", "embd")),
        blocks=(
            *DENSE,
            *attention("A"),
            *qk_norm("A"),
            ("C", "shortconv.conv.weight", "3 embd"),
            ("C", "shortconv.in_proj.weight", "embd 3*embd"),
            ("C", "shortconv.out_proj.weight", "embd embd"),
        ),
    ),
    # nothing but states
    "mamba2": Shape(
        tiny=("R" * 4, {"embd": 256, "vocab": 512, "ctx": 512, "inner": 512, "state": 64, "groups": 2, "heads": 8}),
        real=("", {}),
        keys={
            "context_length": "ctx", "embedding_length": "embd", "feed_forward_length": 0, "attention.head_count": 0,
            "vocab_size": "vocab", "attention.layer_norm_rms_epsilon": 1e-6, "ssm.conv_kernel": 4,
            "ssm.inner_size": "inner", "ssm.state_size": "state", "ssm.time_step_rank": "heads",
            "ssm.group_count": "groups",
        },
        blocks=(
            *norms("*", "attn_norm"),
            ("*", "ssm_in.weight", "embd 2*inner+2*groups*state+heads"),
            ("*", "ssm_conv1d.weight", "4 inner+2*groups*state"),
            ("*", "ssm_conv1d.bias", "inner+2*groups*state"),
            ("*", "ssm_dt.bias", "heads"),
            ("*", "ssm_a", "1 heads"),
            ("*", "ssm_d", "1 heads"),
            ("*", "ssm_norm.weight", "inner/groups groups"),
            ("*", "ssm_out.weight", "inner embd"),
        ),
    ),
    # L: gated delta net, F: attention with an indexer's keys beside it
    "qwen4exp": Shape(
        tiny=(
            "LLLFLLLF",
            TINY_MOE
            | {"state": 64, "kheads": 2, "vheads": 4, "inner": 256, "conv": 4, "hc": 2, "rank": 32}
            | {"idx": 64, "idx_heads": 2},
        ),
        real=("", {}),
        keys=dict(ARCHITECTURES["qwen35moe"].keys)
        | INDEXER
        | {"nextn_predict_layers": 0, "hyper_connection.count": "hc", "hyper_connection.low_rank": "rank"},
        model=(
            ("token_embd.weight", "embd vocab"),
            ("output.weight", "embd vocab"),
            ("output_hc_norm.weight", "embd hc"),
            ("output_hc_down.weight", "hc*embd rank"),
            ("output_hc_up.weight", "rank hc*embd"),
        ),
        blocks=(
            *(row for row in ARCHITECTURES["qwen35moe"].blocks if row[0] != "N" and row[1] not in LAYER_NORMS),
            *(
                ("*", f"hc_{part}_{name}.weight", dims)
                for part in ("attn", "ffn")
                for name, dims in (
                    ("norm", "embd hc"), ("down", "hc*embd rank"), ("up", "rank hc*embd"), ("inject", "hc*embd hc"),
                )
            ),
            ("F", "indexer.q_proj.weight", "embd idx_heads*idx"),
            ("F", "indexer.k_proj.weight", "embd idx"),
            ("F", "indexer.q_norm.weight", "idx"),
            ("F", "indexer.k_norm.weight", "idx"),
        ),
    ),
    # K: delta attention, I: latent attention with an indexer of its own, M: with that of another layer
    "glm5-next": Shape(
        tiny=("KIKMKI", LATENT | {"rope": 0, "kda": 64, "pool": 2}),
        real=("", {}),
        keys=MIXTURE
        | INDEXER
        | {
            "attention.head_count_kv": {"K": 0, "I": 1, "M": 1},
            "attention.indexer.types": {"K": False, "I": True, "M": False},
            "attention.indexer.kpool": "pool", "kda.head_dim": "kda", "ssm.conv_kernel": 4,
            "hyper_connection.count": 4, "hyper_connection.sinkhorn_iterations": 4, "hyper_connection.epsilon": 1e-6,
            "kda.gate_lower_bound": -5.0,
        },
        blocks=(
            *MIXTURE_BLOCKS,
            *(
                ("*", f"hc_{part}_{name}.weight", dims)
                for part in ("attn", "ffn")
                for name, dims in (("fn", "4*embd 24"), ("base", "24"), ("scale", "3"))
            ),
            *latent("IM"),
            *indexer("IM"),
            ("IM", "indexer_compressor_gate.weight", "embd idx"),
            ("IM", "indexer_compressor_ape.weight", "idx pool"),
            *(("K", f"ssm_conv1d_{part}.weight", "4 1 heads*kda") for part in "qkv"),
            *(("K", f"attn_{part}.weight", "embd heads*kda") for part in "qkv"),
            *(("K", f"ssm_{part}_a.weight", "embd kda") for part in "fg"),
            *(("K", f"ssm_{part}_b.weight", "kda heads*kda") for part in "fg"),
            ("K", "ssm_beta.weight", "embd heads"),
            ("K", "ssm_a", "heads"),
            ("K", "ssm_dt.bias", "heads*kda"),
            ("K", "ssm_norm.weight", "kda"),
            ("K", "attn_output.weight", "heads*kda embd"),
        ),
    ),
    # I and M as above
    "hy_v4": Shape(
        tiny=("IMIM", LATENT | {"kv": 1}),
        real=("", {}),
        keys=MIXTURE
        | INDEXER
        | {
            "attention.indexer.types": {"I": True, "M": False},
            "hyper_connection.count": 2, "hyper_connection.epsilon": 1e-6, "hyper_connection.magnitude": 1.0,
        },
        model=(
            ("token_embd.weight", "embd vocab"),
            ("output_norm.weight", "embd"),
            ("output.weight", "embd vocab"),
            ("output_hc_fn.weight", "2*embd 2"),
            ("output_hc_base.weight", "2"),
            ("output_hc_scale.weight", "1"),
        ),
        blocks=(
            *MIXTURE_BLOCKS,
            *(
                ("*", f"hc_{part}_{name}.weight", dims)
                for part in ("attn", "ffn")
                for name, dims in (("fn", "2*embd 4"), ("base", "4"), ("scale", "2"))
            ),
            *latent("*"),
            ("*", "attn_sinks.weight", "heads"),
            ("*", "attn_gate.weight", "embd heads*v_head"),
            *indexer("I"),
        ),
    ),
    # S: a window with a latent of its own length
    "dots3note": Shape(
        tiny=("ISISS", LATENT | {"kv": 1, "kv_lora_swa": 128}),
        real=("", {}),
        keys=MIXTURE
        | INDEXER
        | {
            "attention.indexer.types": {"I": True, "S": False},
            "attention.sliding_window": 300, "attention.sliding_window_pattern": {"I": False, "S": True},
            "attention.kv_lora_rank_swa": "kv_lora_swa", "attention.key_length_swa": "kv_lora_swa+rope",
            "attention.value_length_swa": "kv_lora_swa", "attention.key_length_mla_swa": "nope+rope",
            "attention.value_length_mla_swa": "v_head", "rope.freq_base_swa": 10000.0,
        },
        blocks=(
            *MIXTURE_BLOCKS,
            *latent("I"),
            *latent("S", "kv_lora_swa"),
            ("*", "attn_k_norm.weight", "rope"),
            ("*", "attn_gate.weight", "embd heads"),
            *indexer("I"),
        ),
    ),
}  # fmt: skip
"""Architectures whose windows and states other rules decide, small."""


@pytest.mark.parametrize("architecture", OTHERS)
def test_other_rules(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, architecture, OTHERS[architecture])
    path = write_random_gguf(tmp_path / "m.gguf", architecture, sparse=True)
    values = "q8_0" if architecture in LATENT_ARCHITECTURES else "q4_0"
    compare(path, [MemoryQuestion(2000, ubatch=128), MemoryQuestion(1000, "q8_0", values, sequences=3, unified=True)])


@pytest.mark.parametrize("name", FORK_TYPES)
def test_types_of_forks(name: str, tmp_path: Path) -> None:
    """As many blocks as the codec makes of the rows; heads of 64 in an odd number are filled up."""
    from apex_quant.evaluation.turbo.codec import TURBO

    assert FORK_TYPES[name] == (128, TURBO[name].bytes)
    path = write_random_gguf(tmp_path / "m.gguf", "llama", sparse=True, scale="real")
    with open_model(path) as model:
        f16, turbo = (kv_cache(model, ctx=512, type_k=kind, type_v=kind) for kind in ("f16", name))
    assert turbo.bytes * 256 == f16.bytes * TURBO[name].bytes
    assert _row_bytes(3 * 64, 64, name) == 3 * TURBO[name].bytes
    assert _row_bytes(2 * 64, 64, name) == TURBO[name].bytes
