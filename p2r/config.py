"""What p2r can be told to do: one frozen pydantic model per section of a job file.

Unknown keys are refused everywhere (`p2r.job` adds the nearest valid name). Units stand in the names; the text under a
field is its documentation and its description in the JSON Schema.
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
from p2r.modes import MODES, SETTINGS_OF, Mode, Setting
from p2r.patterns import check_subject_pattern
from p2r.reference import parse_reference


class FilledIn:
    """Marks a field of a job in which `${NAME}` and `${NAME:-default}` stand for environment variables."""


Location = Annotated[str, FilledIn()]
"""A path or a URL. Beside what a corpus says of its data, only these are filled in from the environment: other fields are published."""
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Range = tuple[float, float]
Angle = Annotated[float, Field(ge=0, le=180)]
NumGhosts = Annotated[int, Field(ge=2, le=16)]
NumLabelled = PositiveInt | Literal["all"]

PERCENTILES = (0.0, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 98.0, 99.0, 99.5, 99.9, 100.0)
"""Percentiles of intensity that are recorded with every scan, so that the choice among them is training's, not ingest's."""


def Within(low: float, high: float) -> AfterValidator:  # noqa: N802 (it stands where a type stands)
    """Return what refuses a range that falls, or leaves [low, high]."""

    def check(value: Range) -> Range:
        if not low <= value[0] <= value[1] <= high:
            raise ValueError(f"must rise and lie in [{low:g}, {high:g}], got {list(value)}")
        return value

    return AfterValidator(check)


def _checked_reference(text: str) -> str:
    try:
        parse_reference(text)
    except InputError as error:
        raise ValueError(str(error)) from None
    return text


Artefact = Annotated[Location, AfterValidator(_checked_reference)]
"""Where a backbone is published: a URL, or `URL@sha256:HEX`, which pins its manifest."""


class Section(BaseModel):
    """A part of a job file: frozen, and without room for keys that nobody reads."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class SubjectsOf(Section):
    """Take the subjects of one split of a task, so that a corpus and its task cannot drift apart."""

    task: Location
    """Path of the task's YAML, relative to the job file."""
    split: Literal["train", "validation", "test", "not_held_out"] = "train"
    """Which split's subjects enter the corpus. not_held_out: all that the sources hold, but the task's validation and test patients, so
    that scans without labels are taken, too. Pretraining on `test` would be a leak, and fine-tuning refuses it."""


class QualityConfig(Section):
    """Which scans are good enough. All rules are off by default; a rule that is given wins over the preset's."""

    preset: Literal["none", "openmind"] = "none"
    """openmind: the limits of the OpenMind corpus, spacing up to 3 mm and a field of view of 100 mm or more along every axis."""
    max_spacing_mm: PositiveFloat | None = None
    """Largest voxel size along any axis, mm; others are refused as `spacing`."""
    min_field_of_view_mm: PositiveFloat | None = None
    """Smallest extent along any axis, mm; others are refused as `field_of_view`."""
    min_slices: PositiveInt | None = None
    """Smallest number of planes across `slice_axis`; others are refused as `slice_count`."""
    max_size: PositiveInt | None = None
    """Largest number of voxels along any axis; others are refused as `too_large`."""

    def limits(self) -> Self:
        """Return the rules with the preset's values where none was given."""
        given = {name: getattr(self, name) for name in self.model_fields_set - {"preset"}}
        preset = {"max_spacing_mm": 3.0, "min_field_of_view_mm": 100.0} if self.preset == "openmind" else {}
        return type(self)(**{**preset, **given})


_OF_VIRTUAL_SUBJECTS = {"licence": "icbm-152", "provenance": "virtual subjects", "cohort": "icbm152"}
"""Words by which statements about `template://` sources are known, lest they enter a corpus of real scans."""


