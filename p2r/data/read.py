"""A scan -> the volumes that a corpus stores of it, or a refusal.

    NIfTI:  one volume
    DICOM:  one volume for each image that dcm2niix makes of the series (echoes, magnitude and phase, orientations)

Each volume is read, checked as acquired, resampled if the job requires it, and checked for size. Of a split series the
usable images are kept; `Volume.notes` records the refusals of the others.
"""

from dataclasses import replace

from p2r.config import IngestConfig
from p2r.data.dicom import converted
from p2r.data.quality import check_quality, check_size
from p2r.data.resample import resample
from p2r.data.scans import Scan
from p2r.data.sidecar import common_tags, read_sidecar
from p2r.data.volume import Volume, read_volume
from p2r.errors import RefusedScan


def read_scan(scan: Scan, config: IngestConfig) -> list[Volume]:
    """Read a scan by the rules of a job's ingest section.

    Args:
        scan: Scan from `find_scans`.
        config: The job's ingest section.

    Returns:
        One volume with the scan's key. For a DICOM series with several images, the usable ones with keys KEY_0, KEY_1, ...
        Each has the tags of its sidecar. Its `notes` are those of `read_volume`, then `sidecar_ignored` for each unusable JSON
        file or value, and `part_CODE` for each refused image of the series.

    Raises:
        RefusedScan: if no image is usable, with the codes of `read_volume`, `converted`, `check_quality`, `check_size` and
            `resample`.
        StorageError: if a remote file exists but cannot be fetched.
    """
    if scan.format == "dicom":
        return _read_series(scan, config)
    volume = _read_and_check(scan.path, scan.key, config)
    tags, num_ignored = read_sidecar(scan.path)
    return [replace(volume, sidecar=tags, notes=volume.notes + _repeat_note(num_ignored))]


def sidecar_of(scan: Scan) -> dict[str, object]:
    """Return the technical tags of a scan's acquisition: from the JSON files beside NIfTI, or from DICOM by dcm2niix.

    `read_scan` returns them with each volume; this function reads no voxels. For a series with several images it returns
    the tags that all images share.

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
                volume = _read_and_check(str(part.path), key, config)
            except RefusedScan as error:
                # The temporary path would make the messages of two runs differ.
                refusals.append(RefusedScan(error.code, error.message.replace(str(part.path), scan.path)))
            else:
                notes = volume.notes + _repeat_note(part.num_ignored)
                volumes.append(replace(volume, sidecar=part.tags, notes=notes))
    if not volumes:
        raise refusals[0]
    refused = tuple(f"part_{error.code}" for error in refusals)
    return [replace(volume, notes=volume.notes + refused) for volume in volumes]


def _read_and_check(path: str, key: str, config: IngestConfig) -> Volume:
    volume = read_volume(
        path, key=key, max_mib=config.max_scan_mib, max_frames=config.max_frames, nan=config.nan_voxels
    )
    check_quality(volume, config)
    return volume if config.sessions is not None else to_grid_of_job(volume, config)


def to_grid_of_job(volume: Volume, config: IngestConfig) -> Volume:
    """Resample a volume if the job requires it, and check its size. Of a session only the reference is resampled this way.

    Raises:
        RefusedScan: as `resample` and `check_size`.
    """
    if config.resample_mm is not None:
        requested = config.resample_mm
        spacing_mm = requested if isinstance(requested, tuple) else (requested, requested, requested)
        volume = resample(volume, spacing_mm, max_mib=config.max_scan_mib)
    check_size(volume, config)
    return volume


def _repeat_note(count: int) -> tuple[str, ...]:
    return ("sidecar_ignored",) * count
