"""A list of scans -> volumes, according to the job's ingest section."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from p2r.config import IngestConfig
from p2r.data.read import read_scan, sidecar_of
from p2r.data.scans import find_scans
from p2r.data.volume import read_volume
from p2r.errors import RefusedScan


def config(**ingest: Any) -> IngestConfig:
    return IngestConfig(sources=("x",), licence="CC0-1.0", **ingest)


def some(shape: tuple[int, ...]) -> Any:
    return np.random.default_rng(0).integers(0, 900, shape).astype(np.int16)


def refusal_of(path: Path, **ingest: Any) -> str:
    with pytest.raises(RefusedScan) as refusal:
        read_scan(find_scans([str(path)], cache=path)[0], config(**ingest))
    return refusal.value.code


def test_a_scan_is_read_like_by_read_volume(write_scan: Any, tmp_path: Path) -> None:
    path = write_scan("sub-01_T1w.nii.gz", some((20, 24, 5)))
    path.with_name("sub-01_T1w.json").write_text(json.dumps({"EchoTime": 0.01, "PatientName": "x", "FlipAngle": "x"}))
    (scan,) = find_scans([str(path.parent)], cache=tmp_path)
    (volume,) = read_scan(scan, config())
    expected = read_volume(path)
    np.testing.assert_array_equal(volume.data, expected.data)
    np.testing.assert_array_equal(volume.affine, expected.affine)
    assert (volume.key, volume.frames, volume.resampled_from_mm) == ("sub-01_T1w", None, None)
    assert volume.sidecar == sidecar_of(scan) == {"EchoTime": 0.01}
    assert volume.notes == ("sidecar_ignored",)


def test_the_frame_limit_applies_first(write_scan: Any, tmp_path: Path) -> None:
    (scan,) = find_scans([str(write_scan("bold.nii.gz", some((20, 24, 5, 10))))], cache=tmp_path)
    (volume,) = read_scan(scan, config(max_frames=2, resample_mm=3.0, min_size=8))
    assert volume.frames == (2, 7)
    assert volume.data.shape == (10, 12, 13, 2)
    assert volume.resampled_from_mm == (1.5, 1.5, 8.0)


def test_quality_rules_apply_to_the_scan_before_resampling(write_scan: Any) -> None:
    path = write_scan("scan.nii.gz", some((20, 24, 5)))
    assert refusal_of(path, resample_mm=1.0, quality={"max_spacing_mm": 3.0}) == "spacing"
    assert refusal_of(path, quality={"preset": "openmind"}) == "spacing"
    assert refusal_of(path, quality={"preset": "openmind", "max_spacing_mm": 8}) == "field_of_view"


def test_size_rules_apply_to_the_scan_after_resampling(write_scan: Any) -> None:
    path = write_scan("scan.nii.gz", some((20, 24, 5)))
    assert refusal_of(path, min_size=21) == "too_small"
    assert refusal_of(path, resample_mm=3.0) == "too_small"
    assert refusal_of(path, max_scan_mib=0.001) == "too_large"
    assert refusal_of(path, max_scan_mib=0.01, resample_mm=0.5) == "too_large"


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "num_scans", "openmind"),
    [("acdc", 200, {"spacing": 200}), ("msd_hippocampus", 200, {"field_of_view": 200})],
)
def test_real_scans_are_accepted_by_default_and_refused_by_openminds_rules(
    mri: Path, tmp_path: Path, name: str, num_scans: int, openmind: dict[str, int]
) -> None:
    scans = find_scans([str(mri / name / "images")], cache=tmp_path)
    assert len(scans) == num_scans
    reasons: Counter[str] = Counter()
    for scan in scans:
        (volume,) = read_scan(scan, config())
        assert volume.notes == ()
        try:
            read_scan(scan, config(quality={"preset": "openmind"}))
        except RefusedScan as refusal:
            reasons[refusal.code] += 1
    assert reasons == openmind
