"""A NIfTI file -> `Volume` with voxels in RAS order, or a named refusal; and back to the file's own grid.

Choices: the file is gunzipped in a stream (isal, several times faster than nibabel's own way); the header is nibabel's,
and is judged before a voxel is read; whole numbers become narrow integers (never `get_fdata`, which makes four times
the bytes). What cannot be used is refused with a code that ends up in the corpus's ledger: nothing is guessed.

Memory: at its peak, reading takes the bytes of the voxels as stored (of the frames that are kept), those of `data`, and
32 MiB. What is stored is what the header promises, at most `max_mib`; a stream is followed no further than that and a
MiB of slack, and a file too small to hold what its header promises is refused before anything is allocated.

The header's unit field is not trusted (many writers leave it unset): lengths are millimetres, as nibabel assumes.

Shapes: X Y Z voxels towards Right, Anterior, Superior; T frames (1 for a still scan).
"""

import gzip
import logging
import os
import stat
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from io import BufferedReader
from pathlib import Path
from typing import Any

import fsspec
import nibabel
import numpy as np
from isal import igzip, isal_zlib
from nibabel.nifti1 import Nifti1Header, Nifti1PairHeader
from nibabel.nifti2 import Nifti2Header, Nifti2PairHeader
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from p2r.data.names import HEADER_SUFFIXES as HEADER_SUFFIXES
from p2r.data.names import SUFFIXES as SUFFIXES
from p2r.data.names import VOXEL_SUFFIXES as VOXEL_SUFFIXES
from p2r.data.names import local_path as local_path
from p2r.data.names import pair_of as pair_of
from p2r.data.names import scan_key as scan_key
from p2r.errors import RefusedScan, StorageError

MAX_SCAN_MIB = 4096.0
"""Most memory that the voxels of a scan may claim, unless the reader allows another."""

_LOGGER = logging.getLogger(__name__)
_LOGGER.addHandler(logging.NullHandler())  # what nibabel mends in a header is of interest to those who ask

_SLACK_BYTES = 1 << 20  # what may follow the voxels; some writers pad their files
_MAX_DEFLATE_RATIO = 1032  # no gzip stream grows more
_MAX_AXIS = 32_767  # what NIfTI-1 can say; NIfTI-2 could say 2**63
_MIN_SPACING_MM, _MAX_SPACING_MM = 1e-6, 1e3
_MAX_EXTENT_MM = 1e4  # far beyond a scanner: a header that says more is in other units, or no header
_PART_VOXELS = 1 << 19
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
    frames: tuple[int, ...] | None = None
    """Which of the file's frames `data` holds; None: all."""
    resampled_from_mm: tuple[float, float, float] | None = None
    """Voxel size before resampling; None: the voxels are the file's."""
    acquired_sha256: str | None = None
    """`voxels_sha256` before resampling, by which the scan is known again; None: the voxels are the file's."""
    sidecar: Mapping[str, Any] = field(default_factory=dict)
    """Technical tags of the acquisition, where they are known (see `sidecar`)."""
    notes: tuple[str, ...] = ()
    """What was passed over on the way here, as codes for the ledger."""

    @property
    def source_spacing_mm(self) -> tuple[float, ...]:
        """Voxel size along the axes of the file."""
        return tuple(self.spacing_mm[int(axis)] for axis in io_orientation(self.source_affine)[:, 0])