class IngestConfig(Section):
    """Scans -> a corpus of WebDataset shards."""

    sources: Annotated[tuple[Location, ...], Field(min_length=1)]
    """Folders, files or URLs (`file://`, `s3://`) searched for NIfTI (`.nii`, `.nii.gz`, `.hdr` with `.img`), BIDS and, in folders,
    DICOM; lists of scans (`.csv`, `.tsv`, `.jsonl` with `path` and, if known, `subject`); or `template://icbm152?subjects=N`."""
    include: tuple[str, ...] = ()
    """Only scans whose path below their source matches one of these patterns, such as `**/anat/*_T1w.nii.gz`; `*` matches `/` too.
    Empty: all."""
    exclude: tuple[str, ...] = ()
    """No scan whose path below its source matches one of these patterns."""
    licence: Annotated[str, FilledIn(), Field(min_length=1)]
    """SPDX identifier or name of the data's licence. It travels into every manifest made from this corpus."""
    provenance: Annotated[str, FilledIn()] = ""
    """Where the data come from, and how to cite them."""
    cohort: str = "default"
    """Name space of the subjects' names: `sub-01` of one cohort is not `sub-01` of another. With `subjects_of`, the task's, unless another
    is given."""
    subject_pattern: Annotated[str, AfterValidator(check_subject_pattern)] = r"^(sub-[A-Za-z0-9]+|[^_.]+)"
    """Regular expression searched in a scan's file name (DICOM: in the name of the first folder below the source), then in its path below
    the source; its first group is the subject. Not used where BIDS names or a list give one. Unless another is given: with `subjects_of`,
    the task's; where a `dataset.json` (nnU-Net, Medical Segmentation Decathlon) names cases, the case. Python's syntax;
    `p2r.patterns` lists what it may not have."""
    one_subject: bool = False
    """Take scans that by `subject_pattern` are all of one subject. False: the job stops, for mostly the pattern is wrong."""
    label_maps: Literal["leave_out", "take"] = "leave_out"
    """Label maps among the sources. leave_out: files in folders such as labelsTr, masks or derivatives, with names that end in _seg, _mask
    or the like, and volumes of few whole numbers are left out, as `label_map` in the ledger. take: they are read as scans."""
    dicom_subject: Literal["folder", "patient_id"] = "folder"
    """Where the subject of a DICOM series comes from: `subject_pattern` on a folder's name, or the tag PatientID, which then enters the
    corpus as it is."""
    subjects: tuple[str, ...] | None = None
    """Only these subjects, as names or ranges such as `patient[001-014]`. None: all."""
    subjects_of: SubjectsOf | None = None
    """Only the subjects of one split of a task. None: all."""
    slice_axis: Literal["auto", 0, 1, 2] = "auto"
    """Axis (of the RAS volume) across which planes are cut. auto: the axis of the largest spacing; the third where all are equal."""
    min_size: PositiveInt = 16
    """Smallest number of voxels along each axis of a plane; smaller scans are refused as `too_small`."""
    quality: QualityConfig = QualityConfig()
    """Further rules that a scan must meet, as it was acquired."""
    max_scan_mib: PositiveFloat = 4096.0
    """Most memory that a scan's voxels may claim, as its header states them; larger ones are refused as `too_large`."""
    max_frames: PositiveInt | None = None
    """Most time frames taken of a 4D series, evenly spaced, so that long series do not swamp the corpus. None: all."""
    nan_voxels: Literal["background", "refuse"] = "background"
    """What becomes of voxels that are NaN, as SPM writes them outside of the head. background: they become 0, or the least value if
    that is lower, and the ledger counts them. refuse: a scan with one of them is refused as `nonfinite`."""
    resample_mm: PositiveFloat | tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    """Voxel size that every scan is resampled to, mm: one number, or three along right, anterior, superior. None: as acquired."""
    dcm2niix_timeout_s: PositiveFloat = 300.0
    """Most time that the conversion of one DICOM series may take; after that it is refused as `timeout`."""
    shard_size_mib: PositiveFloat = 64.0
    """A shard is closed once its records reach this size; a subject is never spread over two shards."""
    seed: int = 0
    """Shuffles subjects over shards."""
    record: Literal["planes", "blocks", "npy"] = "planes"
    """What a chunk of a record is. planes: for 2D training. blocks: cubes of 32 voxels, for 3D patches. npy: not compressed, for readers
    without a decoder of ours."""
    codec: Literal["lz4", "zstd"] = "lz4"
    """Compression of the chunks. zstd: about a fifth smaller, about three times slower to read."""
    pseudonyms: bool = False
    """Replace the names of subjects, scans and files by keyed hashes wherever they would be written. The secret is the environment's
    `P2R_PSEUDONYM_KEY`."""
    max_refused_fraction: Fraction = 0.5
    """The job stops when more than this part of the scans it has read (20 at least, or all there are) is refused. Copies do not count."""
    cross_subject_copies: Literal["keep", "refuse"] = "keep"
    """What becomes of scans with exactly the voxels of another subject's. keep: they are counted, and the ledger names the original.
    refuse: only the first is taken. Copies within a subject are always refused."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.subjects is not None and self.subjects_of is not None:
            raise ValueError("give either subjects or subjects_of, not both")
        is_real = [source for source in self.sources if not source.startswith("template://")]
        borrowed = [name for name, word in _OF_VIRTUAL_SUBJECTS.items() if word in getattr(self, name).lower()]
        if is_real and borrowed:
            raise ValueError(
                f"{', '.join(borrowed)} speak{'s' * (len(borrowed) == 1)} of virtual subjects, but sources name other data ({is_real[0]}): "
                f"state {', '.join(f'ingest.{name}' for name in borrowed)} of these"
            )
        return self


class ImageConfig(Section):
    """How a scan becomes the network's input image; the same in training and in use."""

    dimensions: Literal[2, 3] = 2
    """Of the image: a plane of a scan, or a patch that lies anywhere in it."""
    spacing_mm: PositiveFloat = 1.5
    """Pixel size after resampling, mm; in the plane for planes, along every axis for patches."""
    size: PositiveInt = 160
    """Edge of the image, pixels. Planes are cropped or padded about their centre."""
    patches_per_volume: PositiveInt = 1
    """Patches only: how many of each volume (or frame) an epoch holds, each drawn anew."""
    intensity_percentiles: tuple[float, float] = (0.5, 99.5)
    """Percentiles of a scan's non-zero voxels that become 0 and 1; two of those that are recorded with every scan."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = self.intensity_percentiles
        if low >= high or not {low, high} <= set(PERCENTILES):
            raise ValueError(
                f"intensity_percentiles must be two rising ones of {', '.join(f'{p:g}' for p in PERCENTILES)}; got {low:g}, {high:g}"
            )
        return self


class GeometryConfig(Section):
    """Range of the geometric draw. Every parameter is drawn per image, uniformly, and composed into one warp."""

    rotation_deg: Annotated[float, Field(ge=0, le=180)] = 90.0
    """Planes: largest rotation to either side, degrees."""
    rotation_3d_deg: tuple[Angle, Angle, Angle] = (30.0, 30.0, 30.0)
    """Volumes: largest rotation to either side about each axis, degrees; the rotations follow one another."""
    scale: Annotated[Range, Within(0.1, 10)] = (0.8, 1.25)
    """Smallest and largest magnification, drawn log-uniformly."""
    shear_deg: Annotated[float, Field(ge=0, lt=60)] = 5.0
    """Largest shear to either side, degrees; in volumes, of each pair of axes."""
    translation_mm: Annotated[float, Field(ge=0, le=1000)] = 10.0
    """Largest shift along each axis, mm."""
    flip_probability: Fraction = 0.5
    """Probability of mirroring, for each axis."""
    elastic_mm: NonNegativeFloat = 4.0
    """Standard deviation of the displacement of the elastic control points, mm; 0: none."""
    elastic_spacing_mm: Annotated[float, Field(ge=4)] = 32.0
    """Distance of the elastic control points, mm."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.elastic_mm > self.elastic_spacing_mm:
            raise ValueError(
                f"elastic_mm must not exceed elastic_spacing_mm ({self.elastic_spacing_mm:g}): the image would fold, "
                f"got {self.elastic_mm:g}"
            )
        return self


