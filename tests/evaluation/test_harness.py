"""The harness: command lines, environments, its JSON, and that server and harness have ended whatever happens.

A stand-in for llama-server answers on the real port, one for lm_eval asks it and writes what lm_eval 0.4.13 wrote.
"""

from __future__ import annotations

import fcntl
import http.client
import importlib.util
import itertools
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from apex_quant import SessionOptions, embedded_model
from apex_quant.errors import InputError, ResourceError, UsageError
from apex_quant.evaluation import programs, server
from apex_quant.evaluation.harness import TASKS, find_lm_eval, read_metric, read_results, run_harness
from apex_quant.evaluation.server import Found, Server, find_server, server_command
from apex_quant.evaluation.statistics import wilson
from apex_quant.gguf import open_model
from tests.helpers.random_models import write_random_gguf

HEAD = f"""#!{sys.executable}
import fcntl, json, os, signal, sys, urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
folder = Path(__file__).parent
name = Path(__file__).name
def option(flag):
    return sys.argv[sys.argv.index(flag) + 1] if flag in sys.argv else None
held = open(folder / f"{{name}}.lock", "w")  # held as long as this process lives
fcntl.flock(held, fcntl.LOCK_EX)
seen = {{"argv": sys.argv[1:], "env": dict(os.environ), "pid": os.getpid()}}
with open(folder / f"{{name}}.jsonl", "a") as file:
    file.write(json.dumps(seen) + "\\n")
mode = (folder / "mode").read_text() if (folder / "mode").exists() else ""
"""

SERVER = (
    HEAD
    + """
if mode == "no server":
    print("error: failed to load model")
    sys.exit(3)
class Handler(BaseHTTPRequestHandler):
    looks = 0
    def answer(self, status, value):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def do_GET(self):
        Handler.looks += 1
        loading = Handler.looks < 3 or mode == "loads for ever"
        self.answer(404 if self.path != "/health" else 503 if loading else 200, {})
    def do_POST(self):
        right = self.headers.get("Authorization") == "Bearer " + os.environ["LLAMA_API_KEY"]
        self.answer(200 if right else 401, {"path": self.path})
    def log_message(self, *words):
        pass
print("loading model", flush=True)
HTTPServer((option("--host"), int(option("--port"))), Handler).serve_forever()
"""
)

LM_EVAL = (
    HEAD
    + """
about = dict(pair.split("=", 1) for pair in option("--model_args").split(","))
request = urllib.request.Request(about["base_url"], b"{}", {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]})
answer = json.load(urllib.request.urlopen(request))
print("asked", answer["path"])
bar = "Requesting API: {}%|##   | {}/4 [00:00<?, ?it/s]"
sys.stderr.write("\\r" + bar.format(0, 0) + "\\r" + bar.format(100, 4) + "\\n")
sys.stderr.flush()
if mode == "hangs":
    print("hanging", flush=True)
    signal.pause()
if mode == "fails":
    sys.exit("ConnectionError: cannot reach huggingface.co")
if mode != "writes nothing":
    made = Path(option("--output_path")) / "apex"
    made.mkdir(parents=True)
    text = (folder / "results.json").read_text().replace("TASK", option("--tasks"))
    (made / "results_2026-01-02T03-04-05.678901.json").write_text(text)
"""
)

# what lm_eval 0.4.13 wrote for a group of two tasks with --limit 2, without "configs" and what is of no use
GROUP: dict[str, Any] = {
    "results": {
        "t_a": {"name": "t_a", "alias": "t_a", "sample_len": 2,
                "exact_match,custom-extract": 0.5, "exact_match_stderr,custom-extract": 0.5},
        "t_b": {"name": "t_b", "alias": "t_b", "sample_len": 2,
                "exact_match,custom-extract": 0.5, "exact_match_stderr,custom-extract": 0.5},
        "mmlu_pro": {"alias": "mmlu_pro", "name": "mmlu_pro", "sample_len": 4, "exact_match,custom-extract": 0.5,
                     "exact_match_stderr,custom-extract": 0.3535533905932738,
                     "sample_count": {"exact_match,custom-extract": 4}},
    },
    "group_subtasks": {"mmlu_pro": ["t_a", "t_b"]},
    "versions": {"t_a": 3.1, "t_b": 3.1, "mmlu_pro": "2.0"},
    "n-shot": {"t_a": 5, "t_b": 5, "mmlu_pro": 5},
    "n-samples": {"t_a": {"original": 3, "effective": 2}, "t_b": {"original": 3, "effective": 2}},
    "lm_eval_version": "0.4.13",
}  # fmt: skip

