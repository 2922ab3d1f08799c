"""One DICOM series -> NIfTI files, by `dcm2niix` in a process of its own; and files -> series, by their headers.

Choices: the converter sees a temporary folder with links to this series' files and nothing else, no settings of the
user, and a time limit. Of its sidecar only the tags of `sidecar.TAGS` are taken: its option to anonymise keeps
institution, station, serial number and free text. A series whose slices are unevenly spaced (one was lost, mostly) is
refused: dcm2niix offers an interpolated guess, and we do not take it. So is everything that is no MR image, and what is
known to have text burned into the picture.

Two series of one folder are told apart by SeriesInstanceUID; a series that lies in several folders is one for each.
"""

import hashlib
import subprocess
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p2r.data.sidecar import allowed_tags
from p2r.errors import RefusedScan

SUFFIXES = (".dcm", ".ima")
"""File names that are taken for DICOM wherever they lie."""

_MAGIC_OFFSET = 128
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_DIRECTORY = "1.2.840.10008.1.3.10"


@dataclass(frozen=True)
class Series:
    """Files of one folder that belong together."""

    folder: str
    files: tuple[str, ...]
    """Sorted."""
    uid_digest: str | None
    """Short digest of SeriesInstanceUID; None: a file whose header cannot be read, or has none."""
    number: int | None
    """SeriesNumber."""
    patient_id: str | None
    """PatientID. It identifies a person: it is used where a job asks for it, and nowhere else."""


@dataclass(frozen=True)
class Part:
    """One image that a series was converted to."""

    path: Path | None
    """A `.nii` file; None if only tags were asked for."""
    tags: dict[str, Any]
    """By the allow-list of `sidecar`."""
    num_ignored: int
    """Tags on the list without a usable value."""


def is_dicom(path: Path) -> bool:
    """Tell whether a file has DICOM's magic number."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            file.seek(_MAGIC_OFFSET)
            return file.read(4) == b"DICM"
    except OSError:
        return False


def group_by_series(paths: Iterable[Path]) -> list[Series]:
    """Read the headers of DICOM files, and group them by folder and series; a `DICOMDIR`, which lists files, is left out."""
    grouped: dict[tuple[str, str], list[str]] = defaultdict(list)
    headers: dict[tuple[str, str], dict[str, str]] = {}
    found: list[Series] = []
    for path in sorted(paths):
        try:
            header = _header(path, "SeriesInstanceUID", "SeriesNumber", "PatientID")
        except RefusedScan:
            header = {}
        if uid := header.get("SeriesInstanceUID"):
            key = str(path.parent), hashlib.sha256(uid.encode()).hexdigest()[:8]
            grouped[key].append(str(path))
            headers.setdefault(key, header)
        elif header.get("MediaStorageSOPClassUID") != _DIRECTORY:
            found.append(Series(str(path.parent), (str(path),), None, None, None))
    for (folder, digest), files in grouped.items():
        header = headers[folder, digest]
        number = header["SeriesNumber"]
        found.append(
            Series(
                folder,
                tuple(files),
                digest,
                int(number) if number.isdecimal() and len(number) < 10 else None,
                header["PatientID"] or None,
            )
        )
    return found


@contextmanager
def converted(files: Sequence[str], name: str, *, timeout_s: float, only_tags: bool = False) -> Iterator[list[Part]]:
    """Convert one series; the images are there for as long as the context is open.

    Args:
        files: Of the series.
        name: Of the series, for messages.
        timeout_s: Most time that the converter may take.
        only_tags: Make no images.

    Raises:
        RefusedScan: `not_mr`, `secondary_capture`, `burned_in_annotation`, `uneven_slices`, `timeout`, or `unreadable`.
    """
    _check_kind(files, name)
    with tempfile.TemporaryDirectory(prefix="p2r-dicom-") as folder:
        links, output = Path(folder, "series"), Path(folder, "output")
        links.mkdir()
        output.mkdir()
        for number, file in enumerate(files):
            (links / f"{number:06d}.dcm").symlink_to(Path(file).absolute())
        sidecars = ["-b", "o" if only_tags else "y", "-ba", "y"]
        import dcm2niix

        command = [dcm2niix.bin, "-g", "i", *sidecars, "-z", "n", "-f", "part", "-o", str(output), str(links)]
        try:
            # Its words may quote a patient: they are not passed on.
            done = subprocess.run(command, capture_output=True, timeout=timeout_s, env={"HOME": folder}, check=False)
        except subprocess.TimeoutExpired:
            raise RefusedScan(
                "timeout", f"{name}: dcm2niix took longer than {timeout_s:g} s (ingest.dcm2niix_timeout_s)"
            ) from None
        images = sorted(output.glob("part*.json" if only_tags else "part*.nii"))
        if done.returncode or not images:
            raise RefusedScan(
                "unreadable",
                f"{name}: dcm2niix ended with exit code {done.returncode} and {len(images)} images; "
                "run it on the folder to see what it says",
            )
        if any("_Eq" in image.stem for image in images):
            raise RefusedScan("uneven_slices", f"{name} has slices at uneven distances: is one missing? Copy it again")
        yield [_part(image) for image in images]


def _part(image: Path) -> Part:
    sidecar = image.with_suffix(".json")
    tags, num_ignored = allowed_tags(sidecar.read_bytes()) if sidecar.is_file() else ({}, 1)
    return Part(image if image.suffix == ".nii" else None, tags, num_ignored)


def _check_kind(files: Sequence[str], name: str) -> None:
    for file in files:
        header = _header(Path(file), "Modality", "SOPClassUID", "BurnedInAnnotation")
        if header["SOPClassUID"].startswith(_SECONDARY_CAPTURE):
            raise RefusedScan("secondary_capture", f"{name} holds secondary captures: pictures of images, not a scan")
        if header["Modality"] != "MR":
            raise RefusedScan("not_mr", f"{name} has the modality {header['Modality'][:16]!r}; MR is read")
        if header["BurnedInAnnotation"].upper() == "YES":
            raise RefusedScan(
                "burned_in_annotation", f"{name} has text in its pictures (BurnedInAnnotation is YES), maybe a name"
            )


def _header(path: Path, *tags: str) -> dict[str, str]:
    """Return some tags of a file as text, and the kind of the file; empty where they are absent."""
    import pydicom  # takes a second, and most sources have no DICOM

    try:
        with warnings.catch_warnings():  # odd values are no reason to speak up: those that matter are checked
            warnings.simplefilter("ignore")
            # Files named .dcm may lack the preamble, and are DICOM nevertheless.
            header = pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=list(tags))
            found = {tag: header.get(tag) for tag in tags}
            found["MediaStorageSOPClassUID"] = header.file_meta.get("MediaStorageSOPClassUID")
            return {tag: "" if value is None else str(value).strip() for tag, value in found.items()}
    except Exception as error:  # pydicom raises whatever hostile bytes lead it to
        raise RefusedScan("unreadable", f"{path} has no DICOM header to be read ({type(error).__name__})") from error