def bucket_client() -> Any:
    """Return the client for `s3://` paths: one for each process and set of keys, since making one takes a third of a second."""
    return _client(os.getpid(), tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_"))))


def read_volume(
    path: str | Path, *, key: str | None = None, max_mib: float = MAX_SCAN_MIB, max_frames: int | None = None
) -> Volume:
    """Read one scan.

    Args:
        path: A `.nii` or `.nii.gz` file, either file of a `.hdr` and `.img` pair, or its URL.
        key: Name of the volume; None: the file name without its suffix.
        max_mib: Most memory that its voxels may claim.
        max_frames: Most frames that are taken of it, evenly spaced; None: all.

    Raises:
        RefusedScan: with the code `unreadable`, `truncated`, `not_nifti`, `not_3d`, `empty`, `dtype`, `too_large`,
            `nonfinite`, `constant` or `degenerate_affine`.
        StorageError: if a remote file cannot be fetched, for another reason than that there is none.
    """
    volume = _read(path, key, max_mib, max_frames)
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
    volume = _read(path, key, MAX_SCAN_MIB, None)
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
    return replace(volume, data=labels)


def to_source_grid(canonical: NDArray[Any], volume: Volume) -> NDArray[Any]:
    """Undo the reorientation exactly.

    Args:
        canonical: (X, Y, Z, ...) on the grid of `volume.data`; further axes are carried along.
        volume: The scan as it was read.

    Returns:
        The same voxels in the order of the file that `volume` was read from.

    Raises:
        ValueError: for another grid, or a volume that was resampled: there is no exact way back.
    """
    if volume.resampled_from_mm is not None:
        raise ValueError(f"the volume {volume.key} was resampled; read its file again without, to go back to its grid")
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


@lru_cache(maxsize=4)
def _client(process: int, environment: tuple[tuple[str, str], ...]) -> Any:
    # What lies in a bucket may change: no listing is kept.
    return fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)


def _read(path: str | Path, key: str | None, max_mib: float, max_frames: int | None) -> Volume:
    try:
        with np.errstate(all="ignore"):  # what overflows here is refused below, by name
            return _decoded(path, key, max_mib, max_frames)
    except MemoryError as error:
        raise RefusedScan("too_large", f"{path} needs more memory than there is ({error})") from error


def _decoded(path: str | Path, key: str | None, max_mib: float, max_frames: int | None) -> Volume:
    pair = pair_of(str(path))
    header_path, voxels_path = pair or (path, path)
    with _opened(header_path) as stream:
        header = _header(stream, header_path)
        if pair is not None and header.is_single:
            voxels_path = header_path
        affine = _affine(header, path)
        shape = _shape(header, path, max_mib)  # (X, Y, Z, T), the file's order
        frames = _spread(shape[3], max_frames)
        if voxels_path == header_path:
            stored = _stored(stream, header, shape, frames)
        else:
            with _opened(voxels_path) as voxels:
                stored = _stored(voxels, header, shape, frames)
    scaling = _scaling(header, path)
    dtype = _narrowest(stored, scaling, path)
    orientation = io_orientation(affine)
    data = np.empty([*(shape[axis] for axis in np.argsort(orientation[:, 0])), len(frames)], dtype)
    in_file_order = apply_orientation(data, ornt_transform(_RAS, orientation))  # a view
    for part in _parts(stored.shape):
        in_file_order[part] = _scaled(stored[part], scaling)
    spacing = _spacing(header, affine)[np.argsort(orientation[:, 0])]
    if not is_physical(data.shape, spacing.tolist()):
        raise RefusedScan(
            "degenerate_affine",
            f"{path} would be {_MAX_EXTENT_MM / 1000:g} m or larger (voxels of {spacing.round(4).tolist()} mm); are its units mm?",
        )
    return Volume(
        data=data,
        affine=affine @ inv_ornt_aff(orientation, shape[:3]),
        source_affine=affine,
        source_shape=shape[:3],
        spacing_mm=(float(spacing[0]), float(spacing[1]), float(spacing[2])),
        key=scan_key(path) if key is None else key,
        frames=frames if len(frames) < shape[3] else None,
    )


