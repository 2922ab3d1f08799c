"""A NIfTI file -> `Volume` with voxels in RAS order, or a named refusal; and back to the file's own grid.

    opening: bytes, decompressed -> header: position, size, scaling -> Volume

Choices: nibabel parses the header, which is checked before any voxel is read. Whole numbers become narrow integers (not
`get_fdata`, which needs four times the bytes). An unusable file is refused with a code for the corpus's ledger: nothing is
guessed.

Memory: at its peak, reading takes the bytes of the stored voxels of the selected frames, the bytes of `data`, and 32 MiB.
The stored size is the one in the header, at most `max_mib`; a stream is read no further than that and some padding. A file
that is too small for its header is refused before anything is allocated.

Writing: viewers interpret position fields differently. nibabel prefers the sform, ITK the qform in some cases, and they
disagree about files with neither. So an image on a scan's own grid gets these fields of the scan's header unchanged.

Shapes: X Y Z voxels towards Right, Anterior, Superior (one of them may be 1: a single slice); T frames (1 for a still scan).
"""

import gzip
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import nibabel
import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform
from numpy.typing import NDArray

from p2r.data.header import check_extent, geometry_of, read_header, scaling_of, shape_of, unit_mm
from p2r.data.names import HEADER_SUFFIXES as HEADER_SUFFIXES
from p2r.data.names import SUFFIXES as SUFFIXES
from p2r.data.names import VOXEL_SUFFIXES as VOXEL_SUFFIXES
from p2r.data.names import local_path as local_path
from p2r.data.names import pair_of as pair_of
from p2r.data.names import scan_key as scan_key
from p2r.data.opening import Stream, opened
from p2r.data.opening import bucket_client as bucket_client
from p2r.errors import RefusedScan, StorageError

MAX_SCAN_MIB = 4096.0
"""Default limit of the memory for the voxels of a scan."""

Nan = Literal["background", "refuse"]

_LABEL_ROUNDING = 1e-3
_SLAB_VOXELS = 1 << 19
_KEPT_DTYPES = (np.int8, np.uint8, np.int16, np.uint16)
_RAS = np.array([[0, 1], [1, 1], [2, 1]], dtype=np.float64)


@dataclass(frozen=True)
class Volume:
    """A scan in RAS voxel order, with the information to return to its file's grid."""

    data: NDArray[Any]
    """(X, Y, Z, T): int8, uint8, int16, uint16 or float32."""
    affine: NDArray[np.float64]
    """(4, 4): voxel of `data` -> mm."""
    source_affine: NDArray[np.float64]
    """(4, 4): voxel of the file -> mm."""
    source_shape: tuple[int, ...]
    """Spatial shape in the file."""
    spacing_mm: tuple[float, float, float]
    """Voxel size along X, Y, Z, from the affine unless that is a placeholder (see `header`)."""
    key: str
    """File name without `.nii` or `.nii.gz`."""
    frames: tuple[int, ...] | None = None
    """Indices of the file's frames in `data`; None: all."""
    resampled_from_mm: tuple[float, float, float] | None = None
    """Voxel size before resampling; None if not resampled."""
    acquired_sha256: str | None = None
    """`voxels_sha256` before resampling, to recognise the scan; None if not resampled."""
    sidecar: Mapping[str, object] = field(default_factory=dict)
    """Technical tags of the acquisition, if known (see `sidecar`)."""
    notes: tuple[str, ...] = ()
    """Defects that were ignored, as codes for the ledger."""
    placement: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Space and time fields of the file's header, unchanged."""


