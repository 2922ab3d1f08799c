"""What all pictures share: colours that colour-blind readers tell apart, upright slices, PNG bytes without a display.

Figures are made without pyplot: it keeps global state, and a cluster's worker has no screen.

A slice has its lower axis of the RAS volume first. It is shown with that axis to the right and the other one upwards,
so that anatomy stands upright in axial, coronal and sagittal planes alike.
"""

from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

MODE_COLOURS = {"scratch": "#6b6b6b", "linear_probe": "#d98200", "fine_tune": "#0072b2"}
CLASS_COLOURS = ("#e69f00", "#56b4e9", "#cc79a7", "#009e73", "#f0e442", "#d55e00")
"""After Okabe and Ito: distinct for all common kinds of colour vision, and on grey."""
INK, FAINT = "#1a1a1a", "#6b6b6b"
OUTSIDE = np.array(to_rgb("#9a6a85"))
"""Shade of what shows no place of the scan."""

_DPI = 120


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, inches, that `to_png` can draw."""
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def plain(axes: Axes) -> None:
    """Leave of a chart's frame what helps to read heights: faint lines across, and the axis below."""
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, labelcolor=INK, length=3)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def to_png(figure: Figure) -> bytes:
    """Return the figure as a PNG file; equal figures are equal bytes."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def as_array(values: Tensor | NDArray[Any]) -> NDArray[Any]:
    """Return a NumPy array of a tensor anywhere, or of an array."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def as_slices(images: Tensor | NDArray[Any]) -> NDArray[np.float32]:
    """Return (P, H, W) of (P, 1, H, W) or (P, H, W)."""
    array = as_array(images).astype(np.float32)
    if array.ndim == 4 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 3:
        raise ValueError(f"slices must be (P, H, W) or (P, 1, H, W), got {array.shape}")
    return array


def show(axes: Axes, plane: NDArray[Any], **options: Any) -> None:
    """Show one slice (H, W) or (H, W, 3) upright and without ticks."""
    options = {"cmap": "gray", "interpolation": "antialiased", "aspect": "auto", **options}
    axes.imshow(np.swapaxes(plane, 0, 1), origin="lower", **options)
    axes.set_axis_off()


def evenly(candidates: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Return at most so many of the candidates, spread evenly."""
    chosen = np.linspace(0, len(candidates) - 1, min(len(candidates), most)).round().astype(np.int64)
    return candidates[chosen]


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
    """Write a title and a line below it at the figure's upper left corner."""
    height = float(figure.get_figheight())
    figure.text(
        0.15 / float(figure.get_figwidth()), 1 - 0.16 / height, title, va="top", fontsize=13, weight="bold", color=INK
    )
    if subtitle:
        figure.text(
            0.15 / float(figure.get_figwidth()), 1 - 0.44 / height, subtitle, va="top", fontsize=9.5, color=FAINT
        )
