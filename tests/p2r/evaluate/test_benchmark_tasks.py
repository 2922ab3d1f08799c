"""The tasks in jobs/tasks: sizes of splits, licences, and real scans with their label maps."""

import json
from collections import Counter
from pathlib import Path

import nibabel
import numpy as np
import pytest
import yaml

from p2r.data.corpus import expand_subjects
from p2r.data.phantom import CLASSES, REGIONS
from p2r.data.preprocess import Preparation
from p2r.data.volume import read_labels
from p2r.errors import DataError
from p2r.evaluate.tasks import TaskConfig, check_scans, load_scan, load_task

TASKS = Path(__file__).parents[3] / "jobs" / "tasks"


@pytest.mark.data
def test_acdc_has_69_10_and_20_patients_both_frames_and_their_pathologies(mri: Path) -> None:
    task = load_task(TASKS / "acdc.yaml")
    assert [len(task.subjects[split]) for split in ("train", "validation", "test")] == [69, 10, 20]
    assert len(task.scans) == 2 * 99
    assert all(len(task.scans_of((subject,))) == 2 for subject in task.subjects["test"])
    groups = {
        patient: facts["Group"] for patient, facts in json.loads((mri / "acdc/patients.json").read_text()).items()
    }
    assert task.strata == {patient: group for patient, group in groups.items() if patient != "patient074"}
    assert Counter(task.strata[patient] for patient in task.subjects["test"]) == dict.fromkeys(
        ("DCM", "HCM", "MINF", "NOR", "RV"), 4
    )


@pytest.mark.data
@pytest.mark.usefixtures("mri")
def test_unseen_pathology_tests_on_the_last_twenty_patients() -> None:
    task = load_task(TASKS / "acdc-unseen-pathology.yaml")
    assert [len(task.subjects[split]) for split in ("train", "validation", "test")] == [70, 9, 20]
    assert task.subjects["test"] == tuple(f"patient{number:03d}" for number in range(81, 101))
    assert {task.strata[patient] for patient in task.subjects["test"]} == {"RV"}
    assert "RV" not in {task.strata[patient] for split in ("train", "validation") for patient in task.subjects[split]}


@pytest.mark.data
@pytest.mark.usefixtures("mri")
def test_hippocampus_has_140_20_and_40_patients_of_one_scan() -> None:
    task = load_task(TASKS / "hippocampus.yaml")
    assert [len(task.subjects[split]) for split in ("train", "validation", "test")] == [140, 20, 40]
    assert [scan.subject for scan in task.scans] == sorted({scan.subject for scan in task.scans})


@pytest.mark.data
@pytest.mark.usefixtures("mri")
@pytest.mark.parametrize("name", ["acdc", "hippocampus"])
def test_headers_of_real_scans_and_labels_agree(name: str) -> None:
    for scan in load_task(TASKS / f"{name}.yaml").scans:
        image, label = nibabel.load(scan.image), nibabel.load(scan.label)
        assert image.shape == label.shape
        assert np.abs(image.affine - label.affine).max() < 1e-3


@pytest.mark.data
@pytest.mark.usefixtures("mri")
def test_a_real_scan_and_its_label_are_cut_alike() -> None:
    task = load_task(TASKS / "acdc.yaml")
    scan = load_scan(task.scans[0], task, Preparation(spacing_mm=1.5, image_size=160))
    assert scan.label_planes.shape == (scan.planes.images.shape[0], *scan.planes.images.shape[2:])
    assert set(scan.label_planes.unique().tolist()) == {0, 1, 2, 3}
    # A left ventricle at end-diastole holds 50 to 400 ml: the voxel size in mm is right.
    left_ventricle_ml = (scan.labels.data == 3).sum() * np.prod(scan.volume.spacing_mm) / 1000
    assert 50 < left_ventricle_ml < 400


@pytest.mark.data
@pytest.mark.usefixtures("mri")
def test_the_patient_that_acdc_holds_twice_is_found(tmp_path: Path) -> None:
    values = yaml.safe_load((TASKS / "acdc.yaml").read_text())
    values["splits"] = {"train": ["patient001"], "validation": ["patient074"], "test": ["patient076"]}
    (tmp_path / "acdc.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(
        DataError, match=r"subject patient074 \(validation\) and .* of subject patient076 \(test\) have the same"
    ):
        check_scans(load_task(tmp_path / "acdc.yaml"), Preparation(spacing_mm=3.0, image_size=64))


@pytest.mark.data
@pytest.mark.usefixtures("mri")
@pytest.mark.parametrize("name", ["acdc", "acdc-unseen-pathology"])
def test_the_lower_third_of_a_heart_is_its_base_where_the_right_ventricle_is_wide(name: str) -> None:
    task = load_task(TASKS / f"{name}.yaml")
    assert task.config.thirds == ("base", "middle", "apex")
    right_ventricles = [read_labels(scan.label).data[..., 0] == 1 for scan in task.scans[::4]]
    lower_is_wider = [
        areas[: len(areas) // 3].sum() > areas[-(len(areas) // 3) :].sum()
        for areas in (mask.sum(axis=(0, 1))[mask.any(axis=(0, 1))] for mask in right_ventricles)
    ]
    assert np.mean(lower_is_wider) > 0.95


@pytest.mark.parametrize(("name", "folder"), [("template", "labels"), ("regions", "regions")])
def test_a_task_of_virtual_subjects_uses_all_that_it_makes(name: str, folder: str) -> None:
    config = TaskConfig.model_validate(yaml.safe_load((TASKS / f"{name}.yaml").read_text()))
    assert config.splits is not None
    subjects = [subject for patterns in config.splits.model_dump().values() for subject in expand_subjects(patterns)]
    assert subjects == [f"sub-{number:03d}" for number in range(1, len(subjects) + 1)]
    assert config.images == f"template://icbm152/images?subjects={len(subjects)}&seed=0"
    assert config.labels == config.images.replace("images", folder)
    assert config.classes == {"labels": CLASSES, "regions": REGIONS}[folder]


def test_virtual_subjects_load_with_their_labels(tmp_path: Path) -> None:
    for name in ("template", "regions"):
        values = yaml.safe_load((TASKS / f"{name}.yaml").read_text())
        values["splits"] = {"train": ["sub-001"], "validation": ["sub-002"], "test": ["sub-003"]}
        for key in ("images", "labels"):
            values[key] = values[key].replace("subjects=16", "subjects=3")
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
        task = load_task(tmp_path / f"{name}.yaml", cache=tmp_path)
        scan = load_scan(task.scans[0], task, Preparation(spacing_mm=2.0, image_size=96))
        assert set(scan.label_planes.unique().tolist()) == {0, *values["classes"]}


def test_every_task_file_says_what_it_is_its_licence_and_its_citation() -> None:
    for path in TASKS.glob("*.yaml"):
        text = path.read_text()
        values = yaml.safe_load(text)
        assert text.startswith("# "), path.name
        assert "# Licence:" in text, path.name
        assert values["citation"], path.name
        assert values["name"] == path.stem