class _Stream:
    """The content of one open file, gunzipped as it is read.

    Args:
        file: Open at its start.
        path: Its name, for messages.
        limit: Most bytes that its content can have.
    """

    def __init__(self, file: BufferedReader | igzip.GzipFile, path: str | Path, limit: int) -> None:
        self._file = file
        self._path = path
        self._limit = limit
        self._position = 0

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes; fewer at the end."""
        content = self._file.read(size)
        self._position += len(content)
        return content

    def expect(self, size: int) -> None:
        """Refuse the file if it cannot have `size` bytes."""
        if size > self._limit:
            raise RefusedScan(
                "truncated",
                f"{self._path} has room for {self._limit} bytes, its header promises {size}; copy it again",
            )

    def seek(self, position: int) -> None:
        """Pass over everything before `position`."""
        while self._position < position:
            if not self.read(min(_SLACK_BYTES, position - self._position)):
                self._refuse_truncated(position)

    def fill(self, target: NDArray[np.uint8]) -> None:
        """Fill `target` with the next bytes."""
        view, filled = target.data, 0
        while filled < target.size:
            count = self._file.readinto(view[filled : filled + _SLACK_BYTES])
            if not count:
                self._refuse_truncated(self._position + target.size - filled)
            filled += count
            self._position += count

    def finish(self) -> None:
        """Follow the stream to its end, where a gzip stream's checksum stands."""
        excess = 0
        while block := self.read(_SLACK_BYTES):
            excess += len(block)
            if excess > _SLACK_BYTES:
                raise RefusedScan(
                    "unreadable",
                    f"{self._path} goes on after the voxels that its header promises: one of both is wrong",
                )

    def _refuse_truncated(self, promised: int) -> None:
        raise RefusedScan(
            "truncated", f"{self._path} has {self._position} bytes, its header promises {promised}; copy it again"
        )


@contextmanager
def _opened(path: str | Path) -> Iterator[_Stream]:
    with _fetched(path) as local:
        try:
            if "\0" in str(local) or not stat.S_ISREG((state := local.stat()).st_mode):
                # Opening a pipe would wait for its writer, and a device might never end.
                raise RefusedScan("unreadable", f"cannot read {path}: it is not a file")
            with local.open("rb") as file:
                is_zipped = file.read(2) == b"\x1f\x8b"
                file.seek(0)
                if is_zipped:
                    with igzip.GzipFile(fileobj=file) as unzipped:
                        yield _Stream(unzipped, path, state.st_size * _MAX_DEFLATE_RATIO)
                else:
                    yield _Stream(file, path, state.st_size)
        except EOFError as error:
            raise RefusedScan("truncated", f"{path} ends in the middle of its gzip stream; copy it again") from error
        except (isal_zlib.IsalError, zlib.error, gzip.BadGzipFile) as error:  # type: ignore[misc]  # its stub says instance
            raise RefusedScan(
                "unreadable", f"{path} is damaged: its gzip stream does not decode ({error}); copy it again"
            ) from error
        except OSError as error:
            raise RefusedScan("unreadable", f"cannot read {path}: {type(error).__name__}: {error}") from error


@contextmanager
def _fetched(path: str | Path) -> Iterator[Path]:
    """Give a local file with the content of `path`: itself, or a temporary copy, still zipped if it was."""
    if (local := local_path(path)) is not None:
        yield local
        return
    with tempfile.TemporaryDirectory(prefix="p2r-scan-") as folder:
        copy = Path(folder, "scan")
        try:
            files = bucket_client() if str(path).startswith("s3://") else fsspec.url_to_fs(str(path))[0]
            files.get_file(str(path), str(copy))
        except FileNotFoundError as error:
            raise RefusedScan("unreadable", f"cannot read {path}: there is no such object") from error
        except Exception as error:  # fsspec's file systems raise what they like
            # A network that fails says nothing about the scan: it must not vanish from the corpus for that.
            raise StorageError(
                f"cannot read {path}: {type(error).__name__}: {error}; check network and keys"
            ) from error
        yield copy


