"""`run_harness`: standard tasks that generate text (GSM8K, IFEval, MMLU-Pro, HumanEval, MBPP) on a GGUF file.

found = run_harness("MODEL.gguf", ["gsm8k", "ifeval"], limit=100)
print(found["gsm8k"]["value"], found["gsm8k"]["error"])

A server serves the model on this machine, EleutherAI's lm-evaluation-harness (extra `harness`) asks it, and its results
are read. HumanEval and MBPP run what the model wrote as programs: only with allow_code=True.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from apex_quant.errors import InputError, ResourceError, UsageError, did_you_mean
from apex_quant.evaluation.programs import Log, Program, clean_environment
from apex_quant.evaluation.server import ALIAS, Server, find_server
from apex_quant.evaluation.statistics import wilson
from apex_quant.gguf import open_model
from apex_quant.model.facts import facts
from apex_quant.runtime.options import SessionOptions

CTX: Final = 8192  # tokens of a question with its examples and its answer, where the model was trained on as many
SECONDS_OF_AN_ANSWER: Final = 3600
LARGEST_RESULTS: Final = 1 << 28  # bytes of the harness's JSON
CODE_SWITCH: Final = "HF_ALLOW_CODE_EVAL"  # without "1" in it, the metric that runs programs refuses to
_PROGRESS = re.compile(r"Requesting API:.*?\|\s*(\d{1,9})/(\d{1,9})")

Event = dict[str, Any]  # {"what": the task, "done", "planned", "resumed"}, in requests


@dataclass(frozen=True)
class HarnessTask:
    """The harness's names for a task by text completion and as a chat, and its main metric ('name,filter'; of the
    first filter where none is named). `code`: it runs what the model wrote. `talks`: asked as a chat where the model
    has a template; the others give solved examples, which serve models of both kinds."""

    plain: str
    chat: str
    metric: str
    code: bool = False
    talks: bool = False


TASKS: Final[dict[str, HarnessTask]] = {
    "gsm8k": HarnessTask("gsm8k", "gsm8k", "exact_match,strict-match"),
    "mmlu_pro": HarnessTask("mmlu_pro", "mmlu_pro", "exact_match,custom-extract"),
    "ifeval": HarnessTask("ifeval", "ifeval", "prompt_level_strict_acc,none", talks=True),
    "humaneval": HarnessTask("humaneval", "humaneval_instruct", "pass@1", code=True),
    "mbpp": HarnessTask("mbpp", "mbpp_instruct", "pass_at_1", code=True),
}


@dataclass(frozen=True)
class HarnessPlan:
    """Which tasks an evaluation asks through the harness; the fields are run_harness's parameters."""

    tasks: tuple[str, ...]
    limit: int | None = None
    allow_code: bool = False
    chat: bool | None = None
    ctx: int | None = None
    parallel: int = 1


def run_harness(
    model: str | Path,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    allow_code: bool = False,
    chat: bool | None = None,
    ctx: int | None = None,
    parallel: int = 1,
    options: SessionOptions | None = None,
    server: str | Path | None = None,
    lm_eval: str | Path | None = None,
    deadline: float = 600.0,
    on_result: Callable[[str, dict[str, Any]], None] | None = None,
    progress: Callable[[Event], None] | None = None,
    log: Log | None = None,
) -> dict[str, dict[str, Any]]:
    """Metrics of `tasks` (names in TASKS) for results.json: {task: {"value", "error" (standard error), "n", ...}}.

    `limit`: the first so many questions, of each subject of MMLU-Pro. `allow_code`: HumanEval and MBPP may run the
    programs that the model writes, with this user's rights. `chat`: ask through the model's chat template or not;
    None leaves it to the task. `ctx`: tokens of one question and answer, by default CTX or what the model was trained
    on. `parallel`: questions at a time; more than one is faster and makes answers depend on what else was computed.

    `server`: a llama-server; None finds one (server.py). `lm_eval`: the harness's program. `deadline`: seconds that
    the model has to load. `on_result` gets each task's metric when it is finished, `log` the lines of both programs;
    `progress` and `log` are called from another thread.

    Raises UsageError, InputError for a file that is no model, or ResourceError. Both programs have ended then, after
    Ctrl-C too, and soon after this process was killed.
    """
    chosen = chosen_tasks(tasks, allow_code)
    if parallel < 1 or (limit is not None and limit < 1):
        raise UsageError("at least one question at a time, and a limit of at least one")
    harness, found = find_lm_eval(lm_eval), find_server(server)
    with open_model(model) as opened:
        has_template = "tokenizer.chat_template" in opened.metadata
        trained = facts(opened).context_length
        path = opened.path
    if chat and not has_template:
        raise UsageError(f"{path.name} has no chat template", hint="leave out the chat option")
    room = ctx or min(CTX, trained or CTX)
    metrics: dict[str, dict[str, Any]] = {}
    with Server.start(
        path, found, ctx=room, parallel=parallel, options=options, deadline=deadline, log=log
    ) as endpoint:
        for name, task in chosen.items():
            as_chat = chat if chat is not None else task.talks and has_template
            settings = {"chat": as_chat, "ctx": room, "parallel": parallel, "limit": limit, "server": found.kind}
            started = time.monotonic()
            document = _ask(harness, endpoint, name, task, settings, progress, log)
            metrics[name] = {
                **read_metric(document, task.chat if as_chat else task.plain, task.metric),
                **settings,
                "seconds": time.monotonic() - started,
            }
            if on_result is not None:
                on_result(name, metrics[name])
    return metrics


