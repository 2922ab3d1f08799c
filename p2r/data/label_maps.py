"""Label maps among scans: recognised by name, by the list in a `dataset.json`, or by their voxels.

A label map that is read as a scan teaches a network the outlines of organs, test patients' too, and no digest of scans can
show it afterwards. So ingest leaves label maps out, each with a reason in the ledger, unless `ingest.label_maps` says `take`.

    by name     a folder such as labelsTr, labels, masks or derivatives; a name that ends in _seg, _dseg, _mask, _label, ...
    by voxels   whole numbers, and few of them; or more, as in atlases, that hardly change from voxel to voxel
"""

import re
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2r.data.names import scan_key

CODE = "label_map"
"""Reason of the ledger's rows for label maps that were left out."""
WAY_OUT = "ingest.label_maps: take reads it as a scan"

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
_FEW = 16
_MANY = 512
_LEAST_ALIKE = 0.8  # of neighbouring voxels of an atlas; scans, 8-bit ones too, stay below 0.3
_WHOLE = 1e-3
_SAMPLE = 1 << 14


def label_map_by_name(below: str) -> str | None:
    """Return why a file is taken for a label map, by its path below its source; None if nothing says so."""
    path = PurePosixPath(below)
    for folder in path.parts[:-1]:
        if folder.lower() in _FOLDERS:
            return f"is below a folder {folder}"
    match = LABEL_SUFFIX.search(scan_key(path.name))
    return None if match is None else f"has a name that ends in {match[0]}"


def label_map_by_voxels(data: NDArray[Any]) -> str | None:
    """Return why a volume (X, Y, Z, T) is taken for a label map; None if it looks like a scan."""
    flat = data.reshape(-1)
    if _num_whole(flat[:: max(1, flat.size // _SAMPLE)]) is None:  # true of nearly every scan, and cheap
        return None
    num_values = _num_whole(flat)
    if num_values is None or num_values < 2:
        return None
    if num_values <= _FEW:
        return f"holds only {num_values} different values, all whole numbers"
    alike = _alike(data)
    if alike >= _LEAST_ALIKE:
        return f"holds {num_values} different whole numbers, and {alike:.0%} of its neighbouring voxels are equal"
    return None


def _num_whole(values: NDArray[Any]) -> int | None:
    """Count the distinct values; None if they are many, or not all whole numbers."""
    found = np.unique(values)
    if len(found) > _MANY or np.abs(found - np.rint(found)).max(initial=0) > _WHOLE:
        return None
    return len(np.unique(np.rint(found)))


def _alike(data: NDArray[Any]) -> float:
    """Return the share of neighbours, among those that are not background, that have one value."""
    num_equal = num_pairs = 0
    for axis in range(3):
        ahead, behind = np.moveaxis(data, axis, 0)[1:], np.moveaxis(data, axis, 0)[:-1]
        is_pair = (ahead != 0) & (behind != 0)
        num_pairs += int(is_pair.sum())
        num_equal += int((is_pair & (ahead == behind)).sum())
    return num_equal / num_pairs if num_pairs else 0.0