def read_volume(
    path: str | Path,
    *,
    key: str | None = None,
    max_mib: float = MAX_SCAN_MIB,
    max_frames: int | None = None,
    nan: Nan = "background",
) -> Volume:
    """Read one scan.

    Args:
        path: A `.nii` or `.nii.gz` file, either file of a `.hdr` and `.img` pair, or its URL.
        key: Name of the volume; None: the file name without its suffix.
        max_mib: Limit of the memory for its voxels.
        max_frames: Maximum number of frames to read, evenly spaced; None: all.
        nan: background: NaN voxels become 0, or the minimum of their frame if that is lower, and `notes` counts them; refuse: one NaN voxel
            refuses the scan.

    Raises:
        RefusedScan: with the code `unreadable`, `not_fetched`, `truncated`, `not_nifti`, `not_3d`, `empty`, `dtype`,
            `too_large`, `nonfinite`, `constant`, `extent` or `degenerate_affine`.
        StorageError: if a remote file exists but cannot be fetched.
    """
    volume = _read_or_refuse(path, key, max_mib, max_frames, nan)
    if volume.data.min() == volume.data.max():
        raise RefusedScan(
            "constant",
            f"{path} is constant: every voxel is {volume.data.flat[0]} in 32 bits. Leave it out, or subtract an offset if the values "
            "differ only in digits beyond 32 bits",
        )
    return volume


def read_labels(path: str | Path, *, key: str | None = None) -> Volume:
    """Read a label map: whole numbers from 0 to 32767, as int16. An empty label map is allowed.

    Values within 0.001 of a whole number are rounded, because label maps stored from float64 can contain 1.0000153.

    Raises:
        RefusedScan: as `read_volume` except `constant`; also `labels` for invalid values.
    """
    volume = _read_or_refuse(path, key, MAX_SCAN_MIB, None, "refuse")
    if volume.data.dtype.kind == "f":
        whole = np.rint(volume.data)
        if np.abs(volume.data - whole).max() > _LABEL_ROUNDING:
            raise RefusedScan(
                "labels",
                f"{path} holds fractions; labels are whole numbers, to within {_LABEL_ROUNDING:g}: resample label maps by nearest "
                "neighbour, or round them",
            )
        volume = replace(volume, data=whole)
    low, high = volume.data.min(), volume.data.max()
    if low < 0 or high > np.iinfo(np.int16).max:
        raise RefusedScan(
            "labels",
            f"{path} holds values from {low} to {high}; labels are whole numbers from 0 to 32767: replace others by 0 or a class",
        )
    return replace(volume, data=volume.data.astype(np.int16))


def voxels_sha256(volume: Volume) -> str:
    """Return the digest of the voxel values; it is independent of compression, header and dtype of the file."""
    data = volume.data
    dtype = "<f4"  # a `Volume` holds whole numbers as floats only if they exceed 16 bits
    if data.dtype.kind in "iu":
        dtype = "<i2" if data.dtype != np.uint16 or data.max() < 1 << 15 else "<u2"
    digest = hashlib.sha256(f"{dtype}{data.shape}".encode())
    digest.update(np.ascontiguousarray(data, dtype=dtype).data)
    return digest.hexdigest()


def to_source_grid(canonical: NDArray[Any], volume: Volume) -> NDArray[Any]:
    """Reorder voxels from RAS to the order of the scan's file, exactly.

    Args:
        canonical: (X, Y, Z, ...) on the grid of `volume.data`; further axes are kept.
        volume: The scan as read.

    Returns:
        The same voxels in the order of the file of `volume`.

    Raises:
        ValueError: for another grid, or for a resampled volume, which has no exact inverse.
    """
    if volume.resampled_from_mm is not None:
        raise ValueError(
            f"the volume {volume.key} was resampled; read its file without resampling to return to its grid"
        )
    if canonical.shape[:3] != volume.data.shape[:3]:
        raise ValueError(f"array has the grid {canonical.shape[:3]}, the volume {volume.key} {volume.data.shape[:3]}")
    back = ornt_transform(_RAS, io_orientation(volume.source_affine))
    return np.ascontiguousarray(apply_orientation(canonical, back))


