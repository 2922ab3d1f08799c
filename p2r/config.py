"""Schema of the `p2r` part of a job file: one frozen pydantic model per section.

Unknown keys are rejected in every section; `p2r.job` adds the nearest valid name. Names carry their units. The docstring
of a field is also its description in the JSON Schema.
"""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from p2r.errors import InputError
from p2r.modes import MODES, Mode, Setting
from p2r.patterns import check_subject_pattern
from p2r.reference import names_weights_file, parse_reference


class FilledIn:
    """Marker of job fields in which `${NAME}` and `${NAME:-default}` are replaced by environment variables."""


Location = Annotated[str, FilledIn()]
"""A path or URL. Only these and a corpus's own statements (licence, provenance) expand variables: other fields are published."""
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Range = tuple[float, float]
Angle = Annotated[float, Field(ge=0, le=180)]
NumGhosts = Annotated[int, Field(ge=2, le=16)]
NumLabelled = PositiveInt | Literal["all"]

PERCENTILES = (0.0, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 98.0, 99.0, 99.5, 99.9, 100.0)
"""Intensity percentiles recorded with every scan, so that training can choose among them without a new ingest."""


def Within(low: float, high: float) -> AfterValidator:  # noqa: N802 (used in place of a type)
    """Return a validator that requires an increasing range inside [low, high]."""

    def check(value: Range) -> Range:
        if not low <= value[0] <= value[1] <= high:
            raise ValueError(f"must increase and be within [{low:g}, {high:g}], got {list(value)}")
        return value

    return AfterValidator(check)


def _check_reference(text: str) -> str:
    try:
        parse_reference(text)
    except InputError as error:
        raise ValueError(str(error)) from None
    return text


Artefact = Annotated[Location, AfterValidator(_check_reference)]
"""Reference to a published backbone: a URL, or `URL@sha256:HEX`, which pins its manifest."""


class Section(BaseModel):
    """A section of a job file. Immutable; unknown keys are rejected."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class SubjectsOf(Section):
    """Subjects of one split of a task: a corpus defined this way cannot drift from its task."""

    task: Location
    """Path of the task's YAML, relative to the job file."""
    split: Literal["train", "validation", "test", "not_held_out"] = "train"
    """Split whose subjects enter the corpus. not_held_out: every subject of the sources except the task's validation and test patients,
    so unlabelled scans are included. Pretraining on `test` would be a leak; fine-tuning refuses such a backbone."""


class QualityConfig(Section):
    """Quality rules for scans. All rules are off by default; an explicit rule overrides the preset."""

    preset: Literal["none", "openmind"] = "none"
    """openmind: the limits of the OpenMind corpus: spacing up to 3 mm, and a field of view of at least 100 mm along every axis."""
    max_spacing_mm: PositiveFloat | None = None
    """Largest voxel size along any axis, mm; others are refused as `spacing`."""
    min_field_of_view_mm: PositiveFloat | None = None
    """Smallest extent along any axis, mm; others are refused as `field_of_view`."""
    min_slices: PositiveInt | None = None
    """Smallest number of planes across `slice_axis`; others are refused as `slice_count`."""
    max_size: PositiveInt | None = None
    """Largest number of voxels along any axis; others are refused as `too_large`."""

    def limits(self) -> Self:
        """Return the rules, with the preset's values for those not given."""
        given = {name: getattr(self, name) for name in self.model_fields_set - {"preset"}}
        preset = {"max_spacing_mm": 3.0, "min_field_of_view_mm": 100.0} if self.preset == "openmind" else {}
        return type(self)(**{**preset, **given})


_VIRTUAL_SUBJECT_WORDS = {"licence": "icbm-152", "provenance": "virtual subjects", "cohort": "icbm152"}
"""Words that identify statements about `template://` sources, so that they are refused for a corpus of real scans."""


