"""Quality rules: none by default, presets by name, explicit rules before presets."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from p2r.config import IngestConfig, QualityConfig
from p2r.data.quality import check_quality, check_size
from p2r.data.volume import Volume
from p2r.errors import RefusedScan


def scan(shape: tuple[int, int, int] = (120, 130, 40), spacing: tuple[float, float, float] = (1.0, 1.0, 3.0)) -> Volume:
    affine = np.diag([*spacing, 1.0])
    return Volume(np.zeros((*shape, 1), np.uint8), affine, affine, shape, spacing, "scan")


def config(**ingest: Any) -> IngestConfig:
    return IngestConfig(sources=("x",), licence="CC0-1.0", **ingest)


def code(volume: Volume, **quality: Any) -> str | None:
    try:
        check_quality(volume, config(quality=quality))
    except RefusedScan as refusal:
        assert "ingest.quality" in refusal.message
        return refusal.code
    return None


def test_nothing_is_refused_by_default() -> None:
    assert code(scan((2, 2, 2), (30.0, 30.0, 30.0))) is None
    assert code(scan((4000, 2, 2), (0.1, 0.1, 0.1))) is None


@pytest.mark.parametrize(
    ("rule", "at_limit", "beyond", "expected"),
    [
        ("max_spacing_mm", 3.0, 2.9, "spacing"),
        ("min_field_of_view_mm", 120.0, 120.5, "field_of_view"),
        ("min_slices", 40, 41, "slice_count"),
        ("max_size", 130, 129, "too_large"),
    ],
)
def test_each_rule_refuses_scans_beyond_it(rule: str, at_limit: float, beyond: float, expected: str) -> None:
    assert code(scan(), **{rule: at_limit}) is None
    assert code(scan(), **{rule: beyond}) == expected


def test_slices_are_counted_along_the_slice_axis() -> None:
    volume = scan((120, 130, 40))
    with pytest.raises(RefusedScan, match="40 slices"):
        check_quality(volume, config(quality={"min_slices": 125}))
    check_quality(volume, config(quality={"min_slices": 125}, slice_axis=1))


def test_openmind_requires_3_mm_and_100_mm() -> None:
    assert code(scan(), preset="openmind") is None
    assert code(scan(spacing=(1.0, 1.0, 3.1)), preset="openmind") == "spacing"
    assert code(scan((99, 130, 40)), preset="openmind") == "field_of_view"


def test_an_explicit_rule_has_precedence_over_the_preset() -> None:
    thick = scan(spacing=(1.0, 1.0, 8.0))
    assert code(thick, preset="openmind", max_spacing_mm=10) is None
    assert code(thick, preset="openmind", max_spacing_mm=None) is None
    assert code(scan((50, 130, 40)), preset="openmind", max_spacing_mm=10) == "field_of_view"
    limits = QualityConfig(preset="openmind", min_slices=5).limits()
    assert (limits.max_spacing_mm, limits.min_field_of_view_mm, limits.min_slices) == (3.0, 100.0, 5)


def test_impossible_rules_are_refused() -> None:
    for quality in ({"max_spacing_mm": 0}, {"min_slices": -1}, {"preset": "strict"}, {"max_spacing": 3}):
        with pytest.raises(ValidationError):
            QualityConfig(**quality)


def test_slices_must_have_the_minimum_size_of_the_job(tmp_path: Path) -> None:
    check_size(scan((16, 16, 2)), config())
    with pytest.raises(RefusedScan, match=r"15 x 16 voxels; ingest\.min_size is 16") as refusal:
        check_size(scan((15, 16, 40)), config())
    assert refusal.value.code == "too_small"
    check_size(scan((15, 16, 40)), config(slice_axis=0))
