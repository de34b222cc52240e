"""What a GGUF's header says of how the file was made, and how to make, measure and run it again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from apex_quant.errors import ApexError
from apex_quant.gguf import open_model
from apex_quant.report.entry import Entry
from apex_quant.report.formats import one_line
from apex_quant.report.gather import Gathered

_FACTS: Final = {
    "apex.source.sha256": "source, sha256",
    "apex.recipe.sha256": "recipe, sha256",
    "apex.imatrix.sha256": "importance matrix, sha256",
    "apex.data.sha256": "tensor data, sha256",
    "quantize.imatrix.file": "importance matrix",
    "quantize.imatrix.dataset": "calibration text",
    "quantize.imatrix.chunks_count": "calibration chunks",
    "apex.imatrix.prior": "importance of thinly covered experts",
    "apex.encoder": "encoder",
    "apex.version": "apex-quant",
    "apex.library": "library",
    "apex.library.commit": "library commit",
    "apex.llama_cpp.needs": "needs llama.cpp with",
}
_ABOUT: Final = ("general.name", "general.license", "general.license.name", "general.license.link", "general.languages")
_REPO: Final = re.compile(r"https://huggingface\.co/([\w.-]{1,96}/[\w.-]{1,96})/?", re.ASCII)
_PRECISION: Final = re.compile(r"[-_. ](?:bf16|f16|fp16|f32|fp32)$", re.I | re.ASCII)
_MODEL: Final = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)


@dataclass(frozen=True)
class Header:
    """`facts` in the order of the table, title to text; `about` general keys; `base_model` ORG/NAME on the hub;
    `is_moe`, `uses_imatrix` for tags."""

    facts: Mapping[str, str]
    about: Mapping[str, str]
    base_model: str | None
    is_moe: bool
    uses_imatrix: bool


def header(path: Path | None) -> Header | None:
    """Of a GGUF; None without one, or for one that cannot be read (what gather() says already)."""
    if path is None:
        return None
    try:
        with open_model(path) as model:
            facts = {title: _text(model.get(key)) for key, title in _FACTS.items()}
            about = {key: _text(model.get(key)) for key in _ABOUT}
            experts = model.get("{arch}.expert_count")
            weighted = model.get("quantize.imatrix.entries_count") is not None
            base = _base_model(model.get)
    except ApexError:
        return None
    return Header(
        {title: text for title, text in facts.items() if text},
        {key: text for key, text in about.items() if text},
        base,
        isinstance(experts, int) and experts > 1,
        weighted,
    )


def quantize_command(entry: Entry, found: Header | None) -> str | None:
    """How the file was made, as far as its results and header say; None where they do not name a tier."""
    if not entry.tier or entry.imported is not None:
        return None
    source = str((entry.source_of("kld").reference or {}).get("path") or "MODEL-BF16.gguf")
    words = ["apex", "quantize", source if source.endswith(".gguf") else "MODEL-BF16.gguf", "--tier", entry.tier]
    if found is not None and found.uses_imatrix:
        words += ["--imatrix", found.facts.get("importance matrix", "MODEL.imatrix")]
        prior = found.facts.get("importance of thinly covered experts")
        words += ["--fill", "none"] if prior == "none" else []
    return command([*words, "-o", entry.file_name])


def eval_commands(entry: Entry) -> list[str]:
    """How each of its results files was measured, from the settings that it states."""
    made = []
    for source, file in zip(entry.sources, entry.files, strict=True):
        if entry.imported is not None or not source.metrics:
            continue
        said = source.settings
        words = ["apex", "eval", entry.file_name]
        if source.reference:
            words += ["--reference", str(source.reference.get("path") or source.reference.get("name") or "REFERENCE")]
        words += ["--only", ",".join(name for name in source.metrics if name != "ppl_all")]
        for key, option, usual in (("ctx", "--ctx", 2048), ("chunks", "--chunks", None)):
            words += [option, str(said[key])] if said.get(key) not in (usual, None) else []
        words += ["--every-token"] if said.get("scored") == "all" else []
        options = said.get("options")
        if isinstance(options, Mapping):
            words += ["--gpu-layers", str(options["gpu_layers"])] if options.get("gpu_layers") else []
            words += ["--cpu-experts"] if options.get("cpu_experts") else []
        made.append(command([*words, "-o", file]))
    return made


def run_command(file_name: str, ctx: int, *, repo: str | None = None) -> str:
    """llama.cpp's server on a file, or on one of a repository of the hub."""
    place = ["-hf", repo, "-hff", file_name] if repo else ["-m", file_name]
    return command(["llama-server", *place, "-c", str(ctx), "--jinja"])


def model_name(gathered: Gathered) -> str:
    """What all files are of: the reference's name, else what their own names begin with; "" when that is nothing."""
    known = gathered.about_reference or {}
    stated = str(known.get("path") or known.get("name") or "").replace("\\", "/").rpartition("/")[2]
    if gathered.reference is not None:
        return _PRECISION.sub("", gathered.reference.name)
    if stated.endswith(".gguf"):
        return _PRECISION.sub("", stated.removesuffix(".gguf"))
    names = [entry.name for entry in gathered.entries]
    if len(names) == 1:
        return re.split(r"-APEX\b", names[0])[0]
    shared = 0
    while names and all(len(name) > shared and name[shared] == names[0][shared] for name in names):
        shared += 1
    begin = names[0][:shared] if names else ""
    # MODEL-APEX-I-Quality and MODEL-APEX-I-Compact begin alike beyond the model's name
    ours = re.match(r"(.+?)[-_. ]APEX-", begin)
    return ours[1] if ours else re.sub(r"(?:[-_. ]APEX)?[-_. ][^-_. ]*$", "", begin)


def command(words: list[str]) -> str:
    """Words for a shell: names from files are quoted and in one line."""
    return " ".join(shlex.quote(one_line(word)) for word in words)


def versions(entry: Entry) -> dict[str, Any]:
    """What its results were measured with."""
    known = entry.results.environment
    names = ("apex", "library", "commit", "backends", "device", "gpu", "cpu", "os", "python")
    return {name: known[name] for name in names if known.get(name)}


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(one_line(str(one), 40) for one in value[:20])
    text = "" if value is None else one_line(str(value)).strip()
    # a path of the machine that calibrated is nobody's business
    return re.split(r"[/\\]", text)[-1] if text.startswith(("/", "\\")) or text[1:3] == ":\\" else text


def _base_model(get: Any) -> str | None:
    url = get("general.base_model.0.repo_url") or get("general.source.url") or get("general.url")
    found = _REPO.fullmatch(url.strip()) if isinstance(url, str) else None
    if found:
        return found[1]
    organization, name = get("general.base_model.0.organization"), get("general.base_model.0.name")
    joined = f"{organization}/{name}".replace(" ", "-")
    return joined if isinstance(organization, str) and isinstance(name, str) and _MODEL.fullmatch(joined) else None
