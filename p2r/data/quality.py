"""Quality rules of a job: a volume -> None, or a refusal.

The rules apply to a scan as acquired, before any resampling. All except `ingest.min_size` are off unless the job sets them.
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
            f"{volume.key} has voxels of {_format_sizes(spacing)} mm; ingest.quality allows {limits.max_spacing_mm:g} mm",
        )
    if limits.min_field_of_view_mm is not None and min(extent) < limits.min_field_of_view_mm - 1e-6:
        raise RefusedScan(
            "field_of_view",
            f"{volume.key} covers {_format_sizes(extent)} mm; ingest.quality requires {limits.min_field_of_view_mm:g} mm",
        )
    num_slices = shape[slice_axis(spacing, config.slice_axis, shape=shape)]
    if limits.min_slices is not None and num_slices < limits.min_slices:
        raise RefusedScan(
            "slice_count", f"{volume.key} has {num_slices} slices; ingest.quality requires {limits.min_slices}"
        )
    if limits.max_size is not None and max(shape) > limits.max_size:
        raise RefusedScan(
            "too_large", f"{volume.key} has {list(shape)} voxels; ingest.quality allows {limits.max_size} along an axis"
        )


def check_size(volume: Volume, config: IngestConfig) -> None:
    """Check `ingest.min_size`: the slices of a volume must have at least this number of pixels along each side.

    Raises:
        RefusedScan: `too_small`, or `not_3d` for a single slice where volumes are required.
    """
    shape = volume.data.shape
    if config.record == "blocks" and 1 in shape[:3]:
        raise RefusedScan(
            "not_3d",
            f"{volume.key} is a single slice of shape {list(shape)}; blocks are cut from volumes: leave it out, or ingest "
            "with record: planes",
        )
    axis = slice_axis(volume.spacing_mm, config.slice_axis, shape=shape)
    rows, columns = (shape[other] for other in plane_axes(axis))
    if min(rows, columns) < config.min_size:
        time_first = "; if its first axis is time, save time as the fourth" * (shape[3] > 1)
        raise RefusedScan(
            "too_small",
            f"{volume.key} has slices of {rows} x {columns} voxels; ingest.min_size is {config.min_size}{time_first}",
        )


def _format_sizes(values: tuple[float, ...]) -> str:
    return " x ".join(f"{value:.4g}" for value in values)
