"""SIGKILL at ten random moments: the run that comes after each goes on, and ends with the same files.

From a GGUF; test_checkpoint_run.py does it from a checkpoint, with report and publishing.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.helpers.cli import PACKAGE_ROOT
from tests.pipeline.conftest import ran, small_run
from tests.pipeline.kills import killed_ten_times, numbers
from tests.pipeline.test_run import contents

SCRIPT = """
import sys
from pathlib import Path
from tests.pipeline.conftest import small_run
small_run(Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_ten_kills(finished: Path, tmp_path: Path) -> None:
    for name in ("Small-BF16.gguf", "corpus.txt"):
        shutil.copy2(finished / name, tmp_path / name)
    work = tmp_path / "work"
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(PACKAGE_ROOT), str(Path(__file__).parents[2])]))

    def ended() -> None:
        assert contents(work) == contents(finished / "work")

    known = killed_ten_times([sys.executable, "-c", SCRIPT, str(tmp_path)], work, env, longest=5.0, ended=ended)
    made = small_run(tmp_path)
    assert not {(phase, item) for phase, items in ran(made).items() for item in items} & set(known)
    assert contents(work) == contents(finished / "work")
    assert numbers(work) == numbers(finished / "work")
    assert ran(small_run(tmp_path)) == {}
    leftovers = [path for path in work.rglob("*") if path.name.endswith((".partial", ".state", ".sums"))]
    assert leftovers == []
