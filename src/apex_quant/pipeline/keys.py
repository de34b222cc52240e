"""What `apex run` can be told: one model of all its keys, the same for the YAML file and the command line.

config = load_config("run.yaml", {"evaluate.suite": "all"})      # what the command line says wins
config = load_config(None, {"source": "Qwen/Qwen3.5-35B-A3B", "tiers": ["i-quality"], "sizes": ["12GB"]})

Keys are checked before anything is done: unknown ones, wrong types and values that contradict each other are refused
with the path of the key, its line, and what it may have meant. The texts beside the keys are those of docs/config.md
and of the file that `apex run --init` writes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from apex_quant.evaluation.schema import TASKS
from apex_quant.hub import HUB_ID
from apex_quant.importance.fill import RULES
from apex_quant.pipeline.migration import PHASES_THERE
from apex_quant.pipeline.values import (
    NAME,
    SOURCE_ID,
    as_baseline,
    as_count,
    as_size,
    checked,
    choices,
    known_mix,
    known_tier,
    listed,
    matching,
    sequence,
    wrapped,
)
from apex_quant.publishable import MOST_BYTES
from apex_quant.recipe.tiers import published_tiers
from apex_quant.runtime.options import SessionOptions

Phase = Literal[
    "source", "convert", "reference", "calibrate", "recipes", "quantize", "verify", "evaluate", "baselines", "report",
    "publish",
]  # fmt: skip
PHASES: Final[tuple[Phase, ...]] = get_args(Phase)
"""In the order in which they run."""

DEFAULT_TIERS: Final = ("i-quality", "i-balanced", "i-compact", "i-mini")
HARNESS_TASKS: Final = ("gsm8k", "mmlu_pro", "ifeval", "humaneval", "mbpp")
CODE_TASKS: Final = ("humaneval", "mbpp")
"""Those that run programs which the model wrote."""
METRICS: Final = ("ppl", "kld", "router", *TASKS, "speed")
FORMATS: Final = ("html", "png", "svg", "md", "csv")

Size = Annotated[int, checked(as_size), Field(gt=0)]
Count = Annotated[int, checked(as_count), Field(ge=1)]
Words = Annotated[tuple[str, ...], BeforeValidator(listed)]
Texts = Annotated[tuple[str, ...], BeforeValidator(wrapped)]
Prompts = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(wrapped)]
PhaseName = Annotated[Phase, checked(choices(PHASES, "phase", PHASES_THERE))]
PhaseNames = Annotated[tuple[PhaseName, ...], BeforeValidator(listed)]
Repo = Annotated[str, checked(matching(HUB_ID, "of the form ORG/NAME"))]
TaskNames = Annotated[
    tuple[Annotated[str, checked(choices(HARNESS_TASKS, "task of the harness"))], ...], BeforeValidator(listed)
]
Metrics = Annotated[tuple[Annotated[str, checked(choices(METRICS, "metric"))], ...], BeforeValidator(listed)]
Benchmark = Annotated[str, checked(choices(TASKS, "benchmark"))]
Formats = Annotated[tuple[Annotated[str, checked(choices(FORMATS, "format"))], ...], BeforeValidator(listed)]
Share = Annotated[float, Field(ge=0, strict=False)]
Tiers = Annotated[tuple[Annotated[str, checked(known_tier)], ...], BeforeValidator(listed)]
Baselines = Annotated[tuple[Annotated[str, checked(as_baseline)], ...], BeforeValidator(wrapped)]


def key(default: Any, text: str, **more: Any) -> Any:
    """A key with its default and the text that documents it."""
    return Field(default=default, description=text, **more)


class Section(BaseModel):
    """Keys of one part; nothing is guessed: "12" is no number, 1 is not true, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True, allow_inf_nan=False)