class IntensityConfig(Section):
    """Range of the intensity draw, on images in [0, 1]. Two independent draws make the two views differ in contrast.

    Each transform has a range, from which its strength is drawn uniformly unless said otherwise, and the probability that
    it takes part at all.
    """

    gamma: Annotated[Range, Within(0.1, 10)] = (0.6, 1.6)
    """Exponent, drawn log-uniformly."""
    gamma_probability: Fraction = 1.0
    """Probability of an exponent."""
    contrast: Annotated[Range, Within(0.1, 10)] = (0.75, 1.25)
    """Factor about the image's mean, drawn log-uniformly."""
    contrast_probability: Fraction = 1.0
    """Probability of such a factor."""
    inversion_probability: Fraction = 0.25
    """Probability that dark and bright change places."""
    bias_field: Annotated[float, Field(ge=0, le=3)] = 0.4
    """Largest log-amplitude of a smooth multiplicative field; 0: none."""
    bias_field_probability: Fraction = 1.0
    """Probability of such a field."""
    blur_mm: Annotated[float, Field(ge=0, le=20)] = 1.5
    """Largest standard deviation of a Gaussian blur, mm; 0: none."""
    blur_probability: Fraction = 0.5
    """Probability of a blur."""
    low_resolution_mm: Annotated[Range, Within(0, 100)] = (2.0, 6.0)
    """Smallest and largest edge of simulated large voxels, mm; nothing is done along axes whose pixels are as large already."""
    low_resolution_probability: Fraction = 0.0
    """Probability of large voxels, for each axis."""
    ghosting: Annotated[Range, Within(0, 1)] = (0.3, 1.0)
    """Smallest and largest part of every n-th line of k-space that periodic motion takes away."""
    num_ghosts: tuple[NumGhosts, NumGhosts] = (2, 6)
    """Smallest and largest n, the number of copies across the image along one axis drawn at random."""
    ghosting_probability: Fraction = 0.0
    """Probability of ghosts."""
    noise: Annotated[float, Field(ge=0, le=1)] = 0.06
    """Largest standard deviation of the noise; 0: none."""
    noise_probability: Fraction = 1.0
    """Probability of noise."""
    rician_probability: Fraction = 0.0
    """Probability that noise, where there is some, is Rician, as in magnitude images; Gaussian otherwise."""
    window_low: Annotated[Range, Within(0, 100)] = (0.0, 10.0)
    """Smallest and largest percentile of an image's pixels in the scan that becomes 0."""
    window_high: Annotated[Range, Within(0, 100)] = (90.0, 100.0)
    """Smallest and largest percentile that becomes 1."""
    window_probability: Fraction = 0.0
    """Probability of such a window."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_ghosts[0] > self.num_ghosts[1]:
            raise ValueError(f"num_ghosts must rise, got {list(self.num_ghosts)}")
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
"""Values that a name stands for in place of the section `views`. pix2rep: the transforms, probabilities and ranges of the
code that Pix2Rep's authors released, in our units (crops as magnifications, blur in mm; shift and strength of noise are ours, for
theirs depend on the size and the scanner's units of an image).
pix2rep_v2: the same, and the window between random percentiles that Pix2Rep-v2 adds, with our range of percentiles."""
VIEWS["pix2rep_v2"] = {
    "geometry": VIEWS["pix2rep"]["geometry"],
    "intensity": {**VIEWS["pix2rep"]["intensity"], "window_probability": 1.0},
}


def _or_a_name(schema: dict[str, Any]) -> None:
    section = schema.copy()
    schema.clear()
    schema["anyOf"] = [{"enum": list(VIEWS)}, section]


class ViewsConfig(Section):
    """The two views of an image: two intensity draws, one geometric draw. A name stands for a whole section: p2r (what stands
    here), pix2rep or pix2rep_v2 (after what their authors draw)."""

    model_config = ConfigDict(json_schema_extra=_or_a_name)

    geometry: GeometryConfig = GeometryConfig()
    """The warp between the views."""
    intensity: IntensityConfig = IntensityConfig()
    """What each view's contrast may become."""

    @model_validator(mode="before")
    @classmethod
    def _of_name(cls, values: Any) -> Any:
        if not isinstance(values, str):
            return values
        if values not in VIEWS:
            raise ValueError(f"must be a section, or one of the names {', '.join(VIEWS)}")
        return VIEWS[values]


