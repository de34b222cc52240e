"""`publish`: a folder's files to a repository of the Hugging Face hub, all of them in one commit.

Large files go first, one by one; they are not seen before the commit, and a later run finds them there. The commit
names the state that was compared: when somebody else wrote in between, everything is compared again.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from apex_quant.errors import InputError, ResourceError, UsageError
from apex_quant.hub import HUB_ID, HubFile, HubProgress, Repository, find_repository, matches, sha256_of
from apex_quant.hub_access import TRIES, explained, first_line, has_token, library, page, pause, reason, rest, retried
from apex_quant.publishable import SUMS, Kind, LocalFile, Model, publishable, results_of

if TYPE_CHECKING:
    from apex_quant.encode.job import JobProgress

State = Literal["new", "equal", "differs"]
_MESSAGE: Final = "Upload with apex-quant"
_MOST_BLOB: Final = 64 << 20  # larger files are never plain git blobs on the hub
_MOST_TEXT: Final = 32 << 20
_TEXTS: Final = (".md", ".json", ".html", ".txt", ".csv")


@dataclass(frozen=True)
class PublishedFile:
    """A file and how it stands against the repository before the upload."""

    path: str
    kind: Kind
    bytes: int
    sha256: str
    state: State
    uploaded: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "kind": self.kind,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "state": self.state,
            "uploaded": self.uploaded,
        }


@dataclass(frozen=True)
class Published:
    """What was uploaded, or would be. `commit` is the repository's, None when there is no repository yet."""

    repo: str
    url: str
    commit: str | None
    created: bool
    private: bool
    dry_run: bool
    files: tuple[PublishedFile, ...]
    left_out: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def upload_bytes(self) -> int:
        return sum(file.bytes for file in self.files if file.state != "equal")

    def to_json(self) -> dict[str, Any]:
        return {
            "repo": self.repo,
            "url": self.url,
            "commit": self.commit,
            "created": self.created,
            "private": self.private,
            "dry_run": self.dry_run,
            "upload_bytes": self.upload_bytes,
            "files": [file.to_json() for file in self.files],
            "left_out": list(self.left_out),
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True)
class _Content:
    """A file with its hash; `data` instead of `file` for the checksums, which are made here."""

    path: str
    kind: Kind
    size: int
    sha256: str
    file: LocalFile | None
    data: bytes = b""

    def opened(self) -> io.BufferedIOBase:
        return io.BytesIO(self.data) if self.file is None else self.file.file.open("rb")


def publish(
    directory: str | Path,
    repo: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    replace: bool = False,
    progress: Callable[[HubProgress], None] | None = None,
    plan: Callable[[Published], None] | None = None,
    sleep: Callable[[float], None] = rest,
) -> Published:
    """Upload a folder's models, importance matrices, recipes, results, report and card to `repo` (ORG/NAME).

    `dry_run` compares and verifies, and uploads nothing. A file that the repository has with other content is an error
    unless `replace`; equal ones are not uploaded again. `plan` is called with what will happen before anything does.
    Passing failures (429, 5xx, dropped connections) are tried again TRIES times after `sleep`; after an interruption
    the same call goes on. Nothing in the repository is ever deleted.

    Raises UsageError for a bad name, files that differ, a public repository although `private`; InputError for models
    that are quarantined, unfinished or broken, or a gated repository; ResourceError without network or token.
    """
    if not HUB_ID.fullmatch(repo):
        raise UsageError(f"{repo!r} is not of the form ORG/NAME")
    tell = progress or (lambda _: None)
    found = publishable(directory)
    if not dry_run and not has_token():
        raise ResourceError(
            f"{repo}: uploading needs a token, and none is stored",
            hint="hf auth login with a token that may write; huggingface_hub keeps it",
        )

    def say(note: str) -> None:
        tell(HubProgress("upload", repo, 0, 0, note))

    with explained(repo, verb="looked up", hint="is there a network?"):
        there = retried(lambda: find_repository(repo), sleep=sleep, say=say)
    if there is not None and private and not there.private:
        raise UsageError(
            f"{repo} exists and is public, and --private was asked for",
            hint="make it private on its page of the hub, or choose another name",
        )
    contents = _hashed(Path(directory), found.files, there, tell)
    _refuse_other_results(contents)
    result = Published(
        repo=repo,
        url=page(repo),
        commit=there.commit if there else None,
        created=there is None,
        private=there.private if there else private,
        dry_run=dry_run,
        files=_compared(contents, there),
        left_out=found.left_out,
        warnings=_local_paths(Path(directory), found.files),
    )
    if plan is not None:
        plan(result)
    if not dry_run:
        _refuse_differing(result.files, repo, replace)
    _verify([m for m in found.models if not _all_equal(m, result.files)], tell)
    if dry_run:
        return result
    _check_card(repo, [c for c, file in zip(contents, result.files, strict=True) if file.state != "equal"], say, sleep)
    commit = _upload(repo, contents, private, replace, tell, say, sleep)
    done = tuple(changed(file, uploaded=file.state != "equal") for file in result.files)
    return changed(result, commit=commit, files=done)


