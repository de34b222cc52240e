"""What a run is to make, and what decides it."""

from __future__ import annotations

from typing import Any

import pytest

from apex_quant.errors import UsageError
from apex_quant.pipeline.config import make_config
from apex_quant.pipeline.wanted import Wanted, ceilings, wanted


def outputs(**given: Any) -> dict[str, Wanted]:
    return {one.name: one for one in wanted(make_config({"source": "a/b", **given}))}


def limits(given: dict[str, float], **more: Any) -> dict[str, float]:
    config = make_config({"source": "a/b", "verify": {"kld_ceiling": given}, **more})
    return ceilings(config, wanted(config))


def test_filling_a_matrix_decides_only_what_is_encoded_with_one() -> None:
    asked: dict[str, Any] = {"tiers": ["quality", "i-quality", "Q8_0"], "sizes": ["1GB"]}
    before, after = outputs(**asked), outputs(**asked, quantize={"fill": "none"})
    assert [name for name in before if before[name] != after[name]] == ["i-quality", "1GB"]


def test_ceilings_by_any_spelling() -> None:
    asked: dict[str, Any] = {"tiers": ["I-Quality", "q4_k_m"], "sizes": ["12000000000"]}
    assert limits({"i-quality": 0.1, "Q4_K_M": 0.2, "12GB": 0.3}, **asked) == {
        "i-quality": 0.1, "Q4_K_M": 0.2, "12GB": 0.3,
    }  # fmt: skip
    assert limits({"I-QUALITY": 0.1, "q4_k_m": 0.2, "12g": 0.3}, **asked) == {
        "i-quality": 0.1, "Q4_K_M": 0.2, "12GB": 0.3,
    }  # fmt: skip
    assert limits({"mini": 2.0}, **asked) == {"mini": 2.0}


def test_a_ceiling_for_nothing() -> None:
    with pytest.raises(UsageError, match=r"no tier or size is called 'i-compct'\. Did you mean i-compact\?"):
        limits({"i-compct": 0.1})
    with pytest.raises(UsageError, match=r"i-compact has two ceilings, 0\.1 and 0\.2"):
        limits({"i-compact": 0.1, "I-Compact": 0.2})