class ModelConfig(Section):
    """Encoder-decoder, in the dimensions of its image, and the projection head used in pretraining only."""

    name: Literal["basic_unet", "unet", "dynunet", "residual_dynunet", "swin_unetr"] = "basic_unet"
    """MONAI's BasicUNet (two convolutions per level), UNet (residual units), DynUNet (nnU-Net's, with plain or residual blocks), or
    SwinUNETR (attention within windows)."""
    in_channels: PositiveInt = 1
    """C, contrasts of an image. A record of a corpus holds one."""
    channels: Annotated[tuple[PositiveInt, ...], Field(min_length=3, max_length=8)] = (16, 32, 64, 128, 256)
    """Channels at the levels, finest first, each level of half the size. basic_unet has five levels; swin_unetr five of tokens, below the
    image's own size, whose channels double from a multiple of 12 on."""
    feature_channels: PositiveInt = 32
    """F, channels of the dense representation: what a backbone gives for every pixel."""
    level: NonNegativeInt = 0
    """Level of the decoder that gives the representation. 0: the finest, a vector for every pixel; 1: for every 2 pixels along each axis,
    2: for every 4. Finer levels are left out of the network."""
    normalisation: Literal["instance", "group"] = "instance"
    """Both normalise each image by itself, with a learnt scale and shift. Batch normalisation is refused: it mixes the images of a rank."""
    groups: PositiveInt = 8
    """Group normalisation only: groups of channels that are normalised together; divides every number of channels."""
    channels_last: Literal["auto"] | bool = "auto"
    """Keep the channels of a pixel side by side in memory. auto: on GPUs, whose matrix units read them so; on CPUs it is slower."""
    checkpoint_activations: Literal["none", "encoder", "all"] | PositiveInt = "none"
    """Blocks whose activations are computed again in the backward pass instead of kept: memory for time, the same numbers. A number: the
    blocks of so many levels, from the finest on, which hold the most."""
    head_channels: PositiveInt = 256
    """Hidden width of the projection head."""
    embedding_channels: PositiveInt = 128
    """E, length of the vectors that the loss compares."""

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
                f"channels of swin_unetr must be five that double from a multiple of 12 on, as 24, 48, 96, 192, 384, got {channels}"
            )
        if self.level >= self.depth:
            raise ValueError(f"level must be below {self.depth} ({self._kind} depth {self.depth}), got {self.level}")
        if self.normalisation == "group":
            uneven = [number for number in (*channels, self.feature_channels) if number % self.groups]
            if uneven:
                raise ValueError(f"groups must divide channels and feature_channels, got {self.groups} for {uneven}")
        return self

    @property
    def depth(self) -> int:
        """How often the network halves an image."""
        return len(self.channels) - (self.name != "swin_unetr")

    @property
    def size_divisor(self) -> int:
        """What every side of an image must be divisible by."""
        return 1 << self.depth

    @property
    def stride(self) -> int:
        """Pixels along each axis that share a vector of the representation."""
        return 1 << self.level

    @property
    def _kind(self) -> str:
        return "Swin UNETR" if self.name == "swin_unetr" else "U-Net"

    def check_size(self, *size: int, what: str) -> None:
        """Raise `ValueError` if the network cannot take an image of this size.

        Args:
            size: Pixels along each axis.
            what: Whose size it is, for the message.
        """
        divisor, shown = self.size_divisor, " x ".join(map(str, size))
        rule = f"({self._kind} depth {self.depth})"
        if any(side % divisor for side in size):
            raise ValueError(f"{what} must be divisible by {divisor} {rule}, got {shown}")
        if all(side == divisor for side in size):
            # Whatever the image is, the normalisation of a single pixel is zero.
            raise ValueError(
                f"{what} must be divisible by {divisor} and larger {rule}: one pixel would be left at the coarsest level, got {shown}"
            )


