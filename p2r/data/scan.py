"""A scan that was found: its files, and the statements of names and lists about it. Voxels are read elsewhere."""

from dataclasses import dataclass
from typing import Literal

from p2r.data.names import composed


@dataclass(frozen=True, order=True)
class Scan:
    """One image, or one DICOM series, that may become a record."""

    path: str
    """Absolute path, or URL; for two files the header's, for a series its folder (with `#` and a digest where it has several)."""
    key: str
    """Unique name within the corpus, without dots: WebDataset cuts a member's name at its first dot."""
    num_bytes: int
    """Size of its files."""
    modified: str = ""
    """When it was last changed, ns, or its ETag; empty if that is not known."""
    files: tuple[str, ...] = ()
    """Its files, where they are several or `path` is none."""
    subject: str | None = None
    """From BIDS names, a list or PatientID; None: what the job's `subject_pattern` finds in `name`."""
    entities: tuple[tuple[str, str], ...] = ()
    """BIDS entities, or columns of a list; sorted."""
    format: Literal["nifti", "dicom"] = "nifti"
    """What is to be read."""
    label: str = ""
    """For a DICOM series: the first folder below the source that leads to it."""
    below: str = ""
    """Path below its source; empty if it is not below one."""
    case: str | None = None
    """Name of its case, as a `dataset.json` has it."""
    label_map: str = ""
    """Why its name, or a `dataset.json`, makes it a label map; empty: nothing does."""
    passed_over: str = ""
    """Why it is no scan but a folder whose files are not read; empty: it is a scan."""

    @property
    def name(self) -> str:
        """File name of the scan, or the label of a series, in Unicode's composed form."""
        return composed(self.label or self.path.rsplit("/", 1)[-1])


def folder_passed_over(path: str, num_files: int) -> Scan:
    """Return the entry of a folder of a BIDS data set that holds results or sources, and whose files are not read."""
    name = path.rpartition("/")[2]
    reason = f"{name} of a BIDS data set is not read ({num_files} images); a source of its own in ingest.sources is"
    return Scan(path, name, 0, f"{num_files} files", passed_over=reason)
