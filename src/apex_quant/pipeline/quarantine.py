"""The notes beside a file that failed a check, one of each phase: `apex publish` refuses a model that has any
(publishable.py)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apex_quant.gguf import write_file
from apex_quant.publishable import QUARANTINE


def note_of(model: Path, phase: str) -> Path:
    """NAME.gguf.PHASE.quarantine.json; of shards beside the first."""
    return model.with_name(f"{model.name}.{phase}{QUARANTINE}")


def quarantine(model: Path, phase: str, problems: Sequence[str], facts: Any = None) -> Path:
    """Write the note, whole or not at all."""
    note = note_of(model, phase)
    document = {"file": model.name, "phase": phase, "reason": "; ".join(problems), "problems": list(problems)}
    return write_file(note, json.dumps({**document, "facts": facts}, indent=1, sort_keys=True) + "\n")
