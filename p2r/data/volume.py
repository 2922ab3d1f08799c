"""A NIfTI file -> `Volume` with voxels in RAS order, or a named refusal; and back to the file's own grid.

Choices: the whole file is read once and gunzipped in a stream (isal, several times faster than nibabel's own way); the
header is nibabel's, the voxels are a view of the buffer; integers stay integers (never `get_fdata`, which makes four
times the bytes). What cannot be used is refused with a code that ends up in the corpus's ledger: nothing is guessed.

The header's unit field is not trusted (many writers leave it unset): lengths are millimetres, as nibabel assumes.

Shapes: X Y Z voxels towards Right, Anterior, Superior; T frames (1 for a still scan).
"""

import gzip
import os
import tempfile
import zlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import fsspec
import nibabel
import numpy as np
from isal import igzip, isal_zlib
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform
from nibabel.spatialimages import HeaderDataError
from nibabel.volumeutils import apply_read_scaling
from numpy.typing import NDArray

from p2r.errors import RefusedScan, StorageError

SUFFIXES = (".nii.gz", ".nii")
"""File names that are taken for NIfTI."""

_READ_BYTES = 1 << 20
_KEPT_DTYPES = (np.int8, np.uint8, np.int16, np.uint16)
_RAS = np.array([[0, 1], [1, 1], [2, 1]], dtype=np.float64)


@dataclass(frozen=True)
class Volume:
    """A scan in RAS voxel order, with what is needed to go back to its file's grid."""

    data: NDArray[Any]
    """(X, Y, Z, T): int8, uint8, int16, uint16 or float32."""
    affine: NDArray[np.float64]
    """(4, 4): voxel of `data` -> mm."""
    source_affine: NDArray[np.float64]
    """(4, 4): voxel of the file -> mm."""
    source_shape: tuple[int, ...]
    """Spatial shape in the file."""
    spacing_mm: tuple[float, float, float]
    """Voxel size along X, Y, Z; the affine's, unless that is a placeholder (see `_spacing`)."""
    key: str
    """File name without `.nii` or `.nii.gz`."""

    @property
    def source_spacing_mm(self) -> tuple[float, ...]:
        """Voxel size along the axes of the file."""
        return tuple(self.spacing_mm[int(axis)] for axis in io_orientation(self.source_affine)[:, 0])


def scan_key(path: str | Path) -> str:
    """Return the file name of a path or URL without `.nii` or `.nii.gz`."""
    name = str(path).rstrip("/").rsplit("/", 1)[-1]
    for suffix in SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def read_volume(path: str | Path, *, key: str | None = None) -> Volume:
    """Read one scan.

    Args:
        path: A `.nii` or `.nii.gz` file, or its URL.
        key: Name of the volume; None: the file name without its suffix.

    Raises:
        RefusedScan: with the code `unreadable`, `truncated`, `not_nifti`, `not_3d`, `empty`, `dtype`, `nonfinite`,
            `constant` or `degenerate_affine`.
    """
    volume = _read(path, key)
    if volume.data.min() == volume.data.max():
        raise RefusedScan(
            "constant", f"{path} is constant: every voxel is {volume.data.flat[0]}; there is nothing to see"
        )
    return volume


def read_labels(path: str | Path, *, key: str | None = None) -> Volume:
    """Read a label map: whole numbers from 0 to 32767, int16. An empty one is allowed.

    Raises:
        RefusedScan: as `read_volume` but for `constant`; and `labels` for values that are no labels.
    """
    volume = _read(path, key)
    low, high = volume.data.min(), volume.data.max()
    if low < 0 or high > np.iinfo(np.int16).max:
        raise RefusedScan(
            "labels", f"{path} holds values from {low} to {high}; labels are whole numbers from 0 to 32767"
        )
    labels = volume.data.astype(np.int16)
    if volume.data.dtype.kind == "f" and not np.array_equal(labels, volume.data):
        raise RefusedScan(
            "labels", f"{path} holds fractions; labels are whole numbers (was it resampled without nearest?)"
        )
    return Volume(labels, volume.affine, volume.source_affine, volume.source_shape, volume.spacing_mm, volume.key)


def to_source_grid(canonical: NDArray[Any], volume: Volume) -> NDArray[Any]:
    """Undo the reorientation exactly.

    Args:
        canonical: (X, Y, Z, ...) on the grid of `volume.data`; further axes are carried along.
        volume: The scan as it was read.

    Returns:
        The same voxels in the order of the file that `volume` was read from.
    """
    if canonical.shape[:3] != volume.data.shape[:3]:
        raise ValueError(f"array has the grid {canonical.shape[:3]}, the volume {volume.key} {volume.data.shape[:3]}")
    back = ornt_transform(_RAS, io_orientation(volume.source_affine))
    return np.ascontiguousarray(apply_orientation(canonical, back))


