"""Preparation and inference of a network from p2r, for MONAI; p2r itself is not needed. Bundles hold a copy as scripts/pixels.py.

The transforms and inferers repeat `p2r.data.preprocess` and `p2r.evaluate.inference`, so that a bundle gives the result of
`p2r predict` and `p2r embed`. Each export compares both on a test scan. Only MONAI, torch, numpy, scipy and nibabel are imported.

    LoadImaged, EnsureChannelFirstd, Orientationd(RAS) -> NonzeroPercentilesd -> PixelInferer -> Labelsd, Invertd, SaveImaged
                                                                              -> FeatureInferer -> FeatureGridd, SaveImaged

Letters: T frames, X Y Z the scan's voxels in RAS order, P = T * Z slices, h w voxels of a slice.
H W and *S pixels of the network, K classes, F features.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.inferers import Inferer, sliding_window_inference
from monai.networks.layers.factories import Conv
from monai.networks.layers.simplelayers import separable_filtering
from monai.transforms import MapTransform
from torch import Tensor, nn

PERCENTILES = (0.0, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 98.0, 99.0, 99.5, 99.9, 100.0)
_MAX_SAMPLE = 1 << 18
_OVERLAP = 0.25
_ROUNDING = 0.01
_TIED_SPACING = 0.01
_MIN_CONTRAST = 1e-30
_BATCH_SIZE = {2: 8, 3: 1}


class WithHead(nn.Module):
    """A network of features, and a 1x1 convolution to logits (B, K, *S).

    Args:
        network: Image (B, C, *S) -> features (B, F, *S).
        feature_channels: F.
        num_classes: K, background included.
        dimensions: Axes of an image, 2 or 3.
    """

    def __init__(self, network: nn.Module, feature_channels: int, num_classes: int, dimensions: int) -> None:
        super().__init__()
        self.network = network
        self.head = Conv["conv", dimensions](feature_channels, num_classes, kernel_size=1)

    def forward(self, image: Tensor) -> Tensor:
        """Compute the logits of every pixel."""
        logits: Tensor = self.head(self.network(image))
        return logits


class WithPrototypes(nn.Module):
    """A network of features, and the cosine to the nearest prototype of each class as logits (B, K, *S).

    Args:
        network: Image (B, C, *S) -> features (B, F, *S).
        feature_channels: F.
        num_prototypes: Number of prototypes of each class, background first; of several clusterings one after another.
        temperature: Divisor of the cosines.
        kernel: Weights of a filter along each axis of the map of each class; one weight: no filter.
        is_centred: Subtract `centre` (F,) from the unit vectors of the features before the comparison.
        num_clusterings: Number of clusterings, whose similarity maps are averaged.
    """

    def __init__(
        self,
        network: nn.Module,
        feature_channels: int,
        num_prototypes: list[int],
        temperature: float,
        kernel: Sequence[float] = (1.0,),
        is_centred: bool = False,
        num_clusterings: int = 1,
    ) -> None:
        super().__init__()
        self.network = network
        self.num_prototypes = num_prototypes
        self.num_clusterings = num_clusterings
        self.temperature = temperature
        self.kernel = tuple(kernel)
        self.prototypes = nn.Parameter(torch.zeros(sum(num_prototypes), feature_channels), requires_grad=False)
        self.centre = nn.Parameter(torch.zeros(feature_channels), requires_grad=False) if is_centred else None

    def forward(self, image: Tensor) -> Tensor:
        """Compute the logits of every pixel."""
        directions = F.normalize(self.network(image), dim=1)
        if self.centre is not None:
            centre = self.centre.reshape(1, -1, *[1] * (image.ndim - 2))
            directions = F.normalize(directions - centre, dim=1)
        cosines = torch.einsum("pf,bf...->bp...", F.normalize(self.prototypes, dim=1), directions)
        by_class = torch.split(cosines, self.num_prototypes, dim=1)
        nearest = torch.stack([one.amax(1) for one in by_class], dim=1)
        if self.num_clusterings > 1:
            nearest = nearest.reshape(len(nearest), self.num_clusterings, -1, *nearest.shape[2:]).mean(1)
        if len(self.kernel) > 1:
            nearest = separable_filtering(nearest, nearest.new_tensor(self.kernel), mode="replicate")
        return nearest / self.temperature


class NonzeroPercentilesd(MapTransform):  # type: ignore[misc]  # MONAI has no types
    """Map two percentiles of the non-zero voxels of a scan (T, X, Y, Z) to 0 and 1, and clip the rest.

    Args:
        keys: Keys of the scans.
        percentiles: Two of `PERCENTILES`.
        allow_missing_keys: Ignore absent keys.
    """

    def __init__(self, keys: Any, percentiles: Sequence[float], allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.percentiles = tuple(percentiles)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return `data` with normalised scans."""
        made = dict(data)
        for key in self.key_iterator(made):
            scan = torch.nan_to_num(made[key].float(), nan=0.0, posinf=None, neginf=None)
            low, high = intensity_window(np.asarray(scan.movedim(0, -1)), self.percentiles)
            made[key] = ((scan - low) / (high - low)).clamp(0.0, 1.0)
        return made


