"""Publishing to a local server that answers as the hub does: what goes, what is refused, what survives failures."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from apex_quant import publishable as rules
from apex_quant import quantize, split
from apex_quant.errors import InputError, ResourceError, UsageError
from apex_quant.hub import HubProgress
from apex_quant.hub_access import TRIES
from apex_quant.publish import Published, publish
from tests.helpers.random_models import write_random_gguf
from tests.hub.conftest import store_token
from tests.hub.mock import READ_ONLY, Fault, MockHub, Repo

REPO = "me/tiny-GGUF"
PATHS = [
    "README.md", "SHA256SUMS", "recipes/compact.txt", "report/index.html", "tiny-compact.gguf", "tiny-compact.json",
    "tiny.imatrix.gguf", "tiny.npz",
]  # fmt: skip

pytestmark = pytest.mark.usefixtures("waits")


def uploaded(hub: MockHub) -> dict[str, bytes]:
    files = dict(hub.repos[REPO].files)
    files.pop(".gitattributes", None)
    return files


def assert_all_there(hub: MockHub, folder: Path) -> None:
    there = uploaded(hub)
    assert sorted(there) == PATHS
    for path in PATHS:
        if path != "SHA256SUMS":
            assert there[path] == (folder / path).read_bytes()
    sums = {line[66:]: line[:64] for line in there["SHA256SUMS"].decode().splitlines()}
    assert sums == {p: hashlib.sha256(d).hexdigest() for p, d in there.items() if p != "SHA256SUMS"}


def states(done: Published) -> dict[str, str]:
    return {file.path: file.state for file in done.files}


# --- what goes ---


def test_a_new_repository(hub: MockHub, token: str, folder: Path) -> None:
    planned: list[Published] = []
    done = publish(folder, REPO, private=True, plan=planned.append)
    assert_all_there(hub, folder)
    assert hub.repos[REPO].private
    assert len(hub.repos[REPO].history) == 1  # one commit: nobody sees half of it
    assert done.commit == hub.repos[REPO].commit
    assert planned[0].created
    assert set(states(planned[0]).values()) == {"new"}
    assert all(file.uploaded for file in done.files)
    kinds = {file.path: file.kind for file in done.files}
    assert kinds["tiny.imatrix.gguf"] == "imatrix"
    assert kinds["tiny-compact.gguf"] == "model"
    assert sorted(done.left_out) == ["state.json", "tiny-compact.gguf.journal"]
    assert hub.count(r"PUT /lfs/\w+\?part=3") == 1  # the model went in parts
    assert hub.count("POST /complete/") == 1


def test_equal_files_are_skipped(hub: MockHub, token: str, folder: Path) -> None:
    first = publish(folder, REPO)
    hub.log.clear()
    again = publish(folder, REPO)
    assert set(states(again).values()) == {"equal"}
    assert again.commit == first.commit
    assert again.upload_bytes == 0
    assert not any(file.uploaded for file in again.files)
    assert hub.count("PUT|POST") == 0


def test_dry_run_uploads_nothing(hub: MockHub, folder: Path) -> None:
    done = publish(folder, REPO, dry_run=True)  # and needs no token
    assert set(states(done).values()) == {"new"}
    assert done.commit is None
    assert done.created
    assert hub.count("PUT|POST") == 0
    document = done.to_json()
    assert json.loads(json.dumps(document)) == document
    assert document["upload_bytes"] == sum(file["bytes"] for file in document["files"])


def test_a_differing_file_is_never_overwritten_unasked(hub: MockHub, token: str, folder: Path) -> None:
    model = (folder / "tiny-compact.gguf").read_bytes()
    theirs = model[:-1] + bytes([model[-1] ^ 1])  # as long, so only its hash tells
    hub.repos[REPO] = Repo(files={"tiny-compact.gguf": theirs, "README.md": b"# other", "notes.txt": b"keep me"})
    with pytest.raises(UsageError, match=r"other content under README\.md, tiny-compact\.gguf") as caught:
        publish(folder, REPO)
    assert "--replace" in str(caught.value.hint)
    assert hub.repos[REPO].files["tiny-compact.gguf"] == theirs
    assert hub.count("PUT|POST") == 0
    shown = states(publish(folder, REPO, dry_run=True))
    assert (shown["README.md"], shown["tiny-compact.gguf"], shown["tiny.npz"]) == ("differs", "differs", "new")
    publish(folder, REPO, replace=True)
    assert hub.repos[REPO].files.pop("notes.txt") == b"keep me"
    assert_all_there(hub, folder)
    assert hub.repos[REPO].history[0]["tiny-compact.gguf"] == theirs


def test_somebody_writes_in_between(hub: MockHub, token: str, folder: Path) -> None:
    """A harmless commit: ours comes on top. One that touches our file: refused, though the comparison was fine."""
    hub.repos[REPO] = Repo()
    hub.before_commit = [lambda repo: repo.files.update({"notes.txt": b"theirs"})]
    publish(folder, REPO)
    assert hub.repos[REPO].files.pop("notes.txt") == b"theirs"
    assert_all_there(hub, folder)
    hub.repos[REPO] = Repo()
    hub.before_commit = [lambda repo: repo.files.update({"README.md": b"theirs"})]
    with pytest.raises(UsageError, match=r"other content under README\.md"):
        publish(folder, REPO)
    assert hub.repos[REPO].files == {"README.md": b"theirs"}


def test_models_of_an_earlier_upload_stay_in_the_sums(hub: MockHub, token: str, folder: Path) -> None:
    hub.repos[REPO] = Repo(files={"old.gguf": b"old"})
    publish(folder, REPO)
    assert f"{hashlib.sha256(b'old').hexdigest()}  old.gguf\n" in uploaded(hub)["SHA256SUMS"].decode()


# --- what is refused ---


def refused(folder: Path, kind: type[Exception] = InputError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        publish(folder, REPO, **options)
    return f"{caught.value} | {getattr(caught.value, 'hint', '')}"


def test_unverified_models_are_refused(hub: MockHub, token: str, folder: Path) -> None:
    shutil.copy(folder / "tiny-compact.gguf", folder / "copy.gguf")  # the same data: proven
    publish(folder, REPO, dry_run=True)
    hub.log.clear()
    (folder / "tiny-compact.gguf.journal").unlink()
    message = refused(folder)
    assert "copy.gguf: no journal" in message
    assert "tiny-compact.gguf: no journal" in message
    assert hub.log == []  # nobody was asked


def test_another_models_journal_does_not_count(hub: MockHub, token: str, folder: Path, tmp_path: Path) -> None:
    source = write_random_gguf(tmp_path / "tiny-BF16.gguf", "qwen3moe", layers="MM")
    quantize(source, "quality", out=tmp_path / "tiny-quality.gguf", threads=2)
    shutil.copy(tmp_path / "tiny-quality.gguf", folder)
    message = refused(folder)
    assert message.startswith("tiny-quality.gguf: no journal")
    assert "tiny-compact.gguf" not in message


def test_unfinished_journals_do_not_count(hub: MockHub, token: str, folder: Path) -> None:
    journal = folder / "tiny-compact.gguf.journal"
    journal.write_bytes(b"\n".join(journal.read_bytes().splitlines()[:-1]) + b"\n")
    assert "no journal beside it says that apex finished it" in refused(folder)


def test_damaged_models_are_refused(hub: MockHub, token: str, folder: Path) -> None:
    model = folder / "tiny-compact.gguf"
    data = bytearray(model.read_bytes())
    data[-5000] ^= 0xFF
    model.write_bytes(data)
    assert "tiny-compact.gguf: not published: data hash" in refused(folder)
    assert "not published: data hash" in refused(folder, dry_run=True)
    assert hub.count("PUT|POST") == 0
    model.write_bytes(data + bytes(64))
    assert "its journal says" in refused(folder)


@pytest.mark.parametrize(
    "name",
    ["tiny-compact.gguf.quarantine.json", "tiny-compact.quarantine.json", "tiny-compact.gguf.evaluate.quarantine.json"],
)
def test_quarantined_models_are_refused(hub: MockHub, token: str, folder: Path, name: str) -> None:
    (folder / name).write_text('{"reason": "repeats itself"}')
    assert "tiny-compact.gguf: quarantined: repeats itself" in refused(folder)
    (folder / name).write_text("broken")
    assert f"quarantined: {name} says so" in refused(folder)
    assert hub.log == []


def test_results_of_other_bytes(hub: MockHub, token: str, folder: Path) -> None:
    """Encoded again since they were measured: the numbers are not this file's. A baseline may bear any name."""
    results = folder / "tiny-compact.json"
    digest = hashlib.sha256((folder / "tiny-compact.gguf").read_bytes()).hexdigest()
    document = {"schema": "apex.results/1", "model": {"path": "tiny-compact.gguf", "sha256": "0" * 64}}
    results.write_text(json.dumps(document))
    assert "tiny-compact.json: measured another tiny-compact.gguf" in refused(folder)
    (folder / "results/baselines/theirs").mkdir(parents=True)
    results.rename(folder / "results/baselines/theirs/tiny-compact.json")
    document["model"]["sha256"] = digest  # type: ignore[index]
    results.write_text(json.dumps(document))
    assert publish(folder, REPO).files