ONE: dict[str, Any] = {
    "results": {
        "TASK": {
            "alias": "TASK", "sample_len": 8,
            "exact_match,flexible-extract": 0.75, "exact_match_stderr,flexible-extract": 0.16366341767699427,
            "exact_match,strict-match": 0.0, "exact_match_stderr,strict-match": 0.0,
            "prompt_level_strict_acc,none": 0.5, "prompt_level_strict_acc_stderr,none": 0.1889822365046136,
            "inst_level_strict_acc,none": 0.61, "inst_level_strict_acc_stderr,none": "N/A",
            "pass@1,create_test": 0.25, "pass@1_stderr,create_test": 0.16366341767699427,
            "broken,none": float("nan"), "broken_stderr,none": float("nan"),
        }
    },
    "group_subtasks": {"TASK": []},
    "versions": {"TASK": 3.0},
    "n-shot": {"TASK": 5},
    "n-samples": {"TASK": {"original": 1319, "effective": 8}},
    "lm_eval_version": "0.4.13",
}  # fmt: skip


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder first on PATH with both stand-ins; what they were started with is in NAME.jsonl."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name, text in (("llama-server", SERVER), ("lm_eval", LM_EVAL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "results.json").write_text(json.dumps(ONE))
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.delenv(server.DIRECTORY, raising=False)
    monkeypatch.setattr(programs, "PAUSE", 0.01)
    return folder


def started(tools: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tools / f"{name}.jsonl").read_text().splitlines()]


