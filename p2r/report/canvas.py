"""Base of all pictures: colours that colour-blind readers can tell apart, upright slices, files without a display.

    Figure (wide, narrow) -> Drawing: PNG and SVG for papers, SVG for pages that are light or dark, wide or narrow

Figures are made without pyplot, which keeps global state and expects a display. Positions and sizes are in inches.

The first axis of a slice is the lower axis of the RAS volume. It is shown to the right, and the other axis upwards, so that
axial, coronal and sagittal planes are all upright.
"""

import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.textpath import TextToPath
from numpy.typing import NDArray
from torch import Tensor

from p2r.modes import MODES, facts_of
from p2r.report.text import for_picture

CLASS_COLOURS = ("#e69f00", "#56b4e9", "#cc79a7", "#009e73", "#f0e442", "#d55e00")
"""Colours after Okabe and Ito: distinct for all common kinds of colour vision, and on grey."""
INK, FAINT, LINE, RULE = "#1a1a1a", "#6b6b6b", "#e6e6e6", "#b0b0b0"
OUTSIDE = np.array(to_rgb("#9a6a85"))
"""Shade of pixels outside the scan."""

WIDE, NARROW = 8.4, 4.2
"""Width of a picture on a wide and on a narrow page, inches."""

KEY_LINE = 0.2
"""Height of a line of a key, inches."""

_DPI = 120
_MARGIN = 0.15
_KEY_FONT = 8.5
_TO_NAME, _TO_NEXT = 0.17, 0.2  # inches from a key's mark to its name, and from there to the next mark
_DARK_COLOURS = {
    INK: "#ececec",
    FAINT: "#a9adb3",
    LINE: "#34383e",
    RULE: "#626870",
}
"""Replacements of colours on a dark page, besides the colours of modes."""
_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


@dataclass(frozen=True)
class Drawing:
    """One picture in all forms that a report needs; equal pictures give equal bytes."""

    png: bytes
    svg: bytes
    """On white, for papers and editors."""
    wide: bytes
    """SVG for a page: no background, and colours that follow the reader's light or dark mode."""
    narrow: bytes | None
    """The same for narrow pages, if it was drawn for them."""


@dataclass(frozen=True)
class KeyEntry:
    """Meaning of a marker."""

    name: str
    marker: str
    colour: str
    ink: str = INK
    """Colour of the name."""


@dataclass(frozen=True)
class Sheet:
    """A figure with its headline and its source line; `bottom` is the lower edge of the area between them."""

    figure: Figure
    bottom: float

    def panel(self, left: float, low: float, width: float, height: float) -> Axes:
        """Return axes with their lower left corner at this position in the area, inches."""
        across, up = float(self.figure.get_figwidth()), float(self.figure.get_figheight())
        axes = self.figure.add_axes((left / across, (self.bottom + low) / up, width / across, height / up))
        axes.patch.set_visible(False)
        return axes

    def write(self, left: float, low: float, text: str, **options: Any) -> None:
        """Write text at a position in the area."""
        across, up = float(self.figure.get_figwidth()), float(self.figure.get_figheight())
        self.figure.text(left / across, (self.bottom + low) / up, text, **{"fontsize": 9, "color": INK, **options})

    def mark(self, left: float, low: float, *, marker: str, colour: str) -> None:
        """Draw a marker at a position in the area."""
        across, up = float(self.figure.get_figwidth()), float(self.figure.get_figheight())
        self.figure.add_artist(
            Line2D([left / across], [(self.bottom + low) / up], marker=marker, color=colour, markersize=6)
        )

    def key(self, lines: Sequence[Sequence[KeyEntry]], left: float, top: float) -> None:
        """Draw a key (from `key_lines`) at a position in the area, from the top down: a name beside each marker."""
        for number, line in enumerate(lines):
            place, low = left, top - (number + 0.5) * KEY_LINE
            for one in line:
                self.mark(place + 0.06, low, marker=one.marker, colour=one.colour)
                options = {"va": "center", "weight": "bold", "color": one.ink, "fontsize": _KEY_FONT}
                self.write(place + _TO_NAME, low, one.name, **options)
                place += _TO_NAME + text_width(one.name, _KEY_FONT, bold=True) + _TO_NEXT