def write_nifti(
    path: str | Path,
    array: NDArray[Any],
    affine: NDArray[np.float64],
    *,
    like: Volume | None = None,
    world: Volume | None = None,
) -> None:
    """Write (X, Y, Z) or (X, Y, Z, T) to a `.nii` or `.nii.gz` file, atomically. Equal input gives equal bytes.

    Args:
        path: Output path. Its folder is created.
        array: Booleans become uint8, float64 becomes float32, wide integers become the narrowest sufficient type.
        affine: (4, 4) voxel -> mm; set as the sform, and as the qform to the extent that a quaternion can represent it.
        like: The scan whose file has the same grid. Its sform, qform, codes, units and temporal spacing are copied, so that
            every viewer overlays both. A mismatch is a `ValueError`: without `to_source_grid` the file would be mirrored,
            and look right.
        world: The scan whose unit of length is used, for another grid in its world; None: mm.

    Raises:
        StorageError: if the file cannot be written.
    """
    path = Path(path)
    if not path.name.endswith(SUFFIXES):
        raise StorageError(f"{path}: the name of a NIfTI file must end in .nii or .nii.gz")
    content = _nifti_bytes(array, affine, like=like, world=world)
    if path.name.endswith(".gz"):
        content = gzip.compress(content, compresslevel=6, mtime=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".tmp-", delete=False) as file:
            temporary = Path(file.name)
            try:
                file.write(content)
                temporary.chmod(0o644)
                os.replace(temporary, path)  # noqa: PTH105 (Path.replace, but on the name the file was opened under)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error}; check the folder, its permissions and free space") from error


def nifti_image(array: NDArray[Any], affine: NDArray[np.float64], *, like: Volume | None = None) -> Any:
    """Return the image that `write_nifti` would write, as a `nibabel.Nifti1Image` in memory."""
    return nibabel.Nifti1Image.from_bytes(_nifti_bytes(array, affine, like=like, world=None))


def volume_of(image: Any) -> Volume:
    """Convert a `nibabel` image to a volume, with all the checks of `read_volume`.

    Raises:
        RefusedScan: as `read_volume`.
    """
    with tempfile.TemporaryDirectory(prefix="p2r-image-") as folder:
        path = Path(folder, "image.nii")
        nibabel.save(image, path)
        return read_volume(path)


def _nifti_bytes(
    array: NDArray[Any], affine: NDArray[np.float64], *, like: Volume | None, world: Volume | None
) -> bytes:
    if like is not None and (array.shape[:3] != like.source_shape or not np.allclose(affine, like.source_affine)):
        raise ValueError(
            f"array {array.shape} and its affine are not on the grid of {like.key}'s file {like.source_shape}"
        )
    unit = 1.0 if world is None or not world.placement else unit_mm(world.placement)
    affine = np.diag([1 / unit, 1 / unit, 1 / unit, 1.0]) @ affine
    image = nibabel.Nifti1Image(_narrow_dtype(array), affine)
    image.set_sform(affine, code="aligned")
    image.set_qform(affine, code="aligned", strip_shears=True)
    image.header.set_xyzt_units({1e3: "meter", 1e-3: "micron"}.get(unit, "mm"), "sec")
    content: bytes = image.to_bytes()
    if like is not None and like.placement:
        content = _replace_placement(content, like.placement, has_time=array.ndim == 4 and like.frames is None)
    return content


def _replace_placement(content: bytes, placement: Mapping[str, Sequence[float]], *, has_time: bool) -> bytes:
    """Replace the space and time fields of a NIfTI-1 header by those in another file's header."""
    size = Nifti1Header.sizeof_hdr
    header = Nifti1Header(content[:size], check=False)
    for name, values in placement.items():
        if name == "pixdim":
            count = 5 if has_time else 4
            header["pixdim"][:count] = values[:count]
        else:
            header[name] = values if len(values) > 1 else values[0]
    rounded_up = float(np.linalg.norm([header[f"quatern_{part}"] for part in "bcd"]))
    if 1 < rounded_up < 1.01:  # nibabel refuses norms above 1
        for part in "bcd":
            header[f"quatern_{part}"] /= rounded_up
    return bytes(header.binaryblock) + content[size:]


