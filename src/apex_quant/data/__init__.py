"""Data that ships in the package: the embedded reference model."""

from __future__ import annotations

from pathlib import Path


def embedded_model() -> Path:
    """The small trained hybrid MoE (BF16 GGUF) that quickstart and the tests run on."""
    return Path(__file__).with_name("apex-tiny-moe.gguf")
