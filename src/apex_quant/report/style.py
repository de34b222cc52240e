"""How plots look: two themes, families by colour and marker, one figure with its notes, hover texts and labels.

Colours are those of Okabe and Ito (2008, "Color Universal Design"), darkened on light and lightened on dark ground
until each has a contrast of 3 to 1 with it (WCAG 2.1, 1.4.11); families differ by marker as well.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import Collection
from matplotlib.colors import is_color_like, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter, FixedLocator, NullFormatter, NullLocator

from apex_quant.report.family import OURS, REFERENCE

if TYPE_CHECKING:
    from apex_quant.report.gather import Gathered

DPI: Final = 100
PNG_SCALE: Final = 2
_LEAST: Final = 1e-30
_SETTINGS: Final[dict[str, Any]] = {  # what a matplotlibrc could change; no formulas: names may hold dollars
    "text.parse_math": False, "font.family": ["DejaVu Sans"], "font.size": 10.0, "savefig.bbox": None,
    "figure.autolayout": False, "figure.constrained_layout.use": False, "axes.unicode_minus": True,
    "svg.fonttype": "path", "path.simplify": True, "text.usetex": False, "lines.linewidth": 1.5,
}  # fmt: skip
SVG_SALT: Final = "apex"  # ids in SVG files are hashes with it: the same file for the same data

ThemeName = Literal["light", "dark"]
AnyText = TypeVar("AnyText", bound=Text)


@dataclass(frozen=True)
class Theme:
    """Colours as #rrggbb. `families` in the order they are given out."""

    name: ThemeName
    ground: str
    ink: str
    quiet: str
    grid: str
    band: str
    families: tuple[str, ...]


THEMES: Final[dict[str, Theme]] = {
    "light": Theme(
        "light", ground="#ffffff", ink="#1f2328", quiet="#59636e", grid="#d9dee3", band="#e9ecef",
        families=("#0072b2", "#d55e00", "#00805a", "#b5558c", "#8a6d00", "#2b8cbe", "#7a4fbf", "#6b6b6b"),
    ),
    "dark": Theme(
        "dark", ground="#0d1117", ink="#e6edf3", quiet="#9aa4af", grid="#2d343c", band="#1c232b",
        families=("#56b4e9", "#ff9448", "#2ccb9a", "#f09ac8", "#f0e442", "#a5d3f5", "#c3a5f5", "#adb3b9"),
    ),
}  # fmt: skip
MARKERS: Final = ("o", "s", "D", "^", "v", "P", "X", "h")
_VARIABLES: Final = ("ground", "ink", "quiet", "grid", "band")


@dataclass(frozen=True)
class Mark:
    """One thing a reader can point at: `gid` is its id in the SVG, `text` what is said of it, `label` which file."""

    gid: str
    text: str
    label: str


class PlotFigure(Figure):
    """A figure with what tests and pages need of it: `marks`, the `labels` that must not overlap, the `notes` under
    it and a sentence for who cannot see it (`alt`)."""

    def __init__(self, name: str, theme: Theme, width: float, height: float) -> None:
        super().__init__(figsize=(width, height), dpi=DPI, facecolor=theme.ground)
        self.name, self.theme = name, theme
        self.marks: list[Mark] = []
        self.labels: list[Text] = []
        self.notes: list[str] = []
        self.alt = ""
        FigureCanvasAgg(self)

    @property
    def renderer(self) -> Any:
        canvas: Any = self.canvas
        return canvas.get_renderer()

    def mark(self, text: str, label: str) -> str:
        """A new id for something with this hover text."""
        gid = f"{self.name}-{len(self.marks)}"
        self.marks.append(Mark(gid, text, label))
        return gid