def chosen_tasks(tasks: Sequence[str], allow_code: bool) -> dict[str, HarnessTask]:
    """The tasks asked for, each once. Raises UsageError, also for one that runs code which nobody allowed."""
    if not tasks:
        raise UsageError("no task is named", hint=f"known: {', '.join(TASKS)}")
    for name in tasks:
        if name not in TASKS:
            raise UsageError(
                f"no task is called {name!r}.{did_you_mean(name, list(TASKS))}", hint=f"known: {', '.join(TASKS)}"
            )
    running = [name for name in TASKS if name in tasks and TASKS[name].code]
    if running and not allow_code:
        raise UsageError(
            f"{' and '.join(running)} would run programs that the model writes, with your rights",
            hint="--allow-code (allow_code=True) permits it; a container or another user keeps it from your files",
        )
    return {name: TASKS[name] for name in tasks}


def find_lm_eval(given: str | Path | None = None) -> tuple[str, ...]:
    """How to call the harness: `given`, lm_eval on PATH, or the package beside this one. Raises ResourceError."""
    if path := shutil.which(os.fspath(given or "lm_eval")):
        return (path,)
    if given is not None:
        raise ResourceError(f"{given}: no such program")
    if importlib.util.find_spec("lm_eval") is not None:
        return (sys.executable, "-P", "-m", "lm_eval")
    raise ResourceError(
        "the lm-evaluation-harness is not installed", hint="pip install 'apex-quant[harness]' gives lm_eval"
    )


def harness_command(
    harness: Sequence[str], server: Server, task: HarnessTask, settings: Mapping[str, Any], folder: Path
) -> list[str]:
    """lm_eval's command line for one task; results go below `folder`."""
    as_chat = settings["chat"]
    path, kind = ("chat/completions", "local-chat-completions") if as_chat else ("completions", "local-completions")
    about = {
        "model": ALIAS,
        "base_url": f"{server.url}/v1/{path}",
        "num_concurrent": settings["parallel"],
        "max_retries": 3,
        "timeout": SECONDS_OF_AN_ANSWER,
        "max_length": settings["ctx"],
        # the server makes tokens of the text: no tokenizer is downloaded
        **({} if as_chat else {"tokenizer_backend": "none", "tokenized_requests": False}),
    }
    words = ["--model", kind, "--model_args", ",".join(f"{key}={value}" for key, value in about.items())]
    words += ["--tasks", task.chat if as_chat else task.plain, "--batch_size", "1", "--output_path", str(folder)]
    words += ["--limit", str(settings["limit"])] if settings["limit"] else []
    words += ["--apply_chat_template"] if as_chat else []
    words += ["--confirm_run_unsafe_code"] if task.code else []
    return [*harness, *words]


