"""What fits: placements, contexts and choices against a plain search, and the library's own figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apex_quant import embedded_model
from apex_quant.cli.fit import layers
from apex_quant.errors import GGUFError, InputError, NativeError, UsageError
from apex_quant.gguf import open_model
from apex_quant.gguf.tools import split
from apex_quant.model import kv_rules
from apex_quant.model.kv_cache import kv_cache
from apex_quant.serving import fit as module
from apex_quant.serving.fit import find_models, fit
from apex_quant.serving.memory import MemoryQuestion, library_memory
from apex_quant.serving.serve import resolve
from tests.helpers.imatrix import random_imatrix
from tests.helpers.random_models import write_random_gguf

MIB = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sizes of one model, and files that are none."""
    made = tmp_path_factory.mktemp("tiers")
    for kind in ("F32", "BF16", "Q8_0"):
        write_random_gguf(made / f"m-{kind}.gguf", "qwen3moe", dtype=kind, sparse=True, metadata={"x.y": 1})
    random_imatrix(made / "m-Q8_0.gguf").write(made / "m.imatrix.gguf")
    (made / "notes.txt").write_text("no model")
    return made


_ASKS = (
    "test_the_embedded_model_in_main_memory",
    "test_without_the_library",
    "test_compute_buffers_are_each_files_own",
    "test_a_cache_that_the_library_makes_otherwise_is_told",
)


