"""Our type decisions against the library's own: llama_model_quantize's dry run, tensor by tensor and in order."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import pytest

from apex_quant.errors import ApexError
from apex_quant.gguf import TensorInfo, open_model
from apex_quant.gguf.types import TYPES
from apex_quant.model.facts import ModelFacts, facts
from apex_quant.recipe.mixes import MIXES, Choice, requires_imatrix, stock_types
from tests.helpers.dry_run import DryRun, Outcome, dry_runs
from tests.helpers.generic_models import ARCHITECTURES, UNLOADABLE, Tensors, generic_tensors, write_generic
from tests.helpers.random_models import write_random_gguf
from tests.helpers.shapes import ARCHITECTURES as SHAPES

pytest.importorskip("llama_cpp")

# with falcon, which goes through all, these reach every rule that looks at the architecture
FEW_MIXES = ("Q4_K_M", "Q3_K_M", "IQ3_XXS", "IQ2_M", "MXFP4_MOE")


@dataclass(frozen=True)
class Case:
    """One file and how to quantize it."""

    path: Path
    mix: str
    imatrix: bool = False
    overrides: tuple[tuple[str, str], ...] = ()
    pure: bool = False
    output_type: str | None = None
    embedding_type: str | None = None
    leave_output: bool = False
    keep_order: bool = False

    def job(self) -> DryRun:
        scalars: dict[str, Any] = {
            "pure": self.pure,
            "quantize_output_tensor": not self.leave_output,
            "keep_split": self.keep_order,
            "only_copy": self.mix == "COPY",
        }
        for key, kind in (("output_tensor_type", self.output_type), ("token_embedding_type", self.embedding_type)):
            if kind is not None:
                scalars[key] = TYPES[kind].id
        overrides = [(pattern, TYPES[kind].id) for pattern, kind in self.overrides]
        return DryRun(str(self.path), MIXES[self.mix].ftype, self.imatrix, overrides, scalars)

    def ours(self) -> list[Choice]:
        found, tensors = _read(self.path)
        return stock_types(
            found,
            tensors,
            self.mix,
            overrides=[(pattern, TYPES[kind]) for pattern, kind in self.overrides],
            has_imatrix=self.imatrix,
            pure=self.pure,
            output_type=TYPES[self.output_type] if self.output_type else None,
            embedding_type=TYPES[self.embedding_type] if self.embedding_type else None,
            leave_output=self.leave_output,
            keep_order=self.keep_order,
        )


@lru_cache(maxsize=8)
def _read(path: Path) -> tuple[ModelFacts, tuple[TensorInfo, ...]]:
    with open_model(path) as model:
        return facts(model), tuple(model.tensors.values())


def difference(case: Case, stock: Outcome) -> str | None:
    """What differs between our decisions and the library's, None when nothing does."""
    where = f"{case}: "
    try:
        ours = case.ours()
    except ApexError as error:
        return None if stock.error else f"{where}we refuse ({error}), the library does not"
    if stock.error:
        return f"{where}the library fails ({stock.error}), we do not"
    if [c.name for c in ours] != [name for name, _, _ in stock.types]:
        return f"{where}the order differs"
    wrong = [
        f"{choice.name}: {choice.type} ({choice.why}), library {target}"
        for choice, (_, _, target) in zip(ours, stock.types, strict=True)
        if choice.type.name.lower() != target.lower()
    ]
    if wrong:
        return f"{where}{len(wrong)} differ: " + "; ".join(wrong[:5])
    if sum(c.type != c.wanted for c in ours) != stock.fallbacks:
        return f"{where}{stock.fallbacks} fallbacks in the library"
    if not case.imatrix:
        ends = ("token_embd.weight", "per_layer_token_embd.weight", "output.weight")
        needs = any(requires_imatrix(c.name, c.type, case.mix) for c in ours if c.why != "kept" and c.name not in ends)
        if needs != stock.needs_imatrix:
            return f"{where}needs an imatrix: {stock.needs_imatrix} in the library"
    return None


def check(cases: Iterable[Case]) -> list[Outcome]:
    todo = list(cases)
    outcomes = dry_runs([case.job() for case in todo])
    wrong = list(filter(None, map(difference, todo, outcomes)))
    assert not wrong, f"{len(wrong)} of {len(todo)} cases:\n" + "\n".join(wrong[:10])
    return outcomes


