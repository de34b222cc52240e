"""What can be known of a model before anything is done: for --dry-run's sizes and times.

A GGUF's header gives everything to the byte, by the plans of its tiers; a checkpoint its parameters; the hub the
sizes of files. Nothing is downloaded, and no weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

from apex_quant.checkpoint import WEIGHTS
from apex_quant.errors import ApexError
from apex_quant.evaluation.active import active_bytes
from apex_quant.gguf import GGUFModel, open_model
from apex_quant.hub import BASELINE, HubFile, models_fitting
from apex_quant.model.facts import facts
from apex_quant.pipeline.config import RunConfig
from apex_quant.pipeline.wanted import plan_options, wanted
from apex_quant.recipe.plan import plan
from apex_quant.recipe.planned import Plan

Kind = Literal["gguf", "checkpoint", "hub", "unknown"]

BPW: Final = {
    "quality": 5.31, "balanced": 5.86, "compact": 3.83, "mini": 3.12, "nano": 2.67, "micro": 2.47,
}  # fmt: skip
"""Bits per weight of the tiers' plans (with i- the same) for a qwen35moe of 40 layers and 34.4e9 weights
(Qwen3.5-35B-A3B's shapes); a qwen3moe of 48 layers has 0.1 to 0.2 less."""

ENCODED: Final = {
    "Q8_0": 197.6, "Q6_K": 28.2, "Q5_K": 6.8, "Q4_K": 6.3, "Q3_K": 22.5, "Q2_K": 5.8, "IQ4_XS": 4.0, "IQ4_NL": 4.3,
    "IQ3_S": 2.5, "IQ3_XXS": 1.8, "IQ2_S": 3.7, "IQ2_XS": 1.0, "IQ2_XXS": 1.8, "IQ1_M": 4.6, "IQ1_S": 4.2,
}  # fmt: skip
"""Million weights encoded per second of one processor, with importance: benchmarks/rates.py."""
_ENCODED_OTHER: Final = 4.0
# processor seconds for a million weights of a tier, where no plan tells which types it has: the mean over such a plan
TYPICAL: Final = 0.2
_ACTIVE_SHARE: Final = 0.1  # of a MoE's weights, where the header is not there: 3e9 of 30e9


@dataclass(frozen=True)
class SourceFacts:
    """Bytes and counts, None where nothing tells them. `routing`: bytes of a token's routers' choices in a reference;
    `projector`: of the vision or audio part as a GGUF of its own. `outputs`: bytes of each file to make; `encode`:
    seconds of one processor for it, what an earlier one shares left out. `exact`: from a header, to the byte."""

    kind: Kind
    exact: bool = False
    basis: str = ""
    download: int | None = 0
    model: int | None = None
    weights: int | None = None
    active: int | None = None
    layers: int = 40
    embedding: int = 4096
    vocabulary: int = 150_000
    imatrix: int = 0
    routing: int = 0
    projector: int = 0
    outputs: Mapping[str, int | None] = field(default_factory=dict)
    encode: Mapping[str, float | None] = field(default_factory=dict)
    baselines: Mapping[str, int | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def source_facts(config: RunConfig, *, online: bool = True) -> SourceFacts:
    """Look at the source of a configuration. `online`: ask the hub for sizes of files; what it does not tell is
    noted, never an error. Raises what opening a GGUF or a checkpoint raises, and UsageError for unusable tiers."""
    notes: list[str] = []
    if config.source.lower().endswith(".gguf") and not config.is_hub:
        with open_model(config.source) as model:
            found = of_gguf(config, model)
    elif config.is_hub:
        found = _of_hub(config, notes, online=online)
    else:
        found = of_checkpoint(config, Path(config.source))
    baselines = {spec: _baseline_bytes(spec, notes, online=online) for spec in config.baselines}
    return SourceFacts(**{**vars(found), "baselines": baselines, "notes": (*found.notes, *notes)})


def of_gguf(config: RunConfig, model: GGUFModel) -> SourceFacts:
    """From a header: plans of all tiers. A size is its own size."""
    known, active = facts(model), active_bytes(model)
    stored = sum(info.nbytes for info in model.tensors.values())
    weights = sum(info.n_elements for info in model.tensors.values())
    outputs: dict[str, int | None] = {}
    encode: dict[str, float | None] = {}
    seen: set[tuple[str, str, bool]] = set()
    for one in wanted(config):
        if one.asked is None:
            outputs[one.name], encode[one.name] = one.size, weights / 1e6 * TYPICAL
            continue
        made = plan(model, one.asked, options=plan_options(config))
        outputs[one.name], encode[one.name] = made.total_bytes, _encoding(made, one.weighted, seen)
    vocabulary = model.tensors.get("token_embd.weight")
    return SourceFacts(
        "gguf",
        exact=True,
        basis="the model's header",
        model=sum(Path(file.path).stat().st_size for file in model.files),
        weights=weights,
        active=int((active.always + active.experts) * weights / max(1, stored)),
        layers=known.block_count,
        embedding=known.n_embd,
        vocabulary=vocabulary.shape[-1] if vocabulary is not None else 150_000,
        # squares and sums of each input channel, for every expert
        imatrix=sum(
            8 * info.shape[0] * (info.shape[2] if len(info.shape) > 2 else 1)
            for info in model.tensors.values()
            if len(info.shape) > 1
        ),
        routing=4 + 3 * sum(known.n_expert_used),  # the nll; a number and a weight of each expert
        outputs=outputs,
        encode=encode,
    )


def _encoding(made: Plan, weighted: bool, seen: set[tuple[str, str, bool]]) -> float:
    """Seconds of one processor. Equal tensors of equal types are encoded once for all files (encode/tasks.py)."""
    seconds = 0.0
    for tensor in made.tensors:
        key = (tensor.source, tensor.type.name, weighted)
        if tensor.type is not tensor.source_type and tensor.type.is_quantized and key not in seen:
            seen.add(key)
            seconds += tensor.weights / 1e6 / ENCODED.get(tensor.type.name, _ENCODED_OTHER)
    return seconds


def _of_weights(
    config: RunConfig, kind: Kind, weights: int, model: int, download: int, *, is_moe: bool, basis: str
) -> SourceFacts:
    outputs: dict[str, int | None] = {}
    encode: dict[str, float | None] = {}
    for one in wanted(config):
        bpw = BPW.get(one.name.removeprefix("i-"))
        outputs[one.name] = one.size or (int(weights * bpw / 8) if bpw else None)
        encode[one.name] = weights / 1e6 * TYPICAL
    return SourceFacts(
        kind,
        basis=basis,
        download=download,
        model=model,
        weights=weights,
        active=int(weights * (_ACTIVE_SHARE if is_moe else 1)),
        imatrix=weights // 200,
        outputs=outputs,
        encode=encode,
    )


def of_checkpoint(config: RunConfig, folder: Path) -> SourceFacts:
    """From the headers of its weights. Raises what describe() raises."""
    from apex_quant.checkpoint import describe

    found = describe(folder)
    model = found.estimate(config.convert.outtype)
    basis, is_moe = "the checkpoint's headers", found.experts > 1
    made = _of_weights(config, "checkpoint", found.parameters, model, 0, is_moe=is_moe, basis=basis)
    beside = found.vision or found.audio
    return replace(
        made,
        layers=found.layers or made.layers,
        projector=found.estimate(config.convert.outtype, mmproj=True) if beside else 0,
    )


def _of_hub(config: RunConfig, notes: list[str], *, online: bool) -> SourceFacts:
    """From the sizes of files, of which a GGUF's or a safetensors file's are nearly all weights."""
    unknown = SourceFacts("unknown", basis="nothing but its name", download=None, outputs=_nothing(config))
    if not online:
        return unknown
    try:
        from apex_quant.hub import repository
        from apex_quant.hub_access import explained

        with explained(config.source):
            there = repository(config.source, config.revision)
    except ApexError as error:
        notes.append(f"sizes are not known: {error.message}")
        return unknown
    if config.source_files is not None:
        fitting = fitting_bytes(there.files, config.source_files)
        if not fitting:
            notes.append(f"{config.source}: no GGUF fits {config.source_files}")
            return unknown
        basis = "sizes of files on the hub, taken as 16-bit weights of a MoE"
        return _of_weights(config, "hub", fitting // 2, fitting, fitting, is_moe=True, basis=basis)
    if not (stored := _stored_bytes(there.files)):
        notes.append(f"{config.source}: no weights are listed there")
        return unknown
    basis = "sizes of files on the hub, taken as 16-bit weights of a MoE"
    return _of_weights(config, "hub", stored // 2, stored, stored, is_moe=True, basis=basis)


def _stored_bytes(files: Sequence[HubFile]) -> int:
    """Bytes of the weights in the form that is converted; what its index might name otherwise is not read for this."""
    for prefix, suffix in (*WEIGHTS, ("", ".safetensors")):
        if found := sum(one.size for one in files if one.path.startswith(prefix) and one.path.endswith(suffix)):
            return found
    return 0


def _nothing(config: RunConfig) -> dict[str, int | None]:
    return {one.name: one.size for one in wanted(config)}


def _baseline_bytes(spec: str, notes: list[str], *, online: bool) -> int | None:
    """Bytes of the files that a baseline names, None where the hub does not tell."""
    if not online:
        return None
    words = BASELINE.fullmatch(spec)
    assert words is not None  # the configuration has looked
    try:
        from apex_quant.hub import repository
        from apex_quant.hub_access import explained

        with explained(words["repo"]):
            there = repository(words["repo"], words["revision"])
    except ApexError as error:
        notes.append(f"sizes of {spec} are not known: {error.message}")
        return None
    return fitting_bytes(there.files, words["pattern"])


def fitting_bytes(files: Sequence[HubFile], pattern: str) -> int:
    """Bytes of the GGUF models whose path or name fits a pattern, as of shells."""
    return sum(file.size for shards in models_fitting(files, pattern).values() for file in shards)
