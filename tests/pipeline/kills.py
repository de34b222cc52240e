"""SIGKILL at seeded random moments, again and again, and what must not change by it."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Stamps = dict[tuple[str, str], Any]


def stamps(work: Path) -> Stamps:
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


def killed_ten_times(
    command: Sequence[str],
    work: Path,
    env: Mapping[str, str],
    *,
    longest: float,
    seed: int = 1,
    ended: Callable[[], None] = lambda: None,
) -> Stamps:
    """Run a command that works in WORK until it was killed ten times, each within `longest` seconds; the items that
    are finished then. `ended` is called when it came to the end before that: it begins anew in an empty folder."""
    chance = random.Random(seed)
    known: Stamps = {}
    kills = 0
    while kills < 10:
        process = subprocess.Popen(command, env=dict(env), stderr=subprocess.PIPE)
        try:
            process.wait(timeout=chance.uniform(0.5, longest))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        _, err = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), err.decode()
        kills += process.returncode != 0
        now = stamps(work)
        assert known.items() <= now.items(), "a finished phase was repeated"
        known = now
        if process.returncode == 0 and kills < 10:
            ended()
            shutil.rmtree(work)
            known = {}
    return known