class LossConfig(Section):
    """The objective over pixel pairs."""

    name: Literal["info_nce", "barlow_twins"] = "info_nce"
    """InfoNCE contrasts every pixel with all others (Pix2Rep); Barlow Twins decorrelates channels (Pix2Rep-v2)."""
    pixel_pairs_per_image: PositiveInt = 256
    """Corresponding pixels drawn from each pair of views; N of a step is this times the global batch."""
    foreground_share: Fraction = 0.0
    """Part of these that is drawn among pixels brighter than their image's mean; the rest is drawn anywhere in the scan."""
    negatives: Literal["global_batch", "micro_batch", "image"] = "global_batch"
    """What a pixel is contrasted with. With a `micro_batch`, the pixels of the whole step cost encoding twice; micro_batch: those of
    one micro-batch of all workers. image (InfoNCE only): those of its own image, so that other patients' same anatomy is no negative."""
    form: Literal["cross_view", "nt_xent"] = "nt_xent"
    """InfoNCE only: negatives from the other view (N x N), or from both without the diagonal (2N x 2N, as Pix2Rep)."""
    temperature: PositiveFloat = 0.2
    """InfoNCE only: tau, the width of the softmax over cosine similarities."""
    learn_temperature: bool = False
    """InfoNCE only: train tau along with the weights, from `temperature` on; it is kept within [0.013, 1]: below, sums of
    float32 would overflow or vanish."""
    decoupled: bool = False
    """InfoNCE only: leave the positive out of the denominator (decoupled contrastive learning)."""
    exclude_within_mm: PositiveFloat | None = None
    """InfoNCE only: pixels of one image at most this far apart are no negatives of one another (.inf: all of an image). None: all are."""
    exchange: Literal["all_gather", "ring"] = "all_gather"
    """InfoNCE only: each worker holds the embeddings of all, or (slower) those of one other at a time, passed around a ring."""
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
    """Part of all steps in which the rate rises linearly."""
    clip_norm: NonNegativeFloat = 1.0
    """Global gradient norm above which gradients are scaled down; 0: never."""


class CorpusShare(Section):
    """One of several corpora."""

    url: Location
    """Of the corpus."""
    weight: PositiveFloat | None = None
    """Its part in every batch, relative to the others'. None for all: in proportion to their sizes."""
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """SHA-256 of a manifest. None: the revision that is current when the run begins; a resumed run keeps it."""


class ProbeConfig(Section):
    """A quick linear read-out of a labelled task while pretraining goes on, so that a collapse is seen in minutes.

    It reads a few train and validation patients of the task, never a test patient, and changes nothing of the training.
    """

    task: Location
    """Path of the task's YAML, relative to the job file."""
    interval: PositiveInt = 500
    """Steps between two probes; the last step always makes one. Each is stated in the next report."""
    num_labelled: PositiveInt = 1
    """Train patients whose pixels the read-out is fitted to."""
    num_validation: PositiveInt = 4
    """Validation patients that are segmented; all of them, if there are fewer."""
    planes_per_scan: PositiveInt = 16
    """Planes (or frames, of volumes) that are read of every scan at most, evenly spread over it."""
    seed: int = 0
    """Draws the patients."""


class PretrainConfig(Section):
    """Corpus -> pixel representation."""

    corpus: Location | Annotated[tuple[CorpusShare, ...], Field(min_length=1)] | None = None
    """URL of the corpus, or several by weight. None: `<storage>/corpus`, made by this job's ingest section if it is absent."""
    image: ImageConfig = ImageConfig()
    """The network's input."""
    views: ViewsConfig = ViewsConfig()
    """Augmentation: what the representation must follow (geometry) and what it must ignore (intensity)."""
    model: ModelConfig = ModelConfig()
    """Network."""
    loss: LossConfig = LossConfig()
    """Objective."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and schedule."""
    steps: PositiveInt
    """Optimizer steps."""
    global_batch: PositiveInt
    """Images per optimizer step, over all workers together."""
    neighbours: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Share of the batch's images that are the next plane of another image in it: nearly alike, and hard to tell apart."""
    max_replaced: NonNegativeInt = 100
    """Damaged samples that are replaced by others, noted under `quarantine/` and counted, before a worker stops; 0: none."""
    micro_batch: PositiveInt | None = None
    """Images that a worker encodes at once, for when its part of the global batch does not fit into memory. None: all of its part."""
    seed: int = 0
    """Seeds weights, order, views and points."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Arithmetic of the network; statistics of normalisations, reading at points, projection head and sums of the loss are fp32 in all.
    tf32: fp32, whose products a GPU of compute capability 8.0 or newer may round to 10 bits. The loss kernels take tf32 and bf16; in
    fp32 a GPU computes the loss in torch's tiles, several times as slowly."""
    compile: bool | Literal["reduce-overhead"] = False
    """Compile the backbone (torch.compile) before the first step: seconds to minutes, which the first report states, kept in
    `$P2R_CACHE`. Where there is no compiler, the report says so and training goes on without. reduce-overhead: GPUs also replay its
    kernels as CUDA graphs, for networks so small that launching kernels takes longer than running them; memory for time."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO: 0 nothing, 1 optimizer state, 2 gradients too, 3 weights too are partitioned over the workers. Each saves memory
    where there are several; 3 fetches weights layer by layer, and on GPUs its step waits for the device."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Keep a running mean of the weights, in fp32, of which this part stays at every step (0.999: about the last 1000 steps); of the first
    steps it is the plain mean. It is then what is published. None: none, the last weights are."""
    max_skipped_steps: NonNegativeInt = 10
    """Steps in a row that may be left out because the loss or a gradient was not finite, before the run stops and names the last good
    checkpoint. Such a step uses up its batch and its place in the schedule, and changes nothing; 0: the first one stops the run."""
    deterministic: bool = False
    """Only algorithms that give the same bits every time (torch.use_deterministic_algorithms, cuDNN, cuBLAS with a fixed workspace), so
    that a resumed run is bitwise the uninterrupted one on GPUs, too; slower there. CPUs give the same bits without."""
    report_interval: PositiveInt = 10
    """Steps between two reports (a line on the terminal, a line in history.jsonl)."""
    equivariance_interval: NonNegativeInt = 1
    """Reports between two that state the equivariance error: 0 if the embeddings of a step's pixel pairs follow the warp perfectly, 1 if
    no better than chance. 0: never."""
    checkpoint_interval: PositiveInt = 100
    """Steps between two checkpoints; the last step always makes one."""
    keep_checkpoints: PositiveInt = 2
    """How many of the newest checkpoints stay on the storage."""
    keep_every: NonNegativeInt = 0
    """Checkpoints whose step it divides stay for good, beside the newest; 0: none."""
    init_from: Artefact | None = None
    """URL of the first weights, by safetensors: a published backbone (`STORAGE/backbones/NAME/1`), whose projection head is then new, or
    another run's checkpoint (`STORAGE/pretrain/checkpoints/step-00001000`); with `@sha256:HEX`, this very one. Step, schedule and order
    begin anew. None: drawn by `seed`."""
    probe: ProbeConfig | None = None
    """Probe a labelled task on the way. None: no probe."""

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
        """What each pixel is contrasted with, for reports."""
        if self.loss.negatives == "micro_batch" and self.micro_batch is not None:
            return f"of micro-batches only ({self.micro_batch} images of each worker)"
        return "of the same image" if self.loss.negatives == "image" else "of the global batch"