# --- what is here and what is there ---


def _hashed(
    root: Path, files: Sequence[LocalFile], there: Repository | None, tell: Callable[[HubProgress], None]
) -> list[_Content]:
    """Every file with its sha256, and the list of them. InputError when a SHA256SUMS here says otherwise."""
    total, done = sum(file.bytes for file in files), 0
    contents = []
    for file in files:
        tell(HubProgress("hash", file.path, done, total))
        contents.append(_Content(file.path, file.kind, file.bytes, sha256_of(file.file), file))
        _unchanged(file)
        done += file.bytes
    _check_sums(root / SUMS, contents)
    lines = {one.path: one.sha256 for one in contents}
    # models that an earlier upload brought stay listed
    mine = set(lines)
    lines |= {f.path: f.sha256 for f in (there.files if there else ()) if f.sha256 and f.path not in mine}
    data = "".join(f"{lines[path]}  {path}\n" for path in sorted(lines)).encode()
    return [*contents, _Content(SUMS, "sums", len(data), hashlib.sha256(data).hexdigest(), None, data)]


def _check_sums(path: Path, contents: Sequence[_Content]) -> None:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError):
        raise InputError(f"{path} cannot be read", hint="delete it: publish makes a new one") from None
    stated = {name.lstrip("*"): digest for digest, _, name in (line.partition(" ") for line in lines)}
    stated = {name.strip().lstrip("*"): digest for name, digest in stated.items()}
    wrong = [one.path for one in contents if stated.get(one.path, one.sha256) != one.sha256]
    if wrong:
        raise InputError(
            f"{', '.join(wrong[:5])}: not the sha256 that {path} states",
            hint=f"the file or the list is damaged or old; delete {SUMS} when the files are right",
        )


def _refuse_other_results(contents: Sequence[_Content]) -> None:
    """InputError for results that were measured on other bytes than those of the model that bears their name."""
    models = {Path(one.path).name: one.sha256 for one in contents if one.kind == "model"}
    problems = []
    for one in contents:
        # baselines are other people's files, of whatever name
        if one.kind != "results" or one.file is None or "baselines" in Path(one.path).parts:
            continue
        model = (results_of(one.file) or {}).get("model")
        measured = model.get("sha256") if isinstance(model, dict) else None
        name = f"{Path(one.path).stem}.gguf"
        if measured is not None and models.get(name, measured) != measured:
            problems.append(f"{one.path}: measured another {name} than the one that is here")
    if problems:
        raise InputError("; ".join(problems[:5]), hint="measure it again, or move the results out of the folder")


def _unchanged(file: LocalFile) -> None:
    status = file.file.stat()
    if (status.st_size, status.st_mtime_ns) != (file.bytes, file.mtime_ns):
        raise InputError(f"{file.file} was changed while it was published", hint="wait until it is finished")


def _compared(contents: Sequence[_Content], there: Repository | None) -> tuple[PublishedFile, ...]:
    known = {file.path: file for file in there.files} if there else {}
    return tuple(PublishedFile(c.path, c.kind, c.size, c.sha256, _state(c, known.get(c.path))) for c in contents)


def _state(content: _Content, there: HubFile | None) -> State:
    """By size first, then by the hash that the hub has."""
    if there is None:
        return "new"
    if there.size != content.size or (there.sha256 is None and content.size > _MOST_BLOB):
        return "differs"
    return "equal" if matches(there, content.size, content.opened, content.sha256) else "differs"


def _refuse_differing(files: Sequence[PublishedFile], repo: str, replace: bool) -> None:
    names = [file.path for file in files if file.state == "differs"]
    if names and not replace:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise UsageError(
            f"{repo} has other content under {', '.join(names[:5])}{more}",
            hint="--replace overwrites them (the hub keeps the old commit); --dry-run shows all",
        )


def _all_equal(model: Model, files: Sequence[PublishedFile]) -> bool:
    return all(file.state == "equal" for file in files if file.path in model.paths)


def _verify(models: Sequence[Model], tell: Callable[[HubProgress], None]) -> None:
    """What `apex verify` checks without a source, for each model that will leave. InputError naming what failed."""
    from apex_quant.encode.verify import verify

    for model in models:
        name = model.paths[0]

        def on_progress(event: JobProgress, name: str = name) -> None:
            tell(HubProgress("verify", name, int(event.work), int(event.total)))

        checked = verify(model.first, progress=on_progress)
        failed = [f"{check.name} ({check.detail})" for check in checked.checks if check.ok is False]
        if failed:
            raise InputError(f"{name}: not published: {', '.join(failed)}", hint="make it again with apex quantize")


