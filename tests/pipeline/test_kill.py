"""SIGKILL at ten random moments: the run that comes after each goes on, and ends with the same files."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cli import PACKAGE_ROOT
from tests.pipeline.conftest import ran, small_run
from tests.pipeline.test_run import contents

SCRIPT = """
import sys
from pathlib import Path
from tests.pipeline.conftest import small_run
small_run(Path(sys.argv[1]))
"""


def stamps(work: Path) -> dict[tuple[str, str], Any]:
    """When each item was finished."""
    if not (work / "state.json").exists():
        return {}
    phases = json.loads((work / "state.json").read_text())["phases"]
    return {(phase, name): one["finished"] for phase, items in phases.items() for name, one in items.items()}


def numbers(work: Path) -> dict[str, Any]:
    """The metrics of all results, without what was timed."""
    found = {}
    for path in sorted((work / "release/results").glob("*.json")):
        metrics = json.loads(path.read_text())["metrics"]
        timed = ("seconds", "tokens_per_second", "spec")
        found[path.name] = {name: {k: v for k, v in one.items() if k not in timed} for name, one in metrics.items()}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1])
def test_ten_kills(finished: Path, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    for name in ("Small-BF16.gguf", "corpus.txt"):
        shutil.copy2(finished / name, tmp_path / name)
    work = tmp_path / "work"
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(PACKAGE_ROOT), str(Path(__file__).parents[2])]))
    known: dict[tuple[str, str], Any] = {}
    kills = 0
    while kills < 10:
        process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)], env=env, stderr=subprocess.PIPE)
        try:
            process.wait(timeout=chance.uniform(0.5, 5.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        _, err = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), err.decode()
        kills += process.returncode != 0
        now = stamps(work)
        assert known.items() <= now.items(), "a finished phase was repeated"
        known = now
        if process.returncode == 0 and kills < 10:  # a fast machine comes to the end before the tenth: once more
            assert contents(work) == contents(finished / "work")
            shutil.rmtree(work)
            known = {}
    made = small_run(tmp_path)
    assert not {(phase, item) for phase, items in ran(made).items() for item in items} & set(known)
    assert contents(work) == contents(finished / "work")
    assert numbers(work) == numbers(finished / "work")
    assert ran(small_run(tmp_path)) == {}
    leftovers = [path for path in work.rglob("*") if path.name.endswith((".partial", ".state", ".sums"))]
    assert leftovers == []
