"""huggingface_hub in this process, pointed at a local server; nobody sleeps; a folder with a finished model."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from apex_quant import quantize
from tests.helpers.imatrix import random_imatrix
from tests.helpers.random_models import write_random_gguf
from tests.hub.mock import TOKEN, MockHub, serving

RESULTS = '{"schema": "apex.results/1", "per_token": {"path": "tiny.npz", "sha256": "0"}}'


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the library and we would have slept."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[MockHub]:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    home = tmp_path_factory.mktemp("home")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "*")
    with serving() as made:
        changes = {
            "ENDPOINT": made.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": made.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
            "HF_HUB_DISABLE_XET": True,  # a protocol of its own, native, that this server does not speak
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HUB_DISABLE_PROGRESS_BARS": True,
            "HF_HUB_OFFLINE": False,
            "DOWNLOAD_CHUNK_SIZE": 10_000,  # what it goes on from after a dropped connection
        }
        for name, value in changes.items():
            monkeypatch.setattr(constants, name, value, raising=False)
        yield made
        huggingface_hub.close_session()


@pytest.fixture
def token(hub: MockHub) -> str:
    return store_token(TOKEN)


def store_token(text: str) -> str:
    """Where `hf auth login` stores it."""
    from huggingface_hub import constants

    Path(constants.HF_TOKEN_PATH).write_text(text)
    return text


@pytest.fixture(scope="package")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the pipeline leaves it; copy it before changing it."""
    folder = tmp_path_factory.mktemp("made")
    source = write_random_gguf(tmp_path_factory.mktemp("source") / "tiny-BF16.gguf", "qwen3moe", layers="MM")
    quantize(source, "compact", out=folder / "tiny-compact.gguf", threads=2)
    random_imatrix(source).write(folder / "tiny.imatrix.gguf")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# tiny\n")
    (folder / "recipes").mkdir()
    (folder / "recipes" / "compact.txt").write_text("blk.0=Q4_K\n")
    (folder / "tiny-compact.json").write_text(RESULTS)
    (folder / "tiny.npz").write_bytes(b"PK archive")
    (folder / "report").mkdir()
    (folder / "report" / "index.html").write_text("<p>report</p>")
    (folder / "state.json").write_text('{"schema": "apex.state/1"}')
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))