class Phases(Section):
    """Which phases may run. What they need of others must be there from an earlier run."""

    phase: PhaseName | None = key(None, "this one alone")
    from_: PhaseName | None = key(None, "this one and all after it", alias="from")
    only: PhaseNames = key((), "these alone")
    skip: PhaseNames = key((), "all but these; may be used with `from`")

    @model_validator(mode="after")
    def _one_way(self) -> Phases:
        if len([one for one in (self.phase, self.from_, self.only) if one]) > 1:
            raise ValueError("give one of phase, from and only")
        if not self.selected():
            raise ValueError("no phase is left")
        return self

    def selected(self) -> tuple[Phase, ...]:
        """The phases that may run, in order."""
        wanted = (self.phase,) if self.phase else self.only or PHASES[PHASES.index(self.from_ or PHASES[0]) :]
        return tuple(one for one in PHASES if one in wanted and one not in self.skip)


class Convert(Section):
    """From a checkpoint to the full-precision GGUF (docs/convert.md)."""

    outtype: Literal["auto", "bf16", "f16", "f32"] = key("auto", "auto takes the 16-bit type of the weights")
    mmproj: bool | str = key(
        "auto",
        "projector of a vision model, beside the other files: auto, true, false, or a finished FILE or REPO:FILE",
    )
    nextn: bool = key(True, "keep NextN/MTP blocks")
    pre: str | None = key(None, "llama.cpp's splitting rule for a vocabulary that the converter does not know")
    trust_remote_code: bool = key(False, "let the checkpoint's own Python code run")
    python: str | None = key(None, "the Python that runs the converter")


class Reference(Section):
    """What the full-precision model predicts, kept for the divergence of its quantizations (docs/evaluate.md)."""

    form: Literal["auto", "logprobs", "stock"] = key("auto", "auto: hidden states, or log-probabilities")
    text: Texts = key((), "files instead of the built-in held-out text")
    ctx: int = key(2048, "tokens of a chunk", ge=16)
    chunks: int | None = key(None, "at most so many chunks of each text", ge=1)
    every_token: bool = key(False, "score all tokens after an eighth of the context, not the second half")
    copy_output: bool = key(False, "put the output matrix in, so that the GGUF is not needed beside it")


class Calibrate(Section):
    """The importance matrix (docs/calibrate.md)."""

    corpus: Texts = key(("builtin",), "builtin, files, folders, hub:NAME")
    mix: Annotated[str | None, checked(known_mix)] = key(None, "KIND=PERCENT,... such as chat=30,code=25,reasoning=45")
    tokens: Count = key(50_000, "how much text, such as 50k")
    ctx: int = key(512, "tokens of a chunk", ge=16)
    cover: bool = key(False, "draw more text until every expert saw `floor` tokens")
    floor: int = key(64, "tokens that are enough for an expert", ge=1)
    seed: int = key(0, "of the order of the text", ge=0)
    heads: bool = key(True, "collect for the output matrix as well")
    imatrix: str | None = key(None, "a finished importance matrix to use; nothing is collected then")


class Optimize(Section):
    """How `sizes` are spent: measured sensitivities and an exact solver (docs/optimize.md)."""

    sensitivity: str = key("measure", "measure, or the file of an earlier measurement")
    tokens: Count | None = key(None, "of text for measuring; null: as apex measure")
    types: Words = key((), "types to choose from; empty: as apex optimize")


class Quantize(Section):
    """Encoding (docs/quantize.md)."""

    fill: Annotated[str, checked(choices(RULES, "rule"))] = key(
        "prior", "importance of thinly covered experts: prior shrinks it towards the tensor's mean, none takes it as is"
    )
    override: Texts = key((), "REGEX=TYPE for tensors that match; the first counts")
    cell: Texts = key((), "change one cell of the tiers: COLUMN.ZONE=TYPE")
    published: bool = key(False, "exactly what the published tier files do, their holes included")
    output_tensor_type: str | None = key(None, "type of output.weight")
    token_embedding_type: str | None = key(None, "type of token_embd")
    leave_output_tensor: bool = key(False, "keep output.weight as it is")
    pure: bool = key(False, "no mix rules: the base type for all that is not named")
    override_kv: Texts = key((), "KEY=TYPE:VALUE to set in the metadata")
    prune_layers: Annotated[tuple[int, ...], BeforeValidator(wrapped)] = key((), "layers to leave out")
    split: Size | None = key(None, "shards of at most this size, such as 48GB")
    keep_split: bool = key(False, "as many shards as the source")
    allow_requantize: bool = key(False, "also from tensors that are already quantized")
    threads: int | None = key(None, "of the encoder, where it should differ from `threads`", ge=1, le=1024)