MOE = {"expert_count": 6, "expert_used_count": 2}
EIGHT = {"expert_count": 8, "expert_used_count": 2}
QUANTIZED = tuple(name for name, (_, default) in MIXES.items() if default.is_quantized)


def test_every_architecture(tmp_path: Path) -> None:
    known = set(gguf.MODEL_ARCH_NAMES.values()) - {"mmproj"}
    assert known <= set(ARCHITECTURES), "PyPI gguf knows architectures that are not in the table"
    tensors = generic_tensors()
    cases = []
    for architecture in ARCHITECTURES:
        path = write_generic(tmp_path / f"{architecture}.gguf", architecture, tensors, **MOE)
        cases += [Case(path, mix) for mix in FEW_MIXES if architecture not in UNLOADABLE]
    outcomes = check(cases)
    failed = {case.path.stem for case, outcome in zip(cases, outcomes, strict=True) if outcome.error}
    assert failed == {"clip"}  # on some mixes of projector files the library aborts and we say so
    (gptj,) = dry_runs([Case(tmp_path / "gptj.gguf", "Q8_0").job()])
    assert UNLOADABLE["gptj"] in gptj.error


@pytest.mark.parametrize("architecture", ["llama", "qwen3moe", "falcon"])
def test_every_mix(architecture: str, tmp_path: Path) -> None:
    cases = []
    for name, keys in {"dense": {}, "moe": MOE, "eight": EIGHT}.items():
        tensors = generic_tensors(experts=bool(keys), odd=False)
        path = write_generic(tmp_path / f"{name}.gguf", architecture, tensors, **keys)
        cases += [Case(path, mix, imatrix=imatrix) for mix in MIXES for imatrix in (False, True)]
    check(cases)


def test_real_shapes(tmp_path: Path) -> None:
    """Models as they are: names, depths and row lengths of real ones, in sparse files."""
    cases = []
    for architecture in SHAPES:
        path = write_random_gguf(tmp_path / f"{architecture}.gguf", architecture, sparse=True, scale="real")
        cases += [Case(path, mix, imatrix=mix.startswith("I")) for mix in (*FEW_MIXES, "IQ1_M", "Q6_K")]
    check(cases)


