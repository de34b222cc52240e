"""Random models of every architecture: small ones, and ones at real shapes whose data is a hole."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.random_models import Models, write_random_gguf


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """architecture -> path of its small random model."""
    folder = tmp_path_factory.mktemp("tiny")

    def path(architecture: str) -> Path:
        found = folder / f"{architecture}-BF16.gguf"
        return found if found.exists() else write_random_gguf(found, architecture)

    return path


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """architecture -> path of a sparse model at real shapes."""
    folder = tmp_path_factory.mktemp("real")

    def path(architecture: str) -> Path:
        found = folder / f"{architecture}-BF16.gguf"
        return found if found.exists() else write_random_gguf(found, architecture, sparse=True, scale="real")

    return path
