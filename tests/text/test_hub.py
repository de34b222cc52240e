"""The hub: which files are chosen, and loading them from a local server that answers as the hub does."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from apex_quant.errors import InputError, ResourceError, UsageError
from apex_quant.text import hub, load
from apex_quant.text.hub import DataFile, Wanted, parse, select

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CARD = [
    {
        "config_name": "en",
        "data_files": [{"split": "train", "path": "en/*.jsonl"}, {"split": "test", "path": ["t/en.*"]}],
    },
    {"config_name": "es", "data_files": "es/**/*.jsonl"},
]


def files(*paths: str) -> list[DataFile]:
    return [DataFile(path, 10) for path in paths]


def test_names() -> None:
    assert parse("user/data") == Wanted("user/data", "", "")
    assert parse("data:en:test") == Wanted("data", "en", "test")
    for bad in ("", "a/b/c", "../x", "a b", "a:b:c:d", "/etc", "user/", "http://x"):
        with pytest.raises(UsageError, match="is not hub:NAME"):
            parse(bad)


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        ("d:en", ["en/a.jsonl", "en/b.jsonl"]),
        ("d:en:test", ["t/en.jsonl"]),
        ("d:es", ["es/x/c.jsonl", "es/d.jsonl"]),
    ],
)
def test_files_by_card(wanted: str, chosen: list[str]) -> None:
    there = files("en/a.jsonl", "en/b.jsonl", "es/x/c.jsonl", "es/d.jsonl", "t/en.jsonl", "other.txt")
    assert [file.path for file in select(there, CARD, parse(wanted))] == chosen


@pytest.mark.parametrize(
    ("there", "wanted", "chosen"),
    [
        (["a.jsonl", "b.txt"], "d", ["a.jsonl", "b.txt"]),
        (["data/test-0.txt", "data/train-0.txt", "data/train-1.txt"], "d", ["data/train-0.txt", "data/train-1.txt"]),
        (["data/train-0.parquet", "data/test-0.parquet"], "d::test", ["data/test-0.parquet"]),
        (["test.jsonl"], "d", ["test.jsonl"]),
        (["en/train/0.parquet", "es/train/0.parquet", "es/test/0.parquet"], "d:es:test", ["es/test/0.parquet"]),
        (["default/train/0.parquet", "en/train/0.parquet"], "d", ["default/train/0.parquet"]),
        (["only/train.jsonl"], "d", ["only/train.jsonl"]),
    ],
)  # fmt: skip
def test_files_by_name(there: list[str], wanted: str, chosen: list[str]) -> None:
    assert [file.path for file in select(files(*there), None, parse(wanted))] == chosen


def test_choices_that_do_not_exist() -> None:
    there = files("english/train.jsonl", "spanish/train.jsonl")
    for wanted, message in (
        ("d", "has several configurations. Known: english, spanish"),
        ("d:englsh", "no configuration 'englsh'. Did you mean english? Known"),
        ("d:english:dev", "no split 'dev'. Known: train"),
    ):
        with pytest.raises(UsageError) as caught:
            select(there, None, parse(wanted))
        assert message in caught.value.message


@pytest.mark.parametrize("card", ["x", [1], [{"data_files": 3}], [{"config_name": "a"}], [{"data_files": [{}, None]}]])
def test_odd_cards_are_passed_over(card: object) -> None:
    assert select(files("a.jsonl"), card, parse("d")) == files("a.jsonl")


# --- a stand-in for the library, so that this runs without it ---


class FakeApi:
    """What load_hub uses of HfApi."""

    def __init__(self, folder: Path, error: Exception | None = None, sizes: dict[str, int] | None = None) -> None:
        self.folder, self.error, self.sizes = folder, error, sizes or {}

    def dataset_info(self, name: str, revision: str | None, files_metadata: bool) -> Any:
        if self.error:
            raise self.error
        if revision not in (None, hub.CONVERTED):
            raise ValueError(revision)
        folder = self.folder / ("main" if revision is None else "converted")
        found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        entries = [
            SimpleNamespace(rfilename=str(p.relative_to(folder)), size=self.sizes.get(p.name, p.stat().st_size))
            for p in found
        ]
        return SimpleNamespace(sha=COMMIT, siblings=entries, card_data=None)

    def hf_hub_download(self, name: str, path: str, repo_type: str, revision: str) -> str:
        assert (repo_type, revision) == ("dataset", COMMIT)
        return str(next(folder for folder in self.folder.iterdir() if (folder / path).exists()) / path)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    library, errors = ModuleType("huggingface_hub"), ModuleType("huggingface_hub.errors")
    for name in ("RepositoryNotFoundError", "RevisionNotFoundError", "EntryNotFoundError"):
        setattr(errors, name, type(name, (Exception,), {}))
    api = FakeApi(tmp_path)
    vars(library).update(errors=errors, HfApi=lambda: api)
    monkeypatch.setitem(sys.modules, "huggingface_hub", library)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    (tmp_path / "main").mkdir()
    return api


def test_loads_and_names_the_commit(fake: FakeApi) -> None:
    (fake.folder / "main" / "train.jsonl").write_text('{"text": "eins"}\n{"text": "zwei"}\n')
    (fake.folder / "main" / "README.md").write_text("no text of the data set")
    found = load(["hub:user/data"])
    assert [document.text for document in found] == ["eins", "zwei"]
    assert found[1].source == "hub:user/data@01234567/train.jsonl:2"


def test_only_what_is_needed_is_downloaded(fake: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(5):
        (fake.folder / "main" / f"{i}.txt").write_text(f"text {i}")
    monkeypatch.setattr(hub, "ENOUGH", 9)
    said: list[str] = []
    assert [document.text for document in load(["hub:d"], said.append)] == ["text 0", "text 1"]
    assert said == ["hub:d: the first 2 of 5 files are taken, the rest is left out"]
    fake.sizes = {"0.txt": 1 << 40}
    with pytest.raises(InputError, match=r"0\.txt has 1099511627776 bytes"):
        load(["hub:d"])


def test_other_forms_come_from_the_converted_branch(fake: FakeApi) -> None:
    (fake.folder / "main" / "data.csv").write_text("a,b")
    with pytest.raises(InputError, match=r"none of its 1 files is \.jsonl, \.parquet, \.txt"):
        load(["hub:d"])
    (fake.folder / "converted" / "default" / "train").mkdir(parents=True)
    (fake.folder / "converted" / "default" / "train" / "0000.jsonl").write_text('{"text": "converted"}')
    assert [document.text for document in load(["hub:d"])] == ["converted"]


def test_broken_files_of_the_hub_are_named(fake: FakeApi) -> None:
    (fake.folder / "main" / "a.jsonl").write_text("{")
    with pytest.raises(InputError, match=r"hub:d@01234567/a\.jsonl:1: is not JSON"):
        load(["hub:d"])


def test_network_and_names_that_fail(fake: FakeApi) -> None:
    fake.error = ConnectionError("no route\nto host")
    with pytest.raises(ResourceError, match="hub:d: cannot be loaded: ConnectionError: no route") as offline:
        load(["hub:d"])
    assert "network" in str(offline.value.hint)
    fake.error = sys.modules["huggingface_hub.errors"].RepositoryNotFoundError("404 Client Error.")
    with pytest.raises(InputError, match="hub:d: 404 Client Error") as missing:
        load(["hub:d"])
    assert "hf auth login" in str(missing.value.hint)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ResourceError, match="needs huggingface_hub") as caught:
        load(["hub:d"])
    assert caught.value.hint == "pip install 'apex-quant[hub]'"


# --- the library itself against a local server ---

CONTENT = {"en/train.jsonl": b'{"text": "one"}\n{"text": "two"}\n', "es/train.txt": b"uno", "README.md": b"# card"}


class Hub(http.server.BaseHTTPRequestHandler):
    """The two requests of the hub that matter: what a data set holds, and one file of it."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body, headers, status = b"{}", {}, 404
        if path.startswith("/api/datasets/user/data") and "refs" not in path:
            siblings = [{"rfilename": name, "size": len(content)} for name, content in CONTENT.items()]
            info = {"_id": "1", "id": "user/data", "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            body, status = json.dumps(info).encode(), 200
        elif path.startswith(prefix := f"/datasets/user/data/resolve/{COMMIT}/"):
            body, status = CONTENT[path.removeprefix(prefix)], 200
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{len(body)}"'}
        else:
            headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as made:
        thread = threading.Thread(target=made.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{made.server_address[1]}"
        made.shutdown()


LOAD = """
import sys
from apex_quant.errors import ApexError
from apex_quant.text import load
for spec in sys.argv[1:]:
    try:
        print([(document.text, document.source) for document in load([spec])])
    except ApexError as error:
        print(type(error).__name__, error.message)
"""


def test_the_library_against_a_server(server: str, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    env = {**os.environ, "HF_ENDPOINT": server, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "*"}

    def loaded(*specs: str, **more: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", LOAD, *specs],
            env=env | more,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.splitlines()

    english, spanish, both, missing = loaded("hub:user/data:en", "hub:user/data:es", "hub:user/data", "hub:user/none")
    source = f"hub:user/data@{COMMIT[:8]}/"
    assert english == str([("one", f"{source}en/train.jsonl:1"), ("two", f"{source}en/train.jsonl:2")])
    assert spanish == str([("uno", f"{source}es/train.txt")])
    assert both.startswith("UsageError hub:user/data: has several configurations. Known: en, es")
    assert missing.startswith("InputError hub:user/none:")
    (offline,) = loaded("hub:user/data:en", HF_HUB_OFFLINE="1")
    assert offline.startswith("ResourceError hub:user/data:en: cannot be loaded: OfflineModeIsEnabled")
    (closed,) = loaded("hub:user/data:en", HF_ENDPOINT="http://127.0.0.1:9")
    assert closed.startswith("ResourceError hub:user/data:en: cannot be loaded")