class PublishConfig(Section):
    """Checkpoint -> backbone that others load."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    """Folder under `<storage>/backbones/`."""
    version: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "1"
    """Folder under the name. A published version is never overwritten with other weights."""
    licence: str | None = None
    """Licence of the weights. None: the corpus's, which is also the only one allowed where the corpus forbids others."""
    description: str = ""
    """One paragraph for the model card."""


class Distribution(Section):
    """Where candidates are drawn from, under the names of Ray Tune; exactly one of them."""

    uniform: Range | None = None
    """Evenly between two bounds."""
    loguniform: Range | None = None
    """Evenly on a logarithmic scale between two bounds above 0."""
    randint: tuple[int, int] | None = None
    """Whole numbers from the first bound to below the second."""
    choice: Annotated[tuple[float, ...], Field(min_length=1)] | None = None
    """One of these."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.model_fields_set) != 1:
            raise ValueError("a distribution has one of uniform, loguniform, randint and choice")
        name, bounds = self.named()
        if name != "choice" and not bounds[0] < bounds[1]:
            raise ValueError(f"{name} needs two bounds that rise, got {list(bounds)}")
        if name == "loguniform" and bounds[0] <= 0:
            raise ValueError(f"loguniform needs bounds above 0, got {list(bounds)}")
        return self

    def named(self) -> tuple[str, tuple[float, ...]]:
        """Return the name of the distribution that was given, and its bounds or choices."""
        (name,) = self.model_fields_set
        return name, getattr(self, name)


Candidates = Annotated[tuple[float, ...], Field(min_length=1)] | Distribution


class SearchConfig(Section):
    """Hyper-parameters chosen on validation patients, the same number of candidates for every mode, then frozen.

    Lists make a grid; where anything is a distribution, `num_samples` candidates are drawn. One candidate is taken as it is.
    """

    num_labelled: Annotated[tuple[NumLabelled, ...], Field(min_length=1)] = (1,)
    """Numbers of labelled patients at which candidates are compared (first draw), by mean validation Dice."""
    learning_rates: dict[Mode, Candidates] = {
        "scratch": (1e-3, 3e-3),
        "scratch_long": (1e-3, 3e-3),
        "scratch_weak_to_strong": (1e-3, 3e-3),
        "linear_probe": (3e-3, 1e-2),
        "fine_tune": (1e-3, 3e-3),
        "mean_teacher": (1e-3, 3e-3),
        "weak_to_strong": (1e-3, 3e-3),
        "prototype_self_training": (1e-3, 3e-3),
    }
    """Candidates of the peak learning rate, per mode: a list, or a distribution such as `{loguniform: [1e-4, 1e-2]}`. prototype has
    none: nothing is trained."""
    space: dict[Setting, Candidates] = {}
    """Candidates of further settings, for the modes that have them; each overrides the setting of its name."""
    num_samples: PositiveInt = 8
    """Candidates per mode, where any are drawn from a distribution."""
    searcher: Annotated[str, Field(min_length=1)] = "grid"
    """Who proposes candidates. grid: the lists, or draws that depend on the seed alone. Else a search algorithm of Ray Tune by its
    name, such as optuna (its package must be installed), which learns from the candidates before; seeded, too; under Ray only."""
    scheduler: Annotated[str, Field(min_length=1)] = "none"
    """Who stops candidates early. none: nobody. asha, or another scheduler of Ray Tune by its name; under Ray only, the plain loop
    runs every candidate to its end."""
    scheduler_options: dict[str, float | int | str | bool] = {}
    """Arguments of that scheduler, such as `{reduction_factor: 3, grace_period: 2}`; its time is counted in reports."""
    report_steps: PositiveInt = 50
    """Optimizer steps between two intermediate validations, for a scheduler."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if "prototype" in self.learning_rates:
            raise ValueError("learning_rates has candidates for prototype, which trains nothing: take them out")
        for mode, rates in self.learning_rates.items():
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
                f"a scheduler or searcher compares figures of one kind: search.num_labelled must hold one number, "
                f"got {list(self.num_labelled)}"
            )
        return self

    @property
    def is_drawn(self) -> bool:
        """Whether candidates are drawn, for at least one of them comes from a distribution."""
        return any(isinstance(found, Distribution) for found in (*self.learning_rates.values(), *self.space.values()))