def _header(stream: _Stream, path: str | Path) -> Any:
    block = stream.read(Nifti1Header.sizeof_hdr)
    kinds = {b"n+1\0": Nifti1Header, b"ni1\0": Nifti1PairHeader}
    kind = kinds.get(block[344:348])
    if block[4:8] in (b"n+2\0", b"ni2\0"):
        kind = Nifti2Header if block[4:8] == b"n+2\0" else Nifti2PairHeader
        block += stream.read(kind.sizeof_hdr - len(block))
    if kind is None or (not kind.is_single and pair_of(str(path)) is None):
        what = "is empty" if not block else "is a header without voxels" if kind else "has no NIfTI magic number"
        raise RefusedScan("not_nifti", f"{path} {what}; NIfTI-1 and NIfTI-2 (.nii, .nii.gz, .hdr/.img) can be read")
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
        raw.check_fix(logger=_LOGGER, error_level=40)  # 40 breaks the standard; less is mended
        return raw
    except (HeaderDataError, ValueError, OverflowError) as error:
        raise RefusedScan("not_nifti", f"{path} has a header that breaks the NIfTI standard: {error}") from error


def is_physical(shape: Sequence[int], spacing_mm: Sequence[float]) -> bool:
    """Tell whether voxels of this size, so many along X, Y and Z, can be a scan."""
    return all(
        _MIN_SPACING_MM < size < _MAX_SPACING_MM and size * count < _MAX_EXTENT_MM
        for size, count in zip(spacing_mm, shape, strict=False)
    )


def _affine(header: Any, path: str | Path) -> NDArray[np.float64]:
    try:
        affine = np.asarray(header.get_best_affine(), dtype=np.float64)
    except (HeaderDataError, ValueError) as error:
        raise RefusedScan("degenerate_affine", f"{path} has no usable orientation: {error}") from error
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    # Volume of a voxel over the product of its edges: 1 for right angles, 0 where axes coincide.
    if (
        not np.isfinite(affine).all()
        or not ((sizes > _MIN_SPACING_MM) & (sizes < _MAX_SPACING_MM)).all()
        or abs(np.linalg.det(affine[:3, :3] / sizes)) < 1e-2
    ):
        raise RefusedScan(
            "degenerate_affine", f"{path} has an affine that does not span space: {affine[:3].round(4).tolist()}"
        )
    return affine


def _shape(header: Any, path: str | Path, max_mib: float) -> tuple[int, int, int, int]:
    try:
        shape = tuple(int(size) for size in header.get_data_shape())
        offset = int(header["vox_offset"])
    except (HeaderDataError, ValueError, OverflowError) as error:
        raise RefusedScan("not_nifti", f"{path} has a header that breaks the NIfTI standard: {error}") from error
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
    if offset < 0:
        raise RefusedScan("not_nifti", f"{path} says that its voxels begin at byte {offset}")
    promised = offset + int(np.prod(shape, dtype=object)) * int(header.get_data_dtype().itemsize)
    if max(shape) > _MAX_AXIS or promised > max_mib * 2**20:
        raise RefusedScan(
            "too_large",
            f"{path} promises {list(shape)} voxels, {promised / 2**20:.0f} MiB; up to {_MAX_AXIS} along an axis and "
            f"{max_mib:g} MiB are read (ingest.max_scan_mib)",
        )
    return shape[0], shape[1], shape[2], shape[3] if len(shape) == 4 else 1