def _ask(
    harness: Sequence[str],
    server: Server,
    name: str,
    task: HarnessTask,
    settings: Mapping[str, Any],
    progress: Callable[[Event], None] | None,
    log: Log | None,
) -> dict[str, Any]:
    """Run one task to its end and give the harness's results. Raises ResourceError, InputError."""

    def on_line(program: str, line: str) -> None:
        found = _PROGRESS.search(line)
        if found and progress is not None:
            progress({"what": name, "done": int(found[1]), "planned": int(found[2]), "resumed": 0})
        if log is not None:
            log(program, line)

    with tempfile.TemporaryDirectory(prefix="apex-harness-") as folder:
        command = harness_command(harness, server, task, settings, Path(folder))
        with Program("lm_eval", command, env=_environment(server, task), log=on_line) as program:
            status = program.wait()
        if server.program.status is not None:
            raise ResourceError(
                f"{server.kind} ended during {name} with status {server.program.status}: {server.program.last()}",
                hint="finished tasks are kept",
            )
        if status != 0:
            raise ResourceError(
                f"lm_eval ended with status {status} during {name}: {program.last()}",
                hint="the data sets come from the Hugging Face hub; --debug prints the harness's log",
            )
        made = sorted(Path(folder).rglob("results_*.json"))
        if not made:
            raise ResourceError(f"lm_eval wrote no results for {name}; its last line: {program.last()}")
        return read_results(made[-1])


def _environment(server: Server, task: HarnessTask) -> dict[str, str]:
    """The harness's environment: the server's key, no proxy before this machine, programs run only for code tasks."""
    past = ",".join(filter(None, [os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), "127.0.0.1"]))
    more = {"OPENAI_API_KEY": server.key, "NO_PROXY": past, "no_proxy": past}
    if task.code:
        more[CODE_SWITCH] = "1"
    return clean_environment(drop=(CODE_SWITCH,), **more)


def read_results(path: Path) -> dict[str, Any]:
    """The harness's JSON. Raises InputError for anything else."""
    if path.stat().st_size > LARGEST_RESULTS:
        raise InputError(f"{path.name}: larger than {LARGEST_RESULTS} bytes, which no results of lm_eval are")
    try:
        document = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{path.name}: not JSON: {error}") from None
    if not isinstance(document, dict) or not isinstance(document.get("results"), dict):
        raise InputError(f"{path.name}: not results of lm_eval: no results")
    return document


def read_metric(document: Mapping[str, Any], task: str, metric: str) -> dict[str, Any]:
    """One task of the harness's results: its main metric with standard error (null where the harness gives none) and
    number of questions, all its metrics under "metrics", and what else tells results apart. Raises InputError."""
    rows = document["results"].get(task)
    if not isinstance(rows, dict):
        raise InputError(f"lm_eval's results have no task {task}")
    metrics = {}
    for key, value in rows.items():
        name, comma, kind = key.partition(",")
        if comma and not name.endswith("_stderr") and (number := _number(value)) is not None:
            metrics[key] = {"value": number, "error": _number(rows.get(f"{name}_stderr,{kind}"))}
    main = next((key for key in metrics if key == metric or key.partition(",")[0] == metric), None)
    if main is None:
        raise InputError(f"lm_eval's results of {task} have no {metric}, only {', '.join(metrics) or 'nothing'}")
    n = _questions(document, task)
    return {
        **metrics[main],
        **_interval(metrics[main]["value"], n),
        "metric": main,
        "metrics": metrics,
        "task": task,
        "version": _of(document, "versions", task),
        "shots": _of(document, "n-shot", task),
        "harness": f"lm_eval {document.get('lm_eval_version', 'unknown')}",
    }


def _interval(share: float | None, n: int | None) -> dict[str, Any]:
    """Number of questions, and Wilson's interval where the value is the share of those that were right: a standard
    error of 0, where all or none were, is no error."""
    hits = round((share or 0) * (n or 0))
    if not n or share is None or not 0 <= share <= 1 or abs(share * n - hits) > 1e-6 * n:
        return {"n": n}
    return {key: value for key, value in wilson(hits, n).to_json().items() if key in ("low", "high", "n")}


def _questions(document: Mapping[str, Any], task: str) -> int | None:
    """How many questions were asked; of a group the sum over its tasks."""
    below = _of(document, "group_subtasks", task)
    counts = []
    for name in below if isinstance(below, list) and below else [task]:
        count = _of(document, "n-samples", name)
        effective = count.get("effective") if isinstance(count, dict) else None
        if not isinstance(effective, int):
            return None
        counts.append(effective)
    return sum(counts)


def _of(document: Mapping[str, Any], table: str, task: Any) -> Any:
    rows = document.get(table)
    return rows.get(task) if isinstance(rows, dict) and isinstance(task, str) else None


def _number(value: Any) -> float | None:
    """A finite number; 'N/A' and the like are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)