def new_sheet(width: float, height: float, *, title: str, subtitle: str = "", source: str = "") -> Sheet:
    """Return a figure with an area of this size, inches, between a title and a line that states the source."""
    room = width - 2 * _MARGIN
    titles, below, sources = (
        # Not broken at hyphens, so that tasks and commits can be searched for.
        textwrap.wrap(for_picture(text, 400), max(10, int(room * letters)), break_on_hyphens=False)
        for text, letters in ((title, 8.6), (subtitle, 12.6), (source, 16.2))
    )
    top = 0.2 + 0.23 * len(titles) + 0.17 * len(below) + 0.08
    bottom = 0.13 + 0.135 * len(sources) if sources else 0.06
    figure = new_figure(width, top + height + bottom)
    total = top + height + bottom
    place = _MARGIN / width
    for lines, down, step, size, colour in (
        (titles, 0.15, 0.23, 12.5, INK),
        (below, 0.19 + 0.23 * len(titles), 0.17, 9.0, FAINT),
        (sources, top + height + 0.06, 0.135, 7.0, FAINT),
    ):
        weight = "bold" if lines is titles else "normal"
        for number, line in enumerate(lines):
            height_of_line = 1 - (down + number * step) / total
            figure.text(place, height_of_line, line, va="top", fontsize=size, weight=weight, color=colour)
    return Sheet(figure, bottom)


def drawing(wide: Figure, narrow: Figure | None = None) -> Drawing:
    """Return the files of a picture, and of its form for narrow pages."""
    png, svg = to_png(wide), _to_svg(wide)
    return Drawing(
        png=png,
        svg=svg,
        wide=_adapt_for_pages(svg),
        narrow=None if narrow is None else _adapt_for_pages(_to_svg(narrow)),
    )


def key_lines(entries: Sequence[KeyEntry], room: float) -> list[list[KeyEntry]]:
    """Break a key into lines of at most `room` inches."""
    lines: list[list[KeyEntry]] = []
    left = 0.0
    for one in entries:
        width = _TO_NAME + text_width(one.name, _KEY_FONT, bold=True)
        if not lines or left + width > room:
            lines.append([])
            left = 0.0
        lines[-1].append(one)
        left += width + _TO_NEXT
    return lines


def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """Return the width of a line of text, inches, in the font of PNG files; fonts of pages are not wider."""
    font = FontProperties(size=size, weight="bold" if bold else "normal")
    with _ignore_missing_glyphs():
        points, _, _ = TextToPath().get_text_width_height_descent(text, font, ismath=False)
    return float(points) / 72


def mode_colour(mode: str) -> str:
    """Return the colour of a mode in all pictures."""
    facts = facts_of(mode)
    return INK if facts is None else facts.colour


def mode_marker(mode: str) -> str:
    """Return the marker of a mode."""
    facts = facts_of(mode)
    return "P" if facts is None else facts.marker


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of this size, inches, for `to_png`."""
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def apart(heights: list[float], gap: float) -> list[float]:
    """Move labels vertically until neighbours are `gap` apart, each group about its own centre."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    groups = [[index] for index in order]

    def middle(group: list[int]) -> float:
        return sum(heights[index] for index in group) / len(group)

    merged = True
    while merged:
        merged = False
        for a, b in pairwise(groups):
            if middle(b) - middle(a) < gap * (len(a) + len(b)) / 2 - 1e-9:
                groups[groups.index(a)] = a + b
                groups.remove(b)
                merged = True
                break
    placed = list(heights)
    for group in groups:
        for rank, index in enumerate(group):
            placed[index] = middle(group) + (rank - (len(group) - 1) / 2) * gap
    return placed


def plain(axes: Axes) -> None:
    """Reduce a chart's frame to faint horizontal lines and the lower axis."""
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, labelcolor=INK, length=3, labelsize=9)
    for name in (axes.xaxis.label, axes.yaxis.label):
        name.set_fontsize(9.5)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(RULE)


