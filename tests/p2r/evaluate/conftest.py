"""Small tasks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from p2r.data.volume import write_nifti
from p2r.evaluate.tasks import Task, load_task

MakeTask = Callable[..., Path]


@pytest.fixture
def make_task(tmp_path: Path) -> MakeTask:
    """Write four subjects with one scan each, and a task over them; keyword arguments replace keys of the YAML."""

    def make(**changes: Any) -> Path:
        generator = np.random.default_rng(0)
        for number in range(1, 5):
            image = generator.integers(1, 900, size=(20, 24, 6)).astype(np.int16)
            label = (image > 450).astype(np.uint8) + (image > 800)
            write_nifti(tmp_path / f"images/sub-{number:02d}_T1w.nii.gz", image, np.diag([1.0, 1.0, 4.0, 1.0]))
            write_nifti(tmp_path / f"labels/sub-{number:02d}_T1w.nii.gz", label, np.diag([1.0, 1.0, 4.0, 1.0]))
        values = {
            "name": "toy",
            "title": "Toy",
            "images": "images",
            "labels": "labels",
            "licence": "CC0-1.0",
            "classes": {1: "bright", 2: "brightest"},
            "splits": {"train": ["sub-[01-02]"], "validation": ["sub-03"], "test": ["sub-04"]},
            **changes,
        }
        path = tmp_path / "toy.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return make


# Splits by a rule, strata, and folders with other naming schemes.


def people(folder: Path, *names: str) -> None:
    """Scans and label maps of these names, too small to be read."""
    for name in names:
        for part in ("images", "labels"):
            path = folder / part / f"{name}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()


@pytest.fixture
def task_of(tmp_path: Path) -> Callable[..., Task]:
    """Load a task over the folder `tmp_path`; its files are never read."""

    def load(**values: Any) -> Task:
        given = {"name": "toy", "title": "Toy", "images": "images", "labels": "labels", "licence": "CC0-1.0"}
        (tmp_path / "toy.yaml").write_text(yaml.safe_dump({**given, "classes": {1: "organ"}, **values}))
        return load_task(tmp_path / "toy.yaml")

    return load
