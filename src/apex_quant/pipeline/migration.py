"""The published project's per-model YAML files: what each key, phase, option and variable is here.

values, notes = migrate({"name": "X", "model_id": "ORG/X", "layers": 40, "hf_repo": "ME/X-APEX-GGUF"})

Facts of those files and their meaning: scripts/apex_pipeline.sh of mudler/apex-quant. `apex run` takes such a file as
it takes its own and says what each key became; docs/migration.md shows the tables below.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from apex_quant.errors import InputError, did_you_mean

# what its tasks of the harness and its native evaluations are called here
_HARNESS: Final = {
    "humaneval": "humaneval", "humaneval_instruct": "humaneval", "mbpp": "mbpp", "mbpp_instruct": "mbpp",
    "ifeval": "ifeval", "gsm8k": "gsm8k", "gsm8k_cot_zeroshot": "gsm8k", "mmlu_pro": "mmlu_pro",
}  # fmt: skip
_CODE: Final = ("humaneval", "mbpp")
_NATIVE: Final = {
    "ppl": "ppl", "kl": "kld", "hellaswag": "hellaswag", "winogrande": "winogrande", "mmlu": "mmlu", "arc": "arc",
    "truthfulqa": "truthfulqa", "speed": "speed",
}  # fmt: skip
_BY_LIKELIHOOD: Final = {"mmlu": "mmlu", "arc_challenge": "arc", "truthfulqa_mc2": "truthfulqa"}
"""Its tasks of the harness that are measured natively here."""
_ALL_LAYERS: Final = 99
_TIERS: Final = ("quality", "balanced", "compact", "i-quality", "i-balanced", "i-compact", "mini", "nano", "micro")


@dataclass
class _Made:
    """What the keys of one file become."""

    where: str
    values: dict[str, Any] = field(default_factory=dict)  # by dotted keys
    notes: list[str] = field(default_factory=list)

    def put(self, key: str, value: Any, old: str) -> None:
        self.values[key] = value
        self.notes.append(f"{old} -> {key}: {_shown(value)}")

    def text(self, key: str, value: Any) -> str:
        if isinstance(value, bool | list | dict) or value is None:
            raise InputError(f"{self.where}: {key} must be text, is {value!r}")
        return str(value).strip()

    def words(self, key: str, value: Any) -> list[str]:
        """A list, or text with commas."""
        given = value if isinstance(value, list) else self.text(key, value).split(",")
        return [word for one in given if (word := self.text(key, one))]


@dataclass(frozen=True)
class Row:
    """A published key, the keys it becomes (none: not needed), and why or how."""

    key: str
    becomes: tuple[str, ...]
    why: str
    apply: Callable[[_Made, str, Any], None] | None = None


def _as_text(made: _Made, row: str, value: Any) -> None:
    made.put(next(iter(BY_KEY[row].becomes)), made.text(row, value), row)


def _source_gguf(made: _Made, key: str, value: Any) -> None:
    source = made.text(key, value)
    made.put("source", source, key)
    if not source.lower().endswith(".gguf"):
        made.put("source_files", "*BF16*", key)


def _model_id(made: _Made, key: str, value: Any) -> None:
    if "source" in made.values:
        made.notes.append(f"{key}: not needed: source_gguf is the source")
    else:
        made.put("source", made.text(key, value), key)


def _mmproj(made: _Made, key: str, value: Any) -> None:
    made.put("convert.mmproj", value if isinstance(value, bool) else made.text(key, value), key)


def _layers_on_gpu(made: _Made, key: str, value: Any) -> None:
    number = made.text(key, value)
    if not number.removeprefix("-").isascii() or not number.removeprefix("-").isdigit() or len(number) > 9:
        raise InputError(f"{made.where}: {key} must be a number of layers, is {value!r}")
    made.put("gpu.layers", -1 if int(number) >= _ALL_LAYERS or int(number) < 0 else int(number), key)


def _native(made: _Made, key: str, value: Any) -> None:
    names = made.words(key, value)
    for name in names:
        if name not in _NATIVE:
            known = ", ".join(_NATIVE)
            raise InputError(f"{made.where}: {key}: {name!r} is none of {known}.{did_you_mean(name, list(_NATIVE))}")
    made.put("evaluate.only", [_NATIVE[name] for name in names], key)


def _harness(made: _Made, key: str, value: Any) -> None:
    tasks: list[str] = []
    for name in made.words(key, value):
        new = _HARNESS.get(name)
        if new in _CODE:
            made.notes.append(
                f"{key}: {name} left out: it runs programs that the model writes; add {new} to evaluate.harness.tasks "
                "with evaluate.harness.allow_code: true"
            )
        elif new is not None:
            tasks.append(new)
        elif name in _BY_LIKELIHOOD:
            made.notes.append(f"{key}: {name} is measured without the harness: {_BY_LIKELIHOOD[name]} in evaluate.only")
        else:
            made.notes.append(f"{key}: {name} left out: no such task here")
    if tasks:
        made.put("evaluate.harness.tasks", list(dict.fromkeys(tasks)), key)
        if "evaluate.suite" not in made.values:
            made.put("evaluate.suite", "all", key)
    elif made.values.get("evaluate.suite") in ("all", "harness"):
        only = made.values["evaluate.suite"] == "harness"
        made.put("evaluate.suite", "none" if only else "native", key)


def _suite(made: _Made, key: str, value: Any) -> None:
    made.put("evaluate.suite", made.text(key, value), key)


def _baselines(made: _Made, key: str, value: Any) -> None:
    made.put("baselines", value if isinstance(value, list) else [made.text(key, value)], key)


def _calibration(made: _Made, key: str, value: Any) -> None:
    made.put("calibrate.corpus", [made.text(key, value)], key)


def _skip_tiers(made: _Made, key: str, value: Any) -> None:
    skipped = {word.removeprefix("i-") if word.endswith(("mini", "nano", "micro")) else word
               for word in made.words(key, value)}  # fmt: skip
    # there, SKIP_TIERS=quality leaves out i-quality too, and quality itself stays: it belongs to another phase
    left = [name for name in _TIERS if name in _TIERS[:3] or not {name, name.removeprefix("i-")} & skipped]
    if unknown := skipped - {*_TIERS}:
        raise InputError(f"{made.where}: {key}: no tier {', '.join(sorted(unknown))}")
    made.put("tiers", left, key)


ROWS: Final[tuple[Row, ...]] = (
    Row("name", ("name",), "MODEL in the names of files", _as_text),
    Row("source_gguf", ("source", "source_files"), "a repository of GGUF files: those named `*BF16*`", _source_gguf),
    Row("model_id", ("source",), "a hub id; not needed beside source_gguf", _model_id),
    Row("source_format", (), "the source itself tells"),
    Row("layers", (), "read from the model's header"),
    Row("dense_layers", (), "read from the model's header"),
    Row("arch", (), "read from the model's header; the tiers serve dense models too (tiers.md)"),
    Row("hf_repo", ("publish.repo",), "nothing is uploaded without `--yes`", _as_text),
    Row("config_prefix", ("work",), "names the folder; recipes need no files of their own", _as_text),
    Row("tokenizer", (), "the server that the harness asks has the model's own tokenizer"),
    Row("skip_q8_baseline", (), "a Q8_0 file is measured where `baselines` names one"),
    Row("mmproj", ("convert.mmproj",), "REPO:FILE, or `auto` to make it from the checkpoint", _mmproj),
    Row("calibration", ("calibrate.corpus",), "a text file; the built-in corpus needs none", _calibration),
    Row("ngl", ("gpu.layers",), "99 and more become -1, all", _layers_on_gpu),
    Row("eval_suite", ("evaluate.suite",), "`native` where nothing is said (there: all)", _suite),
    Row(
        "harness_tasks", ("evaluate.harness.tasks", "evaluate.suite"),
        "HumanEval and MBPP run programs of the model's and need evaluate.harness.allow_code", _harness,
    ),
    Row("native_evals", ("evaluate.only",), "kl is kld", _native),
    Row("baselines", ("baselines",), "REPO:PATTERN:LABEL as there; a revision may follow the repository: REPO@REVISION",
        _baselines),
    Row("SKIP_TIERS", ("tiers",), "a variable there; here `tiers` names what to make", _skip_tiers),
)  # fmt: skip
"""In the order in which they are applied."""

BY_KEY: Final = {row.key: row for row in ROWS}

PHASES_THERE: Final = {
    "config": "recipes", "download": "source", "convert": "convert", "baseline": "reference", "quantize": "quantize",
    "imatrix": "calibrate", "ivariants": "quantize", "eval": "evaluate", "eval_baselines": "baselines",
    "plots": "report", "publish": "publish", "mlx": "apex convert-mlx",
}  # fmt: skip
"""Its phases -> the phase here that does the same, or the command."""

OPTIONS: Final = {
    "--config FILE": "apex run FILE",
    "--work-dir DIR, WORK_DIR": "--work DIR (work)",
    "--phase, --from, --skip, --only": "the same, with the names of phases here",
    "--eval-suite": "--eval-suite (evaluate.suite)",
    "--dry-run": "--dry-run",
    "NGL": "gpu.layers",
    "SKIP_TIERS": "--tiers (tiers)",
    "APEX_VARIANT": "name: MODEL-APEX-TIER.gguf has no other part",
    "PORT": "not needed: the server takes a free port",
    "LLAMA_CPP_DIR": "the same, for the converter and llama-server",
    "IMATRIX_BACKEND, IMATRIX_BAND, ...": "not needed: calibration maps the file, with gpu.layers and gpu.cpu_experts",
}
"""Its options and variables."""

_SHARED: Final = ("name", "baselines")
"""Keys that both forms have."""


def published_keys(key: str) -> list[str]:
    """The published keys that a dotted key may have come from."""
    return [row.key for row in ROWS if key in row.becomes]


def is_published(values: Mapping[str, Any], where: str, own: Collection[str]) -> bool:
    """Whether these are keys of a published per-model file. InputError when they are of both forms; `own`: keys of
    `apex run`."""
    theirs = [key for key in values if key in BY_KEY and key not in _SHARED]
    ours = [key for key in values if key in own and key not in _SHARED]
    if theirs and ours:
        raise InputError(
            f"{where}: {theirs[0]} is a key of the published per-model files and {ours[0]} one of apex run's: "
            "a file has one form",
            hint="docs/migration.md says what each key is here",
        )
    return bool(theirs)


def migrate(published: Mapping[str, Any], where: str = "published file") -> tuple[dict[str, Any], list[str]]:
    """A published file's keys as nested keys of RunConfig, and a line about each: what it became, or why it is gone.

    Raises InputError for keys and values that those files do not have.
    """
    for key in published:
        if key not in BY_KEY:
            raise InputError(
                f"{where}: {key} is no key of the published per-model files.{did_you_mean(key, list(BY_KEY))}",
                hint="docs/migration.md lists them",
            )
    made = _Made(where)
    for row in ROWS:
        value = published.get(row.key)
        if value is None or value == "":
            continue
        if row.apply is None:
            made.notes.append(f"{row.key}: not needed: {row.why}")
        else:
            row.apply(made, row.key, value)
    if "tiers" not in made.values:
        made.values["tiers"] = list(_TIERS)
        made.notes.append(f"tiers: {', '.join(_TIERS)}: all that its pipeline made")
    nested: dict[str, Any] = {}
    for dotted, value in made.values.items():
        *outer, last = dotted.split(".")
        inner = nested
        for part in outer:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return nested, made.notes


def tables() -> str:
    """The tables of docs/migration.md."""
    lines = ["| published key | here | |", "|---|---|---|"]
    lines += [
        f"| `{row.key}` | {', '.join(f'`{key}`' for key in row.becomes) or 'not needed'} | {row.why} |" for row in ROWS
    ]
    lines += ["", "| published phase | here |", "|---|---|"]
    lines += [f"| `{there}` | `{here}` |" for there, here in PHASES_THERE.items()]
    lines += ["", "| published option or variable | here |", "|---|---|"]
    lines += [f"| {there} | {here} |" for there, here in OPTIONS.items()]
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