def _check_card(
    repo: str, waiting: Sequence[_Content], say: Callable[[str], None], sleep: Callable[[float], None]
) -> None:
    """The hub's own check of the card's front matter, before hours of upload and not after. InputError."""
    for card in waiting:
        if card.path == "README.md" and card.file is not None:
            hint = "correct its front matter, between the --- lines"
            try:
                parsed = library(repo).RepoCard(card.file.file.read_text(encoding="utf-8"))
            except Exception as error:  # of the YAML parser, or not UTF-8
                raise InputError(f"README.md: {first_line(error)}", hint=hint) from None
            with explained(repo, verb="checked"):
                try:
                    retried(partial(parsed.validate, "model"), sleep=sleep, say=say)
                except ValueError as error:
                    raise InputError(f"README.md: {first_line(error)}", hint=hint) from None


def _local_paths(root: Path, files: Sequence[LocalFile]) -> tuple[str, ...]:
    """Texts that name folders of this machine: nobody else needs to read those."""
    places = {str(place).encode() for place in (root.resolve(), Path.home()) if len(place.parts) > 2}
    return tuple(
        f"{file.path} names a folder of this machine"
        for file in files
        if file.path.lower().endswith(_TEXTS)
        and file.bytes <= _MOST_TEXT
        and any(place in file.file.read_bytes() for place in places)
    )


# --- the upload ---


def _upload(
    repo: str,
    contents: Sequence[_Content],
    private: bool,
    replace: bool,
    tell: Callable[[HubProgress], None],
    say: Callable[[str], None],
    sleep: Callable[[float], None],
) -> str:
    """Bring the repository to hold `contents`; its commit. Each turn begins with what is there now."""
    api = library(repo).HfApi()
    operations: dict[str, Any] = {}
    hint = "is there a network? what was uploaded is kept: the same command goes on"
    turn, committed = 0, False
    while True:
        with explained(repo, verb="uploaded", hint=hint):
            there = retried(lambda: find_repository(repo), sleep=sleep, say=say)
            if there is None:
                retried(lambda: api.create_repo(repo, private=private, exist_ok=True), sleep=sleep, say=say)
                there = retried(lambda: find_repository(repo), sleep=sleep, say=say)
        states = _compared(contents, there)
        waiting = [c for c, file in zip(contents, states, strict=True) if file.state != "equal"]
        if there is not None and not waiting:
            return there.commit
        if committed:
            raise ResourceError(
                f"{repo}: was committed, but still lacks {', '.join(content.path for content in waiting[:5])}",
                hint="does a .gitignore there exclude them?",
            )
        # what another program brought meanwhile is not overwritten either
        _refuse_differing(states, repo, replace)
        with explained(repo, verb="uploaded", hint=hint):
            _send_large(api, repo, waiting, operations, tell, say, sleep)
            tell(HubProgress("commit", repo, 0, 0))
            try:
                api.create_commit(
                    repo,
                    [operations[content.path] for content in waiting],
                    commit_message=_MESSAGE,
                    parent_commit=there.commit if there else None,
                )
            except Exception as error:
                wait = _pause_commit(error, turn)
                if wait is None:
                    raise
                say(f"commit: {reason(error)}; again in {wait:.0f} s")
                sleep(wait)
                turn += 1
            else:
                committed = True


def _pause_commit(error: Exception, turn: int) -> float | None:
    """As `pause`; and somebody else's commit in between (412) is a reason to compare again."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (409, 412) and turn + 1 < TRIES:
        return 0.0
    return pause(error, turn)


def _send_large(
    api: Any,
    repo: str,
    waiting: Sequence[_Content],
    operations: dict[str, Any],
    tell: Callable[[HubProgress], None],
    say: Callable[[str], None],
    sleep: Callable[[float], None],
) -> None:
    """The content of large files, one after the other. The hub decides which are; it skips what it has."""
    total, done = sum(content.size for content in waiting), 0
    for content in waiting:
        tell(HubProgress("upload", content.path, done, total))
        if content.path not in operations:
            if content.file is not None:
                _unchanged(content.file)
            operation = library(repo).CommitOperationAdd(
                content.path, str(content.file.file) if content.file is not None else content.data
            )
            operation.upload_info.sha256 = bytes.fromhex(content.sha256)  # not read a second time for it
            retried(partial(api.preupload_lfs_files, repo, [operation], num_threads=1), sleep=sleep, say=say)
            operations[content.path] = operation
        done += content.size
    tell(HubProgress("upload", waiting[-1].path, total, total))
