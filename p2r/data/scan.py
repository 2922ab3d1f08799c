"""A scan of a source: its files, and facts from file names and lists. Its voxels are read elsewhere."""

from dataclasses import dataclass
from typing import Literal

from p2r.data.names import composed


@dataclass(frozen=True, order=True)
class Scan:
    """One image, or one DICOM series, that may become a record."""

    path: str
    """Absolute path, or URL. Two files: the header's path. A series: its folder, plus `#` and a digest if it holds several."""
    key: str
    """Unique name within the corpus, without dots, because WebDataset cuts a member's name at the first dot."""
    num_bytes: int
    """Size of its files."""
    modified: str = ""
    """Modification time in ns, or ETag; empty if unknown."""
    files: tuple[str, ...] = ()
    """Its files, if there are several, or if `path` is not a file."""
    subject: str | None = None
    """Subject from BIDS names, a list or PatientID; None: the job's `subject_pattern` finds it in `name`."""
    entities: tuple[tuple[str, str], ...] = ()
    """BIDS entities, or columns of a list; sorted."""
    format: Literal["nifti", "dicom"] = "nifti"
    """File format."""
    label: str = ""
    """For a DICOM series, the first folder below the source on the path to it."""
    below: str = ""
    """Path relative to its source; empty if it is not below a source."""
    case: str | None = None
    """Name of its case in a `dataset.json`."""
    label_map: str = ""
    """Reason why its name or a `dataset.json` marks it as a label map; empty if there is none."""
    passed_over: str = ""
    """For a folder that is not read, the reason; empty for a scan."""

    description: str = ""
    """Series description of a DICOM series. It may contain a person's name, so it is never stored or logged."""
    study: str = ""
    """Short digest of the study of a DICOM series."""
    channels: tuple[str, ...] = ()
    """Contrasts that a `dataset.json` states for each image; several are on its fourth axis."""

    @property
    def num_channels(self) -> int:
        """Number of contrasts of the image, as far as its names tell."""
        return max(1, len(self.channels))

    @property
    def name(self) -> str:
        """File name of the scan, or label of the series, in Unicode's composed form."""
        return composed(self.label or self.path.rsplit("/", 1)[-1])


def folder_passed_over(path: str, num_files: int) -> Scan:
    """Return the entry of a folder of a BIDS data set that is not read, because it holds results or sources."""
    name = path.rpartition("/")[2]
    reason = f"{name} of a BIDS data set, not read as scans ({num_files} images); to ingest them, list this folder in ingest.sources"
    return Scan(path, name, 0, f"{num_files} files", passed_over=reason)
