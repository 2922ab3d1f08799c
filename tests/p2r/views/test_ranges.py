"""Invalid ranges are refused by name when the job file is read; preset names expand to whole sections."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from p2r.config import VIEWS, GeometryConfig, IntensityConfig, ViewsConfig
from p2r.errors import JobError
from p2r.job import read_job


def job_with(tmp_path: Path, views: Any) -> Path:
    path = tmp_path / "job.yaml"
    pretrain = {"corpus": "file:///corpus", "steps": 1, "global_batch": 1, "views": views}
    path.write_text(yaml.safe_dump({"kind": "pretrain", "name": "x", "pretrain": pretrain}))
    return path


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("geometry.rotation_deg", 181, "less than or equal to 180"),
        ("geometry.rotation_deg", -1, "greater than or equal to 0"),
        ("geometry.rotation_3d_deg", [10, 10, 200], "less than or equal to 180"),
        ("geometry.rotation_3d_deg", [10, 10], "missing"),
        ("geometry.scale", [1.2, 0.8], r"must increase and be within \[0.1, 10\], got \[1.2, 0.8\]"),
        ("geometry.scale", [0, 1], r"must increase and be within \[0.1, 10\]"),
        ("geometry.shear_deg", 60, "less than 60"),
        ("geometry.flip_probability", 1.5, "less than or equal to 1"),
        ("geometry.elastic_mm", 33, r"must not exceed elastic_spacing_mm \(32\): the image would fold, got 33"),
        ("geometry.elastic_spacing_mm", 1, "greater than or equal to 4"),
        ("intensity.gamma", [0.05, 2], r"must increase and be within \[0.1, 10\]"),
        ("intensity.contrast", [2, 1], "must increase"),
        ("intensity.bias_field", 4, "less than or equal to 3"),
        ("intensity.noise", -0.1, "greater than or equal to 0"),
        ("intensity.noise", 1.1, "less than or equal to 1"),
        ("intensity.blur_mm", 21, "less than or equal to 20"),
        ("intensity.low_resolution_mm", [5, 2], r"must increase and be within \[0, 100\]"),
        ("intensity.ghosting", [0.2, 1.2], r"must increase and be within \[0, 1\]"),
        ("intensity.num_ghosts", [1, 4], "greater than or equal to 2"),
        ("intensity.num_ghosts", [4, 2], "num_ghosts must increase"),
        ("intensity.window_low", [0, 91], "window_low must end below window_high"),
        ("intensity.window_high", [95, 101], r"must increase and be within \[0, 100\]"),
        ("intensity.ghost_probability", 0.1, "did you mean ghosting_probability"),
        ("intensity.solarize", 0.1, "unknown key; known here: bias_field"),
    ],
)
def test_a_strength_out_of_range_is_refused_by_name(tmp_path: Path, key: str, value: Any, rule: str) -> None:
    section, field = key.split(".")
    with pytest.raises(JobError, match=rule) as refusal:
        read_job(job_with(tmp_path, {section: {field: value}}))
    assert f"pretrain.views.{section}" in str(refusal.value)


def test_an_infinite_strength_is_refused_where_it_is_written(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"job\.yaml: line \d+: \.inf is not a finite number"):
        read_job(job_with(tmp_path, {"geometry": {"translation_mm": float("inf")}}))


def test_every_probability_is_a_fraction() -> None:
    names = [name for name in IntensityConfig.model_fields if name.endswith("_probability")]
    assert len(names) == 10
    for name in names:
        for value in (-0.1, 1.1):
            with pytest.raises(ValueError, match=name):
                IntensityConfig(**{name: value})


@pytest.mark.parametrize("name", VIEWS)
def test_a_name_stands_for_a_whole_section(tmp_path: Path, name: str) -> None:
    job = read_job(job_with(tmp_path, name))
    assert job.pretrain is not None
    views = job.pretrain.views
    assert views == ViewsConfig(
        geometry=GeometryConfig(**VIEWS[name].get("geometry", {})),
        intensity=IntensityConfig(**VIEWS[name].get("intensity", {})),
    )
    assert ViewsConfig.model_validate(views.model_dump()) == views


def test_pix2rep_v2_is_pix2rep_with_windows() -> None:
    one, two = (ViewsConfig.model_validate(name) for name in ("pix2rep", "pix2rep_v2"))
    assert one.geometry == two.geometry
    assert two.intensity == one.intensity.model_copy(update={"window_probability": 1.0})


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        JobError, match=r"pretrain.views: must be a section, or one of the names p2r, pix2rep, pix2rep_v2, got 'simclr'"
    ):
        read_job(job_with(tmp_path, "simclr"))