def _narrow_dtype(array: NDArray[Any]) -> NDArray[Any]:
    if array.ndim not in (3, 4):
        raise ValueError(f"array must be (X, Y, Z) or (X, Y, Z, T), got {array.shape}")
    if array.dtype == np.bool_:
        return array.astype(np.uint8)
    if array.dtype.kind in "iu" and array.dtype.itemsize > 2:
        limits = int(array.min()), int(array.max())
        return array.astype(np.result_type(*(np.min_scalar_type(limit) for limit in limits)))
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def _read_or_refuse(path: str | Path, key: str | None, max_mib: float, max_frames: int | None, nan: Nan) -> Volume:
    try:
        with np.errstate(all="ignore"):  # overflows are refused below, by name
            return _decode_volume(path, key, max_mib, max_frames, nan)
    except MemoryError as error:
        raise RefusedScan(
            "too_large", f"{path} needs more memory than is available ({error}); read it on a larger machine"
        ) from error


def _decode_volume(path: str | Path, key: str | None, max_mib: float, max_frames: int | None, nan: Nan) -> Volume:
    pair = pair_of(str(path))
    header_path, voxels_path = pair or (path, path)
    with opened(header_path) as stream:
        header, placement = read_header(stream, header_path)
        if pair is not None and header.is_single:
            voxels_path = header_path
        shape = shape_of(header, path, max_mib)  # (X, Y, Z, T) in the order of the file
        place = geometry_of(header, placement, path)
        frames = _choose_frames(shape[3], max_frames)
        if voxels_path == header_path:
            stored, notes = _read_stored(stream, header, shape, frames)
        else:
            with opened(voxels_path) as voxels:
                stored, notes = _read_stored(voxels, header, shape, frames)
    check_extent(place, shape, path)
    scaling = scaling_of(header, path)
    dtype, num_nan, backgrounds = _choose_dtype(stored, scaling, path, nan)
    orientation = io_orientation(place.affine)
    data = np.empty([*(shape[axis] for axis in np.argsort(orientation[:, 0])), len(frames)], dtype)
    in_file_order = apply_orientation(data, ornt_transform(_RAS, orientation))  # a view
    for part in _split_into_slabs(stored.shape):
        scaled = _apply_scaling(stored[part], scaling)
        in_file_order[part] = np.where(np.isnan(scaled), backgrounds[part[3]], scaled) if num_nan else scaled
    spacing = place.spacing_mm[np.argsort(orientation[:, 0])]
    return Volume(
        data=data,
        affine=place.affine @ inv_ornt_aff(orientation, shape[:3]),
        source_affine=place.affine,
        source_shape=shape[:3],
        spacing_mm=(float(spacing[0]), float(spacing[1]), float(spacing[2])),
        key=scan_key(path) if key is None else key,
        frames=frames if len(frames) < shape[3] else None,
        notes=notes + ((f"nan_voxels={num_nan}",) if num_nan else ()),
        placement=placement,
    )