def looks(gathered: Gathered, theme: Theme) -> dict[str, tuple[str, str]]:
    """Colour and marker of each family: ours first, then by number of files; the reference is ink."""
    names = sorted(
        (name for name in gathered.families if name != REFERENCE),
        key=lambda name: (name != OURS, gathered.families.index(name)),
    )
    made = {
        name: (theme.families[min(place, len(theme.families) - 1)], MARKERS[place % len(MARKERS)])
        for place, name in enumerate(names)
    }
    return made | {REFERENCE: (theme.quiet, "*")}


def figure(
    name: str, theme: Theme, title: str, subtitle: str, *, width: float = 9.0, height: float = 5.6
) -> PlotFigure:
    """A figure with its title in the upper left; axes are added by the caller, below `top_of`."""
    made = PlotFigure(name, theme, width, height)
    made.text(0.14 / width, 1 - 0.16 / height, title, ha="left", va="top", fontsize=13.5, weight="bold",
              color=theme.ink)  # fmt: skip
    made.text(0.14 / width, 1 - 0.46 / height, subtitle, ha="left", va="top", fontsize=9.5, color=theme.quiet)
    made.alt = f"{title}. {subtitle}"
    return made


def inches(fig: PlotFigure, left: float, bottom: float, right: float, top: float) -> tuple[float, float, float, float]:
    """The rectangle of axes with these margins in inches, for `add_axes`."""
    width, height = fig.get_size_inches()
    return left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height


def axes(fig: PlotFigure, rect: tuple[float, float, float, float], *, grid: str = "both") -> Axes:
    """Axes of the theme: no box, quiet ticks, a thin grid behind the data."""
    theme, ax = fig.theme, fig.add_axes(rect)
    ax.set_facecolor(theme.ground)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(theme.grid)
    ax.tick_params(colors=theme.quiet, labelsize=9, length=3, color=theme.grid)
    ax.xaxis.label.set_color(theme.ink)
    ax.yaxis.label.set_color(theme.ink)
    ax.set_axisbelow(True)
    if grid:
        ax.grid(True, axis=grid, color=theme.grid, linewidth=0.6)  # type: ignore[arg-type]
    return ax


def footnote(fig: PlotFigure, notes: Sequence[str]) -> None:
    """Notes under the axes, wrapped to the figure; what does not fit in three lines stays in `notes` for the page."""
    fig.notes += notes
    width, height = fig.get_size_inches()
    letters = max(40, int((width - 0.3) * 15.5))
    lines = wrapped("; ".join(notes), letters)
    if len(lines) > 3:
        lines = [*lines[:2], lines[2][: letters - 1].rstrip() + "…"]
    fig.text(0.14 / width, 0.1 / height, "\n".join(lines), ha="left", va="bottom", fontsize=7.8,
             color=fig.theme.quiet, linespacing=1.25)  # fmt: skip


def fit(fig: PlotFigure, text: AnyText, width: float) -> AnyText:
    """The text, its middle left out where it is wider than so many pixels."""
    whole = text.get_text()
    kept = len(whole)
    while kept > 2 and text.get_window_extent(fig.renderer).width > width:
        kept = min(kept - 1, int(kept * width / text.get_window_extent(fig.renderer).width))
        text.set_text(f"{whole[: (kept + 1) // 2]}…{whole[len(whole) - kept // 2 :]}")
    return text


def wrapped(text: str, letters: int) -> list[str]:
    """Lines of at most so many letters, broken at spaces."""
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > letters:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return [*lines, line] if line else lines


def log_ticks(ax: Axes, which: Literal["x", "y"], low: float, high: float, show: Any, *, most: int = 9) -> None:
    """A logarithmic axis from low to high with round numbers: as many of 1, 1.5, 2, 3, ... as there is room for."""
    low, high = max(low, _LEAST), min(high, 1 / _LEAST)  # beyond, no axis can be drawn
    axis = ax.xaxis if which == "x" else ax.yaxis
    (ax.set_xscale if which == "x" else ax.set_yscale)("log")
    (ax.set_xlim if which == "x" else ax.set_ylim)(low, high)
    ticks: list[float] = []
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8),
                  tuple(1 + k / 10 for k in range(90)), tuple(1 + k / 100 for k in range(900))):  # fmt: skip
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [step * 10.0**exponent for exponent in exponents for step in steps]
        found = [tick for tick in found if low <= tick <= high]
        if len(found) > most:
            if len(ticks) < 2:
                ticks = found[:: math.ceil(len(found) / most)]
            break
        ticks = found
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FixedFormatter([show(tick) for tick in ticks]))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def plain(value: float) -> str:
    """A number without needless digits: 0.005, 12, 1.5."""
    return f"{value:.3g}" if value >= 1e-4 else f"{value:.0e}"