def _spread(num_frames: int, max_frames: int | None) -> tuple[int, ...]:
    """Return the middle of each of `max_frames` equal parts of a series, or all of its frames."""
    if max_frames is None or num_frames <= max_frames:
        return tuple(range(num_frames))
    return tuple((2 * part + 1) * num_frames // (2 * max_frames) for part in range(max_frames))


def _stored(stream: _Stream, header: Any, shape: tuple[int, int, int, int], frames: tuple[int, ...]) -> NDArray[Any]:
    """Read the voxels of some frames as they are stored; the others are passed over."""
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
    stream.finish()
    voxels: NDArray[Any] = content.reshape(-1).view(dtype).reshape((*shape[:3], len(frames)), order="F")
    return voxels


def _scaling(header: Any, path: str | Path) -> tuple[float, float]:
    try:
        slope, intercept = header.get_slope_inter()
    except HeaderDataError as error:
        raise RefusedScan("nonfinite", f"{path} has a scaling that is not finite: {error}") from error
    return (1.0, 0.0) if slope is None else (float(slope), float(intercept or 0.0))


def _scaled(stored: NDArray[Any], scaling: tuple[float, float]) -> NDArray[Any]:
    slope, intercept = scaling
    if scaling == (1.0, 0.0):
        return stored
    is_whole = slope.is_integer() and intercept.is_integer() and max(abs(slope), abs(intercept)) < 2**30
    if stored.dtype.kind in "iu" and stored.dtype.itemsize <= 4 and is_whole:
        return stored.astype(np.int64) * int(slope) + int(intercept)
    return stored.astype(np.float64) * slope + intercept


def _narrowest(stored: NDArray[Any], scaling: tuple[float, float], path: str | Path) -> np.dtype[Any]:
    """Return the type that holds the scaled voxels without loss; float32 where they have fractions or are large."""
    native = stored.dtype.newbyteorder("=")
    if native in _KEPT_DTYPES and scaling == (1.0, 0.0):
        return np.dtype(native)
    low, high, num_bad, is_whole = np.inf, -np.inf, 0, True
    for part in _parts(stored.shape):
        values = _scaled(stored[part], scaling)
        if values.dtype.kind == "f":
            num_bad += values.size - int(np.isfinite(values).sum())
            is_whole = is_whole and bool((np.rint(values) == values).all())
        low, high = min(low, values.min()), max(high, values.max())
    if num_bad:
        raise RefusedScan("nonfinite", f"{path} has {num_bad} voxels that are NaN or infinite")
    for dtype in (np.int16, np.uint16) if is_whole else ():
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return np.dtype(dtype)
    if max(-low, high) > np.finfo(np.float32).max:
        raise RefusedScan("nonfinite", f"{path} has values beyond what 32-bit numbers hold")
    return np.dtype(np.float32)  # whole numbers exact up to 2**24, far beyond what a scanner's converter resolves


def _parts(shape: tuple[int, ...]) -> Iterator[tuple[slice, slice, slice, int]]:
    """Yield slabs of (X, Y, Z, T), none larger than `_PART_VOXELS` or a row: what is computed on them stays small."""
    rows = max(1, _PART_VOXELS // shape[0])
    planes = max(1, rows // shape[1])
    for frame in range(shape[3]):
        for plane in range(0, shape[2], planes):
            for row in range(0, shape[1], rows):
                yield slice(None), slice(row, row + rows), slice(plane, plane + planes), frame


def _spacing(header: Any, affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the voxel size along the axes of the file, mm.

    The affine says it, but for one common defect: converters that know no orientation write a matrix of ones and leave
    the true size in `pixdim` alone. Read as written, ACDC's voxels of 1.56 x 1.56 x 10 mm would be 1 mm cubes.
    """
    sizes: NDArray[np.float64] = np.linalg.norm(affine[:3, :3], axis=0)
    pixdim = np.abs(np.asarray(header["pixdim"][1:4], dtype=np.float64))
    is_placeholder = int(header["qform_code"]) == 0 and np.allclose(sizes, 1.0, atol=1e-3)
    if is_placeholder and ((pixdim > 1e-3) & (pixdim < _MAX_SPACING_MM)).all():
        return pixdim
    return sizes


def _storable(array: NDArray[Any]) -> NDArray[Any]:
    if array.ndim not in (3, 4):
        raise ValueError(f"array must be (X, Y, Z) or (X, Y, Z, T), got {array.shape}")
    if array.dtype == np.bool_:
        return array.astype(np.uint8)
    if array.dtype.kind in "iu" and array.dtype.itemsize > 2:
        limits = int(array.min()), int(array.max())
        return array.astype(np.result_type(*(np.min_scalar_type(limit) for limit in limits)))
    return array.astype(np.float32) if array.dtype.kind == "f" else array
