"""The `apex` command in a process of its own, optionally with a saboteur inside it and inside its child.

The saboteur is a sitecustomize module that counts the calls which change files, and at the n-th sends signals: the
n-th call is torn (half of its bytes reach the file), so every crash is as untidy as it can be.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apex_quant

PACKAGE_ROOT = Path(apex_quant.__file__).parents[1]

SABOTEUR = """
import json, os, signal, sys

plan = json.loads(os.environ["APEX_SABOTAGE"])
in_child = "apex_quant.native" in sys.orig_argv
if in_child:
    import apex_quant.encode.executor as executor
    import apex_quant.encode.tasks as tasks
    executor.SYNC_BYTES, executor.SYNC_SECONDS = plan.get("sync", (0, 0.0))
    tasks.MOST_WEIGHTS = tasks.LEAST_WEIGHTS = 1 << 14
    if "fsize" in plan:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (plan["fsize"], resource.RLIM_INFINITY))
if plan.get("pids"):
    with open(os.path.join(plan["pids"], "child" if in_child else "parent"), "w") as file:
        file.write(str(os.getpid()))

calls = 0
def counted(name):
    real = getattr(os, name)
    def wrapper(first, *rest, **more):
        global calls
        calls += 1
        if plan.get("count"):
            real_pwrite(counter, b"%9d" % calls, 0)
        if calls == plan.get("at") and in_child == (plan["where"] == "child"):
            if name == "write":
                real(first, rest[0][: len(rest[0]) // 2])
            if name == "pwrite":
                real(first, rest[0][: len(rest[0]) // 2], rest[1])
            other = os.getppid() if in_child else None
            for who in plan["whom"]:
                pid = {"self": os.getpid(), "parent": other, "group": -os.getpgrp()}[who]
                os.kill(pid, plan["signal"])
            if name in ("write", "pwrite"):
                half = len(rest[0]) // 2
                rest = (rest[0][half:], *((rest[1] + half,) if name == "pwrite" else ()))
                done = real(first, *rest)
                return half + done
        return real(first, *rest, **more)
    return wrapper

real_pwrite = os.pwrite
if plan.get("count"):
    counter = os.open(plan["count"] + (".child" if in_child else ".parent"), os.O_RDWR | os.O_CREAT)
for name in ("pwrite", "write", "fdatasync", "fsync", "ftruncate", "truncate", "replace", "unlink"):
    setattr(os, name, counted(name))
"""


@dataclass(frozen=True)
class Ran:
    """A finished command."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def apex(
    *arguments: str | Path, sabotage: dict[str, Any] | None = None, cwd: Path | None = None, **environment: str
) -> Ran:
    """Run `apex` with these arguments. `sabotage`: where (parent or child), at, whom, signal, fsize, count, pids."""
    env = dict(os.environ, PYTHONPATH=str(PACKAGE_ROOT), **environment)
    if sabotage is not None:
        folder = Path(sabotage["folder"])
        (folder / "sitecustomize.py").write_text(SABOTEUR)
        env |= {
            "PYTHONPATH": f"{folder}:{PACKAGE_ROOT}",
            "APEX_SABOTAGE": json.dumps({"signal": signal.SIGKILL, **sabotage}),
        }
    done = subprocess.run(
        [sys.executable, "-m", "apex_quant", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=env,
        cwd=cwd,
        check=False,
        start_new_session=True,
        timeout=120,
    )
    return Ran(done.returncode, done.stdout, done.stderr)