@pytest.fixture(autouse=True)
def _by_the_formula(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute buffers without the library, where it is not what is tested."""

    def refuse(*words: object, **more: object) -> None:
        raise NativeError("no library")

    if request.node.name not in _ASKS:
        monkeypatch.setattr(module, "library_memory", refuse)


def test_the_embedded_model_in_main_memory() -> None:
    found = fit(embedded_model(), vram=0, ctx=2000, type_k="q8_0", type_v="q5_1")
    (option,) = found.options
    (told,) = library_memory(embedded_model(), [MemoryQuestion(2000, "q8_0", "q5_1")])
    assert found.choice is option
    assert (option.k, option.v) == ("q8_0", "q5_1")
    assert (option.host.kv + option.host.recurrent) / MIB == pytest.approx(told.kv_mib, abs=0.02)
    assert option.host.compute == told.compute_bytes
    assert found.compute.error == 0
    assert option.device.total == 0
    assert json.dumps(found.to_json())


def test_a_cache_that_the_library_makes_otherwise_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for an architecture whose layers are not what the rules say; where they are, nothing is said."""
    path = write_random_gguf(tmp_path / "m.gguf", "qwen35moe", sparse=True)
    for ctx, parallel in ((100, 1), (512, 3)):
        assert not any("the library makes" in line for line in fit(path, vram=0, ctx=ctx, parallel=parallel).warnings)
    monkeypatch.delitem(kv_rules.RECURRENT, "qwen35moe")
    found = fit(path, vram=0, ctx=512, type_k="f16")
    (told,) = library_memory(path, [MemoryQuestion(512)])
    counted = (found.options[0].host.kv + found.options[0].host.recurrent) / MIB
    assert any(f"makes {told.kv_mib:,.2f} MiB" in line and f"{counted:,.2f} MiB" in line for line in found.warnings)


def test_devices_have_buffers_of_their_own(folder: Path) -> None:
    """And each keeps its reserve; in main memory there is one processor."""
    path = folder / "m-Q8_0.gguf"
    one, two = (fit(path, vram=1 << 40, ctx=512, type_k="f16", devices=n) for n in (1, 2))
    assert (one.reserve, two.reserve) == (module.RESERVE, 2 * module.RESERVE)
    first, second = one.options[0].device, two.options[0].device
    assert second.compute == 2 * first.compute > 0
    assert second.total - first.total == first.compute
    least = second.total + two.reserve
    assert fit(path, vram=least, ctx=512, type_k="f16", devices=2).options[0].all_on_device
    assert not fit(path, vram=least - 1, ctx=512, type_k="f16", devices=2).options[0].all_on_device
    apart = [fit(path, vram=0, ctx=512, type_k="f16", devices=n).options[0].host for n in (1, 2)]
    assert apart[0] == apart[1]
    assert two.to_json()["devices"] == 2
    with pytest.raises(UsageError, match="at least 1"):
        fit(path, vram=1, devices=0)


def broken(folder: Path) -> Path:
    made = folder / "broken"
    made.mkdir(exist_ok=True)
    (made / "m.gguf").write_bytes((folder / "m-Q8_0.gguf").read_bytes()[:500])
    return made


def test_choices_get_smaller_with_the_memory(folder: Path) -> None:
    everything = fit(folder, vram=1 << 40, ctx=512)
    assert everything.choice is not None
    assert everything.choice.name == "m-F32"
    assert (everything.choice.k, everything.choice.v) == ("f16", "f16")
    assert {one.name for one in everything.options} == {"m-F32", "m-BF16", "m-Q8_0"}
    assert all(one.ctx_left == 512 for one in everything.options)  # what it was trained on
    sizes = {(one.name, one.k): one.device.total for one in everything.options}
    tight = fit(folder, vram=sizes["m-BF16", "q8_0"], ctx=512, reserve=0)
    assert tight.choice is not None
    assert (tight.choice.name, tight.choice.k) == ("m-BF16", "q8_0")
    assert tight.choice.all_on_device
    offloaded = fit(folder, vram=sizes["m-Q8_0", "q4_0"] - 1, ctx=512, reserve=0)
    assert offloaded.choice is not None
    assert offloaded.choice.name == "m-Q8_0"
    assert 0 < offloaded.choice.placement.cpu_moe <= 6
    assert offloaded.choice.placement.gpu_layers == 7
    assert offloaded.choice.device.total <= offloaded.vram
    assert any("not checked" in line for line in offloaded.warnings)
    with pytest.raises(GGUFError):  # a broken file in a folder is not passed over
        fit(broken(folder), vram=MIB)
    nothing = fit(folder, vram=MIB, ram=MIB, ctx=512)
    assert nothing.choice is None
    assert "nothing fits" in nothing.reason
    assert not any(one.fits for one in nothing.options)


def test_the_fewest_experts_leave_the_device(folder: Path) -> None:
    """One layer less would not fit."""
    from apex_quant.serving.offload import Placement, use, weights

    whole = fit(folder / "m-BF16.gguf", vram=1 << 40, ctx=512, type_k="f16").options[0]
    vram = whole.device.total - 700_000
    found = fit(folder / "m-BF16.gguf", vram=vram, ctx=512, type_k="f16", reserve=0).options[0]
    assert found.fits
    with open_model(folder / "m-BF16.gguf") as model:
        cache, where = kv_cache(model, ctx=512), weights(model)
    fewer = use(where, cache, Placement(7, found.placement.cpu_moe - 1), found.device.compute, 0)[0]
    assert found.device.total <= vram < fewer.total


def test_the_longest_context_is_the_last_that_fits() -> None:
    path = embedded_model()
    short = fit(path, vram=1 << 40, ctx=512, type_k="f16", reserve=0).options[0]
    vram = short.device.total + 100_000
    found = fit(path, vram=vram, ctx=512, type_k="f16", reserve=0).options[0]
    assert 512 <= found.ctx_left < short.ctx_left == 2048
    for ctx, fits in ((found.ctx_left, True), (found.ctx_left + 256, False)):
        again = fit(path, vram=vram, ctx=512, type_k="f16", reserve=0).options[0]
        with open_model(path) as model:
            more = kv_cache(model, ctx=ctx).bytes - kv_cache(model, ctx=512).bytes
        # the compute buffer may grow too, so that only the cache alone is a bound on the side that does not fit
        assert not fits or again.device.total + more <= vram


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*words: object, **more: object) -> None:
        raise NativeError("no library")

    told = fit(embedded_model(), vram=1 << 34, ctx=2048).compute
    monkeypatch.setattr(module, "library_memory", refuse)
    guessed = fit(embedded_model(), vram=1 << 34, ctx=2048).compute
    assert "estimated" in guessed.source
    # the model is far smaller than what the formula's error is stated for: a third of the library's figure is enough
    assert guessed.error == module.FORMULA_ERROR
    assert told.at(2048) / 3 < guessed.at(2048) < told.at(2048) * (1 + module.FORMULA_ERROR)


def test_compute_buffers_are_each_files_own(tmp_path: Path) -> None:
    """At the context and with the types that are asked for, of every architecture, whatever comes first."""
    made = write_random_gguf(tmp_path / "b.gguf", "gemma4", sparse=True, scale="real")
    found = fit([embedded_model(), made], vram=0, ctx=20000, pairs=[("f16", "f16"), ("q8_0", "q8_0")])
    for option in found.options:
        (told,) = library_memory(option.path, [MemoryQuestion(20000, option.k, option.v)])
        assert option.host.compute == told.compute_bytes
        assert option.compute.error == 0
    assert len({option.host.compute for option in found.options}) > 1


def test_points() -> None:
    made = module.Compute(((10, 100), (20, 300), (40, 320)), "", 0.0)
    assert [made.at(ctx) for ctx in (1, 10, 15, 20, 30, 40, 41, 80)] == [100, 100, 200, 300, 310, 320, 328, 640]


