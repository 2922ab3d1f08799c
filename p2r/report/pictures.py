"""Pictures of one example: two views and their pixel pairs, principal components of features, outlines of segmentations.

Shape letters: B or P images or slices, H W, F features, n points per image.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter
from torch import Tensor

from p2r.report.canvas import (
    CLASS_COLOURS,
    INK,
    KEY_LINE,
    NARROW,
    OUTSIDE,
    WIDE,
    Drawing,
    KeyEntry,
    Sheet,
    as_array,
    as_slices,
    box_around,
    drawing,
    evenly,
    inside,
    key_lines,
    new_sheet,
    show_plane,
)
from p2r.report.text import for_picture
from p2r.views.pair import ViewPair

Slices = Tensor | NDArray[Any]
Named = tuple[str, NDArray[np.float32]]
"""A contrast's name, empty for an image of one contrast, and a plane (H, W) or (H, W, 3)."""

_LEFT = 0.42  # inches beside a row of panels, for its label
_TALLEST = 3.6
_TISSUE = 0.05  # of the intensity window; darker pixels are air
_FULL = 0.05  # fraction of tissue, or of the largest label; emptier slices are not shown
_EDGE = "#333333"
_SMALL, _MAX_SMALL = 0.3, 3  # of a panel's edge: further contrasts of a view, and their largest number
_PAIR_COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#d55e00", "#cc79a7", "#ffffff", "#8fb9ff")


def view_pairs(
    image: Slices,
    views: ViewPair,
    points_a: Slices,
    points_b: Slices,
    *,
    num_rows: int = 3,
    num_points: int = 8,
    of_volumes: bool = False,
    contrasts: Sequence[str] = (),
    source: str = "",
) -> Drawing:
    """Draw images, their two views, and some of the pixel pairs that the loss compares.

    Args:
        image: (B, C, H, W) in [0, 1].
        views: The views of these images, with the contrasts that each shows.
        points_a: (B, n, 2) row and column in view a.
        points_b: (B, n, 2) the same anatomy in view b.
        num_rows: Number of images shown.
        num_points: Pairs shown per image, far apart from one another, and on tissue where possible.
        of_volumes: The images are planes of volumes, rotated against each other.
        contrasts: Names of the contrasts; empty: images of one contrast.
        source: Line below that states the source of the images.
    """
    rows = _list_panels(image, views, contrasts)[:num_rows]
    at_a, at_b = as_array(points_a), as_array(points_b)
    subtitle = (
        "the planes are rotated against each other, and share a band; " * of_volumes
        + "joined points show the same anatomy: their features are pulled together; shaded: outside the scan, never compared"
        + "; small: the other contrasts that a view shows" * any(len(panel) > 1 for row in rows for panel in row)
    )

    def figure(width: float) -> Figure:
        gap, top = 0.12, 0.28
        edge = (width - 0.3 - 2 * gap) / 3
        small = _SMALL * edge
        heights = [edge + gap + (small + gap / 2) * any(len(panel) > 1 for panel in row) for row in rows]
        sheet = new_sheet(
            width,
            sum(heights) + top,
            title="Two views of a volume, one plane of each" if of_volumes else "Two views of one slice",
            subtitle=subtitle,
            source=source,
        )
        for number, row in enumerate(rows):
            low = gap + sum(heights[number:]) - gap - edge
            panels = []
            for column, (first, *others) in enumerate(row):
                left = 0.15 + column * (edge + gap)
                panels.append(_show_named(sheet.panel(left, low, edge, edge), *first))
                for place, other in enumerate(others[:_MAX_SMALL]):
                    box = sheet.panel(left + place * (small + gap / 4), low - gap / 2 - small, small, small)
                    _show_named(box, *other, is_small=True)
            if number == 0:
                word = "appearance" if contrasts else "contrast"
                names = ("image", f"view a: {word}", f"view b: {word} and geometry")
                for panel, name in zip(panels, names if width > NARROW else ("image", "view a", "view b"), strict=True):
                    panel.set_title(name, fontsize=9.5, color=INK, pad=4)
            chosen = _choose_far_apart(at_a[number], at_b[number], row[0][0][1], num_points)
            for colour, index in zip(_PAIR_COLOURS * num_points, chosen, strict=False):
                _connect_points(panels[1], at_a[number, index], panels[2], at_b[number, index], colour)
        return sheet.figure

    return drawing(figure(WIDE), figure(NARROW))


