"""The report on a file, against PyPI gguf's reader and counts done by hand."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from apex_quant.errors import InputError
from apex_quant.gguf import open_model
from apex_quant.model import Role
from apex_quant.model.inspect import inspect
from tests.helpers.random_models import Models, write_random_gguf
from tests.helpers.shapes import ARCHITECTURES


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_totals_agree_with_gguf_reader(architecture: str, models: Models) -> None:
    reader = gguf.GGUFReader(models(architecture))
    with open_model(models(architecture)) as model:
        report = inspect(model, tensors=True)
    assert report.parameters == sum(int(t.n_elements) for t in reader.tensors)
    assert report.tensor_bytes == sum(int(t.n_bytes) for t in reader.tensors)
    assert report.bpw == report.tensor_bytes * 8 / report.parameters
    for rows in (report.roles, report.types):
        assert sum(row.parameters for row in rows) == report.parameters
        assert sum(row.bytes for row in rows) == report.tensor_bytes
        assert sum(row.tensors for row in rows) == len(reader.tensors)
        assert sum(row.active_parameters for row in rows) == report.active_parameters
        assert sum(row.share for row in rows) == pytest.approx(1)
    assert report.tensors is not None
    assert [(t.name, t.type, t.bytes) for t in report.tensors] == [
        (t.name, t.tensor_type.name, t.n_bytes) for t in reader.tensors
    ]
    assert report.file_bytes == models(architecture).stat().st_size
    assert set(report.metadata) == {f.name for f in reader.fields.values()} - {
        "GGUF.version",
        "GGUF.tensor_count",
        "GGUF.kv_count",
    }
    assert all(t.role is not Role.other for t in report.tensors if t.name != "rope_freqs.weight")
    assert json.loads(report.model_dump_json())["architecture"] == architecture


def test_active_parameters_of_published_models(tmp_path: Path) -> None:
    """Sizes as the makers name them: total and active parameters in billions."""
    published = {
        "qwen3moe": (30.5, 3.3),
        "deepseek2": (671, 37),
        "gpt-oss": (20.9, 3.6),
        "nemotron_h_moe": (31.6, 3.2),
    }
    for architecture, (total, active) in published.items():
        path = write_random_gguf(tmp_path / f"{architecture}.gguf", architecture, scale="real", sparse=True)
        with open_model(path) as model:
            report = inspect(model)
        assert report.parameters / 1e9 == pytest.approx(total, rel=0.02), architecture
        assert report.active_parameters / 1e9 == pytest.approx(active, rel=0.2), architecture


def test_active_parameters_leave_out_nextn_blocks_and_idle_experts(models: Models) -> None:
    with open_model(models("glm4moe")) as model:
        report = inspect(model)
        idle = sum(
            info.n_elements // 3  # one expert of three
            for name, info in model.tensors.items()
            if "_exps" in name and not name.startswith("blk.6.")
        )
        nextn = sum(info.n_elements for name, info in model.tensors.items() if name.startswith("blk.6."))
    assert report.active_parameters == report.parameters - idle - nextn
    assert (report.layers, report.nextn_layers, report.experts, report.experts_used) == (6, 1, 3, [2])


def test_embeddings(models: Models) -> None:
    with open_model(models("gemma4")) as model:
        report = inspect(model)
    assert (report.tied_embeddings, report.vocabulary, report.embedding_length) == (True, 512, 256)
    with open_model(models("llama")) as model:
        assert not inspect(model).tied_embeddings


def test_statistics_on_request(models: Models) -> None:
    with open_model(models("llama")) as model:
        assert inspect(model).statistics is None
        found = inspect(model, statistics=True).statistics
    assert found
    assert found.roles[0].role is Role.dense_ffn
    assert found.roles[0].tensor_kurtosis == pytest.approx(3, abs=0.05)


def test_files_that_are_no_models(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "imatrix.gguf", "")
    writer.add_type("imatrix")
    writer.add_tensor("blk.0.attn_q.weight.in_sum2", np.ones((1, 256), dtype=np.float32))
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    with open_model(tmp_path / "imatrix.gguf") as model:
        report = inspect(model, tensors=True)
    assert (report.layers, report.parameters, report.metadata["general.type"]) == (0, 256, "imatrix")


def test_metadata_is_shown_short_and_as_text(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"] * 20)
    writer.add_array("short", [1, 2])
    writer.add_array("words", ["x", "yz"])
    writer.add_string("general.license", "mit?")
    writer.add_tensor("output_norm.weight", np.ones(32, dtype=np.float32))
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    path.write_bytes(path.read_bytes().replace(b"mit?", b"mit\xff"))
    with open_model(path) as model:
        report = inspect(model)
    assert report.metadata["tokenizer.ggml.tokens"] == "string[40]"
    assert (report.metadata["short"], report.metadata["words"]) == ([1, 2], ["x", "yz"])
    assert json.loads(report.model_dump_json())["metadata"]["general.license"] == "mit�"


def test_lying_metadata_is_an_input_error(tmp_path: Path) -> None:
    path = write_random_gguf(tmp_path / "m.gguf", "llama", layers="D", metadata={"llama.block_count": "many"})
    with open_model(path) as model, pytest.raises(InputError, match=r"llama\.block_count must be"):
        inspect(model)
