"""Random models, written once for all tests of the room."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.random_models import Models, write_random_gguf


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """architecture -> path of its small random model."""
    folder = tmp_path_factory.mktemp("models")

    def path(architecture: str) -> Path:
        found = folder / f"{architecture}.gguf"
        return found if found.exists() else write_random_gguf(found, architecture)

    return path
