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
from apex_quant.serving.memory import LibraryMemory, MemoryQuestion, library_memory
from tests.helpers.random_models import write_random_gguf
from tests.helpers.shapes import ARCHITECTURES, BASE, TINY, Shape, attention, feed_forward, norms, qk_norm

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
    kinds = [kind for kind in ("full", "sliding") if kind in by_kind]
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
}  # fmt: skip
"""Architectures whose windows and states other rules decide, small."""


@pytest.mark.parametrize("architecture", OTHERS)
def test_other_rules(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, architecture, OTHERS[architecture])
    path = write_random_gguf(tmp_path / "m.gguf", architecture, sparse=True)
    compare(path, [MemoryQuestion(2000, ubatch=128), MemoryQuestion(1000, "q8_0", "q4_0", sequences=3, unified=True)])


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
