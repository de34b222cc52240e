"""`apex publish` as a command: its plan, its JSON, its exit statuses; in a process of its own with HF_ENDPOINT."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from apex_quant.cli.publish import HubBar
from apex_quant.hub import HubProgress
from tests.helpers.cli import PACKAGE_ROOT, Ran
from tests.hub.mock import TOKEN, MockHub, Repo

# also where the command is not wired into the app: it is added here then
RUN = """
import sys
from apex_quant.cli import main
from apex_quant.cli.app import app
from apex_quant.cli.publish import publish
if not any(command.callback is publish for command in app.registered_commands):
    app.command()(publish)
main(sys.argv[1:])
"""
REPO = "me/tiny-GGUF"


def run(hub: MockHub, home: Path, *words: str | Path, token: str | None = TOKEN) -> Ran:
    library = os.pathsep.join([str(PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": library, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "no_proxy": "*"}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    env.pop("HF_TOKEN", None)
    if token:
        env["HF_TOKEN"] = token
    done = subprocess.run(
        [sys.executable, "-c", RUN, "publish", *map(str, words)],
        env=env, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    return Ran(done.returncode, done.stdout, done.stderr)


def test_the_command(hub: MockHub, folder: Path, tmp_path: Path) -> None:
    shown = run(hub, tmp_path, folder, REPO, "--dry-run", token=None)
    assert shown.status == 0, shown.err
    assert "nothing was uploaded" in shown.out
    assert "8 new, 0 equal, 0 differ" in shown.out
    assert hub.repos == {}
    done = run(hub, tmp_path, folder, REPO, "--private", "--json")
    assert done.status == 0, done.err
    document = json.loads(done.out)
    assert document["commit"] == hub.repos[REPO].commit
    assert {file["state"] for file in document["files"]} == {"new"}
    assert hub.repos[REPO].private
    again = run(hub, tmp_path, folder, REPO)
    assert again.status == 0, again.err
    assert "0 new, 8 equal, 0 differ; 0 B to upload" in again.out


def test_exit_statuses(hub: MockHub, folder: Path, tmp_path: Path) -> None:
    hub.repos[REPO] = Repo(files={"README.md": b"other"})
    differs = run(hub, tmp_path, folder, REPO)
    assert differs.status == 2
    assert "error: me/tiny-GGUF has other content under README.md" in differs.err
    assert "hint: --replace" in differs.err
    assert run(hub, tmp_path, folder, REPO, token=None).status == 4
    (folder / "tiny-compact.gguf.journal").unlink()
    assert run(hub, tmp_path, folder, REPO).status == 3


def test_progress_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    bar = HubBar()
    monkeypatch.setattr(bar, "line", said.append)
    with bar:
        bar(HubProgress("upload", "a.gguf", 0, 10))
        bar(HubProgress("upload", "a.gguf", 0, 10, "the hub answered 503; again in 2 s"))
        bar._last_line -= 60
        bar(HubProgress("upload", "a.gguf", 5, 10))
    assert said == ["the hub answered 503; again in 2 s", "uploading: 50%, a.gguf, 0.00 GB"]
