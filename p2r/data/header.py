"""A NIfTI header -> voxel size, position, shape and scaling of a scan, or a named refusal, before any voxel is read.

Lengths are millimetres. Metres and microns are converted; a header without a unit is read as mm, as every other reader
does. The extent of the scan must be plausible: otherwise a wrong unit would give voxels of 100 mm.

The affine follows nibabel: the sform if its code is set, else the qform, else the voxel sizes. Two common defects are
mended: an sform of ones from converters without orientation, with the true size in `pixdim` (see `_spacing_per_axis`), and
quaternions rounded to slightly more than 1.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.nifti1 import Nifti1Header, Nifti1PairHeader
from nibabel.nifti2 import Nifti2Header, Nifti2PairHeader
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from p2r.data.names import pair_of
from p2r.data.opening import Stream
from p2r.errors import RefusedScan

_LOGGER = logging.getLogger(__name__)
_LOGGER.addHandler(logging.NullHandler())  # nibabel's mends of a header are logged only on request

_MAX_AXIS = 32_767  # the largest that NIfTI-1 can state; NIfTI-2 could state 2**63
_MM_PER_UNIT = {1: 1e3, 3: 1e-3}  # metre, micron; mm for all others
_UNIT_NAMES = {1: "metre", 2: "mm", 3: "micron"}
_MAX_EXTENT_MM = 3000.0  # a person lying on the table
_MIN_EXTENT_MM = 1.0  # the longest side: an embryo of a fish under a microscope
_MIN_SPACING_MM, _MAX_RECORD_MM = 1e-6, 1e4  # for records of a corpus, which may be older than the bounds above
_QUATERNION_ROUNDING = -1e-4
_PLACEMENT = (
    "pixdim", "xyzt_units", "toffset", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y",
    "qoffset_z", "srow_x", "srow_y", "srow_z",
)  # fmt: skip
_OTHER_FILES = (
    (b"version https://git-lfs", "not_fetched", "is a Git LFS pointer: its content is not on this machine; fetch it: git lfs pull"),
    (b"/annex/objects/", "not_fetched", "is a git-annex pointer: its content is not on this machine; fetch it: datalad get PATH"),
    (b".git/annex/", "not_fetched", "is a git-annex pointer: its content is not on this machine; fetch it: datalad get PATH"),
    (b"\x1f\x8b", "not_nifti", "is gzipped twice; gunzip it once"),
    (b"<", "not_nifti", "is XML or a web page, such as a login page; download it again, signed in"),
)  # fmt: skip


@dataclass(frozen=True)
class Geometry:
    """Position of a scan in space and time."""

    affine: NDArray[np.float64]
    """(4, 4): voxel of the file -> mm."""
    spacing_mm: NDArray[np.float64]
    """Voxel size along the axes of the file."""
    placement: Mapping[str, tuple[float, ...]]
    """Space and time fields of the header, as the file has them."""


def read_header(stream: Stream, path: str | Path) -> tuple[Any, Mapping[str, tuple[float, ...]]]:
    """Read a header.

    Returns:
        nibabel's header, with small defects mended; and its space and time fields, unchanged.

    Raises:
        RefusedScan: `not_nifti`, `not_fetched`, `truncated` or `dtype`.
    """
    block = stream.read(Nifti1Header.sizeof_hdr)
    kinds = {b"n+1\0": Nifti1Header, b"ni1\0": Nifti1PairHeader}
    kind = kinds.get(block[344:348])
    if block[4:8] in (b"n+2\0", b"ni2\0"):
        kind = Nifti2Header if block[4:8] == b"n+2\0" else Nifti2PairHeader
        block += stream.read(kind.sizeof_hdr - len(block))
    if kind is None or (not kind.is_single and pair_of(str(path)) is None):
        raise _refuse_other_file(block, path, is_half=kind is not None)
    if len(block) < kind.sizeof_hdr:
        raise RefusedScan("truncated", f"{path} ends within its header, after {len(block)} bytes; copy it again")
    try:
        raw = kind(block, check=False)
        placement = {name: tuple(np.atleast_1d(raw[name]).tolist()) for name in _PLACEMENT}
        _check_dtype(raw, path)
        raw.quaternion_threshold = _QUATERNION_ROUNDING
        raw.check_fix(logger=_LOGGER, error_level=40)  # level 40: the standard is violated; lower levels are repaired
    except (HeaderDataError, ValueError, OverflowError) as error:
        raise _refuse_broken_header(path, error) from error
    return raw, placement


def geometry_of(header: Any, placement: Mapping[str, tuple[float, ...]], path: str | Path) -> Geometry:
    """Return the position of a scan in space and time.

    Args:
        header: Header from `read_header`.
        placement: Its space and time fields, from `read_header`.
        path: Path of the scan, for messages.

    Raises:
        RefusedScan: `degenerate_affine`.
    """
    if int(header["sform_code"]) <= 0 and 0 in placement["pixdim"][1:4]:
        raise RefusedScan(
            "degenerate_affine",
            f"{path} states a voxel size of 0 (pixdim {list(placement['pixdim'][1:4])}) and no sform: the true size is unknown; write "
            "it into the header (nibabel: header.set_zooms)",
        )
    mm_per_unit = unit_mm(placement)
    try:
        affine = np.asarray(header.get_best_affine(), dtype=np.float64)
    except (HeaderDataError, ValueError) as error:
        raise RefusedScan(
            "degenerate_affine", f"{path} has no usable orientation: {error}; convert the scan again, or set its sform"
        ) from error
    affine[:3] *= mm_per_unit
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    # Volume of a voxel divided by the product of its edges: 1 for right angles, 0 if axes coincide.
    if (
        not np.isfinite(affine).all()
        or not ((sizes > 1e-9) & (sizes < 1e9)).all()
        or abs(np.linalg.det(affine[:3, :3] / sizes)) < 1e-2
    ):
        raise RefusedScan(
            "degenerate_affine",
            f"{path} has a singular or non-finite affine: {affine[:3].round(4).tolist()}; convert the scan again, or set its "
            f"{'sform' if int(header['sform_code']) > 0 else 'qform'}",
        )
    return Geometry(affine, _spacing_per_axis(header, affine, mm_per_unit), placement)


def check_extent(place: Geometry, shape: tuple[int, ...], path: str | Path) -> None:
    """Refuse a scan that is too large or too small for a body, such as one with a wrong unit of length.

    Args:
        place: Geometry from `geometry_of`.
        shape: Shape from `shape_of`.
        path: Path of the scan, for messages.

    Raises:
        RefusedScan: `extent`.
    """
    unit = int(place.placement["xyzt_units"][0]) & 7
    extent = place.spacing_mm * shape[:3]
    if extent.max() <= _MAX_EXTENT_MM and extent.max() >= _MIN_EXTENT_MM:
        return
    stated = (
        f"Its header states {_UNIT_NAMES[unit]}"
        if unit in _UNIT_NAMES
        else "Its header states no unit, so mm is assumed"
    )
    raise RefusedScan(
        "extent",
        f"{path} covers {' x '.join(f'{size:.3g}' for size in extent)} mm; the longest side of a scan has {_MIN_EXTENT_MM:g} to "
        f"{_MAX_EXTENT_MM:g} mm. {stated} (xyzt_units): correct it with nibabel's "
        "header.set_xyzt_units('mm'), ('meter') or ('micron'), or correct the voxel size",
    )


def is_physical(shape: Sequence[int], spacing_mm: Sequence[float]) -> bool:
    """Return whether a record of this shape and voxel size (X, Y, Z) can come from a scan."""
    return all(
        size > _MIN_SPACING_MM and size * count < _MAX_RECORD_MM for size, count in zip(spacing_mm, shape, strict=False)
    )


def unit_mm(placement: Mapping[str, Sequence[float]]) -> float:
    """Return the header's unit of length in mm."""
    return _MM_PER_UNIT.get(int(placement["xyzt_units"][0]) & 7, 1.0)