@contextmanager
def settings(more: dict[str, Any] | None = None) -> Iterator[None]:
    """Matplotlib as plots here expect it, quiet about letters that its font lacks (the page has them)."""
    all_of_them: Any = {**_SETTINGS, **(more or {})}
    with rc_context(all_of_them), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def png(fig: PlotFigure) -> bytes:
    """At twice the size of the layout, without anything that changes between equal runs."""
    buffer = io.BytesIO()
    with settings():
        # level 3: half the time of level 6 for a fifth more bytes
        fig.savefig(buffer, format="png", dpi=DPI * PNG_SCALE, metadata={"Software": None},
                    facecolor=fig.theme.ground, pil_kwargs={"compress_level": 3})  # fmt: skip
    return buffer.getvalue()


def svg(fig: PlotFigure) -> str:
    """As text, letters as shapes (no font is needed), ids of marks kept, each mark with its text as its title."""
    buffer = io.StringIO()
    with settings({"svg.hashsalt": f"{SVG_SALT}-{fig.name}"}):
        fig.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, facecolor=fig.theme.ground)
    text = buffer.getvalue()
    texts = {mark.gid: mark.text for mark in fig.marks}

    def titled(found: re.Match[str]) -> str:
        said = texts.get(found[1])
        return found[0] if said is None else f"{found[0]}\n<title>{_xml(said)}</title>"

    return re.sub(r'<g id="([\w.-]+)">', titled, text)


def rethemed(fig: PlotFigure, theme: Theme) -> PlotFigure:
    """The same figure in another theme, in place: every colour of the old one becomes that of the new one. It must have
    been drawn, so that all its ticks exist."""
    colours = dict(zip(_colours(fig.theme).values(), _colours(theme).values(), strict=True))
    for artist in fig.findobj():
        for name in ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor"):
            get, put = getattr(artist, f"get_{name}", None), getattr(artist, f"set_{name}", None)
            if get is None or put is None or (name == "color" and isinstance(artist, Collection | Patch)):
                continue
            now = get()
            rows = now if isinstance(now, np.ndarray) and now.ndim == 2 else [now]
            new = [colours.get(to_hex(one), one) if visible(one) else one for one in rows]
            if any(a is not b for a, b in zip(new, rows, strict=True)):
                put(new if rows is now else new[0])
    fig.theme = theme
    return fig


def visible(colour: Any) -> bool:
    """Whether it is a colour, and not transparent."""
    if isinstance(colour, str):
        return colour != "none" and bool(is_color_like(colour))
    return colour is not None and len(colour) in (3, 4) and (len(colour) == 3 or colour[3] > 0)


def recoloured(text: str, theme: Theme, other: Theme) -> str:
    """An SVG that was drawn in `theme` as it would be in `other`, which costs less than to draw it again."""
    colours = dict(zip(_colours(theme).values(), _colours(other).values(), strict=True))
    return re.sub("|".join(colours), lambda found: colours[found[0]], text)


@lru_cache
def _colours(theme: Theme) -> dict[str, str]:
    made = {f"plot-{key}": getattr(theme, key) for key in _VARIABLES}
    return made | {f"plot-family-{place}": colour for place, colour in enumerate(theme.families)}


def _xml(text: str) -> str:
    for letter, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;")):
        text = text.replace(letter, entity)
    return "".join(letter for letter in text if letter >= " " or letter == "\n")