class IngestConfig(Section):
    """Ingest: scans -> a corpus of WebDataset shards."""

    sources: Annotated[tuple[Location, ...], Field(min_length=1)]
    """Sources of scans, in three forms. Folders, files or URLs (`file://`, `s3://`), searched for NIfTI (`.nii`, `.nii.gz`, `.hdr` with
    `.img`), BIDS and, in folders, DICOM. Lists of scans (`.csv`, `.tsv`, `.jsonl`) with a `path` and an optional `subject`.
    `template://icbm152?subjects=N`: virtual subjects."""
    include: tuple[str, ...] = ()
    """Take only scans whose path below their source matches one of these patterns, such as `**/anat/*_T1w.nii.gz`. `*` also matches
    `/`. Empty: all."""
    exclude: tuple[str, ...] = ()
    """Leave out scans whose path below their source matches one of these patterns."""
    licence: Annotated[str, FilledIn(), Field(min_length=1)]
    """SPDX identifier or name of the data's licence. It is copied into every manifest made from this corpus."""
    provenance: Annotated[str, FilledIn()] = ""
    """Origin of the data, and how to cite them."""
    cohort: str = "default"
    """Name space of the subject names: `sub-01` of one cohort is not `sub-01` of another. Default with `subjects_of`: the task's cohort."""
    subject_pattern: Annotated[str, AfterValidator(check_subject_pattern)] = r"^(sub-[A-Za-z0-9]+|[^_.]+)"
    """Regular expression whose first group is the subject. It is searched in the file name (DICOM: the first folder below the source),
    then in the path below the source. BIDS names and lists that give a subject override it. Defaults: with `subjects_of`, the task's
    pattern; with a `dataset.json` (nnU-Net, Medical Segmentation Decathlon), the case. Python's syntax, with the limits of
    `p2r.patterns`."""
    one_subject: bool = False
    """Accept sources in which `subject_pattern` finds only one subject. False: the job stops, since the pattern is usually wrong."""
    label_maps: Literal["leave_out", "take"] = "leave_out"
    """Treatment of label maps among the sources. leave_out: skip them, as `label_map` in the ledger. Label maps are files in folders such
    as labelsTr, masks or derivatives, names ending in _seg, _mask or similar, and volumes of few integers. take: read them as scans."""
    dicom_subject: Literal["folder", "patient_id"] = "folder"
    """Source of the subject of a DICOM series. folder: `subject_pattern` on the folder's name. patient_id: the tag PatientID, which then
    enters the corpus unchanged."""
    subjects: tuple[str, ...] | None = None
    """Take only these subjects: names, or ranges such as `patient[001-014]`. None: all."""
    subjects_of: SubjectsOf | None = None
    """Take only the subjects of one split of a task. None: all."""
    slice_axis: Literal["auto", 0, 1, 2] = "auto"
    """Axis of the RAS volume across which planes are cut. auto: the axis with the largest spacing; the third if all are equal."""
    min_size: PositiveInt = 16
    """Smallest number of voxels along each axis of a plane; smaller scans are refused as `too_small`."""
    quality: QualityConfig = QualityConfig()
    """Further rules on scans as acquired, before resampling."""
    max_scan_mib: PositiveFloat = 4096.0
    """Largest voxel memory that a scan's header may declare, MiB; larger scans are refused as `too_large`."""
    max_frames: PositiveInt | None = None
    """Largest number of time frames taken from a 4D series, evenly spaced, so that long series do not dominate the corpus. None: all."""
    nan_voxels: Literal["background", "refuse"] = "background"
    """Treatment of NaN voxels, such as SPM writes outside the head. background: replace by 0, or by the minimum if lower, and count them
    in the ledger. refuse: refuse the scan as `nonfinite`."""
    resample_mm: PositiveFloat | tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    """Voxel size to which every scan is resampled, mm: one number, or three (right, anterior, superior). None: as acquired."""
    dcm2niix_timeout_s: PositiveFloat = 300.0
    """Time limit for converting one DICOM series, s; a slower series is refused as `timeout`."""
    shard_size_mib: PositiveFloat = 64.0
    """Record size at which a shard is closed, MiB. A subject is never split between two shards."""
    seed: int = 0
    """Seed for shuffling subjects over shards."""
    record: Literal["planes", "blocks", "npy"] = "planes"
    """Chunks of a record. planes: for 2D training. blocks: cubes of 32 voxels, for 3D patches. npy: uncompressed, for readers without
    our decoder."""
    codec: Literal["lz4", "zstd"] = "lz4"
    """Compression of the chunks. zstd is about a fifth smaller and about three times slower to read."""
    pseudonyms: bool = False
    """Replace the names of subjects, scans and files by keyed hashes in everything written. The key is read from the environment
    variable `P2R_PSEUDONYM_KEY`."""
    max_refused_fraction: Fraction = 0.5
    """Fraction of refused scans above which the job stops, checked after 20 scans (or all, if fewer). Copies do not count."""
    cross_subject_copies: Literal["keep", "refuse"] = "keep"
    """Treatment of scans with exactly the voxels of another subject's scan. keep: take and count them; the ledger names the original.
    refuse: take only the first. Copies within a subject are always refused."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.subjects is not None and self.subjects_of is not None:
            raise ValueError("give either subjects or subjects_of, not both")
        is_real = [source for source in self.sources if not source.startswith("template://")]
        borrowed = [name for name, word in _VIRTUAL_SUBJECT_WORDS.items() if word in getattr(self, name).lower()]
        if is_real and borrowed:
            raise ValueError(
                f"{', '.join(borrowed)} speak{'s' * (len(borrowed) == 1)} of virtual subjects, but sources name other data ({is_real[0]}): "
                f"state {', '.join(f'ingest.{name}' for name in borrowed)} of these"
            )
        return self


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
    intensity_percentiles: tuple[float, float] = (0.5, 99.5)
    """Percentiles of a scan's non-zero voxels that are mapped to 0 and 1; two of the percentiles recorded with every scan."""

    @model_validator(mode="after")
    def _check(self) -> Self:
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