class Verify(Section):
    """Checks that each file passes before it counts as done; one that fails is quarantined with its reason."""

    rebuild: Literal["none", "sample", "all"] = key("sample", "encode tensors again from the source and compare bytes")
    generate: int = key(64, "tokens to generate for each prompt; 0: none", ge=0, le=4096)
    prompts: Prompts = key((), "instead of the three built-in ones")
    kld_ceiling: dict[str, Annotated[float, Field(gt=0)]] = key(
        {}, "highest mean KLD by tier, where it should differ from the built-in ones"
    )


class Harness(Section):
    """Tasks that generate text, by lm-evaluation-harness (docs/harness.md)."""

    tasks: TaskNames = key(("gsm8k", "ifeval"), "of " + ", ".join(HARNESS_TASKS))
    limit: int | None = key(None, "the first so many questions of each", ge=1)
    chat: bool | None = key(None, "ask through the chat template; null: as the task wants")
    ctx: int | None = key(None, "tokens of a question and its answer", ge=64)
    parallel: int = key(1, "questions at a time; more than one makes answers depend on each other", ge=1, le=256)
    allow_code: bool = key(False, "HumanEval and MBPP may run the programs that the model writes, with your rights")

    @model_validator(mode="after")
    def _code_is_allowed(self) -> Harness:
        running = [task for task in self.tasks if task in CODE_TASKS]
        if running and not self.allow_code:
            raise ValueError(f"{' and '.join(running)} run programs that the model writes: allow_code: true permits it")
        return self


class Evaluate(Section):
    """Measurements of every file (docs/evaluate.md). Text and context are the reference's."""

    suite: Literal["native", "harness", "all", "none"] = key("native", "native: perplexity, KLD, routers, tasks, speed")
    only: Metrics = key(
        (), f"of {', '.join(METRICS)}; empty: ppl, kld, router, speed and the benchmarks that have a file below"
    )
    tasks: int = key(400, "questions of each benchmark; 0: all", ge=0)
    task_files: dict[Benchmark, str] = key(
        {}, "benchmark: FILE or hub:USER/DATA/FILE; of those named in `only` without one, llama.cpp's on the hub"
    )
    floor: bool = key(False, "also what rounding alone costs: a uniform Q8_0 of the reference")
    seed: int = key(1, "of the choice of questions; 1 is llama-perplexity's", ge=0)
    harness: Harness = key(Harness(), "tasks that generate text")


class Report(Section):
    """Plots, report and model card (docs/report.md)."""

    formats: Formats = key(FORMATS, "of " + ", ".join(FORMATS))
    family: Texts = key((), "NAME=GLOB of labels that belong together, such as Unsloth=UD-*")


class Publish(Section):
    """Upload to the Hugging Face hub; nothing is uploaded without a repository (docs/publish.md)."""

    repo: Repo | None = key(None, "ORG/NAME")
    private: bool = key(False, "only for its owners")
    replace: bool = key(False, "overwrite files that differ")
    shards: Annotated[int, checked(as_size), Field(ge=1_000_000, le=MOST_BYTES)] = key(
        MOST_BYTES, "larger files are split into shards of this size"
    )
    dry_run: bool = key(False, "compare and say what would be uploaded")


class Gpu(Section):
    """Where the model runs for calibration and evaluation."""

    layers: int = key(0, "on the GPU; -1 for all", ge=-1)
    cpu_experts: bool = key(False, "routed experts stay in main memory, whatever `layers` says")
    tensor_split: Annotated[tuple[Share, ...], BeforeValidator(sequence)] = key((), "shares of several GPUs")
    tensor_buffers: Texts = key((), "REGEX=BUFFER, as llama.cpp's --override-tensor")
    mmap: bool = key(True, "map the file instead of reading it")