def _list_panels(image: Slices, views: ViewPair, contrasts: Sequence[str]) -> list[list[list[Named]]]:
    """Return the planes in the panels of each image: for the image, view a and view b, the contrasts that the view shows.

    The image's panel has the contrasts of view a.
    """
    originals, firsts, seconds, valid = (as_array(part) for part in (image, views.a, views.b, views.valid))
    every = np.ones(originals.shape[:2], np.bool_)
    shown_a, shown_b = (every if shown is None else shown for shown in (views.shown_a, views.shown_b))
    rows = []
    for row in range(len(originals)):
        of_a, of_b = (np.flatnonzero(shown[row]).tolist() or [0] for shown in (shown_a, shown_b))
        names = contrasts or [""] * originals.shape[1]
        rows.append(
            [
                [(names[number], originals[row, number]) for number in of_a],
                [(names[number], firsts[row, number]) for number in of_a],
                [(names[number], _shade_outside(seconds[row, number], valid[row])) for number in of_b],
            ]
        )
    return rows


def _show_named(panel: Axes, name: str, plane: NDArray[np.float32], *, is_small: bool = False) -> Axes:
    """Show a plane with the name of its contrast, if it has one."""
    show_plane(panel, plane, **({"vmin": 0, "vmax": 1} if plane.ndim == 2 else {}))
    if name:
        _draw_label(panel, name, size=6.5 if is_small else 8)
    return panel


def _draw_label(panel: Axes, label: str, *, size: float) -> None:
    box = {"facecolor": "black", "alpha": 0.6, "edgecolor": "none", "pad": 1.5}
    panel.text(
        0.03, 0.97, label, ha="left", va="top", fontsize=size, color="white", transform=panel.transAxes, bbox=box
    )


def embedding_pca(
    image: Slices | Mapping[str, Slices],
    features: Slices | Mapping[str, Slices],
    *,
    num_slices: int = 6,
    source: str = "",
) -> Drawing:
    """Draw slices, and below them the first three principal components of their features as red, green and blue.

    Components and colours are shared by all slices: equal colours mean equal features, also across slices, and across contrasts.

    Args:
        image: (P, 1, H, W) or (P, H, W) in [0, 1], or several contrasts of the same slices by name.
        features: (P, F, H, W), or those of each contrast by name.
        num_slices: Number of slices, evenly spread.
        source: Line below that states the source of features and slices.
    """
    by_name = image if isinstance(image, Mapping) else {"": image}
    of_name = features if isinstance(features, Mapping) else {"": features}
    slices = np.stack([as_slices(planes) for planes in by_name.values()])  # (K, P, H, W) of K contrasts
    maps = np.stack([as_array(of_name[name]).astype(np.float32) for name in by_name])  # (K, P, F, H, W)
    if maps.ndim != 5 or maps.shape[1] != slices.shape[1] or maps.shape[3:] != slices.shape[2:]:
        raise ValueError(f"features {maps.shape[1:]} do not fit the slices {slices.shape[1:]}")
    # Averaged over neighbours, so that noise in air is not taken for tissue.
    tissue = uniform_filter(slices.mean(axis=0), size=(1, 5, 5)) > 2 * _TISSUE
    full = np.flatnonzero(tissue.mean(axis=(1, 2)) > _FULL)
    shown = evenly(full if full.size else np.arange(len(tissue)), num_slices)
    slices, maps, tissue = slices[:, shown], maps[:, shown], tissue[shown]
    if not tissue.any():
        tissue = np.ones_like(tissue)
    colours, explained = _principal_colours(maps.reshape(-1, *maps.shape[2:]), np.tile(tissue, (len(maps), 1, 1)))
    colours = colours.reshape(*slices.shape, 3)
    box = box_around(tissue, margin=2)
    slices, tissue, colours = slices[:, :, *box], tissue[:, *box], colours[:, :, *box]
    lines = [line for name in by_name for line in ((name, f"features of {name}") if name else ("slice", "features"))]

    def figure(width: float) -> Figure:
        here = np.arange(len(tissue)) if width > NARROW else inside(np.arange(len(tissue)), 2)
        sheet, panels = _new_grid(
            lines,
            len(here),
            slices.shape[2:],
            width=width,
            title="Principal components of the representation" + ", contrast by contrast" * (len(by_name) > 1),
            subtitle=f"principal components 1 to 3 of {maps.shape[2]} features as red, green, blue: {explained:.0%} of the "
            "variance" + "; equal colours mean equal features, also in different contrasts" * (len(by_name) > 1),
            source=source,
        )
        for column, index in enumerate(here):
            for number in range(len(by_name)):
                show_plane(panels[2 * number][column], slices[number, index], vmin=0, vmax=1)
                # Pixels outside tissue are transparent, because a page is light or dark.
                opaque = np.concatenate([colours[number, index], tissue[index][..., None].astype(np.float32)], axis=2)
                show_plane(panels[2 * number + 1][column], opaque)
        return sheet.figure

    return drawing(figure(WIDE), figure(NARROW))


