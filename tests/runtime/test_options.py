"""Session options: defaults are llama-imatrix's batching, unknown keys and broken patterns are refused."""

from __future__ import annotations

import re

import pytest
from pydantic import ValidationError

from apex_quant import SessionOptions
from apex_quant.runtime.options import EXPERTS


def test_defaults_are_stock_batching() -> None:
    options = SessionOptions()
    assert (options.ctx, options.sequences, options.ubatch, options.batch) == (512, 4, 512, 2048)


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(ValidationError, match="Extra inputs"):
        SessionOptions.model_validate({"use_mmap": True})


@pytest.mark.parametrize("wrong", ["exps", "=CPU", "exps=", "(=CPU"])
def test_wrong_buffer_overrides(wrong: str) -> None:
    with pytest.raises(ValidationError, match="tensor_buffers"):
        SessionOptions(tensor_buffers=(wrong,))


def test_cpu_experts_come_after_what_was_asked() -> None:
    options = SessionOptions(cpu_experts=True, tensor_buffers=(r"blk\.0\.=CUDA0",))
    assert options.buffer_overrides() == [(r"blk\.0\.", "CUDA0"), (EXPERTS, "CPU")]


@pytest.mark.parametrize(
    ("name", "routed"),
    [
        ("blk.3.ffn_up_exps.weight", True),
        ("blk.3.ffn_gate_up_exps.weight", True),
        ("blk.3.ffn_down_chexps.weight", True),
        ("blk.3.ffn_up_shexp.weight", False),
        ("blk.3.ffn_up.weight", False),
    ],
)
def test_pattern_of_routed_experts(name: str, routed: bool) -> None:
    assert bool(re.search(EXPERTS, name)) == routed
