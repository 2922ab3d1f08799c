"""A scan of the list -> the volumes that a corpus keeps of it, or a refusal.

    NIfTI:  one volume
    DICOM:  one volume for each image that dcm2niix makes of the series (echoes, phase beside magnitude, orientations)

Each is read, checked as it was acquired, resampled if the job asks, and checked for size. Of a series that was split, the
images that can be used are kept; what became of the others is in `Volume.notes`.
"""

from dataclasses import replace
from typing import Any

from p2r.config import IngestConfig
from p2r.data.dicom import converted
from p2r.data.quality import check_quality, check_size
from p2r.data.resample import resample
from p2r.data.scans import Scan
from p2r.data.sidecar import common_tags, read_sidecar
from p2r.data.volume import Volume, read_volume
from p2r.errors import RefusedScan


def read_scan(scan: Scan, config: IngestConfig) -> list[Volume]:
    """Read a scan as the job's ingest section asks.

    Args:
        scan: From `find_scans`.
        config: The job's ingest section.

    Returns:
        One volume with the scan's key; or, of a DICOM series that is several images, those that can be used, with the
        keys KEY_0, KEY_1 and so on. Each has the tags of its sidecar, and in `notes` the code `sidecar_ignored` for each
        JSON file or value that could not be used, and `part_CODE` for each refused image of the series.

    Raises:
        RefusedScan: if nothing of it can be used; the codes are those of `read_volume`, `converted`, `check_quality`,
            `check_size` and `resample`.
        StorageError: if a remote file cannot be fetched, for another reason than that there is none.
    """
    if scan.format == "dicom":
        return _read_series(scan, config)
    volume = _read(scan.path, scan.key, config)
    tags, num_ignored = read_sidecar(scan.path)
    return [replace(volume, sidecar=tags, notes=_ignored(num_ignored))]


def sidecar_of(scan: Scan) -> dict[str, Any]:
    """Return the technical tags of a scan's acquisition: of the JSON files beside NIfTI, or those dcm2niix finds in DICOM.

    `read_scan` gives them with each volume; this is for when no voxel is wanted. Of a series that is several images, the
    tags on which all agree.

    Raises:
        RefusedScan: for a DICOM series that cannot be converted.
        StorageError: if a bucket cannot be read.
    """
    if scan.format == "dicom":
        with converted(
            scan.files, scan.path, timeout_s=IngestConfig.model_fields["dcm2niix_timeout_s"].default, only_tags=True
        ) as parts:
            return common_tags([part.tags for part in parts])
    return read_sidecar(scan.path)[0]


def _read_series(scan: Scan, config: IngestConfig) -> list[Volume]:
    volumes: list[Volume] = []
    refusals: list[RefusedScan] = []
    with converted(scan.files, scan.path, timeout_s=config.dcm2niix_timeout_s) as parts:
        for number, part in enumerate(parts):
            key = scan.key if len(parts) == 1 else f"{scan.key}_{number}"
            try:
                volume = _read(str(part.path), key, config)
            except RefusedScan as error:
                # Where it lay for the moment is nobody's concern, and would make two runs differ.
                refusals.append(RefusedScan(error.code, error.message.replace(str(part.path), scan.path)))
            else:
                volumes.append(replace(volume, sidecar=part.tags, notes=_ignored(part.num_ignored)))
    if not volumes:
        raise refusals[0]
    refused = tuple(f"part_{error.code}" for error in refusals)
    return [replace(volume, notes=volume.notes + refused) for volume in volumes]


def _read(path: str, key: str, config: IngestConfig) -> Volume:
    volume = read_volume(
        path, key=key, max_mib=config.max_scan_mib, max_frames=config.max_frames, nan=config.nan_voxels
    )
    check_quality(volume, config)
    if config.resample_mm is not None:
        asked = config.resample_mm
        spacing_mm = asked if isinstance(asked, tuple) else (asked, asked, asked)
        volume = resample(volume, spacing_mm, max_mib=config.max_scan_mib)
    check_size(volume, config)
    return volume


def _ignored(count: int) -> tuple[str, ...]:
    return ("sidecar_ignored",) * count
