"""Short labels for files: what tells them apart, and no two alike."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Final

LONGEST: Final = 28
_SEPARATORS = re.compile(r"(?<=[-_ ])")  # where names may be cut; the separator stays with what is before it
_QUANT = re.compile(r"(?:^|[-_. ])((?:UD-)?(?:I?Q\d\w*|TQ\d_\d|BF16|F16|F32|FP16|MXFP4\w*|NVFP4))$", re.I | re.ASCII)
_OURS = re.compile(r"(?:^|[-_. ])APEX-([\w-]+)$", re.I | re.ASCII)
_SHARD = re.compile(r"-\d{5}-of-\d{5}$", re.ASCII)


def short_labels(names: Sequence[str], hints: Sequence[str] = ()) -> list[str]:
    """One label for each name, unique, of at most LONGEST characters.

    What all names begin with is left away, and "APEX-" where that leaves no two alike. `hints`, one for each name
    (a file, a folder), tell equal ones apart; numbers do when those are equal too.
    """
    if not names:
        return []
    names, hints = [printable(name) for name in names], [printable(hint) for hint in hints]
    stems = [_SHARD.sub("", name.rpartition("/")[2].removesuffix(".gguf")) or name for name in names]
    labels = [_alone(stem) for stem in stems] if len(set(stems)) == 1 else _without_prefix(stems)
    bare = [found[1] if (found := _OURS.search(label)) else label for label in labels]
    if len(set(bare)) == len(set(labels)):
        labels = bare
    counts = Counter(labels)
    if hints:
        labels = [
            f"{label} ({hint})" if counts[label] > 1 and hint else label
            for label, hint in zip(labels, hints, strict=True)
        ]
    return _unique([_cut(label) for label in labels])


def printable(text: str) -> str:
    """The text in one line, without what cannot be printed (control characters, halves of surrogate pairs)."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def _alone(stem: str) -> str:
    """Of a name with nothing to compare it with: what names say of the quantization, else all of it."""
    found = _OURS.search(stem) or _QUANT.search(stem)
    return found[1] if found else stem


def _without_prefix(stems: list[str]) -> list[str]:
    parts = [_SEPARATORS.split(stem) for stem in stems]
    shared = 0
    while all(len(part) > shared + 1 for part in parts) and len({part[shared] for part in parts}) == 1:
        shared += 1
        if parts[0][shared - 1] == "APEX-":
            break  # what follows is a tier's name, whole: I-Quality and I-Compact
    rests = ["".join(part[shared:]) for part in parts]
    # a model's own name among its quantizations ("MODEL" and "MODEL-Q4_K_M") keeps only what follows it
    whole = min(stems, key=len)
    if not shared or any(stem == whole for stem in stems):
        cut = [stem[len(whole) :].lstrip("-_ ") if stem.startswith(whole) and stem != whole else "" for stem in stems]
        if sum(map(bool, cut)) == sum(stem != whole for stem in stems):
            return [rest or _alone(stem) for rest, stem in zip(cut, stems, strict=True)]
    return rests


def _cut(label: str) -> str:
    if len(label) <= LONGEST:
        return label
    half = (LONGEST - 1) // 2
    return f"{label[:half]}…{label[-(LONGEST - 1 - half) :]}"


def _unique(labels: list[str]) -> list[str]:
    counts, taken, made = Counter(labels), set(labels), []
    seen: Counter[str] = Counter()
    for label in labels:
        if counts[label] > 1:
            while True:
                seen[label] += 1
                numbered = f"{label[: LONGEST - 5]} #{seen[label]}"
                if numbered not in taken:
                    break
            taken.add(numbered)
            label = numbered
        made.append(label)
    return made