class FinetuneConfig(Section):
    """Backbone x task x labelled patients x draw x mode -> figures on test (or validation) patients."""

    tasks: Annotated[tuple[Location, ...], Field(min_length=1)]
    """Paths of task YAMLs, relative to the job file."""
    backbone: Artefact | None = None
    """URL of a published backbone; `URL@sha256:HEX`: this very one. None: the one that this job publishes."""
    backbone_signed_by: Annotated[str, Field(pattern=r"^ed25519:[0-9a-f]{64}$")] | None = None
    """Public key of who must have signed that backbone, as `p2r sign` prints it. None: no signature is asked for."""
    modes: Annotated[tuple[Mode, ...], Field(min_length=1)] = ("scratch", "linear_probe", "fine_tune")
    """What is compared. scratch: no pretraining; scratch_long: the same for more steps; linear_probe: a 1x1 convolution on frozen
    features; fine_tune: all weights; mean_teacher: fine_tune, and consistency with an average of its own weights on the unlabelled
    patients of the train split; weak_to_strong: fine_tune, and pseudo-labels of such an average for strongly augmented, mixed images of
    those patients; scratch_weak_to_strong: the same from random weights; prototype_self_training: weak_to_strong, whose first
    pseudo-labels are made in rounds, from class prototypes on frozen features; prototype: the nearest class prototype by cosine on frozen
    features, without training."""
    protocol: Literal["leak_free", "paper_compat"] = "leak_free"
    """leak_free: whole scans, split by patient. paper_compat: as the released code of Pix2Rep does, for comparison with the paper only:
    every scan cropped to its label's box + 10 px and without its empty slices, at test too; validation on slices of the labelled
    patients. Its rows say so."""
    num_labelled: Annotated[tuple[NumLabelled, ...], Field(min_length=1)] = (1, 5)
    """Numbers of labelled patients; all: the whole train split."""
    num_labelled_by_mode: dict[Mode, Annotated[tuple[NumLabelled, ...], Field(min_length=1)]] = {}
    """Modes that are run for some of these numbers only, as in `{mean_teacher: [1, 2]}`."""
    draws: PositiveInt | dict[NumLabelled, PositiveInt] = 3
    """How often the labelled patients are drawn, for each number or by number, as in `{1: 5, 10: 3, all: 3}`; the same draws for every
    mode."""
    stratify: bool = False
    """Draw the labelled patients in proportion to the strata that the task names, such as pathologies."""
    seed: int = 0
    """Seeds the draws, weights and augmentation."""
    steps: PositiveInt = 300
    """Optimizer steps of every trial, equal for all modes but those of `steps_by_mode`."""
    steps_by_mode: dict[Mode, PositiveInt] = {}
    """Modes that are trained for another number of steps, as in `{weak_to_strong: 4000}`. scratch_long: three times `steps`, unless
    given. Every row states its steps."""
    batch_size: PositiveInt = 8
    """Images per step."""
    weight_decay: NonNegativeFloat = 1e-4
    """Decoupled weight decay of AdamW."""
    warmup_head_steps: NonNegativeInt = 0
    """Modes that train pretrained weights: steps, of all steps, in which only the head is trained, before the backbone joins in."""
    backbone_learning_rate_factor: PositiveFloat = 1.0
    """Modes that train pretrained weights: learning rate of the backbone, as a multiple of the head's."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Modes that learn from unlabelled patients: the part of the teacher's weights that each step keeps; less at the start, when the
    average is young."""
    ramp_up_fraction: Fraction = 0.3
    """The same modes: part of the steps in which the weight of the loss on unlabelled images rises."""
    consistency_weight: NonNegativeFloat = 1.0
    """The same modes: weight of the loss on unlabelled images, beside that on labelled ones. mean_teacher: the mean squared difference
    of student's and teacher's probabilities. weak_to_strong: Dice + cross-entropy with the teacher's pseudo-labels."""
    confidence_threshold: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Modes with pseudo-labels (weak_to_strong, scratch_weak_to_strong, prototype_self_training): least probability of the teacher for a
    pixel whose pseudo-label counts."""
    cutmix_probability: Fraction = 0.5
    """The same modes: probability that a box (2 to 40 % of the image) of a strong view is exchanged for that of another
    image, together with its label or pseudo-label."""
    cutmix_labelled_fraction: Fraction = 0.5
    """The same modes: part of these exchanges that are with a labelled image; half of them put its box into the
    unlabelled image, half put the unlabelled box into it. The others are between two unlabelled images."""
    feature_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The same modes: part of the backbone's output channels that a third view drops, whose appearance is unchanged.
    0: there is no third view."""
    strong_intensity: IntensityConfig | None = None
    """The same modes: appearance of the strong views. None: that of `views`."""
    background_prototypes: PositiveInt = 8
    """prototype and prototype_self_training: how many prototypes stand for the background (k-means); each other class has one, its mean.
    Mean Dice on ACDC's validation patients, one labelled patient, three draws, a small backbone: 0.24 with 1, 0.34 with 4, 0.35 with 8,
    0.30 with 32."""
    self_training_rounds: PositiveInt = 3
    """prototype_self_training: most rounds in which pseudo-labels of all unlabelled images are made at once, the first by prototypes, each
    further one by the teacher. After the last one, the teacher labels the images of each step, as in weak_to_strong."""
    self_training_fraction: Annotated[float, Field(gt=0, le=1)] = 0.15
    """prototype_self_training: part of the steps in each round."""
    self_training_min_change: Fraction = 0.05
    """prototype_self_training: rounds end when less than this part of the foreground pixels, of before or after, has other pseudo-labels
    than in the round before. No label is read for it."""
    agreement_views: PositiveInt = 3
    """prototype_self_training: views of an image that must agree on a pixel for its pseudo-label to count; 1: the image as it is."""
    plausible_size_factor: Annotated[float, Field(ge=1)] = 3.0
    """prototype_self_training: how much larger or smaller than in all labelled patients a class may be; else its frame does not count."""
    plausible_margin_mm: NonNegativeFloat = 40.0
    """prototype_self_training: how far beyond the labelled patients' organs, about the scan's centre, foreground counts, mm."""
    probe_augmentation: Literal["views", "none"] = "views"
    """linear_probe: what it is trained on. views: augmented images, as every other mode. none: the images as they are, whose features are
    computed once for all probes of a task: much faster."""
    search: SearchConfig = SearchConfig()
    """Choice of the learning rate, and of other settings."""
    compile: bool = False
    """Compile the network of a trial (torch.compile) before its first step: a minute, which trials of a thousand steps win back on CPUs,
    too. What is compiled is kept in `$P2R_CACHE`. Figures agree with those of a trial without it to rounding, which training amplifies."""
    score_on: Literal["test", "validation"] = "test"
    """Whose figures are reported. validation: while recipes are still being compared, so that test patients stay unread."""
    curve_steps: PositiveInt | None = None
    """Optimizer steps between two validations during training; the row keeps their Dice as `curve`. Nothing is chosen by it, and a trial
    that is done already gets none. None: only the last weights are validated."""
    views: ViewsConfig = ViewsConfig(geometry=GeometryConfig(rotation_deg=180.0))
    """Augmentation of labelled images, equal for all modes."""
    planes: Literal["whole", "centre"] = "whole"
    """What a model reads of a plane, or of a volume. whole: all of it, by overlapping windows of the backbone's image size, and training
    windows lie anywhere. centre: that size about its centre; what lies outside is background. Neither looks at a label."""
    largest_component: bool = False
    """Keep the largest connected part of each predicted class alone: presumes that every organ is in one piece."""
    nsd_tolerance_mm: PositiveFloat = 2.0
    """Tolerance of the normalised surface Dice, mm."""
    allow_transductive: bool = False
    """Go on although validation or test patients are in the backbone's corpus. Every row of the report is then labelled: such figures
    say nothing about patients that the backbone has not seen."""
    publish_model: bool = True
    """Publish the model of the best validation Dice among `published_mode` as `models/<task>/<version>`; and, trained by the same mode on
    all labelled patients of the train split, one more as `models/<task>/all`, whose validation Dice is read and whose test Dice is not."""
    published_mode: Literal["fine_tuned", "any"] = "fine_tuned"
    """Models among which the published one is chosen. fine_tuned: those that train the pretrained backbone's weights (fine_tune,
    mean_teacher, weak_to_strong, prototype_self_training), or, if the job has none, all. any: models from scratch and on frozen
    features, too."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key, given in (("tasks", self.tasks), ("modes", self.modes)):
            if len(set(given)) < len(given):
                raise ValueError(f"{key} must differ, got {', '.join(given)}")
        trained = [mode for mode in self.modes if "steps" in SETTINGS_OF[mode]]
        missing = [mode for mode in trained if mode not in self.search.learning_rates]
        if missing:
            raise ValueError(f"search.learning_rates has no candidates for {', '.join(missing)}")
        if self.protocol == "paper_compat":
            for mode in self.modes:
                if MODES[mode].unlabelled != "none":
                    raise ValueError(
                        f"protocol paper_compat crops by the label, and {mode} reads no label of unlabelled patients: "
                        f"take {mode} out of modes"
                    )
        for mode in self.steps_by_mode:
            if mode not in self.modes or "steps" not in SETTINGS_OF[mode]:
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
                raise ValueError(f"draws names no number of draws for {', '.join(map(str, without))} labelled patients")
        sizes = {mode: self._num_candidates(mode) for mode in trained}
        if len(set(sizes.values())) > 1:
            found = ", ".join(f"{mode} {size}" for mode, size in sizes.items())
            raise ValueError(
                f"search must hold equally many candidates for every mode, got {found}: "
                + (
                    "some modes have lists alone, of which none is drawn; give them a distribution, too"
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
        """Return the optimizer steps of a mode's trials, where no search chooses them."""
        longer = 3 if mode == "scratch_long" else 1
        return self.steps_by_mode.get(mode, longer * self.steps)

    def _num_candidates(self, mode: Mode) -> int:
        space = [self.search.learning_rates[mode], *(self.search.space.get(name, (0,)) for name in SETTINGS_OF[mode])]
        lists = [candidates for candidates in space if not isinstance(candidates, Distribution)]
        is_proposed = self.search.searcher != "grid" or len(lists) < len(space)
        return self.search.num_samples if is_proposed else math.prod(map(len, lists))
