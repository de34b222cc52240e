"""`plot_frontier`: the curve of `apex frontier` as a picture, with the published tiers beside it.

plot_frontier(frontier("MODEL-BF16.gguf"), "MODEL.frontier.svg")
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from apex_quant.errors import UsageError
from apex_quant.gguf.atomic import write_file
from apex_quant.report.labels import printable
from apex_quant.report.quantities import gigabytes

if TYPE_CHECKING:
    from apex_quant.report.style import PlotFigure

FORMATS: Final = (".png", ".svg", ".pdf")
_NAME: Final = 70  # letters of the model's name in the title


class Size(Protocol):
    """One size of the curve: bytes of the whole file and the nats predicted for it."""

    @property
    def total_bytes(self) -> int: ...
    @property
    def predicted_kld(self) -> float: ...


class Curve(Protocol):
    """What is drawn, as frontier() gives it; `tiers` have the keys tier, total_bytes and predicted_kld."""

    @property
    def model(self) -> str: ...
    @property
    def points(self) -> Sequence[Size]: ...
    @property
    def tiers(self) -> Sequence[Mapping[str, Any]]: ...


def check_format(path: str | Path) -> None:
    """Raises UsageError for a name that ends in none of FORMATS."""
    if Path(path).suffix.lower() not in FORMATS:
        raise UsageError(f"{path}: a plot ends in {', '.join(FORMATS)}")


def plot_frontier(curve: Curve, path: str | Path) -> Path:
    """Write the picture, as its name ends; a file that is there is replaced whole.

    Raises UsageError for another ending, ResourceError where it cannot be written.
    """
    check_format(path)
    from apex_quant.report import style

    fig = draw_frontier(curve)
    kind = Path(path).suffix.lower()
    if kind == ".pdf":
        buffer = io.BytesIO()
        with style.settings():
            fig.savefig(buffer, format="pdf", metadata={"CreationDate": None}, facecolor=fig.theme.ground)
        data = buffer.getvalue()
    else:
        data = style.png(fig) if kind == ".png" else style.svg(fig).encode()
    return write_file(Path(path), data)


def draw_frontier(curve: Curve) -> PlotFigure:
    """The figure: size against predicted KLD, both logarithmic."""
    from apex_quant.report.style import THEMES, settings

    with settings():
        return _drawn(curve, THEMES["light"])


def _drawn(curve: Curve, theme: Any) -> PlotFigure:
    import numpy as np
    from matplotlib.lines import Line2D

    from apex_quant.report.placing import Wanted, place_labels
    from apex_quant.report.plots_scatter import gigabytes_of
    from apex_quant.report.style import DPI, axes, figure, footnote, inches, log_ticks, plain

    name = printable(curve.model)[:_NAME]
    fig = figure("frontier", theme, f"Size and predicted divergence: {name}",
                 "least predicted mean KLD of every size. Lower left is better")  # fmt: skip
    ax = axes(fig, inches(fig, 0.85, 0.98, 0.45, 1.12))
    points = [(float(one.total_bytes), one.predicted_kld) for one in curve.points if one.predicted_kld > 0]
    tiers = [(str(row["tier"]), float(row["total_bytes"]), float(row["predicted_kld"])) for row in curve.tiers
             if row["predicted_kld"] > 0]  # fmt: skip
    ours, theirs = theme.families[0], theme.families[1]
    if points or tiers:
        xs = [x for x, _ in points] + [x for _, x, _ in tiers]
        ys = [y for _, y in points] + [y for _, _, y in tiers]
        log_ticks(ax, "x", min(xs) * 0.95, max(xs) * 1.06, gigabytes_of, most=8)
        log_ticks(ax, "y", min(ys) * 0.85, max(ys) * 1.18, plain)
        ax.set_autoscale_on(False)
    ax.set_xlabel("size", fontsize=9.5, color=theme.ink)
    ax.set_ylabel("predicted mean KLD (nats)", fontsize=9.5, color=theme.ink)
    ax.plot(*np.array(points).reshape(-1, 2).T, color=ours, linewidth=1.3, marker="o", markersize=3.5, zorder=3)
    for tier, x, y in tiers:
        mark = Line2D([x], [y], color=theirs, marker="s", markersize=6, linestyle="", zorder=4)
        mark.set_gid(fig.mark(f"{tier}: predicted mean KLD {plain(y)}, {gigabytes(round(x))}", tier))
        ax.add_line(mark)
    pixels = ax.transData.transform(np.array(points).reshape(-1, 2))
    room = 3.0 * DPI / 72
    marks, line = np.hstack([pixels - room, pixels + room]), np.hstack([pixels[:-1], pixels[1:]])
    wanted = [Wanted(tier, x, y, 4.5, theirs) for tier, x, y in tiers]
    place_labels(fig, ax, wanted, marks.tolist(), line.tolist())
    handles = [Line2D([], [], color=ours, marker="o", markersize=3.5, linewidth=1.3, label="measured allocation")]
    if tiers:
        handles.append(Line2D([], [], color=theirs, marker="s", markersize=6, linestyle="", label="published tiers"))
    width, height = fig.get_size_inches()
    made = fig.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.14 / width, 1 - 0.7 / height), ncols=2,
                      frameon=False, fontsize=9, borderaxespad=0.0)  # fmt: skip
    for text in made.get_texts():
        text.set_color(theme.ink)
    footnote(fig, ["predicted from single tensors' costs, not measured; least exact at the ends of the curve"])
    return fig
