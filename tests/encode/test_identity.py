"""Our tensor data is llama-quantize's, byte for byte: the whole data section, against the library itself.

Stock is given our recipe as tensor-type overrides, our base mix and the same importance matrix, which we take as it is
(test_fill.py does the same with filled ones). Random models cover the architectures; the trained embedded model covers
every tier and five stock mixes.
"""

from __future__ import annotations

from pathlib import Path

from apex_quant import embedded_model, quantize
from apex_quant.encode.quantize import QuantizedOutput
from apex_quant.gguf import open_model
from apex_quant.recipe.tiers import published_tiers
from tests.helpers.files import data_section
from tests.helpers.imatrix import random_imatrix
from tests.helpers.random_models import write_random_gguf
from tests.helpers.stock import stock_job, stock_quantize_all

TIERS = [tier.name for tier in published_tiers()]
MIXES = ["Q4_K_M", "IQ4_XS", "Q3_K_L", "IQ2_M", "Q5_0"]
ARCHITECTURES = ["qwen35moe", "qwen3moe", "deepseek2", "gemma4", "gpt-oss", "nemotron_h_moe", "glm4moe", "llama"]


def stock_twin(output: QuantizedOutput, source: Path, imatrix: Path | None, out: Path) -> dict[str, object]:
    """The job for llama_model_quantize that should give the same data."""
    return stock_job(
        source,
        out,
        output.plan.file_type,
        imatrix=imatrix if output.plan.importance else None,
        tensor_types=[(pattern, kind.id) for pattern, kind in output.plan.recipe.overrides()],
        threads=2,
    )


def assert_same(made: list[tuple[Path, Path, QuantizedOutput]], folder: Path) -> None:
    """Each (source, importance matrix, output) against its stock twin; all twins are made in one process."""
    twins = [folder / f"stock-{number}.gguf" for number in range(len(made))]
    stock_quantize_all(
        [stock_twin(output, source, imatrix, twin) for (source, imatrix, output), twin in zip(made, twins, strict=True)]
    )
    for (_, _, output), twin in zip(made, twins, strict=True):
        assert data_section(output.path) == data_section(twin), output.path.name
        with open_model(twin) as theirs, open_model(output.path) as ours:
            assert {n: t.type for n, t in ours.tensors.items()} == {n: t.type for n, t in theirs.tensors.items()}
            assert list(ours.tensors) == list(theirs.tensors)
        assert output.path.stat().st_size == output.plan.total_bytes
        twin.unlink()


def test_embedded_model(tmp_path: Path) -> None:
    """All nine tiers and five stock mixes in one pass, with experts that calibration never reached."""
    source, imatrix = embedded_model(), tmp_path / "imatrix.gguf"
    random_imatrix(source, seed=1, uncovered={"blk.5.ffn_down_exps.weight": [1, 4]}).write(imatrix)
    made = quantize(source, [*TIERS, *MIXES], imatrix=imatrix, out=tmp_path, threads=2, fill="none")
    assert made.job is not None
    assert made.job.rows_encoded == made.job.rows_distinct
    assert made.job.bytes_read == made.job.source_bytes
    assert_same([(source, imatrix, output) for output in made.outputs], tmp_path)


def test_random_models(tmp_path: Path) -> None:
    """Quality, compact and micro of every architecture's shapes."""
    made = []
    for architecture in ARCHITECTURES:
        source = write_random_gguf(tmp_path / f"{architecture}-BF16.gguf", architecture)
        imatrix = tmp_path / f"{architecture}.imatrix.gguf"
        random_imatrix(source, seed=2).write(imatrix)
        tiers = ["quality", "compact", "micro"]
        result = quantize(source, tiers, imatrix=imatrix, out=tmp_path, threads=2, fill="none")
        made += [(source, imatrix, output) for output in result.outputs]
    assert_same(made, tmp_path)