def ended(tools: Path, name: str) -> bool:
    """Whether nobody holds the lock of a stand-in."""
    with (tools / f"{name}.lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def option(argv: list[str], flag: str) -> str:
    return argv[argv.index(flag) + 1]


def test_a_task_from_start_to_end(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "7")
    monkeypatch.setenv("NO_PROXY", "example.org")
    events: list[dict[str, Any]] = []
    lines: list[tuple[str, str]] = []
    results: list[str] = []
    made = run_harness(
        embedded_model(),
        ["gsm8k"],
        limit=8,
        parallel=2,
        options=SessionOptions(threads=2),
        progress=events.append,
        log=lambda program, line: lines.append((program, line)),
        on_result=lambda name, _: results.append(name),
    )
    value = made["gsm8k"]
    interval = wilson(0, 8)
    assert (value["value"], value["error"], value["n"]) == (0.0, 0.0, 8)
    assert (value["low"], value["high"]) == (interval.low, interval.high)
    assert value["metric"] == "exact_match,strict-match"
    flexible = value["metrics"]["exact_match,flexible-extract"]
    assert flexible == {"value": 0.75, "error": 0.16366341767699427}
    assert (value["task"], value["version"], value["shots"], value["harness"]) == ("gsm8k", 3.0, 5, "lm_eval 0.4.13")
    assert (value["chat"], value["ctx"], value["parallel"], value["limit"]) == (False, 2048, 2, 8)
    assert value["server"] == "llama-server"
    json.dumps(value, allow_nan=False)
    assert results == ["gsm8k"]
    assert events == [{"what": "gsm8k", "done": done, "planned": 4, "resumed": 0} for done in (0, 4)]
    assert ("llama-server", "loading model") in lines
    assert ("lm_eval", "asked /v1/completions") in lines

    (serving,), (asking,) = started(tools, "llama-server"), started(tools, "lm_eval")
    argv = serving["argv"]
    assert option(argv, "--model") == str(embedded_model())
    assert option(argv, "--host") == "127.0.0.1"
    assert option(argv, "--ctx-size") == "4096", "for two questions at a time"
    assert option(argv, "--threads") == "2"
    assert serving["env"]["LLAMA_API_KEY"] == asking["env"]["OPENAI_API_KEY"]
    assert serving["env"]["LLAMA_API_KEY"] not in argv
    assert "LLAMA_ARG_CTX_SIZE" not in serving["env"]
    assert asking["argv"][:4] == [
        "--model",
        "local-completions",
        "--model_args",
        option(asking["argv"], "--model_args"),
    ]
    assert option(asking["argv"], "--model_args").split(",") == [
        "model=apex",
        f"base_url=http://127.0.0.1:{option(argv, '--port')}/v1/completions",
        "num_concurrent=2",
        "max_retries=3",
        "timeout=3600",
        "max_length=2048",
        "tokenizer_backend=none",
        "tokenized_requests=False",
    ]
    assert option(asking["argv"], "--limit") == "8"
    assert "HF_ALLOW_CODE_EVAL" not in asking["env"]
    assert "--confirm_run_unsafe_code" not in asking["argv"]
    assert asking["env"]["NO_PROXY"] == asking["env"]["no_proxy"] == "example.org,127.0.0.1"
    assert ended(tools, "llama-server")
    assert ended(tools, "lm_eval")


def test_chat_and_completion(tools: Path) -> None:
    made = run_harness(embedded_model(), ["ifeval", "gsm8k"])
    with open_model(embedded_model()) as model:
        has_template = "tokenizer.chat_template" in model.metadata
    first, second = (one["argv"] for one in started(tools, "lm_eval"))
    assert has_template
    assert (made["ifeval"]["chat"], made["gsm8k"]["chat"]) == (True, False)
    assert option(first, "--model") == "local-chat-completions"
    assert "/v1/chat/completions" in option(first, "--model_args")
    assert "tokenizer_backend" not in option(first, "--model_args")
    assert "--apply_chat_template" in first
    assert "--apply_chat_template" not in second
    assert "--limit" not in first
    assert made["ifeval"]["value"] == 0.5
    assert len(started(tools, "llama-server")) == 1, "one server for all tasks"


def test_code_runs_only_when_allowed(tools: Path) -> None:
    for tasks in (["humaneval"], ["gsm8k", "mbpp"]):
        with pytest.raises(UsageError, match="would run programs that the model writes"):
            run_harness(embedded_model(), tasks)
    assert not (tools / "llama-server.jsonl").exists(), "nothing was started"
    made = run_harness(embedded_model(), ["gsm8k", "humaneval"], allow_code=True)
    assert made["humaneval"]["metric"] == "pass@1,create_test"
    assert made["humaneval"]["value"] == 0.25
    without, with_code = started(tools, "lm_eval")
    assert "HF_ALLOW_CODE_EVAL" not in without["env"]
    assert "--confirm_run_unsafe_code" not in without["argv"]
    assert with_code["env"]["HF_ALLOW_CODE_EVAL"] == "1"
    assert "--confirm_run_unsafe_code" in with_code["argv"]
    assert option(with_code["argv"], "--tasks") == "humaneval"
    run_harness(embedded_model(), ["humaneval"], allow_code=True, chat=True)
    assert option(started(tools, "lm_eval")[-1]["argv"], "--tasks") == "humaneval_instruct"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": []}, "no task is named"),
        ({"tasks": ["gsm9k"]}, "Did you mean gsm8k"),
        ({"tasks": ["gsm8k"], "limit": 0}, "limit"),
        ({"tasks": ["gsm8k"], "parallel": 0}, "at a time"),
    ],
)
def test_wrong_use(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run_harness(embedded_model(), **arguments)


def test_a_chat_needs_a_template(tools: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no chat template"):
        run_harness(write_random_gguf(tmp_path / "m.gguf", "llama"), ["gsm8k"], chat=True)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("no server", "llama-server ended with status 3 .*failed to load model"),
        ("fails", "lm_eval ended with status 1 during gsm8k: ConnectionError: cannot reach"),
        ("writes nothing", "lm_eval wrote no results for gsm8k"),
    ],
)
def test_programs_that_fail(tools: Path, mode: str, message: str) -> None:
    (tools / "mode").write_text(mode)
    with pytest.raises(ResourceError, match=message):
        run_harness(embedded_model(), ["gsm8k"])
    assert ended(tools, "llama-server")


def test_a_server_that_is_not_ready_in_time(tools: Path) -> None:
    (tools / "mode").write_text("loads for ever")
    clock = itertools.count()
    with pytest.raises(ResourceError, match=r"did not serve .* within 3 s"):
        Server.start(embedded_model(), find_server(), ctx=64, deadline=3.0, clock=lambda: float(next(clock)))
    if (tools / "llama-server.lock").exists():  # it was ended, perhaps before it began
        assert ended(tools, "llama-server")


