"""Label maps among scans: recognised by name, by the list in a `dataset.json`, or by their voxels.

A label map read as a scan would teach the network the outlines of organs, also of test patients, and no digest of scans
could reveal it afterwards. So ingest leaves label maps out, with a reason in the ledger, unless `ingest.label_maps` is `take`.

    by name     a folder such as labelsTr, labels, masks or derivatives; a name that ends in _seg, _dseg, _mask, _label, ...
    by voxels   few distinct whole numbers; or more, as in atlases, that rarely change from voxel to voxel
"""

import re
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2r.data.names import scan_key

CODE = "label_map"
"""Ledger reason of label maps that were left out."""
WAY_OUT = "set ingest.label_maps: take to read it as a scan"

_FOLDERS = frozenset(
    {
        *("label", "labels", "labelstr", "labelsts", "labelsval", "gt", "groundtruth", "ground_truth", "gt_segmentations"),
        *("mask", "masks", "seg", "segs", "segmentation", "segmentations", "annotation", "annotations", "derivatives"),
    }
)  # fmt: skip
LABEL_SUFFIX = re.compile(
    r"(^|[_.\s-])(seg|segs|dseg|probseg|segmentation|mask|masks|brainmask|label|labels|labelmap|gt|groundtruth|roi|aseg|aparc\+aseg)$",
    re.IGNORECASE,
)
_MAX_LABELS = 16
_MAX_ATLAS_LABELS = 512
_MIN_EQUAL_FRACTION = 0.8  # of neighbouring voxels of an atlas; scans, even with 8 bits, stay below 0.3
_WHOLE_TOLERANCE = 1e-3
_SAMPLE_VOXELS = 1 << 14


def label_map_by_name(below: str) -> str | None:
    """Return the reason to take a file for a label map, by its path below its source; None if there is none."""
    path = PurePosixPath(below)
    for folder in path.parts[:-1]:
        if folder.lower() in _FOLDERS:
            return f"is below a folder named {folder}"
    match = LABEL_SUFFIX.search(scan_key(path.name))
    return None if match is None else f"has a name that ends in {match[0]}"


def label_map_by_voxels(data: NDArray[Any]) -> str | None:
    """Return the reason to take a volume (X, Y, Z, T) for a label map; None if it looks like a scan."""
    flat = data.reshape(-1)
    if _count_labels(flat[:: max(1, flat.size // _SAMPLE_VOXELS)]) is None:  # cheap, and decides for nearly every scan
        return None
    num_values = _count_labels(flat)
    if num_values is None or num_values < 2:
        return None
    if num_values <= _MAX_LABELS:
        return f"holds only {num_values} different values, all whole numbers"
    equal_fraction = _equal_neighbours(data)
    if equal_fraction >= _MIN_EQUAL_FRACTION:
        return (
            f"holds {num_values} different whole numbers, and {equal_fraction:.0%} of its neighbouring voxels are equal"
        )
    return None


def _count_labels(values: NDArray[Any]) -> int | None:
    """Count the distinct values; None if there are too many for labels, or not all are whole numbers."""
    found = np.unique(values)
    if len(found) > _MAX_ATLAS_LABELS or np.abs(found - np.rint(found)).max(initial=0) > _WHOLE_TOLERANCE:
        return None
    return len(np.unique(np.rint(found)))


def _equal_neighbours(data: NDArray[Any]) -> float:
    """Return the fraction of neighbouring foreground voxels with equal values."""
    num_equal = num_pairs = 0
    for axis in range(3):
        ahead, behind = np.moveaxis(data, axis, 0)[1:], np.moveaxis(data, axis, 0)[:-1]
        is_pair = (ahead != 0) & (behind != 0)
        num_pairs += int(is_pair.sum())
        num_equal += int((is_pair & (ahead == behind)).sum())
    return num_equal / num_pairs if num_pairs else 0.0
