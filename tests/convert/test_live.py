"""The real converter on the embedded model's checkpoint: its tensors must come back, and the file must predict alike.

Needs a Python with PyTorch and transformers: this one, or the one that APEX_CONVERT_PYTHON names.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from apex_quant import embedded_model
from apex_quant.convert import convert
from apex_quant.converter_python import find_python
from apex_quant.converter_source import find_converter
from apex_quant.errors import InputError, ResourceError
from apex_quant.runtime.options import SessionOptions
from apex_quant.runtime.session import Session
from tests.convert.tiny_checkpoint import write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        find_python()
        find_converter()
    except ResourceError as error:
        pytest.skip(f"{error.message}; {error.hint}")
    return write_checkpoint(tmp_path_factory.mktemp("hf") / "Apex-Tiny-MoE")


@pytest.fixture(scope="module")
def converted(checkpoint: Path) -> Path:
    target = checkpoint.parent / "converted.gguf"
    made = convert(checkpoint, target, pre="qwen35")
    assert (made.architecture, made.outtype, made.checkpoint.complete) == ("qwen35moe", "bf16", True)
    assert 1 <= made.checkpoint.estimate("bf16") / made.bytes < 1.4  # the vocabulary's 16 MB weigh much here
    return target


@pytest.mark.slow
def test_the_embedded_models_tensors_come_back(converted: Path) -> None:
    ours, theirs = ({t.name: t for t in gguf.GGUFReader(path).tensors} for path in (embedded_model(), converted))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        other = theirs[name]
        assert (tensor.tensor_type, tensor.shape.tolist()) == (other.tensor_type, other.shape.tolist()), name
        if name.endswith("ssm_a"):  # through a logarithm and back
            np.testing.assert_allclose(tensor.data, other.data, rtol=3e-7)
        else:
            assert np.array_equal(tensor.data, other.data), name


@pytest.mark.slow
def test_the_converted_file_predicts_like_the_embedded_model(converted: Path) -> None:
    found = []
    for path in (embedded_model(), converted):
        with Session(path, SessionOptions(threads=1, ctx=64)) as session:
            tokens = np.arange(100, 132, dtype=np.int32)[None]
            session.decode(tokens)
            found.append(np.array(session.logits()))
    np.testing.assert_allclose(found[0], found[1], atol=1e-3)


@pytest.mark.slow
def test_an_unknown_vocabulary_is_explained(checkpoint: Path) -> None:
    with pytest.raises(InputError, match="not recognized") as caught:
        convert(checkpoint, checkpoint.parent / "x.gguf")
    assert "--pre" in (caught.value.hint or "")
    assert list(checkpoint.parent.glob("x.gguf*")) == []
