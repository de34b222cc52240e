"""The command line in this process: quick, with what it printed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from apex_quant.cli import main
from tests.helpers.cli import Ran
from tests.helpers.imatrix import random_imatrix
from tests.helpers.random_models import write_random_gguf

Call = Callable[..., Ran]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """call('plan', path, ...) -> status, out, err."""

    def run(*words: object) -> Ran:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(word) for word in words])
        captured = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return Ran(caught.value.code, captured.out, captured.err)

    return run


@pytest.fixture(scope="package")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_gguf(tmp_path_factory.mktemp("cli") / "tiny-BF16.gguf", "qwen3moe", layers="MM")


@pytest.fixture(scope="package")
def matrix(model: Path) -> Path:
    path = model.with_name("tiny.imatrix")
    random_imatrix(model).write(path)
    return path