def _choose_frames(num_frames: int, max_frames: int | None) -> tuple[int, ...]:
    """Return the middle frame of each of `max_frames` equal parts of a series, or all frames."""
    if max_frames is None or num_frames <= max_frames:
        return tuple(range(num_frames))
    return tuple((2 * part + 1) * num_frames // (2 * max_frames) for part in range(max_frames))


def _read_stored(
    stream: Stream, header: Any, shape: tuple[int, int, int, int], frames: tuple[int, ...]
) -> tuple[NDArray[Any], tuple[str, ...]]:
    """Read the stored voxels of the selected frames; return them, and notes about the stream."""
    dtype, offset = header.get_data_dtype(), int(header["vox_offset"])
    if header.is_single and offset == 0:
        offset = int(header.single_vox_offset)
    frame_bytes = shape[0] * shape[1] * shape[2] * dtype.itemsize
    stream.expect(offset + frame_bytes * shape[3])
    content = np.empty((len(frames), frame_bytes), np.uint8)
    for frame, target in zip(frames, content, strict=True):
        stream.seek(offset + frame * frame_bytes)
        stream.fill(target)
    stream.seek(offset + frame_bytes * shape[3])
    notes = stream.finish()
    return content.reshape(-1).view(dtype).reshape((*shape[:3], len(frames)), order="F"), notes


def _apply_scaling(stored: NDArray[Any], scaling: tuple[float, float]) -> NDArray[Any]:
    slope, intercept = scaling
    if scaling == (1.0, 0.0):
        return stored
    is_whole = slope.is_integer() and intercept.is_integer() and max(abs(slope), abs(intercept)) < 2**30
    if stored.dtype.kind in "iu" and stored.dtype.itemsize <= 4 and is_whole:
        return stored.astype(np.int64) * int(slope) + int(intercept)
    return stored.astype(np.float64) * slope + intercept


def _choose_dtype(
    stored: NDArray[Any], scaling: tuple[float, float], path: str | Path, nan: Nan
) -> tuple[np.dtype[Any], int, NDArray[np.float64]]:
    """Return the narrowest lossless type for the scaled voxels, the number of NaN voxels, and the value to replace them in each frame.

    The type is float32 if the voxels have fractions, or exceed 16 bits.
    """
    native = stored.dtype.newbyteorder("=")
    if native in _KEPT_DTYPES and scaling == (1.0, 0.0):
        return np.dtype(native), 0, np.zeros(stored.shape[3])
    found = _scan_values(stored, scaling)
    is_empty = found.lows.min() > found.high
    if found.num_infinite or is_empty or (found.num_nan and nan == "refuse"):
        way_out = (
            "replace them by finite values"
            if found.num_infinite or is_empty
            else "set them to 0 if that is correct, or read them as background (ingest.nan_voxels: background)"
        )
        raise RefusedScan(
            "nonfinite", f"{path} has {found.num_nan + found.num_infinite} voxels that are NaN or infinite; {way_out}"
        )
    backgrounds = np.minimum(found.lows, 0.0)  # of each frame, because frames may be contrasts
    low, high = found.lows.min(), found.high
    if found.num_nan:
        low, high = min(low, backgrounds.min()), max(high, backgrounds.max())
    for dtype in (np.int16, np.uint16) if found.is_whole else ():
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return np.dtype(dtype), found.num_nan, backgrounds
    if max(-low, high) > np.finfo(np.float32).max:
        raise RefusedScan("nonfinite", f"{path} has values that exceed 32-bit numbers; scale them down")
    # float32 is exact for whole numbers up to 2**24, far beyond the resolution of a scanner's converter.
    return np.dtype(np.float32), found.num_nan, backgrounds


class _Values(NamedTuple):
    """Facts about the scaled voxels of a scan."""

    lows: NDArray[np.float64]
    """Smallest finite value of each frame; infinite if no value is finite."""
    high: float
    num_infinite: int
    num_nan: int
    is_whole: bool
    """True if all finite values are whole numbers."""


def _scan_values(stored: NDArray[Any], scaling: tuple[float, float]) -> _Values:
    lows, high, num_infinite, num_nan, is_whole = np.full(stored.shape[3], np.inf), -np.inf, 0, 0, True
    for part in _split_into_slabs(stored.shape):
        values = _apply_scaling(stored[part], scaling)
        if values.dtype.kind == "f":
            finite = values[np.isfinite(values)]
            num_nan_here = int(np.isnan(values).sum())
            num_nan, num_infinite = num_nan + num_nan_here, num_infinite + values.size - finite.size - num_nan_here
            values = finite
            is_whole = is_whole and bool((np.rint(values) == values).all())
        if values.size:
            lows[part[3]], high = min(lows[part[3]], values.min()), max(high, values.max())
    return _Values(lows, high, num_infinite, num_nan, is_whole)


def _split_into_slabs(shape: tuple[int, ...]) -> Iterator[tuple[slice, slice, slice, int]]:
    """Yield slabs of (X, Y, Z, T) of at most `_SLAB_VOXELS` or one row, to bound the memory of temporary arrays."""
    rows = max(1, _SLAB_VOXELS // shape[0])
    planes = max(1, rows // shape[1])
    for frame in range(shape[3]):
        for plane in range(0, shape[2], planes):
            for row in range(0, shape[1], rows):
                yield slice(None), slice(row, row + rows), slice(plane, plane + planes), frame
