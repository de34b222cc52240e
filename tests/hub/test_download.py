"""Downloading from the local server: commits, hashes, patterns, baselines, and every way in which it fails."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from apex_quant.errors import InputError, ResourceError, UsageError
from apex_quant.hub import HubProgress, baseline_files, download, snapshot
from tests.hub.conftest import store_token
from tests.hub.mock import READ_ONLY, Fault, MockHub, Repo

REPO = "org/model"
FILES = {
    "config.json": b'{"model_type": "tiny"}',
    "model-00001-of-00002.safetensors": b"a" * 70_000,
    "model-00002-of-00002.safetensors": b"b" * 50_000,
    "extra/notes.txt": b"notes",
}

pytestmark = pytest.mark.usefixtures("waits")


@pytest.fixture
def repo(hub: MockHub) -> Repo:
    hub.repos[REPO] = Repo(files=dict(FILES))
    return hub.repos[REPO]


def failed(kind: type[Exception], spec: str = REPO, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        download(spec, **options)
    assert type(caught.value) is kind
    return f"{caught.value} | {getattr(caught.value, 'hint', '')}"


def test_a_whole_repository_at_its_commit(hub: MockHub, repo: Repo) -> None:
    told: list[HubProgress] = []
    came = snapshot(REPO, revision="v1", progress=told.append)
    assert came.commit == repo.commit == came.folder.name
    assert {str(p.relative_to(came.folder)): p.read_bytes() for p in came.folder.rglob("*") if p.is_file()} == FILES
    assert came.to_json()["revision"] == "v1"
    assert (told[-1].done, told[-1].total) == (sum(map(len, FILES.values())),) * 2
    assert all(came.commit in line for line in hub.log if "resolve" in line)  # never a branch, which moves
    hub.log.clear()
    assert download(REPO, revision=came.commit) == came.folder
    assert hub.count("resolve") == 0  # nothing twice


def test_patterns(hub: MockHub, repo: Repo) -> None:
    folder = download(REPO, patterns=["*.json", "notes.*"])
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == ["config.json", "notes.txt"]
    message = failed(InputError, patterns=["*.gguf"])
    assert "no file fits *.gguf" in message
    assert "it holds config.json" in message


@pytest.mark.parametrize(
    "fault", [{"status": 500}, {"status": 429, "headers": {"Retry-After": "3"}}, {"drop": "before"}, {"drop": "middle"}]
)
@pytest.mark.parametrize("request_", ["GET /api/models", "HEAD .*00001", "GET .*model-00001"])
def test_passing_failures(hub: MockHub, repo: Repo, request_: str, fault: dict[str, Any]) -> None:
    hub.faults = [Fault(request_, **fault)]
    came = snapshot(REPO)
    assert hub.faults[0].times == 0
    assert {file.path: (came.folder / file.path).read_bytes() for file in came.files} == FILES
    if fault.get("drop") == "middle" and request_.startswith("GET .*resolve"):
        assert hub.count("RANGE .*00001-of-00002.safetensors from 30000") == 1  # went on in the middle


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "config.json"])
def test_a_corrupted_download(hub: MockHub, repo: Repo, name: str) -> None:
    hub.corrupt[name] = 1
    told: list[HubProgress] = []
    came = snapshot(REPO, progress=told.append)
    assert (came.folder / name).read_bytes() == FILES[name]
    assert [event.note for event in told if event.note] == [
        f"{name} is not what the hub says it is; downloading it again"
    ]
    (came.folder / name).resolve().unlink()
    (came.folder / name).unlink()
    hub.corrupt[name] = 2
    assert "corrupted: its hash is not" in failed(InputError)
    assert not (came.folder / name).exists()  # nobody takes it for good later
    assert (download(REPO) / name).read_bytes() == FILES[name]


def test_a_file_that_was_changed_in_the_cache(hub: MockHub, repo: Repo) -> None:
    """Also a small one: a configuration that another program wrote to is not the repository's."""
    folder = download(REPO)
    (folder / "config.json").resolve().write_bytes(b"{}")
    assert (download(REPO) / "config.json").read_bytes() == FILES["config.json"]


def test_gated(hub: MockHub, repo: Repo) -> None:
    repo.gated = True
    message = failed(InputError)
    assert "gated" in message
    assert "accept its conditions" in message
    assert "there is none yet: hf auth login" in message
    store_token(READ_ONLY)
    message = failed(InputError)
    assert "gated" in message
    assert "there is none yet" not in message


