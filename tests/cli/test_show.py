"""What people see: the numbers of the plan, every fallback, and bits by layer as a picture."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from apex_quant import plan, quantize, verify
from apex_quant.cli import one_line, safe, show
from apex_quant.encode.diff import diff
from apex_quant.gguf import open_model
from apex_quant.model.inspect import inspect
from apex_quant.recipe.planned import Plan
from apex_quant.recipe.tiers import published_tiers
from tests.helpers.random_models import write_random_gguf


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_gguf(tmp_path_factory.mktemp("show") / "hybrid-BF16.gguf", "qwen35moe")


def console(width: int = 300) -> Console:
    return Console(file=io.StringIO(), width=width, highlight=False, emoji=False)


def text(one: Console) -> str:
    assert isinstance(one.file, io.StringIO)
    return one.file.getvalue()


def rows(output: str, first: str) -> list[list[str]]:
    """Lines that begin with this word, cut into cells."""
    return [re.split(r" {2,}", line.strip()) for line in output.splitlines() if line.startswith(first)]


@pytest.mark.parametrize(
    ("size", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (1_234_567, "1.23 MB"), (48_000_000_000, "48.00 GB")],
)
def test_human(size: int, shown: str) -> None:
    assert show.human(size) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\tc", "a\\x0ab\\x09c"),
        ("\x1b[1m", "\\x1b[1m"),
        ("\u202e\ud800", "??"),
        ("naïve 中文 🙂", "naïve 中文 🙂"),
        ("", ""),
    ],
)
def test_one_line(text: str, shown: str) -> None:
    assert one_line(text) == shown


def test_safe_is_shown_as_it_is() -> None:
    for name in ("[red]x", "[/]", "\\[red]", "a\\", ":smile:", "[link=x]y"):
        out = console()
        out.print(safe(name) + "[bold]![/]")
        assert text(out) == name + "!\n"


def heat(planned: Plan, width: int = 300) -> dict[str, str]:
    out = console(width)
    out.print(show.heat_map(planned.tensors, width))
    title, header, *lines = text(out).splitlines()
    assert title.strip() == "bits per weight by layer (left to right)"
    assert header.split() == ["role", "part", "layers"]
    found: dict[str, str] = {}
    row = ""
    for line in lines:
        *names, digits = line.split()
        row = "/".join(names) or row
        found[row] = found.get(row, "") + digits
    return found


def test_heat_map_is_the_plan(hybrid: Path) -> None:
    """One digit a layer: whole bits a weight as in the name of the type, F for floats, a dot where there is none."""
    planned = plan(hybrid, "compact")
    wanted: dict[str, dict[int, str]] = {}
    for tensor in planned.tensors:
        if tensor.role.layer is not None and not tensor.kept:
            bits = tensor.type.bpw
            wanted.setdefault(f"{tensor.role.role}/{tensor.role.part}", {})[tensor.role.layer] = (
                "F" if bits >= 10 else str(int(bits))
            )
    layers = 9
    drawn = heat(planned)
    assert drawn == {part: "".join(row.get(layer, "·") for layer in range(layers)) for part, row in wanted.items()}
    assert drawn["attention/attn_q"] == "···4···44"
    assert heat(planned, 54) == drawn  # ten a line
    assert set(heat(plan(hybrid, "F16"))["attention/attn_k"]) == {"F", "·"}


def test_heat_map_wraps(tmp_path: Path) -> None:
    deep = write_random_gguf(tmp_path / "deep.gguf", "llama", layers="D" * 45, sparse=True)
    planned = plan(deep, "quality")
    narrow = heat(planned, 60)
    assert narrow == heat(planned, 300)
    assert all(len(row) == 45 for row in narrow.values())


def test_plan_adds_up(hybrid: Path) -> None:
    planned = plan(hybrid, "mini")
    out = console()
    show.show_plan(out, planned)
    shown = text(out)
    assert f"total {planned.total_bytes} bytes" in shown
    assert str(planned.zones) in shown
    head, _, rest = shown.partition("bits per weight by layer")
    counted = [
        cells for cells in (re.split(r" {2,}", line.strip()) for line in head.splitlines()) if cells[-1].endswith("%")
    ]
    assert sum(int(next(cell for cell in cells[1:] if cell.isdigit())) for cells in counted) == sum(
        not tensor.kept for tensor in planned.tensors
    )
    kept = sum(tensor.nbytes for tensor in planned.tensors if tensor.kept)
    shares = sum(float(cells[-1].rstrip("%")) for cells in counted)
    assert shares == pytest.approx(100 * (1 - kept / planned.tensor_bytes), abs=0.06 * len(counted))
    for why in {tensor.why.removeprefix("kept: ") for tensor in planned.tensors if tensor.kept}:
        assert why in head
    assert rest


def test_fallbacks_are_named(tmp_path: Path) -> None:
    """Rows of 288 divide by 32 and not by 256: each such tensor is listed, up to 40, and the rest counted."""
    for layers, more in (("D" * 2, 0), ("D" * 8, 1)):
        source = write_random_gguf(
            tmp_path / f"{len(layers)}.gguf", "llama", layers=layers, embd=288, heads=4, head=72, ff=288, sparse=True
        )
        planned = plan(source, "Q4_K_M")
        fallen = [tensor for tensor in planned.tensors if tensor.fallback_from]
        assert (len(fallen) > 40) == bool(more)
        out = console()
        show.show_plan(out, planned)
        listed = [line for line in text(out).splitlines() if re.match(r"\S+\.weight +288 ", line)]
        assert len(listed) == min(40, len(fallen))
        assert (f"... and {len(fallen) - 40} more (--json lists all)" in text(out)) == bool(more)
        assert any("Q4_K" in line and "Q5_0" in line for line in listed)
        assert f"warning: {len(fallen)} tensors" in text(out)


def test_fit(hybrid: Path) -> None:
    plans = [plan(hybrid, tier.name) for tier in published_tiers()]
    limit = sorted(one.total_bytes for one in plans)[4]
    out = console()
    show.show_fit(out, plans, limit)
    for one in plans:
        (cells,) = rows(text(out), one.tier + " ")
        assert cells[-1] == ("fits" if one.total_bytes <= limit else "too large")
    names = [line.split()[0] for line in text(out).splitlines()]
    sizes = [name for name in names if name in {one.tier for one in plans}]
    assert sizes == [one.tier for one in sorted(plans, key=lambda one: -one.total_bytes)]


def test_tiers() -> None:
    out = console()
    show.show_tiers(out, published_tiers())
    assert [cells[1:3] for cells in rows(text(out), "micro=i-micro")] == [["Q3_K/IQ2_XS/IQ1_M", "Q5_K/Q4_K"]]
    assert len(text(out).splitlines()) == 1 + 9 + 1


def test_outputs(hybrid: Path, tmp_path: Path) -> None:
    quantize(hybrid, "Q8_0", out=tmp_path)
    made = quantize(hybrid, ["Q8_0", "Q4_0"], out=tmp_path)
    out = console()
    show.show_outputs(out, made)
    assert "unchanged" in rows(text(out), "Q8_0 ")[0]
    assert rows(text(out), "Q4_0 ")[0][-1] == str(made.outputs[1].path)
    assert made.job is not None
    assert f"{made.job.rows_encoded} rows encoded" in text(out)


def test_inspection(hybrid: Path) -> None:
    with open_model(hybrid) as model:
        report = inspect(model, tensors=True, statistics=True)
        out = console()
        show.show_inspection(out, report)
        shown = text(out)
        for name in model.tensors:
            assert rows(shown, name + " ")
        for key in model.metadata:
            assert rows(shown, key + " ")
    assert "3 experts, 2 used" in shown
    assert "8 layers + 1 NextN" in shown
    assert "kurtosis" in shown


def test_nothing_is_lost_on_a_narrow_terminal(hybrid: Path, tmp_path: Path) -> None:
    """Hashes and paths fold; no ellipsis eats their end."""
    made = quantize(hybrid, "Q8_0", out=tmp_path).outputs[0]
    result = verify(made.path)
    out = console(60)
    show.show_verification(out, result)
    assert "…" not in text(out)
    flat = re.sub(r"\s", "", text(out))
    digest = next(check.detail for check in result.checks if check.name == "data hash")
    assert digest[:20] in flat
    assert digest[-8:] in flat
    out = console(60)
    show.show_difference(out, diff(hybrid, made.path))
    assert "…" not in text(out)
    assert "tensors are equal" in text(out)
