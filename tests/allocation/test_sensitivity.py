"""sensitivity.json: what is written is read back, and what is wrong with a file is said."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apex_quant.allocation.sensitivity import SCHEMA, Sensitivities, load, parse
from apex_quant.errors import InputError


def document(**changed: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "schema": SCHEMA,
        "model": {"name": "m.gguf", "sha256": "0" * 64, "architecture": "llama"},
        "text": {"name": "probe", "tokens": 512, "chunks": 1, "scored": 447, "sha256": "1" * 64},
        "groups": [
            {
                "name": "a", "tensors": ["a", "b"], "role": "attention", "layer": 0,
                "probes": [{"type": "Q3_K", "kld": 0.01, "error": 0.001, "n": 4, "weighted_error": 0.02}],
            }
        ],
        "errors": {n: {"Q3_K": {"relative": 0.02, "weighted": 0.02}} for n in "ab"},
    }  # fmt: skip
    return {**made, **changed}


def test_round_trip(tmp_path: Path) -> None:
    made = Sensitivities.model_validate(document(future={"x": 1}))
    path = made.save(tmp_path / "s.json")
    again = load(path)
    assert again.to_json() == made.to_json()
    assert again.kinds == {"real": 1}
    assert again.to_json()["future"] == {"x": 1}


PROBE = document()["groups"][0]["probes"][0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"schema": "apex.sensitivity/2"}, "newer"),
        ({"schema": "apex.results/1"}, "not the sensitivities"),
        ({"groups": [{"name": "a", "tensors": [], "role": "x"}]}, "tensors"),
        ({"groups": document()["groups"] * 2}, "two groups"),
        ({"errors": {"a": {"Q3_K": {"relative": 0.1, "weighted": 0.1}}}}, "no errors"),
        ({"errors": {n: {"Q9_Z": {"relative": 0.1, "weighted": 0.1}} for n in "ab"}}, "no tensor type"),
        ({"errors": {n: {"Q3_K": {"relative": -0.1, "weighted": 0.1}} for n in "ab"}}, "greater than or equal"),
        ({"errors": {n: {"Q3_K": {"relative": "0.1", "weighted": 0.1}} for n in "ab"}}, "valid number"),
        ({"joint": [{**PROBE, "name": "j", "types": {"a": "NOPE"}}]}, "no tensor type"),
        ({"tokens_spent": 1.5}, "tokens_spent"),
        ({"model": None}, "model"),
    ],
)
def test_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps(document(**changed)))
    with pytest.raises(InputError, match=message):
        load(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema": 1}', "[" * 100_000, '{"a": NaN}', "\x00\xff"])
def test_broken_files(text: str, tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError):
        load(path)
    with pytest.raises(InputError, match="cannot be read"):
        load(tmp_path / "absent.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(key=st.sampled_from(["model", "text", "groups", "errors", "joint", "floor", "settings"]), value=JSON)
def test_anything_in_a_known_key(key: str, value: Any) -> None:
    with contextlib.suppress(InputError):
        parse(document(**{key: value}), "s.json")