def write_nifti(
    path: str | Path, array: NDArray[Any], affine: NDArray[np.float64], *, like: Volume | None = None
) -> None:
    """Write (X, Y, Z) or (X, Y, Z, T) to a `.nii` or `.nii.gz` file: whole, or not at all. Equal input, equal bytes.

    Args:
        path: Where to. Its folder is made.
        array: Booleans become uint8, float64 becomes float32, wide integers become a narrow type that holds them.
        affine: (4, 4) voxel -> mm; set as sform and as qform (which holds it as well as a quaternion can).
        like: The scan whose file has the same grid. A mismatch is a `ValueError`: a forgotten `to_source_grid`
            would otherwise give a file that looks right and lies mirrored.

    Raises:
        StorageError: if the file cannot be written.
    """
    path = Path(path)
    if not path.name.endswith(SUFFIXES):
        raise StorageError(f"{path}: a NIfTI file's name ends in .nii or .nii.gz")
    if like is not None and (array.shape[:3] != like.source_shape or not np.allclose(affine, like.source_affine)):
        raise ValueError(
            f"array {array.shape} and its affine do not lie on the grid of {like.key}'s file {like.source_shape}"
        )
    image = nibabel.Nifti1Image(_storable(array), affine)
    image.set_sform(affine, code="aligned")
    image.set_qform(affine, code="aligned", strip_shears=True)
    if like is not None and not np.allclose(like.source_spacing_mm, np.linalg.norm(affine[:3, :3], axis=0), rtol=1e-3):
        # The scan's affine is a placeholder: say what its file says, no more.
        image.set_qform(None)
        image.header.set_zooms((*like.source_spacing_mm, *image.header.get_zooms()[3:]))
    image.header.set_xyzt_units("mm", "sec")
    content: bytes = image.to_bytes()
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


def _read(path: str | Path, key: str | None) -> Volume:
    buffer = _read_bytes(path)
    header = _header(buffer, path)
    affine = _affine(header, path)
    voxels = _voxels(buffer, header, path)  # (X, Y, Z, T), the file's order
    orientation = io_orientation(affine)
    canonical = np.ascontiguousarray(apply_orientation(voxels, orientation))
    to_ras = affine @ inv_ornt_aff(orientation, voxels.shape[:3])
    spacing = _spacing(header, affine)[np.argsort(orientation[:, 0])]
    return Volume(
        data=canonical,
        affine=to_ras,
        source_affine=affine,
        source_shape=voxels.shape[:3],
        spacing_mm=(float(spacing[0]), float(spacing[1]), float(spacing[2])),
        key=scan_key(path) if key is None else key,
    )


def _read_bytes(path: str | Path) -> bytes | bytearray:
    try:
        if "://" in str(path):
            with fsspec.open(str(path), "rb") as file:
                raw = file.read()
        else:
            raw = Path(path).read_bytes()
    except Exception as error:  # fsspec's file systems raise what they like
        raise RefusedScan("unreadable", f"cannot read {path}: {type(error).__name__}: {error}") from error
    if raw[:2] != b"\x1f\x8b":
        return bytes(raw)
    content = bytearray()
    try:
        with igzip.GzipFile(fileobj=BytesIO(raw)) as stream:
            while block := stream.read(_READ_BYTES):
                content += block
    except EOFError as error:
        raise RefusedScan("truncated", f"{path} ends in the middle of its gzip stream; copy it again") from error
    except (isal_zlib.IsalError, zlib.error, OSError) as error:  # type: ignore[misc]  # its stub says instance
        raise RefusedScan(
            "unreadable", f"{path} is damaged: its gzip stream does not decode ({error}); copy it again"
        ) from error
    return content


def _header(buffer: bytes | bytearray, path: str | Path) -> Any:
    kind = nibabel.Nifti1Header
    if bytes(buffer[4:8]) == b"n+2\0":
        kind = nibabel.Nifti2Header
    elif bytes(buffer[344:348]) != b"n+1\0":
        what = "is empty" if not buffer else "has no NIfTI magic number"
        raise RefusedScan("not_nifti", f"{path} {what}; single-file NIfTI-1 and NIfTI-2 (.nii, .nii.gz) can be read")
    block = bytes(buffer[: kind.sizeof_hdr])
    if len(block) < kind.sizeof_hdr:
        raise RefusedScan("truncated", f"{path} ends within its header, after {len(block)} bytes; copy it again")
    try:
        raw = kind(block, check=False)
        supported = int(raw["datatype"]) in nibabel.nifti1.data_type_codes.code
        dtype = raw.get_data_dtype() if supported else None
        if dtype is None or dtype.kind not in "iuf":
            raise RefusedScan(
                "dtype",
                f"{path} holds voxels of type {dtype or int(raw['datatype'])}; integers and real numbers can be used",
            )
        return kind(block, check=True)
    except (HeaderDataError, ValueError, OverflowError) as error:
        raise RefusedScan("not_nifti", f"{path} has a header that breaks the NIfTI standard: {error}") from error


