"""Any form in which a scan is held -> `Volume`, with all the checks of `read_volume`.

    path or URL of NIfTI · folder or file of DICOM · nibabel image · MONAI MetaTensor · TorchIO image ·
    numpy array or torch tensor with spacing_mm or affine

MONAI and TorchIO are not imported: their images are recognised by their array and their affine. A position is never guessed. Voxel
order and units follow nibabel: axes of the array along the columns of the affine, which leads to mm in RAS.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from nibabel.spatialimages import SpatialImage
from numpy.typing import ArrayLike, NDArray

from p2r.config import IngestConfig
from p2r.data.names import SUFFIXES, local_path
from p2r.data.volume import Volume, read_volume, volume_of
from p2r.errors import DataError, InputError, RefusedScan, how_to_install

ScanLike = str | Path | Volume | Any
"""A path or URL, a `Volume`, an image of nibabel, MONAI or TorchIO, or an array or tensor with spacing or affine."""

_FORMS = "a path or URL, a folder of DICOM, a nibabel image, a MetaTensor, a TorchIO image, or an array with spacing_mm or affine"
_MIN_VOLUME_MM3 = 1e-9
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def volume_from(
    scan: ScanLike, *, spacing_mm: float | Sequence[float] | None = None, affine: ArrayLike | None = None
) -> Volume:
    """Convert a scan of any accepted form to a volume.

    Args:
        scan: The scan. Arrays and tensors are (X, Y, Z) or (X, Y, Z, T); MetaTensors and TorchIO images have a channel first.
        spacing_mm: For an array without affine: voxel size along its axes, which then point to the right, anterior and superior.
        affine: For an array: (4, 4), voxel -> mm in RAS.

    Raises:
        InputError: The scan has no such form, or no voxel size; or both `spacing_mm` and `affine`, or one too many, are given.
        RefusedScan: See `read_volume`; `several` for a folder of several series.
    """
    place = None if spacing_mm is None and affine is None else _place_of(spacing_mm, affine)
    if place is not None and not isinstance(scan, np.ndarray | torch.Tensor):
        raise InputError(f"{type(scan).__name__} has a position of its own: leave spacing_mm and affine out")
    if isinstance(scan, Volume):
        return scan
    if isinstance(scan, str | Path):
        return _read_path(scan)
    if isinstance(scan, SpatialImage):
        return _volume_of_nibabel(scan)
    own = getattr(scan, "affine", None)
    if own is not None and place is not None:
        raise InputError(f"{type(scan).__name__} has an affine of its own: leave spacing_mm and affine out")
    if isinstance(scan, torch.Tensor) and own is not None:
        return _volume_of_array(_without_channel(scan, "MetaTensor"), _ras_affine(scan, own))
    if isinstance(scan, np.ndarray | torch.Tensor):
        if place is None:
            raise InputError(
                f"{type(scan).__name__} {tuple(scan.shape)} has no voxel size, which is never guessed: give "
                "spacing_mm=(X, Y, Z), mm, or affine"
            )
        return _volume_of_array(_to_numpy(scan), place)
    data = getattr(scan, "data", None)
    if own is not None and isinstance(data, np.ndarray | torch.Tensor):  # TorchIO
        return _volume_of_array(_without_channel(data, type(scan).__name__), _checked_affine(own))
    raise InputError(f"{type(scan).__name__} is no scan that p2r reads; give {_FORMS}")


def _place_of(spacing_mm: float | Sequence[float] | None, affine: ArrayLike | None) -> NDArray[np.float64]:
    if affine is not None:
        if spacing_mm is not None:
            raise InputError("spacing_mm and affine both give the voxel size: leave one of them out")
        return _checked_affine(affine)
    try:
        given = np.broadcast_to(np.asarray(spacing_mm, dtype=np.float64), (3,))
    except (TypeError, ValueError):
        raise InputError(f"spacing_mm must be one number or three, got {spacing_mm!r:.100}") from None
    if not (np.isfinite(given).all() and (given > 0).all()):
        raise InputError(f"spacing_mm must be above 0, got {spacing_mm!r:.100}")
    return np.diag([*given, 1.0])


def _checked_affine(affine: Any) -> NDArray[np.float64]:
    try:
        found = np.asarray(affine.numpy() if hasattr(affine, "numpy") else affine, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"affine must be numbers (4, 4), got {affine!r:.100}") from None
    if found.shape != (4, 4) or not np.isfinite(found).all() or not np.array_equal(found[3], [0, 0, 0, 1]):
        raise InputError(f"affine must be (4, 4), finite, with the last row 0 0 0 1; got {found.tolist()!r:.200}")
    if abs(np.linalg.det(found[:3, :3])) < _MIN_VOLUME_MM3:
        raise InputError(
            f"affine has voxels without volume: {found.tolist()!r:.200}; its three columns must be independent"
        )
    return found


def _ras_affine(image: Any, affine: Any) -> NDArray[np.float64]:
    """Return the affine of a MetaTensor, whose `meta["space"]` may be LPS."""
    found = _checked_affine(affine)
    space = str(getattr(image, "meta", {}).get("space", "RAS"))
    return _LPS_TO_RAS @ found if space.endswith("LPS") else found


def _read_path(scan: str | Path) -> Volume:
    local = local_path(str(scan))
    path = None if local is None else local.expanduser()
    if path is None or not path.exists() or path.name.lower().endswith((*SUFFIXES, ".hdr", ".img")):
        return read_volume(scan)
    try:  # Packages for DICOM are not part of the core.
        from p2r.data.read import read_scan
        from p2r.data.scans import find_scans
    except ModuleNotFoundError as error:
        raise InputError(f"{path}: reading a folder or DICOM needs {error.name}: {how_to_install('cluster')}") from None
    try:
        with tempfile.TemporaryDirectory(prefix="p2r-scan-") as cache:
            found = find_scans([str(path)], cache=Path(cache))
    except DataError as error:
        raise RefusedScan("unreadable", str(error)) from error
    if len(found) > 1:
        names = ", ".join(one.path for one in found[:4])
        raise RefusedScan("several", f"{path} holds {len(found)} scans ({names}): name one of them")
    (one,) = found
    volumes = read_scan(one, IngestConfig(sources=(str(path),), licence="none"))
    if len(volumes) > 1:
        keys = ", ".join(volume.key for volume in volumes)
        raise RefusedScan(
            "several", f"{path} holds {len(volumes)} images of one series ({keys}): convert it, and name one of them"
        )
    return volumes[0]


def _volume_of_nibabel(image: Any) -> Volume:
    if image.affine is None:
        raise InputError(f"the {type(image).__name__} has no affine, so no voxel size: give one to its constructor")
    return volume_of(image)


def _without_channel(data: Any, kind: str) -> NDArray[Any]:
    array = _to_numpy(data)
    if array.ndim == 4 and len(array) == 1:
        return array.reshape(array.shape[1:])
    if array.ndim == 3:
        return array
    raise InputError(
        f"the {kind} is {array.shape}; expected (1, X, Y, Z), one channel first: give one image without a batch, or one channel"
    )


def _to_numpy(data: Any) -> NDArray[Any]:
    if isinstance(data, torch.Tensor):
        plain = data.detach().cpu()
        if plain.dtype in (torch.bfloat16, torch.float16):
            plain = plain.float()
        data = plain.numpy()
    array: NDArray[Any] = np.asarray(data)
    if array.dtype == np.bool_:
        return array.astype(np.uint8)
    if array.dtype.kind not in "iuf":
        raise RefusedScan("dtype", f"the array is {array.dtype}; a scan holds real numbers: take the magnitude")
    if array.dtype == np.float16:
        return array.astype(np.float32)
    return array.astype(np.float64) if array.dtype.kind in "iu" and array.dtype.itemsize > 4 else array


def _volume_of_array(array: NDArray[Any], affine: NDArray[np.float64]) -> Volume:
    if array.ndim not in (3, 4):
        raise InputError(
            f"an array must be (X, Y, Z) or (X, Y, Z, T), got {array.shape}; a single slice is array[..., None]"
        )
    image = nibabel.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm", "sec")
    return volume_of(image)