VIEWS: dict[str, dict[str, dict[str, Any]]] = {
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


def _allow_preset_name(schema: dict[str, Any]) -> None:
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

    @model_validator(mode="before")
    @classmethod
    def _replace_preset_name(cls, values: Any) -> Any:
        if not isinstance(values, str):
            return values
        if values not in VIEWS:
            raise ValueError(f"must be a section, or one of the names {', '.join(VIEWS)}")
        return VIEWS[values]


class ModelConfig(Section):
    """Encoder-decoder with the dimensions of its image, and the projection head used only in pretraining."""

    name: Literal["basic_unet", "unet", "dynunet", "residual_dynunet", "swin_unetr", "residual_encoder_unet"] = (
        "basic_unet"
    )
    """MONAI's BasicUNet (two convolutions per level), UNet (residual units), DynUNet (nnU-Net's network, with plain or residual blocks)
    or SwinUNETR (attention within windows). residual_encoder_unet: nnU-Net's ResEnc, the network of the OpenMind checkpoints."""
    in_channels: PositiveInt = 1
    """C, contrasts of an image. A record of a corpus holds one."""
    channels: Annotated[tuple[PositiveInt, ...], Field(min_length=3, max_length=8)] = (16, 32, 64, 128, 256)
    """Channels per level, finest first; each level halves the size. basic_unet has five levels. swin_unetr has five token levels below
    the image's own resolution; their channels double from a multiple of 12."""
    blocks: Annotated[tuple[PositiveInt, ...] | None, Field(exclude_if=lambda value: value is None)] = None
    """residual_encoder_unet only: residual blocks per level, as many numbers as in `channels`. None: nnU-Net's 1, 3, 4, then 6."""
    feature_channels: PositiveInt = 32
    """F, channels of the dense representation that a backbone returns for every pixel."""
    level: NonNegativeInt = 0
    """Decoder level that gives the representation. 0: the finest, one vector per pixel; 1: one per 2 pixels along each axis; 2: one per
    4. Finer levels are left out of the network."""
    normalisation: Literal["instance", "group"] = "instance"
    """Both normalise each image by itself, with a learnt scale and shift. Batch normalisation is refused: it mixes a rank's images."""
    groups: PositiveInt = 8
    """Group normalisation only: number of groups; must divide every number of channels."""
    channels_last: Literal["auto"] | bool = "auto"
    """Use the channels-last memory format. auto: on GPUs, where convolutions are faster in it; on CPUs they are slower."""
    checkpoint_activations: Literal["none", "encoder", "all"] | PositiveInt = "none"
    """Blocks whose activations are recomputed in the backward pass instead of stored: less memory, more time, the same numbers. A number:
    the blocks of that many levels, starting at the finest, which hold the most."""
    head_channels: PositiveInt = 256
    """Hidden width of the projection head."""
    embedding_channels: PositiveInt = 128
    """E, length of the embedding vectors that the loss compares."""

    @field_validator("normalisation", mode="before")
    @classmethod
    def _refuse_batch(cls, value: object) -> object:
        if value == "batch":
            raise ValueError(
                "batch normalisation would make features depend on the other images of a rank and micro-batch: use instance or group"
            )
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        first, channels = self.channels[0], list(self.channels)
        if self.name == "basic_unet" and len(channels) != 5:
            raise ValueError(f"channels of basic_unet must be five, got {len(channels)}; unet and dynunet take 3 to 8")
        if self.name == "swin_unetr" and (first % 12 or channels != [first * 2**level for level in range(5)]):
            raise ValueError(
                f"channels of swin_unetr must be five that double from a multiple of 12, such as 24, 48, 96, 192, 384, got {channels}"
            )
        if self.blocks is not None and self.name != "residual_encoder_unet":
            raise ValueError(f"blocks are for residual_encoder_unet; {self.name} has none: leave them out")
        if self.blocks is not None and len(self.blocks) != len(channels):
            raise ValueError(
                f"blocks must have one number per level, got {len(self.blocks)} for {len(channels)} levels"
            )
        if self.level >= self.depth:
            raise ValueError(f"level must be below {self.depth} ({self._kind} depth {self.depth}), got {self.level}")
        if self.normalisation == "group":
            uneven = [number for number in (*channels, self.feature_channels) if number % self.groups]
            if uneven:
                raise ValueError(f"groups must divide channels and feature_channels, got {self.groups} for {uneven}")
        return self

    @property
    def num_blocks(self) -> tuple[int, ...]:
        """Residual blocks of every level of residual_encoder_unet."""
        return self.blocks or tuple((1, 3, 4)[level] if level < 3 else 6 for level in range(len(self.channels)))

    @property
    def depth(self) -> int:
        """Number of times the network halves an image."""
        return len(self.channels) - (self.name != "swin_unetr")

    @property
    def size_divisor(self) -> int:
        """Divisor required of every side of an image."""
        return 1 << self.depth

    @property
    def stride(self) -> int:
        """Pixels along each axis that share one vector of the representation."""
        return 1 << self.level

    @property
    def _kind(self) -> str:
        return "Swin UNETR" if self.name == "swin_unetr" else "U-Net"

    def check_size(self, *size: int, what: str) -> None:
        """Raise `ValueError` if the network cannot take an image of this size.

        Args:
            size: Pixels along each axis.
            what: Name of the size, for the message.
        """
        divisor, shown = self.size_divisor, " x ".join(map(str, size))
        rule = f"({self._kind} depth {self.depth})"
        if any(side % divisor for side in size):
            raise ValueError(f"{what} must be divisible by {divisor} {rule}, got {shown}")
        if all(side == divisor for side in size):
            # Normalising a single pixel gives zero for every image.
            raise ValueError(
                f"{what} must be divisible by {divisor} and larger {rule}: one pixel would be left at the coarsest level, got {shown}"
            )


class LossConfig(Section):
    """The objective over pixel pairs."""

    name: Literal["info_nce", "barlow_twins"] = "info_nce"
    """InfoNCE contrasts every pixel with all others (Pix2Rep); Barlow Twins decorrelates channels (Pix2Rep-v2)."""
    pixel_pairs_per_image: PositiveInt = 256
    """Corresponding pixels drawn from each pair of views. The N of a step is this times the global batch."""
    foreground_share: Fraction = 0.0
    """Fraction of these drawn among pixels brighter than their image's mean; the rest is drawn anywhere in the scan."""
    negatives: Literal["global_batch", "micro_batch", "image"] = "global_batch"
    """Pixels that serve as negatives. global_batch: all pixels of the step; combined with `micro_batch`, this encodes every image twice.
    micro_batch: the pixels of one micro-batch of all workers. image (InfoNCE only): the pixels of the same image, so that the same
    anatomy in other patients is not a negative."""
    form: Literal["cross_view", "nt_xent"] = "nt_xent"
    """InfoNCE only: negatives from the other view (N x N), or from both without the diagonal (2N x 2N, as Pix2Rep)."""
    temperature: PositiveFloat = 0.2
    """InfoNCE only: tau, the width of the softmax over cosine similarities."""
    learn_temperature: bool = False
    """InfoNCE only: train tau with the weights, starting at `temperature`. It is clamped to [0.013, 1]: below, float32 sums would overflow
    or vanish."""
    decoupled: bool = False
    """InfoNCE only: leave the positive out of the denominator (decoupled contrastive learning)."""
    exclude_within_mm: PositiveFloat | None = None
    """InfoNCE only: exclude pixels of one image up to this distance from each other's negatives (.inf: all of an image). None: no limit."""
    exchange: Literal["all_gather", "ring"] = "all_gather"
    """InfoNCE only. all_gather: each worker holds all embeddings. ring (slower): each holds one other worker's at a time, passed around."""
    off_diagonal_weight: NonNegativeFloat = 0.005
    """Barlow Twins only: weight of the off-diagonal terms."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.negatives == "image" and self.name != "info_nce":
            raise ValueError(f"negatives image needs name info_nce: {self.name} contrasts no pixels")
        if self.negatives == "image" and self.exclude_within_mm == math.inf:
            raise ValueError(
                "negatives image and exclude_within_mm .inf leave no negatives: give a radius, or leave it out"
            )
        return self


class OptimizerConfig(Section):
    """AdamW with linear warm-up and cosine decay to zero."""

    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 1e-4
    """Decoupled weight decay."""
    warmup_fraction: Fraction = 0.05
    """Fraction of all steps in which the learning rate rises linearly."""
    clip_norm: NonNegativeFloat = 1.0
    """Global gradient norm above which gradients are scaled down; 0 disables."""


class CorpusShare(Section):
    """One of several corpora."""

    url: Location
    """URL of the corpus."""
    weight: PositiveFloat | None = None
    """Weight of this corpus in every batch, relative to the others. None for all: in proportion to their sizes."""
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """SHA-256 of a manifest. None: the current revision when the run starts; a resumed run keeps it."""


class ProbeConfig(Section):
    """A quick linear probe on a labelled task during pretraining, which shows a collapse within minutes.

    It reads a few train and validation patients of the task, never a test patient, and does not affect training.
    """

    task: Location
    """Path of the task's YAML, relative to the job file."""
    interval: PositiveInt = 500
    """Steps between two probes; the last step is always probed. The next report states the result."""
    num_labelled: PositiveInt = 1
    """Train patients whose pixels the probe is fitted to."""
    num_validation: PositiveInt = 4
    """Validation patients to segment; all of them, if there are fewer."""
    planes_per_scan: PositiveInt = 16
    """Largest number of planes (for volumes: frames) read from each scan, evenly spaced."""
    seed: int = 0
    """Seed for drawing the patients."""


class PretrainConfig(Section):
    """Pretraining: corpus -> pixel representation."""

    corpus: Location | Annotated[tuple[CorpusShare, ...], Field(min_length=1)] | None = None
    """URL of the corpus, or several with weights. None: `<storage>/corpus`, made by this job's ingest section if absent."""
    image: ImageConfig = ImageConfig()
    """The network's input."""
    views: ViewsConfig = ViewsConfig()
    """Augmentation: geometry, to which the representation is equivariant, and intensity, to which it is invariant."""
    model: ModelConfig = ModelConfig()
    """Network."""
    loss: LossConfig = LossConfig()
    """Objective."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and schedule."""
    steps: PositiveInt
    """Optimizer steps."""
    global_batch: PositiveInt
    """Images per optimizer step, over all workers."""
    neighbours: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Fraction of the batch's images that are the next plane of another image in it: nearly alike, hence hard negatives."""
    max_replaced: NonNegativeInt = 100
    """Damaged samples that a worker may replace by others before it stops. Each is recorded under `quarantine/` and counted. 0: none."""
    micro_batch: PositiveInt | None = None
    """Images that a worker encodes at once, if its part of the global batch does not fit into memory. None: all of its part."""
    seed: int = 0
    """Seed for weights, order, views and points."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Arithmetic of the network. Normalisation statistics, sampling at points, the projection head and the sums of the loss are always
    fp32. tf32: fp32, with products that GPUs of compute capability 8.0 or newer may round to 10 bits. The loss kernels support tf32 and
    bf16; with fp32 a GPU computes the loss in torch's tiles, several times slower."""
    compile: bool | Literal["reduce-overhead"] = False
    """Compile the backbone (torch.compile) before the first step. Takes seconds to minutes, stated in the first report; the result is
    cached in `$P2R_CACHE`. Without a compiler the report says so, and training runs uncompiled. reduce-overhead: GPUs also replay the
    kernels as CUDA graphs, for networks so small that kernel launches dominate; it uses more memory."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage, by state partitioned over the workers: 0 nothing, 1 optimizer state, 2 also gradients, 3 also weights. Each
    saves memory with several workers. Stage 3 fetches weights layer by layer; on GPUs its step waits for the device."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Decay of an exponential moving average of the weights, in fp32, which is then published (0.999: about the last 1000 steps). Over
    the first steps it is the plain mean. None: publish the last weights."""
    max_skipped_steps: NonNegativeInt = 10
    """Consecutive steps that may be skipped because the loss or a gradient is not finite; then the run stops and names the last good
    checkpoint. A skipped step uses up its batch and its place in the schedule and changes nothing. 0: the first one stops the run."""
    deterministic: bool = False
    """Use only deterministic algorithms (torch.use_deterministic_algorithms, cuDNN, cuBLAS with a fixed workspace). A resumed run is then
    bitwise equal to an uninterrupted one on GPUs, too, but slower. On CPUs this holds without it."""
    report_interval: PositiveInt = 10
    """Steps between two reports (a line on the terminal, a line in history.jsonl)."""
    equivariance_interval: NonNegativeInt = 1
    """Reports from one that states the equivariance error to the next. The error is 0 if the embeddings of a step's pixel pairs follow
    the warp perfectly, 1 if no better than chance. 0 disables."""
    checkpoint_interval: PositiveInt = 100
    """Steps between two checkpoints; the last step is always saved."""
    keep_checkpoints: PositiveInt = 2
    """Number of newest checkpoints kept on the storage."""
    keep_every: NonNegativeInt = 0
    """Keep checkpoints whose step is a multiple of this permanently, besides the newest. 0 disables."""
    init_from: Artefact | None = None
    """URL of the initial weights. A published backbone (`STORAGE/backbones/NAME/1`): its projection head is new. Another run's checkpoint:
    `STORAGE/pretrain/checkpoints/step-00001000`. A weights file (.safetensors, .pth, .pt, .ckpt) of MONAI's networks, nnU-Net, nnssl or
    anatomix, whose names are mapped to `model`. `@sha256:HEX` pins each. Step, schedule and order start from zero. None: random weights,
    drawn by `seed`."""
    probe: ProbeConfig | None = None
    """Linear probe on a labelled task during training. None: no probe."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.model.check_size(self.image.size, what="image.size")
        if self.model.in_channels != 1:
            raise ValueError(
                f"model.in_channels must be 1, the contrasts in a record of a corpus, got {self.model.in_channels}"
            )
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "compile needs zero_stage 0, 1 or 2: stage 3 fetches weights between layers, where a compiled graph breaks"
            )
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError("precision bf16 needs zero_stage 1, 2 or 3 (DeepSpeed's stage 0 drifts), got 0")
        return self

    @property
    def negatives(self) -> str:
        """Description of the negatives of a pixel, for reports."""
        if self.loss.negatives == "micro_batch" and self.micro_batch is not None:
            return f"of micro-batches only ({self.micro_batch} images of each worker)"
        return "of the same image" if self.loss.negatives == "image" else "of the global batch"


class PublishConfig(Section):
    """Publishing: checkpoint -> backbone that others can load."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    """Folder under `<storage>/backbones/`."""
    version: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "1"
    """Folder under the name. A published version is never overwritten with other weights."""
    licence: str | None = None
    """Licence of the weights. None: the corpus's licence, which is also the only one allowed where the corpus forbids others."""
    description: str = ""
    """One paragraph for the model card."""


class Distribution(Section):
    """Distribution of candidates, named as in Ray Tune; exactly one of the fields."""

    uniform: Range | None = None
    """Uniform between two bounds."""
    loguniform: Range | None = None
    """Log-uniform between two bounds above 0."""
    randint: tuple[int, int] | None = None
    """Integers from the first bound to below the second."""
    choice: Annotated[tuple[float, ...], Field(min_length=1)] | None = None
    """One of these values."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.model_fields_set) != 1:
            raise ValueError("a distribution has one of uniform, loguniform, randint and choice")
        name, bounds = self.named()
        if name != "choice" and not bounds[0] < bounds[1]:
            raise ValueError(f"{name} needs two increasing bounds, got {list(bounds)}")
        if name == "loguniform" and bounds[0] <= 0:
            raise ValueError(f"loguniform needs bounds above 0, got {list(bounds)}")
        return self

    def named(self) -> tuple[str, tuple[float, ...]]:
        """Return the name of the given distribution, and its bounds or choices."""
        (name,) = self.model_fields_set
        return name, getattr(self, name)


Candidates = Annotated[tuple[float, ...], Field(min_length=1)] | Distribution


class SearchConfig(Section):
    """Hyper-parameter search on validation patients: equally many candidates for every mode, then frozen.

    Lists form a grid. If any candidate is a distribution, `num_samples` candidates are drawn. A single candidate is used as it is.
    """

    num_labelled: Annotated[tuple[NumLabelled, ...], Field(min_length=1)] = (1,)
    """Numbers of labelled patients at which candidates are compared (first draw), by mean validation Dice."""
    learning_rates: dict[Mode, Candidates] = {
        mode: facts.learning_rates for mode, facts in MODES.items() if facts.trains != "nothing"
    }
    """Candidates for the peak learning rate, by mode: a list, or a distribution such as `{loguniform: [1e-4, 1e-2]}`. prototype has none:
    it trains nothing."""
    space: dict[Setting, Candidates] = {}
    """Candidates for further settings, for the modes that have them; each overrides the setting of its name."""
    num_samples: PositiveInt = 8
    """Number of candidates per mode, if any come from a distribution."""
    searcher: Annotated[str, Field(min_length=1)] = "grid"
    """Search algorithm. grid: the lists, or draws that depend only on the seed. Under Ray, also the name of a search algorithm of Ray
    Tune, such as optuna, which learns from earlier candidates. It is seeded, too; its package must be installed."""
    scheduler: Annotated[str, Field(min_length=1)] = "none"
    """Scheduler that stops candidates early: none, asha, or the name of another scheduler of Ray Tune. Works only under Ray; in one
    process every candidate is trained to its end."""
    scheduler_options: dict[str, float | int | str | bool] = {}
    """Arguments of the scheduler, such as `{reduction_factor: 3, grace_period: 2}`; its time is counted in reports."""
    report_steps: PositiveInt = 50
    """Optimizer steps between two intermediate validations, for the scheduler."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for mode, rates in self.learning_rates.items():
            if MODES[mode].trains == "nothing":
                raise ValueError(f"learning_rates has candidates for {mode}, which trains nothing: take them out")
            given = rates.named()[1] if isinstance(rates, Distribution) else rates
            if min(given) <= 0:
                raise ValueError(f"learning_rates.{mode} must be above 0, got {min(given):g}")
        for name, candidates in (*self.learning_rates.items(), *self.space.items()):
            if not isinstance(candidates, Distribution) and len(set(candidates)) < len(candidates):
                raise ValueError(f"the candidates of {name} must differ, got {list(candidates)}")
        numbers = {len(rates) for rates in self.learning_rates.values() if not isinstance(rates, Distribution)}
        if len(numbers) > 1 and not self.space and not self.is_drawn:
            raise ValueError(
                "learning_rates must hold equally many candidates for every mode: a fair comparison searches equally"
            )
        if (self.scheduler != "none" or self.searcher != "grid") and len(self.num_labelled) > 1:
            raise ValueError(
                f"a scheduler or searcher compares results of one kind: search.num_labelled must hold one number, "
                f"got {list(self.num_labelled)}"
            )
        return self

    @property
    def is_drawn(self) -> bool:
        """True if at least one setting is drawn from a distribution."""
        return any(isinstance(found, Distribution) for found in (*self.learning_rates.values(), *self.space.values()))


class ImportedConfig(Section):
    """Facts about a weights file of another tool that it does not state itself."""

    model: ModelConfig
    """Network of the file: name, channels and, for residual_encoder_unet, blocks. The heads are not used."""
    image: ImageConfig
    """Input image that the network is given."""
    licence: Annotated[str, FilledIn(), Field(min_length=1)]
    """SPDX identifier or name of the weights' licence; it is copied into everything made from them."""
    provenance: Annotated[str, FilledIn()] = ""
    """Origin of the weights, and how to cite them."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.model.check_size(self.image.size, what="image.size")
        return self


class FinetuneConfig(Section):
    """Few-shot fine-tuning: backbone x task x labelled patients x draw x mode -> results on test (or validation) patients."""

    tasks: Annotated[tuple[Location, ...], Field(min_length=1)]
    """Paths of task YAMLs, relative to the job file."""
    backbone: Artefact | None = None
    """URL of a published backbone; `URL@sha256:HEX` pins its manifest. Or a weights file of another tool (see `imported`), which is first
    published as `backbones/imported/<digest>` in the job's storage. None: the backbone that this job publishes."""
    imported: Annotated[ImportedConfig | None, Field(exclude_if=lambda value: value is None)] = None
    """Only if `backbone` is a weights file (.safetensors, .pth, .pt, .ckpt) of MONAI's networks, nnU-Net, nnssl or anatomix: its network,
    image and licence. Its pretraining patients are unknown, so `allow_transductive` must be set."""
    backbone_signed_by: Annotated[str, Field(pattern=r"^ed25519:[0-9a-f]{64}$")] | None = None
    """Public key that must have signed the backbone, as `p2r sign` prints it. None: no signature is required."""
    modes: Annotated[tuple[Mode, ...], Field(min_length=1)] = ("scratch", "linear_probe", "fine_tune")
    """Modes to compare. scratch: no pretraining. scratch_long: the same with more steps. linear_probe: a 1x1 convolution on frozen
    features. fine_tune: train all weights. mean_teacher: fine_tune, plus consistency with an average of its own weights on the train
    split's unlabelled patients. weak_to_strong: fine_tune, plus pseudo-labels from such an average on strongly augmented, mixed images of
    these patients. scratch_weak_to_strong: the same from random weights. prototype_self_training: weak_to_strong with rounds of
    pseudo-labels first, made from class prototypes on frozen features. prototype: nearest class prototype by cosine similarity on
    frozen features, without training."""
    protocol: Literal["leak_free", "paper_compat"] = "leak_free"
    """leak_free: whole scans, split by patient. paper_compat: the released code of Pix2Rep, only for comparison with the paper; its rows
    say so. It crops every scan to its label's box + 10 px and drops empty slices, even at test. It validates on slices of the labelled
    patients."""
    num_labelled: Annotated[tuple[NumLabelled, ...], Field(min_length=1)] = (1, 5)
    """Numbers of labelled patients; all: the whole train split."""
    num_labelled_by_mode: dict[Mode, Annotated[tuple[NumLabelled, ...], Field(min_length=1)]] = {}
    """Modes that run for only some of these numbers, as in `{mean_teacher: [1, 2]}`."""
    draws: PositiveInt | dict[NumLabelled, PositiveInt] = 3
    """Number of draws of labelled patients: one number, or one per number of patients, as in `{1: 5, 10: 3, all: 3}`. Every mode gets the
    same draws."""
    stratify: bool = False
    """Draw the labelled patients in proportion to the strata named by the task, such as pathologies."""
    seed: int = 0
    """Seed for draws, weights and augmentation."""
    steps: PositiveInt = 300
    """Optimizer steps of every trial, equal for all modes except those in `steps_by_mode`."""
    steps_by_mode: dict[Mode, PositiveInt] = {}
    """Optimizer steps of particular modes, as in `{weak_to_strong: 4000}`. Default of scratch_long: three times `steps`. Every row states
    its steps."""
    batch_size: PositiveInt = 8
    """Images per step."""
    weight_decay: NonNegativeFloat = 1e-4
    """Decoupled weight decay of AdamW."""
    warmup_head_steps: NonNegativeInt = 0
    """Modes that train pretrained weights: first steps that train only the head; they count towards all steps."""
    backbone_learning_rate_factor: PositiveFloat = 1.0
    """Modes that train pretrained weights: learning rate of the backbone, as a multiple of the head's."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Modes that learn from unlabelled patients: decay of the teacher's weights per step; smaller in the first steps, while the average
    covers few of them."""
    ramp_up_fraction: Fraction = 0.3
    """The same modes: fraction of the steps in which the weight of the unlabelled loss rises."""
    consistency_weight: NonNegativeFloat = 1.0
    """The same modes: weight of the loss on unlabelled images, relative to the labelled loss. mean_teacher: the mean squared difference of
    the student's and teacher's probabilities. weak_to_strong: Dice + cross-entropy with the teacher's pseudo-labels."""
    confidence_threshold: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Modes with pseudo-labels (weak_to_strong, scratch_weak_to_strong, prototype_self_training): smallest teacher probability at which
    a pixel's pseudo-label counts."""
    cutmix_probability: Fraction = 0.5
    """The same modes: probability that a strong view exchanges a box (2 to 40 % of the image) with another image. The label or
    pseudo-label is exchanged with it."""
    cutmix_labelled_fraction: Fraction = 0.5
    """The same modes: fraction of these exchanges made with a labelled image; half paste its box into the unlabelled image, half the
    reverse. The others are between two unlabelled images."""
    feature_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The same modes: fraction of the backbone's output channels dropped in a third view of unchanged appearance. 0: no third view."""
    strong_intensity: IntensityConfig | None = None
    """The same modes: appearance of the strong views. None: as in `views`."""
    background_prototypes: PositiveInt = 8
    """prototype and prototype_self_training: number of background prototypes (k-means); each other class has one, its mean. Mean
    validation Dice on ACDC, one labelled patient, three draws, a small backbone: 0.24 with 1, 0.34 with 4, 0.35 with 8, 0.30 with 32."""
    self_training_rounds: PositiveInt = 3
    """prototype_self_training: largest number of rounds. Each labels all unlabelled images at once, the first by prototypes, the others by
    the teacher. After the last round the teacher labels the images of each step, as in weak_to_strong."""
    self_training_fraction: Annotated[float, Field(gt=0, le=1)] = 0.15
    """prototype_self_training: fraction of the steps in each round."""
    self_training_min_change: Fraction = 0.05
    """prototype_self_training: rounds stop when a smaller fraction of foreground pixels changes its pseudo-label. No label is read for
    this rule."""
    agreement_views: PositiveInt = 3
    """prototype_self_training: number of views that must agree on a pixel's pseudo-label. 1: only the unchanged image."""
    plausible_size_factor: Annotated[float, Field(ge=1)] = 3.0
    """prototype_self_training: largest ratio of a class's size to its sizes in the labelled patients, both ways. A larger class does not
    count; a smaller one excludes its frame."""
    plausible_margin_mm: NonNegativeFloat = 40.0
    """prototype_self_training: distance beyond the labelled patients' organs, relative to the scan's centre, within which foreground
    counts, mm."""
    probe_augmentation: Literal["views", "none"] = "views"
    """linear_probe: training images. views: augmented, as in every other mode. none: unaugmented; their features are computed once for all
    probes of a task, which is much faster."""
    search: SearchConfig = SearchConfig()
    """Search for the learning rate and other settings."""
    compile: bool = False
    """Compile a trial's network (torch.compile) before its first step. Takes about a minute, which a thousand steps recover, also on CPUs.
    The result is cached in `$P2R_CACHE`. Results equal uncompiled ones up to rounding, which training amplifies."""
    score_on: Literal["test", "validation"] = "test"
    """Split whose results are reported. validation: while recipes are still compared, so that test patients stay unread."""
    curve_steps: PositiveInt | None = None
    """Optimizer steps between two validations during training; the row keeps their Dice as `curve`. Nothing is chosen by it. Finished
    trials are not run again for it. None: validate only the last weights."""
    views: ViewsConfig = ViewsConfig(geometry=GeometryConfig(rotation_deg=180.0))
    """Augmentation of labelled images, equal for all modes."""
    planes: Literal["whole", "centre"] = "whole"
    """Region that a model reads of a plane or volume. whole: all of it, in overlapping windows of the backbone's image size; training
    windows are drawn anywhere. centre: that size about its centre; the rest is background. Neither uses a label."""
    largest_component: bool = False
    """Keep only the largest connected component of each predicted class; assumes that every organ is in one piece."""
    nsd_tolerance_mm: PositiveFloat = 2.0
    """Tolerance of the normalised surface Dice, mm."""
    allow_transductive: bool = False
    """Continue although validation or test patients are in the backbone's corpus. Every row of the report is then labelled: such results
    do not hold for patients that the backbone has not seen."""
    publish_model: bool = True
    """Publish the model with the best validation Dice among `published_mode` as `models/<task>/<version>`. Publish a second, trained in the
    same mode on all labelled train patients, as `models/<task>/all`; its validation Dice is computed, its test Dice is not."""
    publish_draws: bool = False
    """Also publish the other draws of the best model's mode and number of labelled patients, for `p2r predict --ensemble`."""
    published_mode: Literal["fine_tuned", "any"] = "fine_tuned"
    """Candidates for the published model. fine_tuned: models that train the pretrained backbone's weights (fine_tune, mean_teacher,
    weak_to_strong, prototype_self_training); all models, if the job has none of these. any: also models from scratch and on frozen
    features."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key, given in (("tasks", self.tasks), ("modes", self.modes)):
            if len(set(given)) < len(given):
                raise ValueError(f"{key} must differ, got {', '.join(given)}")
        is_file = self.backbone is not None and names_weights_file(self.backbone)
        if is_file and self.imported is None:
            raise ValueError(
                f"backbone {self.backbone} is a weights file, which states neither network nor image nor licence: give them as imported: "
                "{model: ..., image: ..., licence: ...}"
            )
        if self.imported is not None and not is_file:
            raise ValueError("imported describes a weights file, and backbone names none: leave imported out")
        trained = [mode for mode in self.modes if "steps" in MODES[mode].settings]
        missing = [mode for mode in trained if mode not in self.search.learning_rates]
        if missing:
            raise ValueError(f"search.learning_rates has no candidates for {', '.join(missing)}")
        if self.views.shown_fraction is not None:
            raise ValueError(
                "views.shown_fraction is for pretraining only: a labelled image is shown whole; leave it out"
            )
        if self.protocol == "paper_compat":
            for mode in self.modes:
                if MODES[mode].unlabelled != "none":
                    raise ValueError(
                        f"protocol paper_compat crops by the label, and {mode} reads no label of unlabelled patients: "
                        f"take {mode} out of modes"
                    )
        for mode in self.steps_by_mode:
            if mode not in self.modes or "steps" not in MODES[mode].settings:
                why = "is not in modes" if mode not in self.modes else "trains nothing"
                raise ValueError(f"steps_by_mode names {mode}, which {why}")
        for mode, numbers in self.num_labelled_by_mode.items():
            if mode not in self.modes:
                raise ValueError(f"num_labelled_by_mode names {mode}, which is not in modes")
            if others := [number for number in numbers if number not in self.num_labelled]:
                raise ValueError(
                    f"num_labelled_by_mode.{mode} has {', '.join(map(str, others))}, which is not in num_labelled "
                    f"{list(self.num_labelled)}"
                )
        if isinstance(self.draws, dict):
            without = [number for number in self.num_labelled if number not in self.draws]
            if without:
                raise ValueError(f"draws gives no number of draws for {', '.join(map(str, without))} labelled patients")
        sizes = {mode: self._num_candidates(mode) for mode in trained}
        if len(set(sizes.values())) > 1:
            found = ", ".join(f"{mode} {size}" for mode, size in sizes.items())
            raise ValueError(
                f"search must hold equally many candidates for every mode, got {found}: "
                + (
                    "some modes have only lists, which are not drawn; give them a distribution, too"
                    if self.search.is_drawn
                    else "search.space has settings that only some modes have; give the others more learning_rates"
                )
            )
        for name, candidates in self.search.space.items():
            field = type(self).model_fields[name]
            rule: TypeAdapter[Any] = TypeAdapter(Annotated[field.annotation, *field.metadata])  # type: ignore[arg-type]
            values = candidates.named()[1] if isinstance(candidates, Distribution) else candidates
            for value in values:
                try:
                    rule.validate_python(value)
                except ValidationError as error:
                    raise ValueError(f"search.space.{name}: {error.errors()[0]['msg']}, got {value}") from None
        return self

    def steps_of(self, mode: Mode) -> int:
        """Return the optimizer steps of a mode's trials, unless the search chooses them."""
        longer = 3 if mode == "scratch_long" else 1
        return self.steps_by_mode.get(mode, longer * self.steps)

    def _num_candidates(self, mode: Mode) -> int:
        space = [
            self.search.learning_rates[mode],
            *(self.search.space.get(name, (0,)) for name in MODES[mode].settings),
        ]
        lists = [candidates for candidates in space if not isinstance(candidates, Distribution)]
        is_proposed = self.search.searcher != "grid" or len(lists) < len(space)
        return self.search.num_samples if is_proposed else math.prod(map(len, lists))