def _affine(header: Any, path: str | Path) -> NDArray[np.float64]:
    try:
        affine = np.asarray(header.get_best_affine(), dtype=np.float64)
    except (HeaderDataError, ValueError) as error:
        raise RefusedScan("degenerate_affine", f"{path} has no usable orientation: {error}") from error
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    # Volume of a voxel over the product of its edges: 1 for right angles, 0 where axes coincide.
    if not np.isfinite(affine).all() or (sizes < 1e-6).any() or abs(np.linalg.det(affine[:3, :3] / sizes)) < 1e-2:
        raise RefusedScan(
            "degenerate_affine", f"{path} has an affine that does not span space: {affine[:3].round(4).tolist()}"
        )
    return affine


def _spacing(header: Any, affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the voxel size along the axes of the file, mm.

    The affine says it, but for one common defect: converters that know no orientation write a matrix of ones and leave the true
    size in `pixdim` alone. Read as written, ACDC's voxels of 1.56 x 1.56 x 10 mm would be 1 mm cubes.
    """
    sizes: NDArray[np.float64] = np.linalg.norm(affine[:3, :3], axis=0)
    pixdim = np.abs(np.asarray(header["pixdim"][1:4], dtype=np.float64))
    is_placeholder = int(header["qform_code"]) == 0 and np.allclose(sizes, 1.0, atol=1e-3)
    if is_placeholder and np.isfinite(pixdim).all() and (pixdim > 1e-3).all():
        return pixdim
    return sizes


def _voxels(buffer: bytes | bytearray, header: Any, path: str | Path) -> NDArray[Any]:
    shape = tuple(int(size) for size in header.get_data_shape())
    while len(shape) > 4 and shape[-1] == 1:
        shape = shape[:-1]
    if not 3 <= len(shape) <= 4:
        raise RefusedScan(
            "not_3d", f"{path} has {len(shape)} axes {list(shape)}; a scan has three, or four with time last"
        )
    if min(shape) < 1:
        raise RefusedScan("empty", f"{path} has no voxels: its shape is {list(shape)}")
    if 1 in shape[:3]:
        raise RefusedScan("not_3d", f"{path} is a single plane, its shape is {list(shape)}; a scan has two or more")
    dtype, offset = header.get_data_dtype(), int(header["vox_offset"])
    count = int(np.prod(shape, dtype=object))
    if len(buffer) < offset + count * dtype.itemsize:
        raise RefusedScan(
            "truncated",
            f"{path} has {len(buffer)} bytes, its header promises {offset + count * dtype.itemsize}; copy it again",
        )
    stored = np.frombuffer(buffer, dtype, count, offset).reshape(shape, order="F")
    voxels = _scaled(stored, header, path)
    return voxels if voxels.ndim == 4 else voxels[..., None]


def _scaled(stored: NDArray[Any], header: Any, path: str | Path) -> NDArray[Any]:
    try:
        slope, intercept = header.get_slope_inter()
    except HeaderDataError as error:
        raise RefusedScan("nonfinite", f"{path} has a scaling that is not finite: {error}") from error
    slope, intercept = (1.0, 0.0) if slope is None else (slope, intercept or 0.0)
    if stored.dtype.kind in "iu" and (slope, intercept) == (1.0, 0.0):
        return _narrowed(stored)
    whole = float(slope).is_integer() and float(intercept).is_integer() and max(abs(slope), abs(intercept)) < 2**30
    if stored.dtype.kind in "iu" and stored.dtype.itemsize <= 4 and whole:
        return _narrowed(stored.astype(np.int64) * int(slope) + int(intercept))
    if not np.isfinite(stored).all():
        raise RefusedScan(
            "nonfinite", f"{path} has {int((~np.isfinite(stored)).sum())} voxels that are NaN or infinite"
        )
    with np.errstate(over="ignore"):
        scaled = apply_read_scaling(stored, slope, intercept)
        voxels = np.asarray(scaled, dtype=np.float32)
    if not np.isfinite(voxels).all():
        raise RefusedScan("nonfinite", f"{path} has values beyond what 32-bit numbers hold")
    return voxels


def _narrowed(voxels: NDArray[Any]) -> NDArray[Any]:
    native = voxels.dtype.newbyteorder("=")
    if native in _KEPT_DTYPES:
        return voxels.astype(native, copy=False)
    low, high = int(voxels.min()), int(voxels.max())
    for dtype in (np.int16, np.uint16):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return voxels.astype(dtype)
    return voxels.astype(np.float32)  # exact up to 2**24, far beyond what a scanner's converter resolves


def _storable(array: NDArray[Any]) -> NDArray[Any]:
    if array.ndim not in (3, 4):
        raise ValueError(f"array must be (X, Y, Z) or (X, Y, Z, T), got {array.shape}")
    if array.dtype == np.bool_:
        return array.astype(np.uint8)
    if array.dtype.kind in "iu" and array.dtype.itemsize > 2:
        limits = int(array.min()), int(array.max())
        return array.astype(np.result_type(*(np.min_scalar_type(limit) for limit in limits)))
    return array.astype(np.float32) if array.dtype.kind == "f" else array
