"""View sheet: a job's section `views` as a picture of each transform at the ends and middle of its range, and of whole draws.

A job gives numbers; the sheet shows whether, say, a bias field of 0.4 is strong. Every panel runs the code that training
runs. A volume is shown by its middle plane across the third axis.

Letters: C contrasts, D spatial dimensions (2 or 3), *S sizes along them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from numpy.typing import NDArray
from torch import Tensor

from p2r.config import ImageConfig, ViewsConfig
from p2r.data.grids import to_patch
from p2r.data.preprocess import Preparation, intensity_window, normalise, percentile_table, planes_of
from p2r.data.volume import Volume
from p2r.report.canvas import FAINT, INK, OUTSIDE, headline, new_figure, show_plane, to_png
from p2r.views import Draws, apply_appearance, apply_warp, inside_mask, make_views, warp_of
from p2r.views.geometric import Geometry, affine_matrix, sample_geometry
from p2r.views.intensity import sample_appearance, unchanged

_SEED = 1
_EDGE, _GAP, _LABEL, _TOP, _BOTTOM = 1.45, 0.06, 1.35, 0.8, 0.36  # inches
_NUM_PANELS = 3


@dataclass(frozen=True)
class _Row:
    label: str
    note: str
    panels: list[tuple[str, NDArray[Any]]]
    """Captions, and pictures (H, W) or (H, W, 3)."""


def image_of(volume: Volume, config: ImageConfig) -> tuple[Tensor, Tensor]:
    """Return the fullest plane of a scan, or the patch about its centre, prepared as in training.

    Returns:
        (1, *S) float32 in [0, 1], and (*S) bool: pixels of the scan.
    """
    if config.dimensions == 2:
        preparation = Preparation(
            intensity_percentiles=config.intensity_percentiles, spacing_mm=config.spacing_mm, image_size=config.size
        )
        planes = planes_of(volume, preparation=preparation, size=config.size)
        fullest = planes.images.mean((1, 2, 3)).argmax()
        return planes.images[fullest], planes.inside[fullest]
    window = intensity_window(percentile_table(volume.data, name=volume.key), config.intensity_percentiles)
    voxels = normalise(torch.from_numpy(volume.data[..., 0].astype(np.float32)), *window)
    middle = tuple((length - 1) / 2 for length in voxels.shape)
    patch, inside = to_patch(
        voxels, middle, spacing_mm=volume.spacing_mm, target_mm=config.spacing_mm, size=config.size
    )
    return patch[None], inside


def view_sheet(image: Tensor, inside: Tensor, *, config: ViewsConfig, spacing_mm: float) -> bytes:
    """Draw the sheet.

    Args:
        image: (1, *S) float32 in [0, 1].
        inside: (*S) bool, pixels of the scan.
        config: Ranges.
        spacing_mm: Pixel size.
    """
    sheet = _Sheet(image[None], inside[None], config, (spacing_mm,) * (image.ndim - 1))
    left, right = sheet.of_geometry(), sheet.of_intensity()
    left += sheet.of_whole_views(num_draws=_NUM_PANELS * ((len(right) - len(left)) // 2))
    rows = max(len(left), len(right))
    block = _LABEL + _NUM_PANELS * (_EDGE + _GAP)
    width, height = 2 * block + 0.3, rows * (_EDGE + _GAP) + _TOP + _BOTTOM
    figure = new_figure(width, height)
    for column, block_rows in enumerate((left, right)):
        for number, row in enumerate(block_rows):
            start, low = column * (block + 0.2) + 0.1, height - _TOP - (number + 1) * (_EDGE + _GAP)
            middle = (low + _EDGE / 2) / height
            place = (start + _LABEL - 0.12) / width
            figure.text(place, middle, row.label, ha="right", va="bottom", fontsize=10.5, color=INK)
            figure.text(place, middle - 0.04 / height, row.note, ha="right", va="top", fontsize=8.5, color=FAINT)
            for panel, (caption, picture) in enumerate(row.panels):
                at = start + _LABEL + panel * (_EDGE + _GAP)
                axes = figure.add_axes((at / width, low / height, _EDGE / width, _EDGE / height))
                show_plane(axes, picture, **({"vmin": 0, "vmax": 1} if picture.ndim == 2 else {}))
                _draw_caption(axes, caption)
    headline(
        figure,
        "Each transform over its range, and whole draws",
        f"{sheet.dimensions}D, {spacing_mm:g} mm pixels, {' x '.join(map(str, image.shape[1:]))}; "
        "left: geometry; right: appearance",
    )
    figure.text(
        1 - 0.1 / width,
        0.12 / height,
        "shaded: outside the scan, never compared",
        ha="right",
        fontsize=9,
        color=FAINT,
    )
    return to_png(figure)


@dataclass(frozen=True)
class _Sheet:
    image: Tensor  # (1, 1, *S)
    inside: Tensor  # (1, *S)
    config: ViewsConfig
    spacing_mm: tuple[float, ...]

    @property
    def dimensions(self) -> int:
        return len(self.spacing_mm)

    def of_geometry(self) -> list[_Row]:
        config, num_axes = self.config.geometry, self.dimensions
        pairs = num_axes * (num_axes - 1) // 2
        names = ["rotation"] if num_axes == 2 else [f"rotation, axis {axis + 1}" for axis in range(3)]
        largest = (config.rotation_deg,) if num_axes == 2 else config.rotation_3d_deg
        rows = []
        for number, (name, degrees) in enumerate(zip(names, largest, strict=True)):
            turned = np.eye(pairs)[number : number + 1]
            panels = [
                (f"{angle + 0.0:.0f}°", self.moved(rotation_deg=angle * turned))
                for angle in (-degrees, degrees / 2, degrees)
            ]
            rows.append(_Row(name, "degrees", panels))
        low, high = config.scale
        factors = (low, float(np.sqrt(low * high)), high)
        panels = [(f"{factor:.2f}", self.moved(magnification=np.array([factor]))) for factor in factors]
        rows.append(_Row("scale", "factor", panels))
        angles = (-config.shear_deg, config.shear_deg / 2, config.shear_deg)
        panels = [(f"{angle + 0.0:.1f}°", self.moved(shear_deg=np.full((1, pairs), angle))) for angle in angles]
        rows.append(_Row("shear", "degrees", panels))
        lengths = (-config.translation_mm, config.translation_mm / 2, config.translation_mm)
        panels = [(f"{length + 0.0:.0f} mm", self.moved(shift_mm=np.full((1, num_axes), length))) for length in lengths]
        rows.append(_Row("translation", "along each axis", panels))
        one, other = np.eye(num_axes, dtype=bool)[:2]
        flips = (("axis 1", one), ("axis 2", other), ("both", one | other))
        panels = [(name, self.moved(flipped=axes[None])) for name, axes in flips]
        rows.append(_Row("flip", f"p {config.flip_probability:g} each", panels))
        draws = self.draws("elastic")
        geometry = sample_geometry(draws, config=config, size=self.size, spacing_mm=self.spacing_mm)
        controls = geometry.controls_mm
        panels = [
            (
                f"{share * config.elastic_mm:.1f} mm",
                self.moved(controls_mm=None if controls is None else share * controls),
            )
            for share in (0, 0.5, 1)
        ]
        rows.append(
            _Row("elastic", f"every {config.elastic_spacing_mm:g} mm" if controls is not None else "off", panels)
        )
        return rows

    def of_intensity(self) -> list[_Row]:
        config = self.config.intensity
        drawn = sample_appearance(
            self.draws("look"),
            config=config.model_copy(update={"bias_field": 1.0, "bias_field_probability": 1.0}),
            dimensions=self.dimensions,
        )
        bias = np.log(drawn.bias)
        bias /= max(float(np.abs(bias).max()), 1e-12)
        first_axis = np.eye(1, self.dimensions)

        def row(
            label: str, values: tuple[float, ...], caption: Callable[[float], str], parameters: Callable[[float], Any]
        ) -> _Row:
            probability = getattr(config, f"{label.replace(' ', '_')}_probability")
            panels = [(caption(value), self.changed(**parameters(value))) for value in values]
            return _Row(label, f"p {probability:g}" if probability else "off", panels)

        def flag(name: str) -> Callable[[float], Any]:
            return lambda value: {name: np.array([bool(value)])}

        def number(name: str) -> Callable[[float], Any]:
            return lambda value: {name: np.array([float(value)])}

        def ghosts(value: float) -> Any:
            low, high = config.ghosting
            share = (value - low) / (high - low) if high > low else 0.0
            copies = round(config.num_ghosts[0] + share * (config.num_ghosts[1] - config.num_ghosts[0]))
            return {"ghosting": np.array([value]), "num_ghosts": np.array([copies])}

        def window(share: float) -> Any:
            ends = [low + share * (high - low) for low, high in (config.window_low, config.window_high[::-1])]
            return {"window": np.array([ends])}

        noise = _from_zero(config.noise)
        return [
            row("gamma", _ends_and_middle(config.gamma, log=True), lambda v: f"{v:.2f}", number("gamma")),
            row("contrast", _ends_and_middle(config.contrast, log=True), lambda v: f"{v:.2f}", number("contrast")),
            row("inversion", (0, 1), lambda v: "inverted" if v else "as it is", flag("inverted")),
            row(
                "bias field",
                _from_zero(config.bias_field),
                lambda v: f"{v:.2f}",
                lambda v: {"biased": np.array([v > 0]), "bias": np.exp(v * bias)},
            ),
            row("blur", _from_zero(config.blur_mm), lambda v: f"{v:.2f} mm", number("blur_mm")),
            row(
                "low resolution",
                _ends_and_middle(config.low_resolution_mm),
                lambda v: f"{v:.1f} mm",
                lambda v: {"voxel_mm": v * first_axis},
            ),
            row(
                "ghosting",
                _ends_and_middle(config.ghosting),
                lambda v: f"{v:.2f}, n = {ghosts(v)['num_ghosts'][0]}",
                ghosts,
            ),
            row("noise", noise, lambda v: f"{v:.3f}", number("noise")),
            row(
                "rician",
                noise,
                lambda v: f"{v:.3f}",
                lambda v: {"noise": np.array([v]), "rician": np.array([True])},
            ),
            row("window", (0, 0.5, 1), lambda v: "{:.1f} to {:.1f} %".format(*window(v)["window"][0]), window),
        ]

    def of_whole_views(self, *, num_draws: int) -> list[_Row]:
        pair = make_views(
            self.image.expand(num_draws, *self.image.shape[1:]),
            self.inside.expand(num_draws, *self.size),
            config=self.config,
            spacing_mm=self.spacing_mm,
            seed=_SEED,
            epochs=np.zeros(num_draws, dtype=np.int64),
            positions=np.arange(num_draws),
        )
        rows = []
        for first in range(0, num_draws, _NUM_PANELS):
            drawn = range(first, first + _NUM_PANELS)
            views_a = [(f"draw {index + 1}", self.plane(pair.a[index, 0])) for index in drawn]
            views_b = [(f"draw {index + 1}", self.tinted(pair.b[index, 0], pair.valid[index])) for index in drawn]
            rows += [_Row("view a", "all together", views_a), _Row("view b", "of the same image", views_b)]
        return rows

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(self.image.shape[2:])

    def draws(self, name: str) -> Draws:
        zeros = np.zeros(1, dtype=np.int64)
        return Draws.of_samples(_SEED, epochs=zeros, positions=zeros).named(name)

    def moved(
        self,
        *,
        shift_mm: NDArray[np.float64] | None = None,
        controls_mm: NDArray[np.float64] | None = None,
        **parts: NDArray[Any],
    ) -> NDArray[Any]:
        """Warp the image by one part of a geometry, with the others neutral."""
        pairs = self.dimensions * (self.dimensions - 1) // 2
        neutral: dict[str, NDArray[Any]] = {
            "rotation_deg": np.zeros((1, pairs)),
            "magnification": np.ones(1),
            "shear_deg": np.zeros((1, pairs)),
            "flipped": np.zeros((1, self.dimensions), dtype=np.bool_),
        }
        shift_mm = np.zeros((1, self.dimensions)) if shift_mm is None else shift_mm
        geometry = Geometry(affine_matrix(**{**neutral, **parts}), shift_mm, controls_mm)
        warp = warp_of(geometry, size_in=self.size, size_out=self.size, spacing_mm=self.spacing_mm)
        return self.tinted(apply_warp(self.image, warp)[0, 0], inside_mask(warp, self.inside)[0])

    def changed(self, **parameters: Any) -> NDArray[Any]:
        """Change one parameter of the image's appearance, with the others neutral."""
        look = replace(unchanged(self.draws("look"), dimensions=self.dimensions), **parameters)
        result = apply_appearance(self.image, look, spacing_mm=self.spacing_mm, inside=self.inside)
        return self.plane(result[0, 0] * self.inside[0])

    def plane(self, picture: Tensor) -> NDArray[Any]:
        if self.dimensions == 3:
            picture = picture[..., picture.shape[-1] // 2]
        return np.asarray(picture.numpy())

    def tinted(self, picture: Tensor, shows: Tensor) -> NDArray[Any]:
        grey = np.repeat(self.plane(picture).clip(0, 1)[..., None], 3, axis=2)
        return np.where(self.plane(shows)[..., None], grey, 0.1 * grey + 0.9 * OUTSIDE)


def _ends_and_middle(limits: tuple[float, float], *, log: bool = False) -> tuple[float, ...]:
    low, high = limits
    return low, float(np.sqrt(low * high)) if log else (low + high) / 2, high


def _from_zero(most: float) -> tuple[float, ...]:
    return 0.0, most / 2, most


def _draw_caption(axes: Axes, text: str) -> None:
    box = {"facecolor": "black", "alpha": 0.55, "edgecolor": "none", "boxstyle": "square,pad=0.15"}
    axes.text(0.03, 0.04, text, transform=axes.transAxes, color="white", fontsize=8, va="bottom", bbox=box)
