"""The page in headless Chromium: accessible, usable by keyboard, narrow and wide, light, dark and printed, offline."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from apex_quant.report.choose import choose
from apex_quant.report.gather import gather
from apex_quant.report.report import report
from tests.report.results_folder import add, with_headers

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe = pytest.importorskip("axe_core_python", reason="axe-core-python is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
HOSTILE = '</script><script>document.title="owned"</script><img src=x onerror="document.title=\'owned\'">'
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("results")
    with_headers(made)
    add(made, "tiny-tie", scale=0.5, size=6_000_000, seed=7)
    add(made, HOSTILE, scale=1.5, size=5_000_000, seed=8)
    (made / "broken.json").write_text("{")
    report(made, made / "out", formats=("html",), family=["Others=tie*"])
    return made


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        made = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield made
        made.close()


@pytest.fixture
def open_page(browser: Any, folder: Path) -> Iterator[Open]:
    """open_page(width) -> the page; what it asks for and complains about are in its `asked` and `said`."""
    contexts = []

    def run(width: int = 1600, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.asked, page.said = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.goto((folder / "out" / "index.html").as_uri())
        return page

    yield run
    for context in contexts:
        context.close()


@pytest.mark.parametrize(("width", "scheme"), [(1600, "light"), (400, "light"), (1600, "dark"), (400, "dark")])
def test_accessible(open_page: Open, width: int, scheme: str) -> None:
    """No finding of axe with everything opened, nothing wider than the window, nothing asked for, no complaint."""
    page = open_page(width, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.evaluate((Path(axe.__file__).parent / "axe.min.js").read_text())
    found = page.evaluate("async () => (await axe.run(document, {resultTypes: ['violations']})).violations")
    assert [(one["id"], [node["html"][:120] for node in one["nodes"]][:3]) for one in found] == []
    assert len(page.asked) == 1
    assert page.said == []
    assert page.title() != "owned"


def test_sorting_by_keyboard(open_page: Open) -> None:
    page = open_page()
    rows = page.locator("table.files tbody tr th")
    head = page.locator("table.files th", has_text="Mean KLD")
    sizes = [float(page.locator("table.files tbody tr").nth(i).locator("td").nth(1).get_attribute("data-sort") or 0)
             for i in range(rows.count())]  # fmt: skip
    assert sizes == sorted(sizes, reverse=True)
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert page.locator("table.files th[aria-sort=ascending]").count() == 1
    first = rows.all_inner_texts()
    assert first[0] in ("tiny-large", "tiny-tie", "large", "tie")
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert rows.all_inner_texts() == first[::-1]


def test_marks_say_their_values(open_page: Open) -> None:
    page = open_page()
    chart = page.locator("svg.chart").first
    marks = chart.locator(".mark")
    assert [marks.nth(i).get_attribute("tabindex") for i in range(marks.count())].count("0") == 1
    marks.first.focus()
    assert page.locator("#tip").inner_text() == marks.first.get_attribute("aria-label")
    page.keyboard.press("ArrowRight")
    assert page.locator("#tip").inner_text() == marks.nth(1).get_attribute("aria-label")
    assert marks.nth(1).get_attribute("tabindex") == "0"
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()
    marks.nth(2).hover()
    assert page.locator("#tip").inner_text() == marks.nth(2).get_attribute("aria-label")


def test_labels_do_not_overlap(open_page: Open) -> None:
    """Measured by the renderer, in every chart, at both widths."""
    script = """() => [...document.querySelectorAll('svg.chart')].flatMap((chart) => {
      const boxes = [...chart.querySelectorAll('text')].map((one) => [one.textContent, one.getBoundingClientRect()]);
      const over = (x, y) => x.left < y.right - 1 && x.top + 3 < y.bottom;
      return boxes.flatMap(([a, x], i) =>
        boxes.slice(i + 1).filter(([b, y]) => over(x, y) && over(y, x)).map(([b]) => [a, b]));
    })"""
    for width in (400, 1600):
        assert open_page(width).evaluate(script) == []


def test_precision_map_by_keyboard(open_page: Open, folder: Path) -> None:
    page = open_page()
    entry = next(one for one in gather([folder]).entries if one.file_name == "tiny-large.gguf")
    page.locator("#map-file").select_option(label=entry.label)
    assert entry.precision is not None
    buttons = page.locator("#map button")
    assert buttons.count() == len(entry.precision.cells)
    buttons.first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    label = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert "layer 1" in label
    page.keyboard.press("Enter")
    names = page.locator("#cell tbody th").all_inner_texts()
    role = label.split(",")[0].replace(" ", "_")
    tensors = [one for one in entry.precision.tensors if (one.role, one.layer) == (role, 1)]
    assert names == [one.name for one in tensors]
    assert f"{tensors[0].bits:.3f}" in page.locator("#cell tbody tr").first.inner_text()


def test_the_chooser_agrees(open_page: Open, folder: Path) -> None:
    """The page and choose() name the same file, sums and ties for the same wishes."""
    page = open_page()
    gathered = gather([folder], family=["Others=tie*"])
    for gigabytes, ctx, kind in ((16, 32768, "f16"), (1.13, 32768, "f16"), (1.135, 4096, "q8_0"), (0.5, 32768, "f16")):
        page.locator("#vram").fill(str(gigabytes))
        page.locator("#ctx").select_option(str(ctx))
        page.locator("#kv").select_option(f"{kind}/{kind}")
        text = page.locator("#choice").inner_text()
        found = choose(gathered, vram=int(gigabytes * 1e9), ctx=ctx, type_k=kind, type_v=kind)
        if found.best is None:
            assert "No measured file fits" in text
        else:
            assert text.startswith(f"{found.best.label}: lowest mean KLD of the ")
            assert f"takes {found.best.total_bytes / 1e9:.2f} GB" in text
            assert ("No difference could be shown to " + ", ".join(found.ties) in text) == bool(found.ties)
        fits = page.locator("#fits tbody tr td:last-child").all_inner_texts()
        assert fits == ["yes" if one.fits else "no" for one in found.candidates]


def test_prints(open_page: Open) -> None:
    """On paper everything is open, and what only screens can do is gone."""
    page = open_page(1000)
    page.emulate_media(media="print")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    assert page.locator("#chooser").is_hidden()
    assert page.locator("nav").is_hidden()
    assert page.locator("table.files").is_visible()
    assert page.locator("#map table").is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert page.pdf()[:4] == b"%PDF"


def test_without_scripts(open_page: Open) -> None:
    page = open_page(java_script_enabled=False)
    assert page.locator("table.files tbody tr").count() == 5
    assert page.locator("svg.chart .mark").count() > 10
    assert "apex which" in page.locator("#choice").inner_text()