def test_the_folder_of_a_run(hub: MockHub, token: str, folder: Path) -> None:
    """Card and report would lie at the wrong place, and stay here unsaid."""
    work = folder.parent / "work"
    work.mkdir()
    folder.rename(work / "release")
    (work / "state.json").write_text("{}")
    assert f"what it publishes lies in {work / 'release'}" in refused(work, UsageError)
    assert publish(work / "release", REPO).files


def test_large_files_must_be_shards(hub: MockHub, token: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "MOST_BYTES", 1_000_000)
    message = refused(folder, UsageError)
    assert "tiny-compact.gguf has 0.0 GB, over" in message
    assert "apex split" in message
    assert "--split-max-size 47G" in message
    # as the hint says: the shards carry the data hash that the journal knows, and the whole stays here
    split(folder / "tiny-compact.gguf", folder / "tiny-compact", 400_000)
    done = publish(folder, REPO)
    models = [file.path for file in done.files if file.kind == "model"]
    assert models == [f"tiny-compact-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert "tiny-compact.gguf (its shards are published)" in done.left_out
    (folder / models[1]).unlink()
    with pytest.raises(InputError, match="00002-of-00003"):
        publish(folder, REPO)


def test_quarantined_shards_are_refused(hub: MockHub, token: str, folder: Path) -> None:
    split(folder / "tiny-compact.gguf", folder / "tiny-compact", 400_000)
    (folder / "tiny-compact.gguf").unlink()
    (folder / "tiny-compact.gguf.quarantine.json").write_text('{"reason": "NaN"}')
    assert "tiny-compact-00001-of-00003.gguf: quarantined: NaN" in refused(folder)


def test_sums_that_do_not_fit(hub: MockHub, token: str, folder: Path) -> None:
    digest = hashlib.sha256((folder / "README.md").read_bytes()).hexdigest()
    (folder / "SHA256SUMS").write_text(f"{digest}  README.md\n")
    publish(folder, REPO, dry_run=True)
    (folder / "README.md").write_text("changed")
    assert "README.md: not the sha256" in refused(folder)


def test_nothing_to_publish(hub: MockHub, token: str, tmp_path: Path) -> None:
    assert "nothing to publish" in refused(tmp_path, UsageError)
    assert "is not a folder" in refused(tmp_path / "none", UsageError)
    (tmp_path / "x.gguf").write_bytes(b"no GGUF")
    assert "x.gguf" in refused(tmp_path)


def test_private_was_asked_for(hub: MockHub, token: str, folder: Path) -> None:
    hub.repos[REPO] = Repo(private=False)
    assert "is public" in refused(folder, UsageError, private=True)


def test_texts_that_name_this_machine(hub: MockHub, folder: Path) -> None:
    (folder / "README.md").write_text(f"made in {folder.resolve()}")
    assert publish(folder, REPO, dry_run=True).warnings == ("README.md names a folder of this machine",)


def test_a_card_that_the_hub_does_not_take(hub: MockHub, token: str, folder: Path) -> None:
    hub.faults = [Fault("validate-yaml", status=400)]
    assert "README.md: " in refused(folder)
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    assert "README.md: " in refused(folder)
    assert hub.count("PUT|lfs|create|commit") == 0  # known before the first byte


# --- tokens ---


def test_without_a_token(hub: MockHub, folder: Path) -> None:
    message = refused(folder, ResourceError)
    assert "needs a token, and none is stored" in message
    assert "hf auth login" in message
    assert hub.log == []


def test_a_token_that_may_not_write(hub: MockHub, folder: Path) -> None:
    store_token(READ_ONLY)
    for repos in ({}, {REPO: Repo()}):
        hub.repos = repos
        message = refused(folder, ResourceError)
        assert "the hub refuses this token" in message
        assert "write permission" in message
        assert not hub.repos or hub.repos[REPO].files == {}


@pytest.mark.parametrize("name", ["a/b/c", "me/..", "a b", "", "nonsense"])
def test_bad_names(hub: MockHub, token: str, folder: Path, name: str) -> None:
    for dry_run in (True, False):
        with pytest.raises(UsageError):
            publish(folder, name, dry_run=dry_run)
    assert hub.log == []


# --- failures that pass, and those that do not ---

REQUESTS = [
    "POST /api/validate-yaml", "GET /api/models/", "POST /api/repos/create", "POST /api/models/.*/preupload",
    "POST .*/objects/batch",
    r"PUT /lfs/\w+\?part=2", r"PUT /lfs/\w+$", "POST /complete/", "POST /verify/", "POST /api/models/.*/commit/",
]  # fmt: skip


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize(
    "fault",
    [{"status": 500}, {"status": 503, "times": 8}, {"status": 429, "headers": {"Retry-After": "7"}},
     {"drop": "before"}, {"drop": "after"}],
    ids=["500", "503x8", "429", "dropped", "answer-lost"],
)  # fmt: skip
def test_passing_failures(
    hub: MockHub, token: str, folder: Path, waits: list[float], request_: str, fault: dict[str, Any]
) -> None:
    if fault.get("times") and re.search("GET|create|commit|validate", request_):
        fault = {**fault, "times": TRIES - 1}  # the library sends these once, and we as often as we say
    hub.faults = [Fault(request_, **fault)]
    told: list[HubProgress] = []
    publish(folder, REPO, progress=told.append)
    assert hub.faults[0].times == 0
    assert_all_there(hub, folder)
    assert len(hub.repos[REPO].history) == 1  # also when the answer to the commit was lost
    if fault.get("status") == 429:
        assert {7.0, 8.0} & set(waits)  # ours, or the library's, which adds a second


def test_a_commit_is_tried_again_as_the_hub_asks(hub: MockHub, token: str, folder: Path) -> None:
    hub.faults = [Fault("/commit/", status=429, headers={"Retry-After": "30"}), Fault("/commit/", status=502)]
    slept: list[float] = []
    told: list[HubProgress] = []
    publish(folder, REPO, sleep=slept.append, progress=told.append)
    assert slept == [30.0, 4.0]
    notes = [event.note for event in told if event.note]
    assert notes == ["commit: the hub answered 429; again in 30 s", "commit: the hub answered 502; again in 4 s"]


def test_retries_are_bounded(hub: MockHub, token: str, folder: Path) -> None:
    hub.faults = [Fault("/commit/", status=503, times=1000)]
    slept: list[float] = []
    message = refused(folder, ResourceError, sleep=slept.append)
    assert "the hub is in trouble" in message
    assert hub.count("/commit/") == TRIES
    assert slept == [2.0, 4.0, 8.0, 16.0, 32.0]
    assert hub.repos[REPO].history == []


def test_a_long_rest_is_not_waited_for(hub: MockHub, token: str, folder: Path) -> None:
    hub.faults = [Fault("/commit/", status=429, headers={"Retry-After": "86400"}, times=1000)]
    slept: list[float] = []
    message = refused(folder, ResourceError, sleep=slept.append)
    assert "asks for 86400 s of rest" in message
    assert slept == []


def test_an_interrupted_upload_goes_on(hub: MockHub, token: str, folder: Path) -> None:
    """Ended at the commit: the next run finds the large files there and sends none of their bytes again."""
    hub.faults = [Fault("/commit/", status=403)]
    refused(folder, ResourceError)
    assert hub.repos[REPO].history == []
    hub.log.clear()
    publish(folder, REPO)
    assert hub.count("PUT") == 0
    assert_all_there(hub, folder)


@pytest.mark.parametrize("at", range(1, 12))
def test_killed_anywhere(hub: MockHub, token: str, folder: Path, at: int) -> None:
    """Ctrl-C at the n-th event: the repository has nothing or everything, and the next run completes it."""
    seen = 0

    def stop(event: HubProgress) -> None:
        nonlocal seen
        seen += event.phase in ("upload", "commit")
        if seen == at:
            raise KeyboardInterrupt

    try:
        publish(folder, REPO, progress=stop)
    except KeyboardInterrupt:
        assert not hub.repos[REPO].history
    publish(folder, REPO)
    assert_all_there(hub, folder)
    assert len(hub.repos[REPO].history) == 1


def test_files_that_the_repository_ignores(hub: MockHub, token: str, folder: Path) -> None:
    hub.ignored = {"tiny.npz"}
    message = refused(folder, ResourceError)
    assert "still lacks tiny.npz" in message
    assert ".gitignore" in message


def test_no_network(hub: MockHub, token: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    message = refused(folder, ResourceError)
    assert "cannot be looked up" in message
    assert "network" in message