def test_finished_tasks_are_handed_on_before_one_fails(tools: Path) -> None:
    found: dict[str, Any] = {}

    def on_result(name: str, value: dict[str, Any]) -> None:
        found[name] = value
        (tools / "mode").write_text("fails")

    with pytest.raises(ResourceError, match="during ifeval"):
        run_harness(embedded_model(), ["gsm8k", "ifeval"], on_result=on_result)
    assert found["gsm8k"]["n"] == 8


def test_ctrl_c_ends_both_programs(tools: Path) -> None:
    (tools / "mode").write_text("hangs")

    def on_line(program: str, line: str) -> None:
        if line == "hanging":
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_harness(embedded_model(), ["gsm8k"], log=on_line)
    for name in ("llama-server", "lm_eval"):
        assert ended(tools, name)
        with pytest.raises(ProcessLookupError):
            os.kill(started(tools, name)[0]["pid"], 0)


def test_a_killed_caller_leaves_nothing_running(tools: Path) -> None:
    (tools / "mode").write_text("hangs")
    program = """if True:
        from apex_quant import embedded_model
        from apex_quant.evaluation.harness import run_harness
        run_harness(embedded_model(), ["gsm8k"], log=lambda _, line: print(line, flush=True))
    """
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout is not None
        assert "hanging\n" in iter(caller.stdout.readline, "")
        caller.kill()
    for name in ("llama-server", "lm_eval"):
        with (tools / f"{name}.lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # returns when the process is gone


# --- finding programs ---


def no_program(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv(server.DIRECTORY, raising=False)


def make_executable(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_the_folder_of_llama_cpp_comes_before_path(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_server() == Found("llama-server", (str(tools / "llama-server"),))
    built = make_executable(tmp_path / "llama.cpp" / "build" / "bin" / "llama-server")
    monkeypatch.setenv(server.DIRECTORY, str(tmp_path / "llama.cpp"))
    assert find_server() == Found("llama-server", (str(built),))
    assert find_server(tools / "llama-server") == Found("llama-server", (str(tools / "llama-server"),))
    built.unlink()
    with pytest.raises(ResourceError, match="no llama-server there"):
        find_server()
    with pytest.raises(ResourceError, match="no such program"):
        find_server("llama-swerver")


def test_the_bindings_server_is_the_last_resort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_program(tmp_path, monkeypatch)
    monkeypatch.setattr(server, "_installed", lambda name: True)
    found = find_server()
    assert (found.kind, found.command[-1]) == ("llama_cpp.server", server.BINDINGS_SERVER)
    monkeypatch.setattr(server, "_installed", lambda name: name not in ("uvicorn", "fastapi"))
    with pytest.raises(ResourceError, match="lacks fastapi, uvicorn") as caught:
        find_server()
    assert caught.value.hint is not None
    assert "apex-quant[harness]" in caught.value.hint


def test_no_harness(tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_lm_eval() == (str(tools / "lm_eval"),)
    no_program(tmp_path, monkeypatch)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match="not installed") as caught:
        run_harness(embedded_model(), ["gsm8k"])
    assert caught.value.hint is not None
    assert "apex-quant[harness]" in caught.value.hint
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert find_lm_eval() == (sys.executable, "-P", "-m", "lm_eval")


OPTIONS = SessionOptions(
    gpu_layers=-1, cpu_experts=True, tensor_split=(3, 1), tensor_buffers=("exps=CPU",), type_k="q8_0",
    flash_attention="on", repack=False, ubatch=256,
)  # fmt: skip


def test_options_of_the_servers() -> None:
    stock = Found("llama-server", ("llama-server",))
    argv = server_command(stock, "m.gguf", 1, ctx=100, parallel=3, options=OPTIONS)
    assert " ".join(argv[1:7]) == "--model m.gguf --host 127.0.0.1 --port 1"
    assert " ".join(argv[7:17]) == "--alias apex --ctx-size 300 --parallel 3 --ubatch-size 256 --n-gpu-layers 999"
    assert " ".join(argv[17:23]) == "--tensor-split 3,1 --override-tensor exps=CPU --cache-type-k q8_0"
    assert argv[23:] == ["--flash-attn", "on", "--cpu-moe", "--no-repack"]
    bindings = Found("llama_cpp.server", ("python", "-m", "llama_cpp.server"))
    with pytest.raises(ResourceError, match="cpu_experts, tensor_buffers, no repack, parallel"):
        server_command(bindings, "m.gguf", 1, ctx=100, parallel=3, options=OPTIONS)
    plain = SessionOptions(gpu_layers=-1, tensor_split=(3, 1))
    argv = server_command(bindings, "m.gguf", 1, ctx=100, parallel=1, options=plain)
    for flag, value in (("--ctx", "100"), ("--gpu-layers", "-1"), ("--tensor-split", "3,1"), ("--type-k", "f16")):
        assert option(argv, flag) == value
    assert "--no-mmap" not in argv
    argv = server_command(
        bindings, "m.gguf", 1, ctx=100, parallel=1, options=SessionOptions(mmap=False, flash_attention="on")
    )
    assert argv[-2:] == ["--no-mmap", "--flash-attn"]


def test_the_bindings_server_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes these options, answers with its key alone, and reads no settings of its own in the environment."""
    no_program(tmp_path, monkeypatch)
    for name, value in (("N_BATCH", "many"), ("API_KEY", "another"), ("CONFIG_FILE", "/nowhere"), ("SEED", "x")):
        monkeypatch.setenv(name, value)
    options = SessionOptions(threads=1, gpu_layers=-1, ubatch=64, type_k="q8_0", mmap=False, flash_attention="on")
    with Server.start(embedded_model(), find_server(), ctx=64, options=options) as running:
        for key, status in ((running.key, 200), ("another", 401)):
            connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
            connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"})
            assert connection.getresponse().status == status
            connection.close()
        lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)]
        assert any(server.BINDINGS_SERVER.encode() in line for line in lines)
        assert not any(running.key.encode() in line for line in lines)


# --- the harness's JSON ---


def test_a_group_counts_the_questions_of_its_tasks() -> None:
    made = read_metric(GROUP, "mmlu_pro", TASKS["mmlu_pro"].metric)
    assert (made["value"], made["error"], made["n"]) == (0.5, 0.3535533905932738, 4)
    assert (made["low"], made["high"]) == (wilson(2, 4).low, wilson(2, 4).high)
    assert made["version"] == "2.0"


def test_values_without_error_or_of_no_number() -> None:
    made = read_metric(ONE, "TASK", "inst_level_strict_acc,none")
    assert (made["value"], made["error"], made["n"]) == (0.61, None, 8)
    assert "low" not in made, "not a share of the 8 questions"
    assert not [key for key in made["metrics"] if key.startswith(("broken", "sample_len", "alias"))]


def test_results_that_lack_something() -> None:
    with pytest.raises(InputError, match="no task gsm8k"):
        read_metric(GROUP, "gsm8k", "exact_match")
    with pytest.raises(InputError, match="have no pass@1, only exact_match,custom-extract"):
        read_metric(GROUP, "t_a", "pass@1")
    bare = {"results": {"t": {"acc,none": 0.5, "acc_stderr,none": 0.1}}}
    made = read_metric(bare, "t", "acc")
    assert (made["n"], made["version"], made["harness"]) == (None, None, "lm_eval unknown")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"results": 1}', "\x00\xff"])
def test_files_that_are_no_results(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results_1.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError):
        read_results(path)


def test_every_task_of_the_issue_is_known() -> None:
    assert set(TASKS) == {"humaneval", "mbpp", "ifeval", "gsm8k", "mmlu_pro"}
    assert {name for name, task in TASKS.items() if task.code} == {"humaneval", "mbpp"}


def test_tasks_and_options_that_lm_eval_knows() -> None:
    """Where the real harness is installed: our names and options are its own."""
    pytest.importorskip("lm_eval", reason="the extra harness is not installed")
    package = Path(pytest.importorskip("lm_eval").__file__).parent
    text = "\n".join(path.read_text() for path in (package / "tasks").rglob("*") if path.suffix == ".yaml")
    for task in TASKS.values():
        assert f"task: {task.plain}\n" in text or f"group: {task.plain}\n" in text
        assert f"task: {task.chat}\n" in text or f"group: {task.chat}\n" in text