def test_missing_and_private(hub: MockHub, repo: Repo) -> None:
    message = failed(InputError, "org/none")
    assert "org/none: 401" in message
    assert "hf auth login" in message
    repo.private = True
    assert "hf auth login" in failed(InputError)
    store_token(READ_ONLY)
    assert download(REPO).is_dir()
    assert "check the name" in failed(InputError, "org/none")
    assert "Revision Not Found" in failed(InputError, revision="v9") or "404" in failed(InputError, revision="v9")


@pytest.mark.parametrize("name", ["", "a/b/c", "../x", "a b"])
def test_bad_names(hub: MockHub, name: str) -> None:
    failed(UsageError, name)


def test_no_network(hub: MockHub, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    message = failed(ResourceError)
    assert "cannot be loaded: " in message
    assert "is there a network?" in message
    assert sum(waits) < 300


def test_the_network_ends_halfway(hub: MockHub, repo: Repo) -> None:
    hub.faults = [Fault("(GET|HEAD) .*model-00002", drop="before", times=10_000)]
    assert "is there a network?" in failed(ResourceError)
    hub.faults, hub.log[:] = [], []
    download(REPO)
    assert hub.count("GET .*model-00001") == 0  # what was whole is not fetched again
    assert hub.count("GET .*model-00002") == 1


def test_server_in_trouble(hub: MockHub, repo: Repo) -> None:
    hub.faults = [Fault("GET /api/models", status=503, times=10_000)]
    assert "the hub is in trouble" in failed(ResourceError)
    hub.faults = [Fault("GET /api/models", status=429, headers={"Retry-After": "100000"}, times=10_000)]
    assert "too many requests (429), the hub asks for 100000 s" in failed(ResourceError)


def test_disk_full(hub: MockHub, repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000))
    message = failed(ResourceError)
    assert "0.00 GB free" in message
    assert "HF_HUB_CACHE" in message
    assert hub.count("resolve") == 0
    monkeypatch.undo()


def test_disk_full_on_the_way(hub: MockHub, repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def full(*_: Any, **__: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub.HfApi, "hf_hub_download", full)
    assert "the disk is full" in failed(ResourceError)


# --- baselines ---


def gguf_repo(hub: MockHub) -> None:
    names = ["m-Q4_K_M.gguf", "m-Q8_0.gguf", "Q6/m-Q6_K-00001-of-00002.gguf", "Q6/m-Q6_K-00002-of-00002.gguf"]
    names += ["imatrix.gguf", "mmproj-F16.gguf", "README.md"]
    hub.repos["them/m-GGUF"] = Repo(files={name: name.encode() for name in names})


def test_baselines(hub: MockHub) -> None:
    gguf_repo(hub)
    (one,) = baseline_files("them/m-GGUF:*Q4_K_M*:them")
    assert (one.label, one.path.read_bytes()) == ("them", b"m-Q4_K_M.gguf")
    assert one.commit == hub.repos["them/m-GGUF"].commit
    (sharded,) = baseline_files("them/m-GGUF@main:*Q6_K*")
    assert (sharded.label, sharded.path.name) == ("them/m-GGUF", "m-Q6_K-00001-of-00002.gguf")
    assert [file.path for file in sharded.files] == [f"Q6/m-Q6_K-0000{i}-of-00002.gguf" for i in (1, 2)]
    assert all((sharded.path.parent / Path(file.path).name).exists() for file in sharded.files)
    everything = baseline_files("them/m-GGUF:*:them")
    assert [one.label for one in everything] == ["them m-Q6_K", "them m-Q4_K_M", "them m-Q8_0"]
    assert hub.count("resolve.*(imatrix|mmproj|README)") == 0


def test_baselines_that_are_none(hub: MockHub) -> None:
    gguf_repo(hub)
    with pytest.raises(UsageError, match="is not REPO:PATTERN:LABEL"):
        baseline_files("them/m-GGUF")
    with pytest.raises(InputError, match="fits IQ2") as caught:
        baseline_files("them/m-GGUF:IQ2*:x")
    assert "m-Q8_0.gguf" in str(caught.value.hint)
    with pytest.raises(InputError, match="1 of 2 shards"):
        baseline_files("them/m-GGUF:*00001-of*:x")
    with pytest.raises(InputError, match="them/none: 401"):
        baseline_files("them/none:*:x")