class PixelInferer(Inferer):  # type: ignore[misc]  # MONAI has no types
    """Segment a whole scan: (1, T, X, Y, Z) in [0, 1] -> probabilities (1, T * K, X, Y, Z) on the same voxels.

    Args:
        dimensions: 2 for a network of slices, 3 for a network of volumes.
        slice_axis: Axis across the slices, or auto: the axis with the largest spacing.
        spacing_mm: Pixel size of the network, mm.
        image_size: Side of the windows, pixels.
        planes: whole, or centre: read one central window only.
    """

    def __init__(
        self, dimensions: int, slice_axis: str | int, spacing_mm: float, image_size: int, planes: str = "whole"
    ) -> None:
        super().__init__()
        self.dimensions = dimensions
        self.slice_axis = slice_axis
        self.spacing_mm = spacing_mm
        self.image_size = image_size
        self.size = image_size if planes == "centre" else None

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Return the probabilities of every voxel."""

        def probabilities(windows: Tensor) -> Tensor:
            return network(windows, *args, **kwargs).float().softmax(dim=1)

        scan, spacing_mm = _frames_and_spacing(inputs)
        with torch.no_grad():
            if self.dimensions == 3:
                maps = self._read_volumes(scan, spacing_mm, probabilities)
            else:
                maps = self._read_slices(scan, spacing_mm, probabilities)
        return maps.flatten(0, 1)[None]  # (1, T * K, X, Y, Z)

    def _read_volumes(self, scan: Tensor, spacing_mm: Sequence[float], network: Callable[[Tensor], Tensor]) -> Tensor:
        own = scan.shape[1:]
        shape = cubic_shape(own, spacing_mm, self.spacing_mm) if self.size is None else (self.size,) * 3
        images = to_cubic(scan[:, None], shape, spacing_mm, self.spacing_mm)
        parts = [blend_windows(network, one, self.image_size) for one in torch.split(images, 1)]
        return torch.cat([to_cubic(one, own, (self.spacing_mm,) * 3, spacing_mm) for one in parts])

    def _read_slices(self, scan: Tensor, spacing_mm: Sequence[float], network: Callable[[Tensor], Tensor]) -> Tensor:
        axis, slices, resampled = cut(scan, spacing_mm, self.slice_axis, self.spacing_mm)
        own = slices.shape[2:]
        images = resample_slices(slices, resampled)
        if self.size is not None:
            images = F.pad(images, centre_padding(resampled, (self.size, self.size)))
        parts = []
        for part in torch.split(images, _BATCH_SIZE[2]):
            maps = blend_windows(network, part, self.image_size)
            whole = F.pad(maps, centre_padding((maps.shape[-2], maps.shape[-1]), resampled, inverse=True))
            parts.append(resample_slices(whole, own))
        return stack(torch.cat(parts), axis, num_frames=len(scan))


class FeatureInferer(Inferer):  # type: ignore[misc]  # MONAI has no types
    """Compute the features of every pixel of a scan: (1, T, X, Y, Z) in [0, 1] -> (1, T * F, X', Y', Z').

    The features are on the network's grid, whose position `FeatureGridd` computes. Arguments as in `PixelInferer`.

    Args:
        dimensions: 2 for a network of slices, 3 for a network of volumes.
        slice_axis: Axis across the slices, or auto.
        spacing_mm: Pixel size of the network, mm.
        image_size: Side of the windows of a network of volumes, pixels.
        size_divisor: Divisor of the sides that the network can read.
    """

    def __init__(
        self, dimensions: int, slice_axis: str | int, spacing_mm: float, image_size: int, size_divisor: int
    ) -> None:
        super().__init__()
        self.dimensions = dimensions
        self.slice_axis = slice_axis
        self.spacing_mm = spacing_mm
        self.image_size = image_size
        self.size_divisor = size_divisor

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Return the features of every pixel."""

        def features(windows: Tensor) -> Tensor:
            return network(windows, *args, **kwargs).float()

        scan, spacing_mm = _frames_and_spacing(inputs)
        with torch.no_grad():
            if self.dimensions == 3:
                shape = cubic_shape(scan.shape[1:], spacing_mm, self.spacing_mm)
                images = to_cubic(scan[:, None], shape, spacing_mm, self.spacing_mm)
                padded = pad_to_divisor(images, self.size_divisor)
                maps = torch.cat([blend_windows(features, one, self.image_size) for one in torch.split(padded, 1)])
                found = maps[:, :, : shape[0], : shape[1], : shape[2]]
            else:
                axis, slices, resampled = cut(scan, spacing_mm, self.slice_axis, self.spacing_mm)
                padded = pad_to_divisor(resample_slices(slices, resampled), self.size_divisor)
                maps = torch.cat([features(part) for part in torch.split(padded, _BATCH_SIZE[2])])
                found = stack(maps[:, :, : resampled[0], : resampled[1]], axis, num_frames=len(scan))
        return found.flatten(0, 1)[None]


class Labelsd(MapTransform):  # type: ignore[misc]  # MONAI has no types
    """Probabilities (T * K, X, Y, Z) -> labels (T, X, Y, Z), the most probable class of each voxel; or the probabilities, normalised.

    Args:
        keys: Keys of the probabilities.
        num_classes: K, background included.
        largest_component: Keep only the largest connected component of each class.
        probabilities: Return the probabilities (T * K, X, Y, Z); they sum to 1 in every voxel.
        allow_missing_keys: Ignore absent keys.
    """

    def __init__(
        self,
        keys: Any,
        num_classes: int,
        largest_component: bool = False,
        probabilities: bool = False,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.num_classes = num_classes
        self.largest_component = largest_component
        self.probabilities = probabilities

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return `data` with labels, or normalised probabilities."""
        made = dict(data)
        for key in self.key_iterator(made):
            maps = torch.as_tensor(made[key])
            by_frame = maps.reshape(-1, self.num_classes, *maps.shape[1:])
            if self.probabilities:
                total = by_frame.sum(1, keepdim=True)
                whole = by_frame / total.clamp_min(torch.finfo(maps.dtype).tiny)
                whole[:, :1] += total == 0  # background where the network did not read
                made[key] = MetaTensor(whole.flatten(0, 1))
                continue
            labels = by_frame.argmax(dim=1).to(torch.uint8)
            if self.largest_component:
                for frame in labels.cpu().numpy():
                    _keep_largest(frame, self.num_classes)
            made[key] = MetaTensor(labels)  # `Invertd` ignores plain tensors
        return made


class FeatureGridd(MapTransform):  # type: ignore[misc]  # MONAI has no types
    """Give features (T * F, X', Y', Z') the affine of the network's grid.

    Args:
        keys: Keys of the features.
        image: Key of the scan (T, X, Y, Z) from which they were computed.
        dimensions: 2 for a network of slices, 3 for a network of volumes.
        slice_axis: Axis across the slices, or auto.
        spacing_mm: Pixel size of the network, mm.
        allow_missing_keys: Ignore absent keys.
    """

    def __init__(
        self,
        keys: Any,
        image: str,
        dimensions: int,
        slice_axis: str | int,
        spacing_mm: float,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.image = image
        self.dimensions = dimensions
        self.slice_axis = slice_axis
        self.spacing_mm = spacing_mm

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return `data` with features that know their position."""
        made = dict(data)
        affine = np.asarray(made[self.image].affine, np.float64)
        own, spacing_mm = made[self.image].shape[1:], _spacing_of(affine)
        for key in self.key_iterator(made):
            found = made[key].shape[1:]
            to_voxel = np.eye(4)
            across = None if self.dimensions == 3 else choose_axis(spacing_mm, self.slice_axis, own)
            for axis in range(3):
                if axis == across:
                    continue
                if self.dimensions == 3:
                    scale = self.spacing_mm / spacing_mm[axis]
                    offset = ((own[axis] - 1) - scale * (found[axis] - 1)) / 2
                else:
                    scale = own[axis] / found[axis]
                    offset = (scale - 1) / 2
                to_voxel[axis, axis], to_voxel[axis, 3] = scale, offset
            features = torch.as_tensor(made[key]).cpu()
            meta = {"filename_or_obj": made[self.image].meta.get("filename_or_obj"), "space": "RAS"}
            made[key] = MetaTensor(features, affine=torch.from_numpy(affine @ to_voxel), meta=meta)
        return made


def intensity_window(scan: Any, percentiles: Sequence[float]) -> tuple[float, float]:
    """Return the intensities of a scan (X, Y, Z, T) that become 0 and 1.

    Raises:
        ValueError: 99 of 100 voxels have the same value.
    """
    flat = scan.reshape(-1)
    stride = math.ceil(flat.size / _MAX_SAMPLE)
    while math.gcd(stride, flat.size) > 1:
        stride += 1
    sample = flat[::stride]
    for voxels in (sample[sample != 0], sample):
        if voxels.size:
            ordered = np.sort(voxels.astype(np.float32))
            places = np.asarray(PERCENTILES) / 100 * (len(ordered) - 1)
            below = np.floor(places).astype(np.int64)
            lower, upper = (
                ordered[index].astype(np.float64) for index in (below, np.minimum(below + 1, len(ordered) - 1))
            )
            table = (lower + (upper - lower) * (places - below)).tolist()
            if table[PERCENTILES.index(99.5)] - table[PERCENTILES.index(0.5)] >= _MIN_CONTRAST:
                low, high = (table[PERCENTILES.index(one)] for one in percentiles)
                return (low, high) if high - low >= _MIN_CONTRAST else (table[0], table[-1])
    raise ValueError("99 of 100 voxels of the scan have the same value: leave it out, or crop it to its content")


def choose_axis(spacing_mm: Sequence[float], rule: str | int, shape: Sequence[int]) -> int:
    """Return the axis across the slices: the given one, the axis with one voxel, or the one with the largest spacing."""
    if rule != "auto":
        return int(rule)
    if 1 in shape:
        return list(shape).index(1)
    largest = max(spacing_mm)
    return max(axis for axis in range(3) if spacing_mm[axis] >= largest * (1 - _TIED_SPACING))


def cut(
    scan: Tensor, spacing_mm: Sequence[float], rule: str | int, target_mm: float
) -> tuple[int, Tensor, tuple[int, int]]:
    """Cut (T, X, Y, Z) into slices (P, 1, h, w); return their axis, the slices, and (H, W) at the pixel size of the network."""
    axis = choose_axis(spacing_mm, rule, scan.shape[1:])
    slices = scan.movedim(1 + axis, 1).flatten(0, 1)[:, None].contiguous()
    along = [mm for other, mm in enumerate(spacing_mm) if other != axis]
    height, width = (max(1, round(n * mm / target_mm)) for n, mm in zip(slices.shape[2:], along, strict=True))
    return axis, slices, (height, width)


def stack(maps: Tensor, axis: int, *, num_frames: int) -> Tensor:
    """Stack maps of slices (P, K, h, w) into volumes (T, K, X, Y, Z)."""
    by_frame = maps.reshape(num_frames, -1, *maps.shape[1:])  # (T, Z, K, h, w)
    return by_frame.movedim(1, 2 + axis)


def resample_slices(slices: Tensor, shape: Sequence[int]) -> Tensor:
    """Resample (P, K, h, w) linearly, antialiased where pixels grow."""
    if slices.shape[-2:] == torch.Size(shape):
        return slices
    return F.interpolate(slices, size=tuple(shape), mode="bilinear", align_corners=False, antialias=True)


def centre_padding(shape: Sequence[int], size: Sequence[int], *, inverse: bool = False) -> list[int]:
    """Return the padding for `F.pad` (negative: cropping) from `shape` to `size`; `inverse` undoes that from `size` to `shape`."""
    padding: list[int] = []
    for have, want in zip(reversed(shape), reversed(size), strict=True):
        before = -((have - want) // 2) if inverse else (want - have) // 2
        padding += [before, want - have - before]
    return padding


def cubic_shape(shape: Sequence[int], spacing_mm: Sequence[float], target_mm: float) -> tuple[int, int, int]:
    """Return the number of cubic voxels along each axis that cover a volume."""
    x, y, z = (max(1, math.ceil(n * mm / target_mm - _ROUNDING)) for n, mm in zip(shape, spacing_mm, strict=True))
    return x, y, z


def to_cubic(
    maps: Tensor, shape: Sequence[int], spacing_mm: Sequence[float], target_mm: float | Sequence[float]
) -> Tensor:
    """Resample the last three axes of `maps` linearly to `shape` about their centre, antialiased where voxels grow."""
    targets = [float(target_mm)] * 3 if isinstance(target_mm, float | int) else target_mm
    for position, (size, own_mm, mm) in enumerate(zip(shape, spacing_mm, targets, strict=True)):
        axis = maps.ndim - 3 + position
        weights = _axis_weights(maps.shape[axis], size, mm / own_mm).to(maps.device)
        maps = torch.movedim(torch.tensordot(weights, maps, dims=([1], [axis])), 0, axis)
    return maps.contiguous()


def _axis_weights(num_voxels: int, size: int, scale: float) -> Tensor:
    """Return linear weights (size, num_voxels) with rows that sum to 1, or to 0 outside of the voxels."""
    places = (num_voxels - 1) / 2 + (torch.arange(size, dtype=torch.float64) - (size - 1) / 2) * scale
    distance = (torch.arange(num_voxels, dtype=torch.float64) - places[:, None].clamp(0, num_voxels - 1)).abs()
    weights = (1 - distance / max(1.0, scale)).clamp_min(0)
    inside = (places >= -0.5) & (places <= num_voxels - 0.5)
    return (weights / weights.sum(1, keepdim=True) * inside[:, None]).float()


def blend_windows(network: Callable[[Tensor], Tensor], images: Tensor, size: int) -> Tensor:
    """Read (B, C, *S) in overlapping windows and blend the outputs."""
    dimensions = images.ndim - 2
    blended = sliding_window_inference(
        images,
        roi_size=[size] * dimensions,
        sw_batch_size=_BATCH_SIZE[dimensions],
        predictor=network,
        overlap=_OVERLAP,
        mode="gaussian",
    )
    assert isinstance(blended, Tensor)
    return blended


def pad_to_divisor(images: Tensor, divisor: int) -> Tensor:
    """Pad the end of every side of (B, C, *S) with zeros, up to a size that the network can read."""
    sides = [-(-side // divisor) * divisor for side in images.shape[2:]]
    if all(side == divisor for side in sides):
        sides[-1] *= 2  # otherwise one pixel would be left at the coarsest level
    padding = [(0, side - have) for side, have in zip(sides, images.shape[2:], strict=True)]
    return F.pad(images, [amount for pair in reversed(padding) for amount in pair])


def _frames_and_spacing(inputs: Tensor) -> tuple[Tensor, tuple[float, ...]]:
    """Return one scan of a batch as frames (T, X, Y, Z), and its voxel size.

    Raises:
        ValueError: The batch holds several scans, or does not know their position.
    """
    if inputs.ndim != 5 or inputs.shape[0] != 1 or not isinstance(inputs, MetaTensor):
        raise ValueError(f"give one scan (1, T, X, Y, Z) as MetaTensor with its affine, got {tuple(inputs.shape)}")
    affine = np.asarray(inputs.affine, np.float64)
    return inputs.as_tensor()[0], _spacing_of(affine[0] if affine.ndim == 3 else affine)


def _spacing_of(affine: Any) -> tuple[float, ...]:
    x, y, z = np.sqrt((affine[:3, :3] ** 2).sum(axis=0)).tolist()
    return x, y, z


def _keep_largest(frame: Any, num_classes: int) -> None:
    """Turn all but the largest component of each class into background, in place."""
    from scipy import ndimage

    for value in range(1, num_classes):
        parts, num_parts = ndimage.label(frame == value, structure=np.ones((3, 3, 3)))
        if num_parts > 1:
            sizes = np.bincount(parts.ravel())[1:]
            frame[(parts > 0) & (parts != 1 + int(sizes.argmax()))] = 0