def shape_of(header: Any, path: str | Path, max_mib: float) -> tuple[int, int, int, int]:
    """Return (X, Y, Z, T) in the order of the file.

    Raises:
        RefusedScan: `not_nifti`, `not_3d`, `empty` or `too_large`.
    """
    try:
        shape = tuple(int(size) for size in header.get_data_shape())
        offset = int(header["vox_offset"])
    except (HeaderDataError, ValueError, OverflowError) as error:
        raise _refuse_broken_header(path, error) from error
    while len(shape) > 4 and shape[-1] == 1:
        shape = shape[:-1]
    if not 3 <= len(shape) <= 4:
        vectors = " (the fifth axis of NIfTI holds the components of vectors)" if len(shape) == 5 else ""
        raise RefusedScan(
            "not_3d",
            f"{path} has {len(shape)} axes {list(shape)}{vectors}; a scan has three, or four with time last: save one volume, "
            "or one slice as (X, Y, 1)",
        )
    if min(shape) < 1:
        raise RefusedScan("empty", f"{path} has no voxels: its shape is {list(shape)}; correct the header's dim")
    if sum(size == 1 for size in shape[:3]) > 1:
        raise RefusedScan(
            "not_3d",
            f"{path} is a line of voxels: its shape is {list(shape)}; a scan has at least two axes of 2 voxels",
        )
    if offset < 0:
        raise RefusedScan("not_nifti", f"{path} states that its voxels begin at byte {offset}; write the file again")
    promised = offset + int(np.prod(shape, dtype=object)) * int(header.get_data_dtype().itemsize)
    if max(shape) > _MAX_AXIS or promised > max_mib * 2**20:
        raise RefusedScan(
            "too_large",
            f"{path} promises {list(shape)} voxels, {promised / 2**20:.0f} MiB; up to {_MAX_AXIS} along an axis and "
            f"{max_mib:g} MiB are read (ingest.max_scan_mib)",
        )
    return shape[0], shape[1], shape[2], shape[3] if len(shape) == 4 else 1