class RunConfig(Section):
    """Everything that `apex run` can be told."""

    source: Annotated[str, Field(min_length=1)] = key(..., "hub id, checkpoint folder or full-precision GGUF")
    revision: str | None = key(None, "branch, tag or commit on the hub")
    source_files: str | None = key(None, "which files of a hub repository of GGUF files are the source, such as *BF16*")
    name: Annotated[str | None, checked(matching(NAME, "a name for files"))] = key(
        None, "MODEL in MODEL-APEX-I-Quality.gguf; null: from the source"
    )
    work: str | None = key(None, "folder for everything; null: NAME-apex here")
    tiers: Tiers = key(
        (),
        "tiers, llama.cpp mixes, .toml files, all (nine tiers); empty: "
        f"{', '.join(DEFAULT_TIERS)}, or none where sizes are given",
    )
    sizes: Annotated[tuple[Size, ...], BeforeValidator(wrapped)] = key(
        (), "sizes to fill with a measured allocation, such as 12GB"
    )
    threads: int | None = key(None, "null: all processors", ge=1, le=1024)
    keep: bool = key(False, "keep the converted full-precision GGUF when no later phase needs it")
    ray: str | None = key(
        None, "Ray cluster that shares this disk: HOST:PORT, auto (the one of this machine), local (start one)"
    )
    phases: Phases = key(Phases(), "")
    convert: Convert = key(Convert(), "")
    reference: Reference = key(Reference(), "")
    calibrate: Calibrate = key(Calibrate(), "")
    optimize: Optimize = key(Optimize(), "")
    quantize: Quantize = key(Quantize(), "")
    verify: Verify = key(Verify(), "")
    evaluate: Evaluate = key(Evaluate(), "")
    baselines: Baselines = key((), "others' files to compare with: REPO[@REVISION]:PATTERN[:LABEL]")
    report: Report = key(Report(), "")
    publish: Publish = key(Publish(), "")
    gpu: Gpu = key(Gpu(), "")

    @property
    def wanted_tiers(self) -> tuple[str, ...]:
        """Names of the tiers to make, 'all' written out, each once."""
        asked = self.tiers or (() if self.sizes else DEFAULT_TIERS)
        named = [name for one in asked for name in ([t.name for t in published_tiers()] if one == "all" else [one])]
        return tuple(dict.fromkeys(named))

    @property
    def is_hub(self) -> bool:
        """Whether the source is downloaded: it has a hub id's form and no file of that name exists."""
        return bool(SOURCE_ID.fullmatch(self.source)) and not Path(self.source).exists()

    @property
    def is_gguf(self) -> bool:
        """Whether the source is a GGUF, downloaded or here, and nothing is to be converted."""
        return self.source_files is not None if self.is_hub else self.source.lower().endswith(".gguf")

    @property
    def copies_output(self) -> bool:
        """Whether the reference takes the output matrix along: a converted file is deleted before the evaluation."""
        return self.reference.copy_output or not self.is_gguf

    @property
    def model_name(self) -> str:
        """`name`, or what the source is called."""
        path = Path(self.source)
        last = path.name if path.name not in ("", "..") else path.resolve().name
        return self.name or re.sub(r"(-00001-of-\d{5})?\.gguf$", "", last, flags=re.IGNORECASE) or "model"

    @property
    def work_folder(self) -> Path:
        """`work`, or NAME-apex in the current folder."""
        return Path(self.work or f"{self.model_name}-apex")

    def session_options(self, *, ctx: int = 512) -> SessionOptions:
        """How models are loaded for calibration and evaluation."""
        return SessionOptions(
            threads=self.threads,
            gpu_layers=self.gpu.layers,
            cpu_experts=self.gpu.cpu_experts,
            tensor_split=self.gpu.tensor_split,
            tensor_buffers=self.gpu.tensor_buffers,
            mmap=self.gpu.mmap,
            ctx=ctx,
        )

    def to_json(self) -> dict[str, Any]:
        """All keys as the YAML file has them; load_config of them is this again."""
        return self.model_dump(mode="json", by_alias=True)
