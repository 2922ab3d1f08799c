"""A volume -> nothing, or a refusal: the rules of a job about which scans are good enough.

They look at a scan as it was acquired, before any resampling. All but `ingest.min_size` are off unless the job asks.
"""

from p2r.config import IngestConfig
from p2r.data.preparation import plane_axes, slice_axis
from p2r.data.volume import Volume
from p2r.errors import RefusedScan


def check_quality(volume: Volume, config: IngestConfig) -> None:
    """Check `ingest.quality`.

    Raises:
        RefusedScan: `spacing`, `field_of_view`, `slice_count` or `too_large`.
    """
    limits = config.quality.limits()
    shape, spacing = volume.data.shape[:3], volume.spacing_mm
    extent = tuple(float(size * step) for size, step in zip(shape, spacing, strict=True))
    if limits.max_spacing_mm is not None and max(spacing) > limits.max_spacing_mm + 1e-6:
        raise RefusedScan(
            "spacing",
            f"{volume.key} has voxels of {_listed(spacing)} mm; ingest.quality allows {limits.max_spacing_mm:g} mm",
        )
    if limits.min_field_of_view_mm is not None and min(extent) < limits.min_field_of_view_mm - 1e-6:
        raise RefusedScan(
            "field_of_view",
            f"{volume.key} covers {_listed(extent)} mm; ingest.quality asks for {limits.min_field_of_view_mm:g} mm",
        )
    num_slices = shape[slice_axis(spacing, config.slice_axis, shape=shape)]
    if limits.min_slices is not None and num_slices < limits.min_slices:
        raise RefusedScan(
            "slice_count", f"{volume.key} has {num_slices} slices; ingest.quality asks for {limits.min_slices}"
        )
    if limits.max_size is not None and max(shape) > limits.max_size:
        raise RefusedScan(
            "too_large", f"{volume.key} has {list(shape)} voxels; ingest.quality allows {limits.max_size} along an axis"
        )


def check_size(volume: Volume, config: IngestConfig) -> None:
    """Check `ingest.min_size`: the planes that a volume will be cut into must be worth looking at.

    Raises:
        RefusedScan: `too_small`, or `not_3d` for a single plane where volumes are wanted.
    """
    shape = volume.data.shape
    if config.record == "blocks" and 1 in shape[:3]:
        raise RefusedScan(
            "not_3d",
            f"{volume.key} is a single plane, its shape is {list(shape)}; blocks are cut from volumes: leave it out, or ingest "
            "with record: planes",
        )
    axis = slice_axis(volume.spacing_mm, config.slice_axis, shape=shape)
    rows, columns = (shape[other] for other in plane_axes(axis))
    if min(rows, columns) < config.min_size:
        raise RefusedScan(
            "too_small", f"{volume.key} has planes of {rows} x {columns} voxels; ingest.min_size is {config.min_size}"
        )


def _listed(values: tuple[float, ...]) -> str:
    return " x ".join(f"{value:.4g}" for value in values)