def test_heads_and_depth(tmp_path: Path) -> None:
    """Grouped queries, layers without KV heads, 70B, NextN blocks and loaders that count layers differently."""
    shallow, deep = (generic_tensors(layers=n, experts=False, odd=False) for n in (18, 80))
    deeper = generic_tensors(layers=82, experts=False, odd=False)
    gqa: dict[str, dict[str, Any]] = {f"gqa{n}": {"attention__head_count_kv": 8 // n} for n in (1, 2, 4, 8)}
    gqa["none"] = {"attention__head_count": 0, "attention__head_count_kv": 0}
    gqa["array"] = {"attention__head_count_kv": [0, *[2] * 17]}
    gqa["more"] = {"attention__head_count": 9, "attention__head_count_kv": 8}
    gqa["absent"] = {"attention__head_count": 8, "attention__head_count_kv": None}
    mixes = ("Q2_K", "Q2_K_S", "IQ1_S", "IQ2_S", "IQ3_XXS", "IQ3_XS", "IQ3_M", "IQ4_XS", "Q3_K_S")
    cases = []
    for name, keys in gqa.items():
        path = write_generic(tmp_path / f"{name}.gguf", "qwen3", shallow, **keys)
        cases += [Case(path, mix) for mix in mixes]
    for architecture in ("llama", "llama-embed", "deci", "qwen2", "olmo", "jais2", "qwen3"):
        for layers, n_tensors, keys in (
            (80, deep, {"attention__head_count_kv": 8}),
            (80, deep, {"attention__head_count": 9, "attention__head_count_kv": 8}),
            (80, deep, {"attention__head_count_kv": 2}),
            (82, deeper, {"nextn_predict_layers": 2}),
            (80, deep, {"nextn_predict_layers": 2}),
            (80, deep, EIGHT),
            (68, deep, {}),
        ):
            path = write_generic(tmp_path / f"{len(cases)}.gguf", architecture, n_tensors, layers=layers, **keys)
            cases += [Case(path, mix) for mix in ("Q4_K_M", "Q3_K_S")]
    for architecture, keys in {"nanbeige": {"num_loops": 3}, "graniteswitch": {}, "mamba": {}}.items():
        path = write_generic(tmp_path / f"{architecture}.gguf", architecture, shallow, **keys)
        cases += [Case(path, mix) for mix in ("Q4_K_M", "Q2_K_S", "IQ3_XS")]
    check(cases)


@pytest.mark.parametrize("width", [576, 100, 64, 32])
def test_row_lengths(width: int, tmp_path: Path) -> None:
    """Every fallback, and the types the library has none for."""
    cases = []
    for tied in (False, True):
        tensors = generic_tensors(layers=3, width=width, tied=tied, odd=False)
        path = write_generic(tmp_path / f"{tied}.gguf", "qwen3moe", tensors, layers=3, **MOE)
        cases += [Case(path, mix) for mix in QUANTIZED]
        cases += [
            Case(path, "Q8_0", overrides=(("ffn_down", kind.name), ("attn", "Q5_K")), output_type=kind.name)
            for kind in TYPES.values()
        ]
    check(cases)


def test_tied_embeddings_and_asked_types(tmp_path: Path) -> None:
    cases = []
    for tied in (False, True):
        for architecture in ("gemma3n", "falcon"):
            tensors = generic_tensors(layers=3, tied=tied, experts=False)
            path = write_generic(tmp_path / f"{architecture}{tied}.gguf", architecture, tensors, layers=3)
            cases += [Case(path, mix) for mix in MIXES]
            named = (("per_layer", "Q5_0"), ("output", "Q5_1"))
            for mix in ("Q4_K_M", "IQ2_XXS", "MXFP4_MOE", "F16", "COPY", "TQ1_0"):
                for overrides in ((), named, (("token_embd", "Q2_K"),)):
                    for pure in (False, True):
                        cases += [
                            Case(path, mix, False, overrides, pure),
                            Case(path, mix, False, overrides, pure, output_type="Q3_K"),
                            Case(path, mix, False, overrides, pure, embedding_type="IQ4_XS"),
                            Case(path, mix, False, overrides, pure, "F16", "BF16", leave_output=True),
                        ]
    check(cases)


def test_overrides_and_counters(tmp_path: Path) -> None:
    """Overridden tensors do not advance the counters, the order decides what the counters see."""
    sets: tuple[tuple[tuple[str, str], ...], ...] = (
        (("attn_v", "Q8_0"),),
        (("blk\\.[0-3]\\.attn_v", "Q8_0"), ("attn_v", "Q4_K")),
        (("blk\\.(0|2|4|6|8)\\.", "Q5_0"),),
        (("ffn_down(?!_)", "Q6_K"), ("ffn_down", "Q3_K")),
        (("^blk\\.1\\d\\.ffn_up\\.weight$", "IQ2_S"), ("", "IQ4_NL")),
        (("weight", "Q4_K"),),
    )
    cases = []
    for architecture, keys in (("qwen3moe", MOE), ("llama", {}), ("glm5-next", MOE), ("bailingmoe3", MOE)):
        path = write_generic(tmp_path / f"{architecture}.gguf", architecture, generic_tensors(), **keys)
        for mix in ("Q4_K_M", "Q3_K_M", "Q2_K_S", "IQ2_M", "Q5_K_M", "MXFP4_MOE", "BF16"):
            cases += [Case(path, mix, imatrix=True, overrides=overrides) for overrides in sets]
            cases += [Case(path, mix, keep_order=True), Case(path, mix, pure=True)]
    check(cases)


def test_refusals(tmp_path: Path) -> None:
    """Where the library stops, so do we: layers out of range, projector files, types without fallback."""
    stray: dict[str, Tensors] = {
        "encoder": {"v.blk.0.ffn_down.weight": ((256, 64), "F16")},
        "beyond": {"blk.3.ffn_up_exps.weight": ((256, 64, 6), "F16")},
        "negative": {"blk.-1.ffn_gate.weight": ((256, 64), "F16")},
        "spaces": {"blk.  1.ffn_gate.weight": ((256, 64), "F16"), "blk.+2.ffn_up.weight": ((256, 64), "F16")},
    }
    cases = []
    for name, extra in stray.items():
        tensors = generic_tensors(layers=3, odd=False) | extra
        path = write_generic(tmp_path / f"{name}.gguf", "qwen3moe", tensors, layers=3, **MOE)
        cases += [Case(path, mix) for mix in ("Q4_K_M", "IQ2_XXS", "Q8_0", "MXFP4_MOE")]
        cases.append(Case(path, "Q4_K_M", overrides=(("ffn_(down|up_exps|gate)", "Q6_K"),)))
    path = write_generic(tmp_path / "clip.gguf", "clip", generic_tensors(experts=False))
    cases += [Case(path, mix) for mix in ("Q4_K_M", "Q8_0", "Q5_K_S", "IQ4_XS", "IQ1_S")]
    outcomes = check(cases)
    assert sum(bool(outcome.error) for outcome in outcomes) == 8


def test_pruned_layers(tmp_path: Path) -> None:
    """Renamed tensors with the whole model's facts give what --prune-layers gives."""
    path = write_generic(tmp_path / "model.gguf", "qwen3moe", generic_tensors(odd=False), **MOE)
    gone, mixes = (2, 3, 11), ("Q4_K_M", "Q3_K_M", "IQ3_XS", "IQ2_S")
    number = {layer: new for new, layer in enumerate(i for i in range(18) if i not in gone)}
    found, tensors = _read(path)
    kept = []
    for tensor in tensors:
        head, layer, *rest = tensor.name.split(".")
        if head != "blk":
            kept.append(tensor)
        elif int(layer) in number:
            kept.append(replace(tensor, name=".".join([head, str(number[int(layer)]), *rest])))
    jobs = [replace(Case(path, mix).job(), prune=gone) for mix in mixes]
    for mix, stock in zip(mixes, dry_runs(jobs), strict=True):
        ours = stock_types(found, kept, mix)
        assert [(c.name, c.type.name.lower()) for c in ours] == [(n, t.lower()) for n, _, t in stock.types]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_random_models(seed: int, tmp_path: Path) -> None:
    """Random architectures, depths, widths, tensors left out, mixes and options."""
    rng = random.Random(seed)
    architectures = sorted(set(ARCHITECTURES) - set(UNLOADABLE) - {"clip", "hrm_text"})
    kinds = [kind.name for kind in TYPES.values() if kind.encodable]
    cases = []
    for number in range(60):
        layers = rng.choice([4, 18, 31, 40, 61, 68, 80])
        full = generic_tensors(
            layers=layers, width=rng.choice([256, 512, 576, 96]), tied=rng.random() < 0.3, odd=rng.random() < 0.3
        )
        tensors = {name: row for name, row in full.items() if rng.random() < 0.9}
        experts = rng.choice([0, 1, 4, 8, 128])
        keys = {"expert_count": experts, "expert_used_count": 1} if experts else {}
        path = write_generic(
            tmp_path / f"{number}.gguf",
            rng.choice(architectures),
            tensors,
            layers=layers,
            attention__head_count_kv=rng.choice([1, 2, 4, 8]),
            **keys,
        )
        for _ in range(6):
            patterns = [rng.choice(["attn_v", "blk\\.[0-9]\\.", "ffn_.*_exps", "down", "embd"]) for _ in range(2)]
            cases.append(
                Case(
                    path,
                    rng.choice(QUANTIZED),
                    imatrix=rng.random() < 0.5,
                    overrides=tuple((p, rng.choice(kinds)) for p in patterns) if rng.random() < 0.4 else (),
                    pure=rng.random() < 0.1,
                    output_type=rng.choice(kinds) if rng.random() < 0.1 else None,
                    embedding_type=rng.choice(kinds) if rng.random() < 0.1 else None,
                    leave_output=rng.random() < 0.1,
                    keep_order=rng.random() < 0.2,
                )
            )
    check(cases)


@pytest.mark.slow
def test_every_architecture_and_mix(tmp_path: Path) -> None:
    for architecture in sorted(set(ARCHITECTURES) - set(UNLOADABLE)):
        path = write_generic(tmp_path / f"{architecture}.gguf", architecture, generic_tensors(), **MOE)
        check(Case(path, mix, imatrix=imatrix) for mix in MIXES for imatrix in (False, True))
        path.unlink()