def to_png(figure: Figure) -> bytes:
    """Return the figure as a PNG file; equal figures give equal bytes."""
    buffer = BytesIO()
    with _ignore_missing_glyphs():
        figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def _to_svg(figure: Figure) -> bytes:
    buffer = BytesIO()
    for image in figure.findobj(AxesImage):
        image.set_interpolation("none")  # stores the original pixels, a tenth of the bytes; the viewer enlarges them
    # Text stays text: it can be searched, and uses the reader's font.
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "p2r"}
    with matplotlib.rc_context(settings), _ignore_missing_glyphs():
        figure.savefig(buffer, format="svg", dpi=_DPI, metadata={"Date": None, "Creator": None})
    smooth = buffer.getvalue().replace(b"image-rendering:crisp-edges;image-rendering:pixelated", b"")
    return smooth


def _adapt_for_pages(svg: bytes) -> bytes:
    """Remove the background, replace colours by variables, which a dark page overrides, and use the reader's fonts."""
    text = re.sub(r'<g id="patch_1">.*?</g>', "", svg.decode(), count=1, flags=re.DOTALL)
    dark_colours = {**_DARK_COLOURS, **{facts.colour: facts.dark_colour for facts in MODES.values()}}
    names = {colour: f"--c{number}" for number, colour in enumerate(dark_colours)}
    for colour, name in names.items():
        text = text.replace(f": {colour}", f": var({name})")
    text = re.sub(r"'DejaVu Sans'[^;\"]*?sans-serif", _FONTS, text)
    light = ";".join(f"{name}:{colour}" for colour, name in names.items())
    dark = ";".join(f"{name}:{dark_colours[colour]}" for colour, name in names.items())
    style = f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    return text.replace('<style type="text/css">', f'<style type="text/css">{style}', 1).encode()


@contextmanager
def _ignore_missing_glyphs() -> Iterator[None]:
    """Suppress warnings about letters that Matplotlib's font lacks; the PNG shows boxes for them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        yield


def as_array(values: Tensor | NDArray[Any]) -> NDArray[Any]:
    """Return a tensor on any device, or an array, as a NumPy array."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def as_slices(images: Tensor | NDArray[Any]) -> NDArray[np.float32]:
    """Return (P, H, W) of (P, H, W) or (P, C, H, W): of several contrasts, the first that a slice has."""
    array = as_array(images).astype(np.float32)
    if array.ndim == 4:
        first = array.any((2, 3)).argmax(1)
        array = array[np.arange(len(array)), first]
    if array.ndim != 3:
        raise ValueError(f"slices must be (P, H, W) or (P, C, H, W), got {array.shape}")
    return array


def show_plane(axes: Axes, plane: NDArray[Any], **options: Any) -> None:
    """Show one slice (H, W) or (H, W, 3) upright and without ticks."""
    options = {"cmap": "gray", "interpolation": "antialiased", "aspect": "auto", **options}
    axes.imshow(np.swapaxes(plane, 0, 1), origin="lower", **options)
    axes.set_axis_off()


def evenly(candidates: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Return at most `most` candidates, evenly spread."""
    chosen = np.linspace(0, len(candidates) - 1, min(len(candidates), most)).round().astype(np.int64)
    return candidates[chosen]


def inside(candidates: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Return at most `most` candidates: the middles of equal parts, because the ends often show least."""
    number = min(len(candidates), most)
    return candidates[[len(candidates) * (2 * part + 1) // (2 * number) for part in range(number)]]


def box_around(mask: NDArray[np.bool_], *, margin: int, least: int = 24) -> tuple[slice, slice]:
    """Return rows and columns around the True pixels of (P, H, W), the same for every slice."""
    box = []
    for axis, size in ((1, mask.shape[1]), (2, mask.shape[2])):
        others = tuple(other for other in range(3) if other != axis)
        hit = np.flatnonzero(mask.any(axis=others))
        first, last = (int(hit[0]), int(hit[-1]) + 1) if hit.size else (0, size)
        margin_here = max(margin, (least - (last - first) + 1) // 2)
        box.append(slice(max(0, first - margin_here), min(size, last + margin_here)))
    return box[0], box[1]


def headline(figure: Figure, title: str, subtitle: str = "") -> None:
    """Write a title, and a line below it, at the figure's upper left corner."""
    height = float(figure.get_figheight())
    figure.text(
        0.15 / float(figure.get_figwidth()), 1 - 0.16 / height, title, va="top", fontsize=13, weight="bold", color=INK
    )
    if subtitle:
        figure.text(
            0.15 / float(figure.get_figwidth()), 1 - 0.44 / height, subtitle, va="top", fontsize=9.5, color=FAINT
        )