def scaling_of(header: Any, path: str | Path) -> tuple[float, float]:
    """Return slope and intercept.

    Raises:
        RefusedScan: `nonfinite`.
    """
    try:
        slope, intercept = header.get_slope_inter()
    except HeaderDataError as error:
        raise RefusedScan(
            "nonfinite", f"{path} has a non-finite scaling: {error}; correct scl_slope and scl_inter"
        ) from error
    return (1.0, 0.0) if slope is None else (float(slope), float(intercept or 0.0))


def _refuse_other_file(block: bytes, path: str | Path, *, is_half: bool) -> RefusedScan:
    for start, code, reason in _OTHER_FILES:
        if block.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(start):
            return RefusedScan(code, f"{path} {reason.replace('PATH', str(path))}")
    reason = "is empty" if not block else "is a header without voxels" if is_half else "has no NIfTI magic number"
    return RefusedScan(
        "not_nifti",
        f"{path} {reason}; only NIfTI-1 and NIfTI-2 (.nii, .nii.gz, .hdr/.img) are read: copy or convert it again",
    )


def _refuse_broken_header(path: str | Path, error: Exception) -> RefusedScan:
    return RefusedScan(
        "not_nifti",
        f"{path} has a header that breaks the NIfTI standard: {error}; write the file again, as with nibabel",
    )


def _check_dtype(header: Any, path: str | Path) -> None:
    number = int(header["datatype"])
    known = nibabel.nifti1.data_type_codes
    if number not in known.code or header.get_data_dtype().kind not in "iuf":
        name = known.label.get(number, "unknown")
        raise RefusedScan(
            "dtype",
            f"{path} holds voxels of type {name} (NIfTI code {number}); integers and real numbers of up to 64 bits are supported: save "
            "it as one of these, such as float32",
        )


def _spacing_per_axis(header: Any, affine: NDArray[np.float64], mm_per_unit: float) -> NDArray[np.float64]:
    """Return the voxel size along the axes of the file, mm.

    It follows from the affine, with one exception: converters without orientation write an sform of ones and leave the true
    size in `pixdim`. Taken literally, ACDC's voxels of 1.56 x 1.56 x 10 mm would be 1 mm cubes. An sform of the scanner
    (code 1) is trusted, unless the qform, which uses `pixdim`, contradicts it.
    """
    sizes: NDArray[np.float64] = np.linalg.norm(affine[:3, :3], axis=0)
    pixdim = np.abs(np.asarray(header["pixdim"][1:4], dtype=np.float64)) * mm_per_unit
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    is_unit = np.allclose(sizes, mm_per_unit, rtol=1e-3) and not affine[:3, 3].any()
    is_placeholder = sform > 0 and is_unit and (qform > 0 or sform != 1)
    return pixdim if is_placeholder and ((pixdim > 1e-9) & np.isfinite(pixdim)).all() else sizes
