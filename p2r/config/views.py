"""Sections `image` and `views`: the input of the network, and its augmentation."""

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from pydantic.config import JsonDict

from p2r.config.section import Fraction, Range, Section, Within, is_zero

Angle = Annotated[float, Field(ge=0, le=180)]
NumGhosts = Annotated[int, Field(ge=2, le=16)]


PERCENTILES = (0.0, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 98.0, 99.0, 99.5, 99.9, 100.0)
"""Intensity percentiles recorded with every scan, so that training can choose among them without a new ingest."""


class ImageConfig(Section):
    """Input image of the network, made from a scan; the same in training and in use."""

    dimensions: Literal[2, 3] = 2
    """Dimensions of the image. 2: a plane of a scan. 3: a patch from anywhere in it."""
    spacing_mm: PositiveFloat = 1.5
    """Pixel size after resampling, mm. Planes: in the plane. Patches: along every axis."""
    size: PositiveInt = 160
    """Edge of the image, pixels. Planes are cropped or padded about their centre."""
    patches_per_volume: PositiveInt = 1
    """Patches only: number of patches drawn from each volume (or frame) per epoch."""
    foreground_share: Fraction = Field(default=0.0, exclude_if=is_zero)
    """Patches only: fraction of the patches that are centred, as far as the scan reaches, in a part of it brighter than its mean. The rest
    is drawn anywhere. It needs a corpus with `ingest.record: blocks`, which stores these parts."""
    intensity_percentiles: tuple[float, float] = (0.5, 99.5)
    """Percentiles of a scan's non-zero voxels that are mapped to 0 and 1; two of the percentiles recorded with every scan."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.foreground_share and self.dimensions == 2:
            raise ValueError("foreground_share chooses patches: it needs dimensions 3")
        low, high = self.intensity_percentiles
        if low >= high or not {low, high} <= set(PERCENTILES):
            raise ValueError(
                f"intensity_percentiles must be two increasing ones of {', '.join(f'{p:g}' for p in PERCENTILES)}; got {low:g}, {high:g}"
            )
        return self


class GeometryConfig(Section):
    """Ranges of the geometric augmentation. Every parameter is drawn uniformly per image; all compose into one warp."""

    rotation_deg: Annotated[float, Field(ge=0, le=180)] = 90.0
    """Planes: largest rotation to either side, degrees."""
    rotation_3d_deg: tuple[Angle, Angle, Angle] = (30.0, 30.0, 30.0)
    """Volumes: largest rotation to either side about each axis, degrees; the three rotations are applied in turn."""
    scale: Annotated[Range, Within(0.1, 10)] = (0.8, 1.25)
    """Smallest and largest magnification, drawn log-uniformly."""
    shear_deg: Annotated[float, Field(ge=0, lt=60)] = 5.0
    """Largest shear to either side, degrees; in volumes, for each pair of axes."""
    translation_mm: Annotated[float, Field(ge=0, le=1000)] = 10.0
    """Largest shift along each axis, mm."""
    flip_probability: Fraction = 0.5
    """Probability of mirroring, for each axis."""
    elastic_mm: NonNegativeFloat = 4.0
    """Standard deviation of the displacement of the elastic control points, mm; 0 disables."""
    elastic_spacing_mm: Annotated[float, Field(ge=4)] = 32.0
    """Spacing of the elastic control points, mm."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.elastic_mm > self.elastic_spacing_mm:
            raise ValueError(
                f"elastic_mm must not exceed elastic_spacing_mm ({self.elastic_spacing_mm:g}): the image would fold, "
                f"got {self.elastic_mm:g}"
            )
        return self


