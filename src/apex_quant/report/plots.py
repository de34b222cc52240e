"""The plots of a report by name, and `write_plots`, which makes files of them.

write_plots(gather(["results/"]), "report", ("png", "svg"))

Each plot is a pure function of what was gathered and a theme (style.THEMES); it gives no figure where nothing it shows
was measured.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from apex_quant.errors import UsageError, did_you_mean
from apex_quant.gguf.atomic import write_file
from apex_quant.report.gather import Gathered

if TYPE_CHECKING:
    from apex_quant.report.style import PlotFigure

FORMATS: Final = ("png", "svg")
THEMES: Final = ("light", "dark")


@dataclass(frozen=True)
class Plot:
    """`name` is the file's stem and what pages call it; `where`: module and function that draw it."""

    name: str
    title: str
    shows: str
    where: tuple[str, str]

    def draw(self, gathered: Gathered, theme: str = "light") -> PlotFigure | None:
        """The figure, or None where nothing it shows was measured. Raises UsageError for another theme."""
        from apex_quant.report.style import THEMES as LOOKS
        from apex_quant.report.style import settings

        if theme not in LOOKS:
            raise UsageError(f"no theme is called {theme!r}", hint=f"known: {', '.join(LOOKS)}")
        module = importlib.import_module(f"apex_quant.report.{self.where[0]}")
        with settings():
            made: PlotFigure | None = getattr(module, self.where[1])(gathered, LOOKS[theme])
        return made


PLOTS: Final[dict[str, Plot]] = {
    plot.name: plot
    for plot in (
        Plot("kld-vs-size", "Divergence over size", "mean KLD over size, with the Pareto front",
             ("plots_scatter", "plot_kld_vs_size")),
        Plot("tail-vs-size", "Tail over size", "99.9 % KLD over size, with the Pareto front",
             ("plots_scatter", "plot_tail_vs_size")),
        Plot("rivals", "Families at equal bytes", "ours against other families at interpolated equal bytes",
             ("plots_rivals", "plot_rivals")),
        Plot("kld-distribution", "Distribution", "KLD per token of each file: median, mean, tails",
             ("plots_rows", "plot_distribution")),
        Plot("domains", "Divergence by domain", "mean KLD of each kind of text",
             ("plots_rows", "plot_domains")),
        Plot("accuracy", "Accuracy", "multiple choice, with Wilson intervals and the reference's line",
             ("plots_rows", "plot_accuracy")),
        Plot("ppl-vs-size", "Perplexity over size", "perplexity over size, with the reference's line",
             ("plots_scatter", "plot_ppl_vs_size")),
        Plot("kld-vs-speed", "Divergence over speed", "mean KLD over generation speed",
             ("plots_scatter", "plot_kld_vs_speed")),
        Plot("ppl-vs-speed", "Perplexity over speed", "perplexity over generation speed",
             ("plots_scatter", "plot_ppl_vs_speed")),
        Plot("bubbles", "Size, quality and speed", "quality over size, speed as area",
             ("plots_scatter", "plot_bubbles")),
        Plot("radar", "Profiles", "each file of the front on five scales", ("plots_radar", "plot_radar")),
        Plot("routers", "Routers by layer", "tokens whose experts changed, by layer", ("plots_maps", "plot_routers")),
        Plot("precision", "Precision map", "bits per weight by layer and role of each file",
             ("plots_maps", "plot_precision")),
    )
}  # fmt: skip
"""In the order in which a report shows them."""


def write_plots(
    gathered: Gathered,
    folder: str | Path,
    formats: Sequence[str] = FORMATS,
    *,
    names: Sequence[str] | None = None,
    themes: Sequence[str] = THEMES,
) -> list[Path]:
    """Write what can be drawn into `folder` as NAME.png and NAME.svg, and NAME-dark of each; give their paths.

    PNG have twice the pixels of the layout. `names`: only these of PLOTS. Files are replaced whole. Raises UsageError
    for other formats, themes or names, ResourceError when a file cannot be written.
    """
    for one, known, what in ((formats, FORMATS, "format"), (themes, THEMES, "theme"), (names or (), PLOTS, "plot")):
        for word in one:
            if word not in known:
                raise UsageError(f"no {what} is called {word!r}.{did_you_mean(word, list(known))}",
                                 hint=f"known: {', '.join(known)}")  # fmt: skip
    folder = Path(folder)
    written: list[Path] = []
    for plot in PLOTS.values():
        if names is not None and plot.name not in names:
            continue
        written += _write_plot(plot, gathered, folder, formats, themes)
    return written


def _write_plot(
    plot: Plot, gathered: Gathered, folder: Path, formats: Sequence[str], themes: Sequence[str]
) -> list[Path]:
    """The files of one plot, which is made once and recoloured for the other themes."""
    from apex_quant.report import style

    fig = plot.draw(gathered, themes[0]) if themes else None
    if fig is None:
        return []
    written: list[Path] = []
    for theme in themes:
        stem = plot.name if theme == "light" else f"{plot.name}-{theme}"
        if theme != fig.theme.name:
            if not written:
                style.png(fig)
            fig = style.rethemed(fig, style.THEMES[theme])
        if "png" in formats:
            written.append(write_file(folder / f"{stem}.png", style.png(fig)))
        if "svg" in formats:
            if theme == themes[0]:
                first = style.svg(fig)
            text = first if theme == themes[0] else style.recoloured(first, style.THEMES[themes[0]], fig.theme)
            written.append(write_file(folder / f"{stem}.svg", text.encode()))
    return written
