"""`quantize --fill`: stock's bytes given the filled file, stock's bytes given the raw one, and what the file says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apex_quant import plan, quantize, verify
from apex_quant.encode.job import run_job
from apex_quant.encode.quantize import QuantizedOutput
from apex_quant.errors import UsageError
from apex_quant.gguf import open_model
from apex_quant.importance import Importance, fill, save
from apex_quant.recipe.planned import PlanOptions
from tests.helpers.files import data_section
from tests.helpers.imatrix import random_imatrix
from tests.helpers.random_models import write_random_gguf
from tests.helpers.stock import stock_job, stock_quantize_all

DOWN = "blk.1.ffn_down_exps.weight"
UP = "blk.2.ffn_up_exps.weight"


class Bench:
    """A model with an importance matrix that lacks experts, and a tier that depends on it."""

    def __init__(self, folder: Path) -> None:
        self.source = write_random_gguf(folder / "m-BF16.gguf", "qwen3moe", layers="MMM")
        self.raw, self.filled = folder / "raw.gguf", folder / "filled.gguf"
        matrix = random_imatrix(self.source, uncovered={DOWN: [0, 2], UP: [0, 1, 2]}, tokens=200)
        matrix.write(self.raw)
        save(fill(matrix), self.filled)
        self.tier = str(folder / "t.toml")
        Path(self.tier).write_text(
            'name = "own"\nbase = "Q4_K_M"\nshared = "Q8_0"\nattention = "Q5_K"\n'
            'routed = { edge = "Q3_K", middle = "Q2_K" }\n'
        )

    def make(self, out: Path, rule: str, imatrix: Path | Importance | None = None, **options: Any) -> QuantizedOutput:
        (made,) = quantize(
            self.source, self.tier, imatrix=imatrix or self.raw, out=out, threads=2, options=PlanOptions(**options),
            fill=rule,
        ).outputs  # fmt: skip
        return made


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("fill"))


def said(path: Path, key: str) -> object:
    with open_model(path) as model:
        return model.get(key)


def checks(path: Path, bench: Bench, imatrix: Path) -> dict[str, bool | None]:
    found = verify(path, source=bench.source, imatrix=imatrix, everything=True, threads=2)
    return {check.name: check.ok for check in found.checks}


def test_stock_gives_the_same(bench: Bench, tmp_path: Path) -> None:
    """With the prior stock needs the filled file, without it the raw one; the two differ where experts are thin."""
    none, prior = (
        bench.make(tmp_path / f"{rule}.gguf", rule, cell=["routed.middle=IQ2_XXS"]) for rule in ("none", "prior")
    )
    jobs = [
        stock_job(
            bench.source,
            tmp_path / f"stock-{given.name}",
            made.plan.file_type,
            imatrix=given,
            tensor_types=[(pattern, kind.id) for pattern, kind in made.plan.recipe.overrides()],
        )
        for made, given in ((none, bench.raw), (prior, bench.filled))
    ]
    stock_quantize_all(jobs)
    assert data_section(none.path) == data_section(tmp_path / "stock-raw.gguf")
    assert data_section(prior.path) == data_section(tmp_path / "stock-filled.gguf")
    with open_model(none.path) as a, open_model(prior.path) as b:
        different = {name for name in a.tensors if a.read(a.tensors[name]) != b.read(b.tensors[name])}
    assert different
    assert all("_exps." in name for name in different)
    assert UP not in different  # none of its experts has data: nothing to fill with
    for made in (none, prior):
        assert made.path.stat().st_size == made.plan.total_bytes


def test_what_the_file_says(bench: Bench, tmp_path: Path) -> None:
    """The rule stands in the file, and verify follows it."""
    none, prior = bench.make(tmp_path / "none.gguf", "none"), bench.make(tmp_path / "prior.gguf", "prior")
    given = bench.make(tmp_path / "given.gguf", "none", bench.filled)
    for made, rule, imatrix in (
        (none, "none", bench.raw), (prior, "shrink K=64", bench.raw), (given, "shrink K=64", bench.filled),
    ):  # fmt: skip
        assert said(made.path, "apex.imatrix.prior") == made.plan.prior == rule
        assert set(checks(made.path, bench, imatrix).values()) == {True}
    assert data_section(given.path) == data_section(prior.path)
    # the same data, but of another matrix: said, and nothing differs
    assert {name for name, ok in checks(prior.path, bench, bench.filled).items() if not ok} == {"imatrix"}
    # another rule than the one it was made by
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(prior.path.read_bytes().replace(b"shrink K=64", b"shrink K=16"))
    assert {name for name, ok in checks(wrong, bench, bench.raw).items() if not ok} == {"re-encoding"}
    wrong.write_bytes(prior.path.read_bytes().replace(b"shrink K=64", b"another one"))
    found = checks(wrong, bench, bench.raw)
    assert (found["imatrix prior"], found["re-encoding"]) == (None, False)


def test_plan_and_journal(bench: Bench, tmp_path: Path) -> None:
    """The plan knows the size and the rule; another rule is another file and not the same one finished."""
    for rule in ("prior", "none"):
        planned = plan(bench.source, bench.tier, imatrix=bench.raw, options=PlanOptions(fill=rule))
        assert bench.make(tmp_path / f"{rule}.gguf", rule).bytes == planned.total_bytes
    assert bench.make(tmp_path / "prior.gguf", "prior").unchanged
    with pytest.raises(UsageError, match=r"prior\.gguf exists and was not made by this command"):
        bench.make(tmp_path / "prior.gguf", "none")
    with pytest.raises(UsageError, match="--fill 'half': choose prior or none"):
        bench.make(tmp_path / "x.gguf", "half")
    unused = plan(bench.source, "quality", imatrix=bench.raw)
    assert unused.prior == "none"
    assert "prior" not in str(unused.layouts[0].header)


def test_object(bench: Bench, tmp_path: Path) -> None:
    with Importance.read(bench.raw) as matrix:
        raw = bench.make(tmp_path / "raw.gguf", "prior", matrix)
        filled = bench.make(tmp_path / "filled.gguf", "prior", fill(matrix))
    reference = bench.make(tmp_path / "file.gguf", "prior")
    assert data_section(raw.path) == data_section(filled.path) == data_section(reference.path)


def test_warnings(bench: Bench) -> None:
    def warned(rule: str, text: str) -> list[str]:
        made = plan(bench.source, "i-compact", imatrix=bench.raw, options=PlanOptions(fill=rule))
        return [warning for warning in made.warnings if text in warning]

    (filled,) = warned("prior", "mean over experts: blk")
    assert filled.startswith("2 expert matrices in 1 tensors had no calibration tokens")
    assert filled.endswith(f"{DOWN}: [0, 2]")
    (left,) = warned("prior", "unweighted")
    assert left.endswith(f"{UP}: [0, 1, 2]")
    (thin,) = warned("prior", "fewer than 64 tokens")
    with Importance.read(bench.raw) as matrix:
        few = sum(int(((e.counts > 0) & (e.counts < 64)).sum()) for n, e in matrix.entries.items() if "_exps" in n)
    assert int(thin.split()[0]) == few > 0
    assert warned("none", "fewer than 64 tokens") == []
    (unweighted,) = warned("none", "unweighted")
    assert unweighted.startswith("5 expert matrices in 2 tensors")


def test_legacy(bench: Bench, tmp_path: Path) -> None:
    """No counts per expert: taken as it is, and said; also after it was converted."""
    with Importance.read(bench.raw) as matrix:
        save(matrix, tmp_path / "m.dat")
    with Importance.read(tmp_path / "m.dat") as legacy:
        save(legacy, tmp_path / "m.gguf")
    for name, prior in (("m.dat", "none"), ("m.gguf", "shrink K=64")):
        made = plan(bench.source, "i-compact", imatrix=tmp_path / name)
        assert made.prior == prior
        (warning,) = [text for text in made.warnings if "no token counts per expert" in text]
        assert ("(a .dat file never has)" in warning) == (name == "m.dat")
        assert warning.startswith("8 expert tensors")  # the ninth had no data, which the form cannot hold
    a = bench.make(tmp_path / "a.gguf", "prior", tmp_path / "m.dat")
    b = bench.make(tmp_path / "b.gguf", "none", tmp_path / "m.dat")
    assert a.path.read_bytes() == b.path.read_bytes()
    assert checks(a.path, bench, tmp_path / "m.dat")["re-encoding"]


def test_one_rule_a_pass(bench: Bench, tmp_path: Path) -> None:
    plans = [
        (plan(bench.source, "i-compact", imatrix=bench.raw, options=PlanOptions(fill=rule)), tmp_path / f"{rule}.gguf")
        for rule in ("prior", "none")
    ]
    with open_model(bench.source) as model, pytest.raises(UsageError, match="in different ways"):
        run_job(model, plans, imatrix=bench.raw, imatrix_sha256="x", threads=1)


def test_well_covered_experts_hardly_move(bench: Bench) -> None:
    """A prior worth 64 tokens moves an expert of a million by less than one part in ten thousand of the distance."""
    with open_model(bench.source) as model:
        info = model.tensors[DOWN]
        rng = np.random.default_rng(0)
        sums = rng.lognormal(size=(info.shape[2], info.shape[0])) * 1e6
        raw = Importance.from_arrays({DOWN: (sums, [10**6] * info.shape[2])})
        before, after = raw.for_tensor(info), fill(raw).for_tensor(info)
    assert before is not None
    assert after is not None
    assert np.abs(after - before).max() <= np.abs(before - before.mean(axis=0)).max() * 1e-4
