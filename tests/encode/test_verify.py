"""`verify`: each kind of damage fails the check that it should and no other, with and without the library."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from apex_quant import embedded_model, quantize, split, verify
from apex_quant.encode import verify as verify_module
from apex_quant.encode.verify import Verification
from apex_quant.errors import GGUFError, InputError
from apex_quant.gguf import open_model
from apex_quant.importance import Importance
from apex_quant.native import LibraryInfo
from apex_quant.recipe.planned import PlanOptions
from tests.helpers.cli import PACKAGE_ROOT, apex
from tests.helpers.imatrix import random_imatrix
from tests.helpers.random_models import write_random_gguf

TENSOR = "blk.1.ffn_down_exps.weight"


class Bench:
    """A model, its importance matrix and one output."""

    def __init__(self, folder: Path) -> None:
        self.source = write_random_gguf(folder / "m-BF16.gguf", "qwen3moe", layers="MMM")
        self.imatrix = folder / "imatrix.gguf"
        random_imatrix(self.source).write(self.imatrix)
        tier = folder / "t.toml"
        tier.write_text(
            'name = "own"\nbase = "Q4_K_M"\nshared = "Q8_0"\nattention = "Q5_K"\n'
            'routed = { edge = "Q3_K", middle = "IQ2_XXS" }\n'
        )
        self.made = quantize(self.source, str(tier), imatrix=self.imatrix, out=folder / "made.gguf").outputs[0].path


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("verify"))


@pytest.fixture
def copy(bench: Bench, tmp_path: Path) -> Path:
    return Path(shutil.copy(bench.made, tmp_path / "copy.gguf"))


def failed(result: Verification) -> set[str]:
    assert result.ok == (not any(check.ok is False for check in result.checks))
    return {check.name for check in result.checks if check.ok is False}


def unasked(result: Verification) -> set[str]:
    return {check.name for check in result.checks if check.ok is None}


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def flip(path: Path, offset: int) -> None:
    patch(path, offset, bytes([path.read_bytes()[offset] ^ 1]))


def find(path: Path, text: bytes) -> int:
    at = path.read_bytes().find(text)
    assert at > 0
    return at


def test_good(bench: Bench) -> None:
    result = verify(bench.made)
    assert (failed(result), unasked(result)) == (set(), set())
    assert [check.name for check in result.checks] == ["structure", "size", "values", "data hash", "recipe"]


@pytest.mark.parametrize("everything", [False, True])
def test_good_with_source(bench: Bench, everything: bool) -> None:
    result = verify(bench.made, source=bench.source, imatrix=bench.imatrix, everything=everything)
    assert (failed(result), unasked(result)) == (set(), set())
    names = {check.name for check in result.checks}
    assert {"imatrix", "source tensors", "re-encoding"} <= names
    assert ("source hash" in names) == everything
    with open_model(bench.made) as model:
        count = len(model.tensors)
    detail = next(check.detail for check in result.checks if check.name == "re-encoding")
    assert detail.startswith(f"{count if everything else 12} of {count} tensors give the same bytes")


def test_flipped_byte_of_data(bench: Bench, copy: Path) -> None:
    """Found by the hash alone; with the source the tensor, the row and the number of bytes are named."""
    with open_model(copy) as model:
        info = model.tensors[TENSOR]
    flip(copy, info.offset + 3 * info.row_bytes + 40)
    assert failed(verify(copy)) == {"data hash"}
    result = verify(copy, source=bench.source, imatrix=bench.imatrix, everything=True)
    assert failed(result) == {"data hash", "re-encoding"}
    assert result.differences == [
        {"tensor": TENSOR, "type": "IQ2_XXS", "bytes_different": 1, "bytes": info.nbytes, "first_row": 3}
    ]


def test_block_with_a_scale_that_is_not_a_number(copy: Path) -> None:
    with open_model(copy) as model:
        info = model.tensors[TENSOR]
    patch(copy, info.offset + 5 * info.row_bytes, b"\x00\x7e")
    result = verify(copy)
    assert failed(result) == {"data hash", "values"}
    assert TENSOR in next(check.detail for check in result.checks if check.name == "values")


@pytest.mark.parametrize("key", ["apex.data.sha256", "apex.recipe.sha256"])
def test_flipped_hash(copy: Path, key: str) -> None:
    flip(copy, find(copy, key.encode()) + len(key) + 12 + 5)
    assert failed(verify(copy)) == {{"apex.data.sha256": "data hash", "apex.recipe.sha256": "recipe"}[key]}


@pytest.mark.parametrize("key", ["apex.source.sha256", "apex.imatrix.sha256"])
def test_flipped_origin(bench: Bench, copy: Path, key: str) -> None:
    flip(copy, find(copy, key.encode()) + len(key) + 12 + 5)
    assert failed(verify(copy)) == set()
    result = verify(copy, source=bench.source, imatrix=bench.imatrix, everything=True)
    assert failed(result) == {{"apex.source.sha256": "source hash", "apex.imatrix.sha256": "imatrix"}[key]}


def test_changed_types(copy: Path) -> None:
    """A type that is not the recipe's, in blocks of the same size: only the recipe's hash can tell."""
    name = b"blk.0.ffn_gate_exps.weight"  # Q3_K, 110 bytes a block, as IQ3_S
    at = find(copy, name) + len(name) + 4 + 3 * 8
    assert copy.read_bytes()[at] == 11
    patch(copy, at, bytes([21]))
    assert "recipe" in failed(verify(copy))


def test_length(copy: Path) -> None:
    whole = copy.read_bytes()
    copy.write_bytes(whole + b"\0" * 32)
    assert failed(verify(copy)) == {"size", "data hash"}
    copy.write_bytes(whole + b"x" * 1000)
    assert failed(verify(copy)) == {"size", "data hash"}
    copy.write_bytes(whole[: -len(whole) // 3])
    with pytest.raises(GGUFError, match="the file"):
        verify(copy)
    copy.write_bytes(b"")
    with pytest.raises(GGUFError):
        verify(copy)


def test_wrong_matrix(bench: Bench, tmp_path: Path) -> None:
    """Another one, and none: told as such, and the library is never asked for what would end its process."""
    random_imatrix(bench.source, seed=9).write(tmp_path / "other.gguf")
    result = verify(bench.made, source=bench.source, imatrix=tmp_path / "other.gguf", everything=True)
    assert failed(result) == {"imatrix", "re-encoding"}
    assert {row["type"] for row in result.differences} == {"Q3_K", "IQ2_XXS", "Q5_K"}
    result = verify(bench.made, source=bench.source, everything=True)
    assert failed(result) == {"imatrix", "re-encoding"}
    assert unasked(result) == {"importance"}
    assert "IQ2_XXS" not in {row["type"] for row in result.differences}
    Importance.from_arrays({TENSOR: ([[1.0] * 256], [1])}).write(tmp_path / "bad.gguf")
    with pytest.raises(InputError, match=r"has 256 values, but blk\.1\.ffn_down_exps\.weight needs .* 768"):
        verify(bench.made, source=bench.source, imatrix=tmp_path / "bad.gguf", everything=True)


def test_unneeded_matrix(bench: Bench, tmp_path: Path) -> None:
    made = quantize(bench.source, "quality", out=tmp_path).outputs[0].path
    assert failed(verify(made, source=bench.source)) == set()
    assert failed(verify(made, source=bench.source, imatrix=bench.imatrix)) == {"imatrix"}


def test_other_source(bench: Bench, tmp_path: Path) -> None:
    other = write_random_gguf(tmp_path / "o.gguf", "qwen3moe", layers="MMM", seed=5)
    result = verify(bench.made, source=other, imatrix=bench.imatrix, everything=True)
    assert failed(result) == {"re-encoding", "source hash"}
    smaller = write_random_gguf(tmp_path / "s.gguf", "qwen3moe", layers="MM")
    result = verify(bench.made, source=smaller, imatrix=bench.imatrix, everything=True)
    assert failed(result) == {"source tensors"}
    assert "blk.2." in next(check.detail for check in result.checks if check.name == "source tensors")


def test_source_packed_otherwise(bench: Bench, tmp_path: Path) -> None:
    """The source hash is of the weights: shards of it serve as well."""
    shards = split(bench.source, tmp_path / "s", 1_000_000)
    assert failed(verify(bench.made, source=shards[1], imatrix=bench.imatrix, everything=True)) == set()


@pytest.mark.parametrize(
    ("tier", "options"),
    [
        ("compact", PlanOptions(split_max_size=300_000)),
        ("quality", PlanOptions(leave_output_tensor=True)),
        ("Q4_K_M", PlanOptions(output_tensor_type="F16", token_embedding_type="F32")),
        ("Q8_0", PlanOptions(override=("attn_v=BF16", "attn_k=F16"))),
        ("Q4_0", PlanOptions(pure=True)),
        ("compact", PlanOptions(override_kv=("general.name=str:other",), cell=("routed.middle=IQ4_NL",))),
        ("quality", PlanOptions(published=True)),
        ("COPY", PlanOptions()),
        ("compact", PlanOptions(prune_layers=[1])),
    ],
)
def test_every_way_to_make_a_file(bench: Bench, tmp_path: Path, tier: str, options: PlanOptions) -> None:
    """What quantize writes, verify accepts: the recipe hash is that of the types, whatever they come from."""
    made = quantize(bench.source, tier, out=tmp_path / "m.gguf", options=options).outputs[0].path
    result = verify(made, source=bench.source, everything=True)
    assert failed(result) == set(), result.checks


@pytest.mark.parametrize("architecture", ["gpt-oss", "qwen35moe", "deepseek2"])
def test_architectures(architecture: str, tmp_path: Path) -> None:
    source = write_random_gguf(tmp_path / "m-BF16.gguf", architecture)
    made = quantize(source, "quality", out=tmp_path).outputs[0].path
    assert failed(verify(made, source=source)) == set()


def test_files_by_others(bench: Bench) -> None:
    """No hash, no recipe: not asked, not failed."""
    result = verify(bench.source)
    assert (failed(result), unasked(result)) == (set(), {"data hash", "recipe"})
    assert failed(verify(bench.source, source=bench.source)) == set()


def test_without_the_library(bench: Bench, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are then dequantized by PyPI gguf; what it has no code for is not failed."""
    monkeypatch.setattr(verify_module, "library_info", lambda: LibraryInfo(None, None, ()))
    assert failed(verify(copy)) == set()
    with open_model(copy) as model:
        info = model.tensors["blk.0.ffn_down_exps.weight"]
        vector = model.tensors["blk.0.attn_norm.weight"]
    patch(copy, info.offset + 5 * info.row_bytes + 108, b"\x00\x7e")  # Q3_K keeps its scale last
    patch(copy, vector.offset, b"\x00\x00\xc0\x7f")
    result = verify(copy)
    assert failed(result) == {"data hash", "values"}
    detail = next(check.detail for check in result.checks if check.name == "values")
    assert info.name in detail
    assert vector.name in detail