def outlines(
    slices: Slices,
    prediction: Slices | Mapping[str, Slices],
    reference: Slices,
    class_names: Sequence[str],
    *,
    spacing_mm: tuple[float, float] | None = None,
    num_slices: int = 6,
    title: str = "Segmentation and reference",
    subtitle: str = "",
    source: str = "",
) -> Drawing:
    """Draw segmentations over slices: predictions filled in, the reference as a line of the same colour.

    Args:
        slices: (P, H, W) or (P, 1, H, W), any intensities.
        prediction: (P, H, W) labels, or several by name (of modes): one row of pictures for each.
        reference: (P, H, W) labels.
        class_names: Names of the labels 1, 2, ...
        spacing_mm: Row and column spacing of the slices; None: square pixels of unknown size.
        num_slices: Number of slices, evenly spread over those with reference labels.
        title: Headline.
        subtitle: Text before the description of the drawing.
        source: Line below that states the source of the segmentations.
    """
    planes, truth = as_slices(slices), as_array(reference)
    by_name = prediction if isinstance(prediction, Mapping) else {"prediction": prediction}
    found = {name: as_array(labels) for name, labels in by_name.items()}
    for name, labels in (*found.items(), ("reference", truth)):
        if labels.shape != planes.shape:
            raise ValueError(f"{name} has the shape {labels.shape}, the slices {planes.shape}")
    area = (truth > 0).sum(axis=(1, 2))
    labelled = np.flatnonzero(area > area.max() * _FULL)
    shown = evenly(labelled if labelled.size else np.arange(len(planes)), num_slices)
    planes, truth, found = planes[shown], truth[shown], {name: labels[shown] for name, labels in found.items()}
    low, high = np.percentile(planes, (0.5, 99.5))
    box = box_around(truth > 0, margin=10, least=48)
    planes, truth, found = planes[:, *box], truth[:, *box], {name: labels[:, *box] for name, labels in found.items()}
    names = ("slice", *found)
    classes = [
        KeyEntry(for_picture(name, 24), "s", _class_colour(value)) for value, name in enumerate(class_names, start=1)
    ]

    def figure(width: float) -> Figure:
        here = np.arange(len(planes)) if width > NARROW else inside(np.arange(len(planes)), 2)
        key = key_lines(classes, width - _LEFT - 0.1)
        sheet, panels = _new_grid(
            names,
            len(here),
            planes.shape[1:],
            width=width,
            below=0.08 + KEY_LINE * len(key),
            pixel=spacing_mm or (1, 1),
            title=title,
            subtitle=f"{subtitle}{'; ' * bool(subtitle)}filled: prediction, line: reference",
            source=source,
        )
        for column, index in enumerate(here):
            for line, name in enumerate(names):
                axes = panels[line][column]
                show_plane(axes, planes[index], vmin=low, vmax=max(high, low + 1e-6), interpolation="bilinear")
                if name != "slice":
                    _draw_overlay(axes, found[name][index], truth[index], len(class_names))
        if spacing_mm is not None:
            _draw_scale_bar(panels[0][0], planes.shape[1:], spacing_mm)
        sheet.key(key, _LEFT, KEY_LINE * len(key) + 0.02)
        return sheet.figure

    return drawing(figure(WIDE), figure(NARROW))


def _new_grid(
    labels: Sequence[str],
    columns: int,
    shape: tuple[int, ...],
    *,
    width: float,
    title: str,
    subtitle: str,
    source: str,
    below: float = 0.06,
    pixel: tuple[float, float] = (1, 1),
) -> tuple[Sheet, list[list[Axes]]]:
    """Return a sheet with a row of panels for each label, for planes of one shape."""
    gap = 0.06
    panel_width = min(2.4, (width - _LEFT - 0.1) / columns - gap)
    panel_height = panel_width * shape[1] * pixel[1] / (shape[0] * pixel[0])  # shown with the first axis to the right
    if panel_height > _TALLEST:
        panel_width, panel_height = panel_width * _TALLEST / panel_height, _TALLEST
    sheet = new_sheet(width, below + len(labels) * (panel_height + gap), title=title, subtitle=subtitle, source=source)
    panels = []
    for row, label in enumerate(labels):
        low = below + (len(labels) - 1 - row) * (panel_height + gap)
        panels.append(
            [
                sheet.panel(_LEFT + column * (panel_width + gap), low, panel_width, panel_height)
                for column in range(columns)
            ]
        )
        text = for_picture(label, max(6, int(panel_height * 12)))
        sheet.write(_LEFT / 2 + 0.06, low + panel_height / 2, text, rotation=90, ha="center", va="center", fontsize=9)
    return sheet, panels


