"""Section `ingest`: scans -> a corpus of shards."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator

from p2r.config.section import FilledIn, Fraction, Location, Section, is_none
from p2r.contrasts import Contrast
from p2r.patterns import check_subject_pattern


def is_32(value: object) -> bool:
    """Return whether cubes have the edge of earlier versions; then the field is left out, as in corpora before it."""
    return value == 32


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


class SessionsConfig(Section):
    """Sessions: the scans of one visit become one record with a named volume for each contrast, all on one grid.

    A session is a subject and session of BIDS, a study of DICOM, a case of a `dataset.json`, or the rows of a list with the same
    subject and `group` (or `session`, `session_id`, `visit`). Otherwise all scans of a subject, by session if their paths have
    `ses-...`. A contrast that a session lacks stays missing.
    """

    contrasts: Annotated[
        dict[Contrast, Annotated[tuple[str, ...], Field(min_length=1)] | str], Field(min_length=1, max_length=64)
    ]
    """Contrasts by name, each with one or several patterns (`*` and `?`, in any case). A pattern must match all the words that state
    a scan's contrast: `T1w` does not match `acq-mprage_T1w`, `*T1w` does. The words are the column `contrast` of a list, a DICOM
    series description, or the channel in a `dataset.json`. Without them, they are the entities and suffix of a BIDS name (such as
    `ce-GADOLINIUM_T1w`, without sub, ses and run), or else the file's name. The first contrast that matches counts; a scan that
    matches none is left out, as `no_contrast` in the ledger."""
    reference: Contrast | None = None
    """Contrast whose grid all contrasts of a session share; others are resampled to it by their headers' positions, where their grids
    differ. Nothing is registered. None: the first of `contrasts`."""
    without_reference: Literal["next", "refuse"] = "next"
    """Treatment of a session without the reference. next: the first of `contrasts` that it has takes its place. refuse: refuse its scans
    as `no_reference`."""
    min_coverage: Fraction = 0.9
    """Smallest fraction of the reference's voxels that a contrast must cover; others are refused as `other_extent`."""
    repeats: Literal["refuse", "first", "last"] = "refuse"
    """Treatment of several scans of one contrast in a session, in the order of their paths (run-2 before run-10). refuse: refuse all of
    them as `contrast_twice`. first, last: take that one."""
    fourth_axis: Literal["time", "contrasts"] = "time"
    """Meaning of the fourth axis of an image. contrasts: one contrast after the other, in the order of `contrasts`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.reference is not None and self.reference not in self.contrasts:
            raise ValueError(
                f"reference must be one of the contrasts {', '.join(self.contrasts)}, got {self.reference}"
            )
        return self

    @property
    def by_priority(self) -> tuple[str, ...]:
        """Contrasts in the order in which they serve as the reference."""
        first = (self.reference,) if self.reference is not None else ()
        return (*first, *(name for name in self.contrasts if name not in first))


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
    sessions: SessionsConfig | None = Field(default=None, exclude_if=is_none)
    """Join the scans of a session into one record of several contrasts. None: each scan is a record."""
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
    """Chunks of a record. planes: for 2D training. blocks: cubes of `block_size` voxels, for 3D patches. npy: uncompressed, for readers
    without our decoder."""
    block_size: Literal[16, 24, 32] = Field(default=32, exclude_if=is_32)
    """Records of blocks only: edge of a cube, voxels. A patch reads every cube that it touches. For patches of 96 to 128 voxels, cubes of
    16 are 1.8 to 1.6 times the bytes of the patch, cubes of 32 are 2.7 to 2.2 times. Smaller cubes take more requests from a bucket."""
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
        if self.max_frames is not None and self.sessions is not None and self.sessions.fourth_axis == "contrasts":
            raise ValueError(
                "max_frames shortens series in time, and by sessions.fourth_axis the fourth axis holds contrasts: leave max_frames out"
            )
        is_real = [source for source in self.sources if not source.startswith("template://")]
        borrowed = [name for name, word in _VIRTUAL_SUBJECT_WORDS.items() if word in getattr(self, name).lower()]
        if is_real and borrowed:
            raise ValueError(
                f"{', '.join(borrowed)} speak{'s' * (len(borrowed) == 1)} of virtual subjects, but sources name other data ({is_real[0]}): "
                f"state {', '.join(f'ingest.{name}' for name in borrowed)} of these"
            )
        return self
