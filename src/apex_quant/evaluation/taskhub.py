"""Task files by name: those that llama-perplexity's documentation names are on the Hugging Face hub.

task_file("mmlu", None)                                  # the kind's own
task_file("hellaswag", "hub:USER/DATA/FILE.txt")
task_file("arc", "arc-challenge-validation.bin")         # a file here
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from apex_quant.errors import InputError, UsageError, did_you_mean
from apex_quant.evaluation.taskfiles import KINDS, MAX_BYTES
from apex_quant.hub_access import explained, library

_SETS = "ikawrakow/validation-datasets-for-llama.cpp"
FILES: Final[dict[str, str]] = {
    "hellaswag": f"hub:{_SETS}/hellaswag-validation.bin",
    "winogrande": "hub:ikawrakow/winogrande-eval-for-llama.cpp/winogrande-debiased-eval.csv",
    "mmlu": f"hub:{_SETS}/mmlu-validation.bin",
    "arc": f"hub:{_SETS}/arc-challenge-validation.bin",
    "truthfulqa": f"hub:{_SETS}/truthful-qa-validation.bin",
}
_NAME = re.compile(r"hub:([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)/([\w./ -]+)", re.ASCII)


def task_file(kind: str, file: str | Path | None) -> Path:
    """The file of tasks: the one given, or the one of that name from the hub, downloaded if it is not there yet.

    Raises UsageError for a name that is none, InputError when there is no such file, ResourceError when it cannot be
    had (no huggingface_hub, no network).
    """
    if file is None:
        if kind not in FILES:
            raise UsageError(f"no tasks called {kind!r}.{did_you_mean(kind, list(KINDS))} Known: {', '.join(KINDS)}")
        file = FILES[kind]
    return hub_file(str(file), MAX_BYTES) if str(file).startswith("hub:") else Path(file)


def hub_file(name: str, most: int) -> Path:
    """hub:USER/DATA/FILE of a dataset, downloaded if it is not there yet; files of more than `most` bytes are not.

    Raises UsageError for a name of another form, InputError when there is no such file, ResourceError when it cannot be
    had (no huggingface_hub, no network).
    """
    found = _NAME.fullmatch(name)
    if found is None or ".." in found[2].split("/"):
        raise UsageError(f"{name} is not hub:USER/DATA/FILE")
    repository, path = found.groups()
    with explained(name):
        api = library(name).HfApi()
        known = api.get_paths_info(repository, [path], repo_type="dataset")
        size = next((getattr(one, "size", 0) or 0 for one in known), 0)
        if size > most:
            raise InputError(f"{name}: {size} bytes, at most {most} are read")
        return Path(api.hf_hub_download(repository, path, repo_type="dataset"))
