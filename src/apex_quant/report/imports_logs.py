"""Logs of llama-perplexity: the lines that its results are in, in any order, with what it said about the model.

Forms of the lines are those of tools/perplexity/perplexity.cpp of llama.cpp. Numbers are read as they are printed.
"""

from __future__ import annotations

import re
from typing import Final

from apex_quant.report.imports_rows import Row, parsed

_NUMBER = r"([-+]?\d{1,20}(?:\.\d{1,20})?)"
_ERROR = rf"(?: *(?:±|\+/-) *{_NUMBER})?"

# the whole line; `%` there means that it is printed in percent
_LINES: Final = {
    "ppl": rf"(?:Final estimate: PPL =|Mean PPL\(Q\) *:) *{_NUMBER}{_ERROR}",
    "kld": rf"Mean +KLD: *{_NUMBER}{_ERROR}",
    "kld_max": rf"Maximum KLD: *{_NUMBER}",
    "kld_p99_9": rf"99\.9% +KLD: *{_NUMBER}",
    "kld_p99": rf"99\.0% +KLD: *{_NUMBER}",
    "kld_p95": rf"95\.0% +KLD: *{_NUMBER}",
    "kld_p90": rf"90\.0% +KLD: *{_NUMBER}",
    "kld_median": rf"Median +KLD: *{_NUMBER}",
    "ppl_ratio": rf"Mean PPL\(Q\)/PPL\(base\) *: *{_NUMBER}{_ERROR}",
    "top1": rf"Same top p: *{_NUMBER}{_ERROR} *%",
    "delta_p": rf"RMS Δp *: *{_NUMBER}{_ERROR} *%",
}
_PATTERNS: Final = {key: re.compile(r"(?:^|[ :])" + line + r"\s*$", re.ASCII) for key, line in _LINES.items()}
_WINOGRANDE = re.compile(r"Final Winogrande score\((\d{1,9}) tasks\): *" + _NUMBER)
_CHOICE = re.compile(r"Final result: *" + _NUMBER + _ERROR)
_RUNNING = re.compile(r"^(\d{1,9})\t(\d{1,3}\.\d{1,12})%?(?:\t|\s*$)", re.ASCII)
_TABLE = re.compile(r"(?:hellaswag|winogrande) score|^task\tacc_norm")
_OVER = re.compile(r"(?:calculating perplexity|computing) over (\d{1,9}) chunks, n_ctx=(\d{1,9})")
_MODEL = re.compile(r"(?:from|model:) (?:\S.{0,4000}[/\\])?([^/\\]{1,250}?)\.gguf(?: \(version|\s*$|')")
_SIZE = re.compile(r"file size +=? *" + _NUMBER + r" (MiB|GiB) \(" + _NUMBER + r" BPW\)")
_UNITS: Final = {"MiB": 1 << 20, "GiB": 1 << 30}
_CHOICES: Final = {"truthfulqa": ("truthful", "tqa"), "mmlu": ("mmlu",), "arc": ("arc",)}
_BY_COUNT: Final = {817: "truthfulqa", 1548: "mmlu", 299: "arc"}
_LONGEST = 4096  # of a line; results stand in short ones
_PERCENT: Final = {"top1", "delta_p"}


def perplexity_log(text: str, stem: str) -> list[Row] | None:
    """The numbers of one run; of several in one log, the last of each kind. None for other texts."""
    row = Row(stem)
    seen = False
    kind, running = "", None  # which benchmark's tasks are counted, and the last count
    for line in text.splitlines():
        if len(line) > _LONGEST:
            continue
        for key, pattern in _PATTERNS.items():
            if found := pattern.search(line):
                seen = True
                whole_is = 100.0 if key in _PERCENT else 1.0
                error = found[2] if found.re.groups > 1 else None
                row.put(
                    key, max(0.0, parsed(found[1], key) / whole_is),
                    error=None if error is None else parsed(error, key) / whole_is,
                )  # fmt: skip
        if found := _WINOGRANDE.search(line):
            row.put_task("winogrande", parsed(found[2], "winogrande") / 100, int(found[1]), 4)
            seen, kind = True, ""
        elif found := _CHOICE.search(line):
            seen = _put_choice(row, parsed(found[1], "result") / 100, running[0] if running else None, stem) or seen
            kind = ""
        elif found := _RUNNING.match(line):
            running = int(found[1]), found[2]
        elif found := _TABLE.search(line):
            kind = found[0] if found[0].endswith("score") or not kind else kind
            kind = "hellaswag score" if "confidence" in line else kind
        elif found := _OVER.search(line):
            chunks, ctx = int(found[1]), int(found[2])
            row.settings |= {"ctx": ctx, "chunks": chunks, "scored": "half"}
        elif found := _MODEL.search(line):
            row.name = found[1] + ".gguf"
        elif found := _SIZE.search(line):
            row.bytes, row.bpw = round(parsed(found[1], "size") * _UNITS[found[2]]), parsed(found[3], "bpw")
    if kind and running is not None:  # the closing line goes to another stream, and below 100 tasks there is none
        share, digits = parsed(running[1], "accuracy") / 100, len(running[1].partition(".")[2])
        if kind.startswith("task"):
            seen = _put_choice(row, share, running[0], stem) or seen
        else:
            row.put_task(kind.partition(" ")[0], share, running[0], digits)
            seen = True
    if not seen and not row.warnings:
        return None
    _count_tokens(row)
    return [row]


def _put_choice(row: Row, share: float, n: int | None, stem: str) -> bool:
    """llama-perplexity calls every multiple choice TruthfulQA: names of files tell them apart, else their number."""
    named = next((kind for kind, words in _CHOICES.items() if any(word in stem.lower() for word in words)), None)
    kind = named or (_BY_COUNT.get(n) if n is not None else None)
    if kind is None:
        row.warnings.append(
            f"a multiple choice of {n or 'unknown'} tasks is left out: the log does not say which; put mmlu, arc or "
            "truthfulqa into the file's name"
        )
        return False
    row.put_task(kind, share, n, 4)
    return True


def _count_tokens(row: Row) -> None:
    """How many tokens were scored: of each chunk those from half the context to the last but one."""
    ctx, chunks = row.settings.get("ctx"), row.settings.get("chunks")
    if ctx is None or chunks is None:
        return
    n = chunks * (ctx - 1 - ctx // 2)
    if "ppl" in row.metrics:
        row.metrics["ppl"]["n"] = n
    mean = row.metrics.get("kld", {}).get("mean")
    if mean:
        mean["n"] = n
