"""What every step has at hand: the configuration, the folder's layout, the state, and how it tells of its progress.

WORK/source/      the full-precision GGUF, made by `convert`; deleted when no phase needs it (unless kept)
WORK/reference/   what it predicts: NAME.apexref, and greedy.json of the smoke check
WORK/release/     what is published: quantized files, NAME.imatrix.gguf, recipes/, results/, report/, README.md
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from apex_quant.errors import UsageError
from apex_quant.native import Local, Workers
from apex_quant.pipeline.config import RunConfig
from apex_quant.pipeline.phases import PENDING, Item
from apex_quant.pipeline.state import Record, State, digest_of

FOLDERS: Final = ("source", "reference", "release", "release/recipes", "release/results")
_COMMITS: Final = "commits"
"""Of the state: the commit at which each repository was taken, by REPO@REVISION, of other phases than source with
their name before it."""
_WORTH_SAYING: Final = 2 << 30  # bytes to hash


@dataclass(frozen=True)
class PhaseEvent:
    """A line of the run. `kind`: run, skip, done, note. `eta`: estimated seconds with the ends of their range, of a
    phase that starts; `seconds`: what one that is done took."""

    kind: str
    phase: str
    text: str
    eta: tuple[float, float, float] | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Artifact:
    """Files that a phase made, and one digest of their content (PENDING... when they are not made yet)."""

    paths: tuple[Path, ...]
    digest: str

    @property
    def path(self) -> Path:
        return self.paths[0]


@dataclass
class Context:
    """One run. `pending`: (phase, item) that will have run before what is looked at now runs. `forced`: phases that
    begin anew. `cluster`: machines that share the work, None where this one does it alone."""

    config: RunConfig
    work: Path
    state: State
    tell: Callable[[Any], None] = lambda event: None
    yes: bool = False
    pending: set[tuple[str, str]] = field(default_factory=set)
    cluster: Workers | None = None
    forced: Collection[str] = ()

    @property
    def release(self) -> Path:
        return self.work / "release"

    @property
    def name(self) -> str:
        return self.config.model_name

    @property
    def workers(self) -> Workers:
        """Who does independent jobs."""
        return self.cluster or Local()

    @property
    def is_gguf(self) -> bool:
        """Whether the source is a GGUF and nothing is to be converted."""
        return self.config.is_gguf

    def note(self, phase: str, text: str) -> None:
        self.tell(PhaseEvent("note", phase, text))

    def pinned(self, repo: str, revision: str | None, phase: str = "source") -> str | None:
        """The commit at which a phase took a repository before; `revision` where there is none, or to look again."""
        known: dict[str, str] = self.state.about.get(_COMMITS, {})
        return revision if phase in self.forced else known.get(_pin(repo, revision, phase), revision)

    def pin(self, repo: str, revision: str | None, commit: str, phase: str = "source") -> None:
        """Remember it: what a later run downloads, when the cache was emptied, is the same."""
        self.state.about.setdefault(_COMMITS, {})[_pin(repo, revision, phase)] = commit

    def announce_hashing(self, phase: str, paths: Sequence[Path]) -> None:
        """A line before minutes of silence."""
        if (size := self.state.unread(paths)) >= _WORTH_SAYING:
            self.note(phase, f"reading {size / 1e9:.0f} GB once, for their sha256")

    def noted(self, phase: str, item: Item) -> dict[str, Any]:
        """What an earlier run, which ended before the item was recorded, knew of its files."""
        begun = self.state.started.get(phase, {}).get(item.name)
        return dict(begun.facts) if begun is not None else {}

    def keep_note(self, phase: str, item: Item, facts: Mapping[str, Any]) -> None:
        """Keep what is known of files that are whole, before the minutes in which they are hashed."""
        self.state.started[phase][item.name].facts = dict(facts)
        self.state.save()

    def record(self, phase: str, item: str = "") -> Record | None:
        return self.state.record(phase, item)

    def facts(self, phase: str, item: str = "") -> dict[str, Any]:
        """What a finished item is known by; {} while there is none."""
        found = self.record(phase, item)
        return found.facts if found is not None else {}

    def artifact(self, phase: str, label: str, item: str = "") -> Artifact:
        """What an item of an earlier phase made. Raises UsageError when that has never run and will not now."""
        record = self.record(phase, item)
        files = record.outputs.get(label, []) if record is not None else []
        paths = tuple(self.state.where(file) for file in files)
        if (phase, item) in self.pending:
            return Artifact(paths, f"{PENDING}{phase}")
        if record is None:
            named = f"{phase} ({item})" if item else phase
            raise UsageError(
                f"phase {named} has not run in {self.work}, and is left out of this run",
                hint=f"--from {phase} runs it and what follows",
            )
        return Artifact(paths, digest_of(file.sha256 for file in files) if files else "")

    def model(self) -> Artifact:
        """The full-precision GGUF: the user's, or the converted one."""
        return self.artifact("source", "files") if self.is_gguf else self.artifact("convert", "model")

    def files(self, names: Sequence[str]) -> dict[str, str]:
        """Digests of the user's own files by name, folders file by file; names that are no files give none. Equal names
        of other folders are numbered: where a file lies decides nothing."""
        found: dict[str, str] = {}
        for path in map(Path, names):
            label, number = path.absolute().name, 1
            while label in found:
                number += 1
                label = f"{path.absolute().name} {number}"
            if path.is_file():
                found[label] = self.state.sha256(path)
            elif path.is_dir():
                inside = sorted(one for one in path.rglob("*") if one.is_file() and not one.name.startswith("."))
                digests = [f"{one.relative_to(path)} {self.state.sha256(one)}" for one in inside]
                found[label] = digest_of(digests) if len(digests) != 1 else digest_of([*digests, ""])
        return found


def _pin(repo: str, revision: str | None, phase: str) -> str:
    return f"{'' if phase == 'source' else f'{phase} '}{repo}@{revision or ''}"