def test_a_device_smaller_than_what_stays_free(folder: Path) -> None:
    """It is not used, and the choice is that of main memory."""
    without = fit(folder, vram=0, ctx=512)
    found = fit(folder, vram=1000 * MIB, ctx=512)
    assert found.choice is not None
    assert without.choice is not None
    assert found.choice.name == without.choice.name == "m-F32"
    assert found.choice.device.total == 0
    assert any("not used" in line for line in found.warnings)


def test_contexts_beyond_what_was_trained_on(folder: Path) -> None:
    found = fit(folder, vram=1 << 40, ctx=4000)
    assert found.choice is not None
    assert found.choice.ctx_left == 4096


def test_layers(folder: Path) -> None:
    option = fit(embedded_model(), vram=0, ctx=300, type_k="q8_0", type_v="q5_1").options[0]
    rows = option.to_json()["kv_layers"]
    assert sum(row["k_bytes"] + row["v_bytes"] for row in rows) == option.host.kv + option.host.recurrent
    assert [row["layer"] for row in rows] == list(range(12))
    full = next(row for row in rows if row["kind"] == "full")
    assert (full["cells"], full["k_bytes"], full["v_bytes"]) == (512, 512 * 128 * 34 // 32, 512 * 128 * 24 // 32)
    first, second = layers(option.cache)
    assert first.startswith("9 recurrent (0-2, 4-6, 8-10) of ")
    assert second.startswith("3 full (3, 7, 11) of ")


@pytest.mark.parametrize("architecture", ["llama", "qwen35moe", "gemma4", "deepseek2", "gpt-oss", "qwen3moe"])
@pytest.mark.slow
def test_the_formula_keeps_its_error(architecture: str, tmp_path: Path) -> None:
    from apex_quant.model.facts import facts

    path = write_random_gguf(tmp_path / "real.gguf", architecture, scale="real", sparse=True)
    contexts = (4096, 32768, 131072)
    told = library_memory(path, [MemoryQuestion(ctx, kind, kind) for kind in ("f16", "q8_0") for ctx in contexts])
    with open_model(path) as model:
        known = facts(model)
        for ctx, one in zip(contexts * 2, told, strict=True):
            assert module._formula(model, known, 512, ctx) == pytest.approx(one.compute_bytes, rel=module.FORMULA_ERROR)


def test_files_and_shards(folder: Path, tmp_path: Path) -> None:
    shards = split(folder / "m-BF16.gguf", tmp_path / "s", 1 << 20)
    assert len(shards) > 2
    assert find_models([tmp_path]) == [shards[0]]
    whole, parts = (fit(path, vram=1 << 40, ctx=512).options[0] for path in (folder / "m-BF16.gguf", shards[0]))
    assert whole.device == parts.device
    assert parts.name == "s"
    with pytest.raises(InputError, match="no models there"):
        find_models([Path(__file__).parent])


def test_a_tier_beside_files_that_cannot_be_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "M-I-Quality.gguf").write_bytes((folder / "m-BF16.gguf").read_bytes())
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    (tmp_path / "b.gguf").mkdir()
    unreadable: list[str] = []
    assert resolve("i-quality", tmp_path, unreadable) == [tmp_path / "M-I-Quality.gguf"]
    assert [line.partition(":")[0].partition(" ")[0] for line in unreadable] == [
        str(tmp_path / "a.gguf"), str(tmp_path / "b.gguf")
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"no file of tier mini, and what cannot be read: .*b\.gguf: is a folder"):
        resolve("i-mini", tmp_path)
    with pytest.raises(InputError, match=r"a\.gguf"):
        find_models([tmp_path])
    (tmp_path / "M-I-Quality.gguf").unlink()
    with pytest.raises(InputError, match=r"cannot be read: .*a\.gguf"):
        resolve("mini", tmp_path)


def test_refusals(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="q4_9"):
        fit(folder, vram=1 << 30, type_k="q4_9")
    latent = write_random_gguf(tmp_path / "mla.gguf", "deepseek2", sparse=True)
    with pytest.raises(UsageError, match="latent"):
        fit(latent, vram=1 << 34, type_k="q8_0", type_v="q4_0", ctx=512)
    with pytest.raises(UsageError, match="negative"):
        fit(folder, vram=-1)
    for parallel, ctx in ((257, 512), (0, 512), (1, 0)):
        with pytest.raises(UsageError, match="at least 1, 256 sequences"):
            fit(folder, vram=1 << 30, parallel=parallel, ctx=ctx)
    with pytest.raises(UsageError, match="turbo3 is not in stock"):
        fit(folder, vram=1 << 30, type_k="turbo3")
    assert fit(folder, vram=1 << 34, ctx=512, type_k="turbo3", offered=["turbo3"]).choice is not None
    found = fit(folder / "m-Q8_0.gguf", vram=1 << 34, ctx=4096)
    assert any("trained on 512" in line for line in found.warnings)