HIDDEN = """
import importlib.abc, sys

class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "llama_cpp":
            raise ModuleNotFoundError("No module named 'llama_cpp'", name=name)

if sys.argv[1] == "hide":
    sys.meta_path.insert(0, Hide())
from apex_quant.cli import run
for words in __import__("json").loads(sys.argv[2]):
    assert run(words) == 0, words
assert "llama_cpp" not in sys.modules
loaded = "libggml" in open("/proc/self/maps").read()
assert loaded == (sys.argv[3] == "loads"), loaded
"""


@pytest.mark.parametrize("how", ["hide", "here"])
def test_what_needs_no_library(bench: Bench, tmp_path: Path, how: str) -> None:
    """The commands run where llama_cpp cannot be imported; where it can, they leave it alone.

    `verify` asks libggml-base about blocks if it is there, without the bindings.
    """
    made, source = str(bench.made), str(bench.source)
    without = [
        ["tiers"], ["inspect", source, "--tensors", "--stats"], ["plan", source, "--tier", "micro"],
        ["plan", source, "--fit", "1GB"], ["diff", made, source, "--values"],
        ["split", made, "-o", str(tmp_path / "s"), "--split-max-size", "400k"],
        ["quantize", source, "--tier", "Q8_0", "--dry-run"],
    ]  # fmt: skip
    env = dict(os.environ, PYTHONPATH=str(PACKAGE_ROOT))
    for commands, loads in ((without, "loads not"), ([["verify", made]], "loads not" if how == "hide" else "loads")):
        done = subprocess.run(
            [sys.executable, "-c", HIDDEN, how, json.dumps(commands), loads],
            capture_output=True,
            text=True,
            env=env,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def test_command_line(bench: Bench, copy: Path) -> None:
    with open_model(copy) as model:
        flip(copy, model.tensors[TENSOR].offset + 40)
    result = apex("verify", copy, "--source", bench.source, "--imatrix", bench.imatrix, "--all", "--json")
    assert result.status == 3
    assert result.err.strip() == f"error: {copy}: failed: data hash, re-encoding"
    assert result.json["ok"] is False
    assert [row["tensor"] for row in result.json["differences"]] == [TENSOR]
    result = apex("verify", copy)
    assert result.status == 3
    assert "FAILED" in result.out
    assert apex("verify", bench.made, "--all").status == 2


def test_progress_reaches_the_end(bench: Bench) -> None:
    seen: list[tuple[str, float]] = []
    verify(bench.made, source=bench.source, progress=lambda p: seen.append((p.phase, p.work / p.total)))
    assert {phase for phase, _ in seen} >= {"verify"}
    assert max(share for phase, share in seen if phase == "verify") <= 1
    assert all(0 <= share <= 1.000001 for _, share in seen)


def test_embedded_model() -> None:
    assert failed(verify(embedded_model())) == set()