class IntensityConfig(Section):
    """Ranges of the intensity augmentation, for images in [0, 1]. Two independent draws give the two views different contrast.

    Each transform has a probability of being applied and a range for its strength, drawn uniformly unless stated.
    """

    gamma: Annotated[Range, Within(0.1, 10)] = (0.6, 1.6)
    """Exponent, drawn log-uniformly."""
    gamma_probability: Fraction = 1.0
    """Probability of a gamma exponent."""
    contrast: Annotated[Range, Within(0.1, 10)] = (0.75, 1.25)
    """Factor about the image's mean, drawn log-uniformly."""
    contrast_probability: Fraction = 1.0
    """Probability of a contrast factor."""
    inversion_probability: Fraction = 0.25
    """Probability of exchanging dark and bright."""
    bias_field: Annotated[float, Field(ge=0, le=3)] = 0.4
    """Largest log-amplitude of a smooth multiplicative field; 0 disables."""
    bias_field_probability: Fraction = 1.0
    """Probability of a bias field."""
    blur_mm: Annotated[float, Field(ge=0, le=20)] = 1.5
    """Largest standard deviation of a Gaussian blur, mm; 0 disables."""
    blur_probability: Fraction = 0.5
    """Probability of a blur."""
    low_resolution_mm: Annotated[Range, Within(0, 100)] = (2.0, 6.0)
    """Smallest and largest edge of simulated large voxels, mm. Axes whose pixels are already as large are left unchanged."""
    low_resolution_probability: Fraction = 0.0
    """Probability of large voxels, for each axis."""
    ghosting: Annotated[Range, Within(0, 1)] = (0.3, 1.0)
    """Smallest and largest fraction of every n-th line of k-space removed by periodic motion."""
    num_ghosts: tuple[NumGhosts, NumGhosts] = (2, 6)
    """Smallest and largest n: the number of copies across the image, along one random axis."""
    ghosting_probability: Fraction = 0.0
    """Probability of ghosts."""
    noise: Annotated[float, Field(ge=0, le=1)] = 0.06
    """Largest standard deviation of the noise; 0 disables."""
    noise_probability: Fraction = 1.0
    """Probability of noise."""
    rician_probability: Fraction = 0.0
    """Probability that the noise, where applied, is Rician, as in magnitude images; Gaussian otherwise."""
    window_low: Annotated[Range, Within(0, 100)] = (0.0, 10.0)
    """Smallest and largest percentile of an image's pixels in the scan that is mapped to 0."""
    window_high: Annotated[Range, Within(0, 100)] = (90.0, 100.0)
    """Smallest and largest percentile that is mapped to 1."""
    window_probability: Fraction = 0.0
    """Probability of an intensity window."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_ghosts[0] > self.num_ghosts[1]:
            raise ValueError(f"num_ghosts must increase, got {list(self.num_ghosts)}")
        if self.window_low[1] >= self.window_high[0]:
            raise ValueError(
                f"window_low must end below window_high, got {list(self.window_low)} and {list(self.window_high)}"
            )
        return self


VIEWS: dict[str, dict[str, dict[str, object]]] = {
    "p2r": {},
    "pix2rep": {
        "geometry": {"rotation_deg": 90.0, "scale": (1.05, 3.0), "shear_deg": 0.0, "elastic_mm": 0.0},
        "intensity": {
            "gamma": (0.95, 1.05),
            "gamma_probability": 0.9,
            "contrast_probability": 0.0,
            "inversion_probability": 0.35,
            "bias_field": 0.9,
            "bias_field_probability": 0.75,
            "blur_mm": 2.0,
            "noise_probability": 0.3,
        },
    },
}
"""Named presets for the section `views`. pix2rep: transforms, probabilities and ranges of the code released by Pix2Rep's authors,
in our units: crops as magnifications, blur in mm. Its shifts and noise levels are ours; theirs depend on the image size and the
scanner's units. pix2rep_v2: the same, plus Pix2Rep-v2's window between random percentiles, with our range of percentiles."""
VIEWS["pix2rep_v2"] = {
    "geometry": VIEWS["pix2rep"]["geometry"],
    "intensity": {**VIEWS["pix2rep"]["intensity"], "window_probability": 1.0},
}


def is_same(value: object) -> bool:
    """Return whether the views show the same contrasts; then the field is left out, as in configurations before it."""
    return value == "same"


def _allow_preset_name(schema: JsonDict) -> None:
    section = schema.copy()
    schema.clear()
    schema["anyOf"] = [{"enum": list(VIEWS)}, section]


class ViewsConfig(Section):
    """The two views of an image: two intensity draws, one geometric draw. A preset's name may replace the section: p2r (the
    defaults below), pix2rep or pix2rep_v2 (close to the augmentation of their authors)."""

    model_config = ConfigDict(json_schema_extra=_allow_preset_name)

    geometry: GeometryConfig = GeometryConfig()
    """The warp between the views."""
    intensity: IntensityConfig = IntensityConfig()
    """Changes of contrast, drawn for each view."""
    shown_fraction: Annotated[Range, Within(0.02, 1)] | None = None
    """Pretraining only: smallest and largest fraction of the image that a view shows, in a box drawn for each view. The rest is zero, as
    outside the scan. It removes a shortcut: in scans smaller than the image, the distance to their edge reveals the position. None: all."""

    frames_apart: NonNegativeInt = Field(default=0, exclude_if=is_zero)
    """Pretraining on series (cine and other 4D scans) only: view b shows another frame of the series, drawn among those at most this many
    frames before or after the frame of view a. The pixel pairs ignore motion between the two. Scans of one frame show it in both views.
    0: both views show the same frame."""
    contrasts: Literal["same", "cross", "mixed"] = Field(default="same", exclude_if=is_same)
    """Pretraining with `model.contrasts` only: contrasts of the two views of an image. same: both show all contrasts that the image has.
    cross: each shows one, not the same if the image has several, so that the representation does not depend on the contrast. mixed: same
    or cross, drawn for each image."""
    contrast_dropout: Fraction = Field(default=0.0, exclude_if=is_zero)
    """Images of several contrasts only: probability of dropping each contrast, except one; it prepares the network for missing ones.
    Pretraining: from both views of an image, where they show the same contrasts. Fine-tuning: from each labelled image and strong view."""

    @model_validator(mode="before")
    @classmethod
    def _replace_preset_name(cls, values: Any) -> Any:
        if not isinstance(values, str):
            return values
        if values not in VIEWS:
            raise ValueError(f"must be a section, or one of the names {', '.join(VIEWS)}")
        return VIEWS[values]
