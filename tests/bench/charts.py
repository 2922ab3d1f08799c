"""What the pictures of benchmarks share: horizontal bars with quartiles, and what makes them readable."""

from collections.abc import Mapping, Sequence
from typing import Any

from p2r.report.canvas import FAINT, INK, headline, new_figure, to_png

OURS_COLOUR, OTHERS_COLOUR = "#0072b2", "#c4c4c4"
PART_COLOURS = ("#7fb8da", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#f0e442", "#c4c4c4")
"""Of parts of a whole, in their order."""


def bar_picture(
    heading: str,
    subtitle: str,
    names: Sequence[str],
    values: Sequence[Mapping[str, float]],
    *,
    title: str,
    texts: Sequence[str],
    colours: Sequence[str],
) -> bytes:
    """Draw `bars` alone under a headline; return a PNG."""
    whole = 0.36 * len(names) + 1.5
    figure = new_figure(9.0, whole)
    headline(figure, heading, subtitle)
    axes = figure.add_axes((0.25, 0.3 / whole, 0.72, (whole - 1.3) / whole))
    bars(axes, names, values, title=title, texts=texts, colours=colours)
    return to_png(figure)


def bars(
    axes: Any,
    names: Sequence[str],
    values: Sequence[Mapping[str, float]],
    *,
    title: str,
    texts: Sequence[str],
    colours: Sequence[str],
) -> None:
    """Draw medians as bars from above to below and quartiles as whiskers; each bar's text stands at its end."""
    widest = max(value["high"] for value in values)
    for place, (value, text, colour) in enumerate(zip(values, texts, colours, strict=True)):
        axes.barh(place, value["median"], height=0.68, color=colour)
        axes.plot([value["low"], value["high"]], [place, place], color=INK, linewidth=1.2, solid_capstyle="butt")
        end = max(value["high"], value["median"]) + 0.01 * widest
        axes.text(end, place, text, va="center", fontsize=9, color=INK)
    axes.set_xlim(0, 1.25 * widest)
    axes.xaxis.set_major_formatter("{x:,.6g}")
    _finish(axes, names, title)


def shares(axes: Any, names: Sequence[str], parts: Sequence[Mapping[str, float]], *, title: str) -> None:
    """Draw parts of a whole, which add up to 1, side by side; the wide ones are labelled with their percentage."""
    for place, of_name in enumerate(parts):
        left = 0.0
        for (part, share), colour in zip(of_name.items(), PART_COLOURS, strict=False):
            axes.barh(place, share, left=left, height=0.68, color=colour, label=part if place == 0 else None)
            if share > 0.05:
                axes.text(
                    left + share / 2, place, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=INK
                )
            left += share
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
    _finish(axes, names, title)
    below = {"loc": "upper left", "bbox_to_anchor": (0, 0), "borderaxespad": 1.8}
    narrow = {"ncols": len(PART_COLOURS), "columnspacing": 1.0, "handlelength": 1.2, "handletextpad": 0.4}
    axes.legend(frameon=False, fontsize=8.5, **below, **narrow)


def _finish(axes: Any, names: Sequence[str], title: str) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, labelcolor=INK, length=0, labelsize=9)
    for side in ("top", "right", "bottom", "left"):
        axes.spines[side].set_visible(False)