def _shade_outside(plane: NDArray[np.float32], valid: NDArray[np.bool_]) -> NDArray[np.float32]:
    grey = np.repeat(plane.clip(0, 1)[..., None], 3, axis=2)
    mixed: NDArray[np.float32] = np.where(valid[..., None], grey, 0.1 * grey + 0.9 * OUTSIDE)
    return mixed


def _choose_far_apart(at_a: NDArray[Any], at_b: NDArray[Any], plane: NDArray[np.float32], count: int) -> list[int]:
    """Choose pairs one by one, each the farthest from the previous ones: spread out and deterministic.

    Pairs on tissue and away from the edges come first, because matches in air cannot be seen.
    """
    size = np.array(plane.shape)
    rows, columns = at_a.round().astype(int).clip(0, size - 1).T
    inner = np.all([(at > 0.05 * size) & (at < 0.95 * size - 1) for at in (at_a, at_b)], axis=(0, 2))
    good = inner & (plane[rows, columns] > 3 * _TISSUE)
    candidates = np.flatnonzero(good) if good.any() else np.arange(len(at_b))
    places = at_b[candidates]
    distance = -np.linalg.norm(places - places.mean(axis=0), axis=1)
    chosen: list[int] = []
    for step in range(min(count, len(candidates))):
        best = int(np.argmax(distance))
        chosen.append(int(candidates[best]))
        away = np.linalg.norm(places - places[best], axis=1)
        distance = away if step == 0 else np.minimum(distance, away)
    return chosen


def _connect_points(first: Axes, at_a: NDArray[Any], second: Axes, at_b: NDArray[Any], colour: str) -> None:
    for axes, point in ((first, at_a), (second, at_b)):
        axes.plot(point[0], point[1], "o", color=colour, markersize=6.5, markeredgecolor="black", markeredgewidth=0.8)
    line = ConnectionPatch(
        tuple(at_a), tuple(at_b), "data", "data", axesA=first, axesB=second, color=colour, linewidth=0.9
    )
    line.set_path_effects(
        [withStroke(linewidth=1.7, foreground=_EDGE)]
    )  # white and yellow lines cross white pixels and paper
    line.set_in_layout(False)
    second.figure.add_artist(line)


def _principal_colours(maps: NDArray[np.float32], tissue: NDArray[np.bool_]) -> tuple[NDArray[np.float32], float]:
    """Return (P, H, W, 3) colours in [0, 1], and the fraction of variance that the three components explain."""
    pixels = np.moveaxis(maps, 1, -1)  # (P, H, W, F)
    sample = pixels[tissue].astype(np.float64)
    mean = sample.mean(axis=0)
    values, vectors = np.linalg.eigh(np.cov(sample - mean, rowvar=False).reshape(maps.shape[1], -1))
    axes = vectors[:, ::-1][:, :3]
    # An eigenvector's sign is arbitrary; it is fixed here, so that equal features give equal pictures.
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    scores = (pixels - mean) @ axes
    low, high = np.percentile(scores[tissue], (2, 98), axis=0)
    colours = np.zeros((*scores.shape[:3], 3), np.float32)
    colours[..., : axes.shape[1]] = ((scores - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
    total = max(float(values.sum()), 1e-12)
    return colours, float(values[::-1][:3].sum()) / total


def _draw_overlay(axes: Axes, found: NDArray[Any], truth: NDArray[Any], num_classes: int) -> None:
    paint = np.zeros((*found.shape, 4), np.float32)
    for value in range(1, num_classes + 1):
        colour = _class_colour(value)
        paint[found == value] = (*to_rgb(colour), 0.45)
        if (truth == value).any() and not (truth == value).all():
            axes.contour((truth == value).T.astype(float), levels=[0.5], colors=[colour], linewidths=1.6)
    show_plane(axes, paint, interpolation="nearest")


def _class_colour(value: int) -> str:
    return CLASS_COLOURS[(value - 1) % len(CLASS_COLOURS)]


def _draw_scale_bar(axes: Axes, shape: tuple[int, ...], spacing_mm: tuple[float, float]) -> None:
    width_mm = shape[0] * spacing_mm[0]
    length_mm = max(mm for mm in (1, 2, 5, 10, 20, 50, 100) if mm <= max(1.0, width_mm / 3))
    left, low = shape[0] * 0.06, shape[1] * 0.07
    axes.plot((left, left + length_mm / spacing_mm[0]), (low, low), color="white", linewidth=2.5, solid_capstyle="butt")
    axes.text(left, low + shape[1] * 0.03, f"{length_mm} mm", color="white", fontsize=8, va="bottom")
