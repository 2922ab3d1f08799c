"""Tasks that load, and every one that is refused with a message that helps."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from p2r.data.corpus import expand_subjects
from p2r.data.preprocess import Preparation
from p2r.data.volume import write_nifti
from p2r.errors import DataError
from p2r.evaluate.tasks import Task, TaskConfig, load_scan, load_task

TASKS = Path(__file__).parents[3] / "jobs" / "tasks"
PREPARATION = Preparation(spacing_mm=2.0, image_size=32)

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


def rewrite_label(
    task: Task, array: np.ndarray[Any, Any] | None = None, affine: np.ndarray[Any, Any] | None = None
) -> None:
    shape = (20, 24, 6)
    write_nifti(
        task.scans[0].label,
        np.zeros(shape, np.uint8) if array is None else array,
        np.diag([1.0, 1.0, 4.0, 1.0]) if affine is None else affine,
    )


def test_a_task_pairs_every_image_with_its_label(make_task: MakeTask) -> None:
    task = load_task(make_task())
    assert [scan.key for scan in task.scans] == [f"sub-{number:02d}_T1w" for number in range(1, 5)]
    assert all(scan.image.name == scan.label.name and scan.image != scan.label for scan in task.scans)
    assert task.subjects == {"train": ("sub-01", "sub-02"), "validation": ("sub-03",), "test": ("sub-04",)}
    assert task.num_classes == 3
    assert [scan.subject for scan in task.scans_of(("sub-02", "sub-04"))] == ["sub-02", "sub-04"]


def test_scans_of_subjects_in_no_split_are_left_out_labelled_or_not(make_task: MakeTask) -> None:
    path = make_task(splits={"train": ["sub-01"], "validation": ["sub-03"], "test": ["sub-04"]})
    (path.parent / "labels/sub-02_T1w.nii.gz").unlink()
    assert [scan.subject for scan in load_task(path).scans] == ["sub-01", "sub-03", "sub-04"]


def test_hidden_files_are_no_scans(make_task: MakeTask) -> None:
    path = make_task()
    (path.parent / "images/._sub-01_T1w.nii.gz").write_bytes(b"left by a file manager")
    assert len(load_task(path).scans) == 4


def test_compression_may_differ_between_image_and_label(make_task: MakeTask) -> None:
    path = make_task()
    label = path.parent / "labels/sub-01_T1w.nii.gz"
    label.unlink()
    write_nifti(label.with_suffix(""), np.zeros((20, 24, 6), np.uint8), np.diag([1.0, 1.0, 4.0, 1.0]))
    assert load_task(path).scans[0].label.name == "sub-01_T1w.nii"


def test_a_scan_is_cut_into_planes_together_with_its_label(make_task: MakeTask) -> None:
    task = load_task(make_task())
    scan = load_scan(task.scans[0], task, PREPARATION)
    assert scan.planes.images.shape == (6, 1, 10, 12)
    assert scan.label_planes.shape == (6, 10, 12)
    assert load_scan(task.scans[0], task, PREPARATION, size=32).label_planes.shape == (6, 32, 32)


def test_an_empty_label_map_is_allowed(make_task: MakeTask) -> None:
    task = load_task(make_task())
    rewrite_label(task)
    assert not load_scan(task.scans[0], task, PREPARATION).label_planes.any()


def test_a_missing_folder_is_refused_by_name(make_task: MakeTask) -> None:
    with pytest.raises(DataError, match=r"toy\.yaml: labels is masks, but there is no folder .*masks"):
        load_task(make_task(labels="masks"))


def test_an_image_without_label_is_refused_by_name(make_task: MakeTask) -> None:
    path = make_task()
    (path.parent / "labels/sub-02_T1w.nii.gz").unlink()
    with pytest.raises(DataError, match=r"sub-02_T1w\.nii\.gz .* has no label map"):
        load_task(path)


def test_a_listed_subject_without_scan_is_refused_by_name(make_task: MakeTask) -> None:
    with pytest.raises(DataError, match=r"no scan of sub-05, sub-06 in"):
        load_task(make_task(splits={"train": ["sub-[01-02]"], "validation": ["sub-03"], "test": ["sub-[04-06]"]}))


def test_a_subject_in_two_splits_is_refused_with_both(make_task: MakeTask) -> None:
    with pytest.raises(DataError, match=r"sub-02 is in the splits train and test"):
        load_task(make_task(splits={"train": ["sub-[01-02]"], "validation": ["sub-03"], "test": ["sub-02", "sub-04"]}))


def test_an_unset_variable_is_named(make_task: MakeTask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("P2R_DATA", raising=False)
    with pytest.raises(DataError, match=r"images: environment variable P2R_DATA is not set"):
        load_task(make_task(images="${P2R_DATA}/acdc/images"))


def test_a_variable_in_a_folder_is_filled_in(make_task: MakeTask, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_task(images="${P2R_DATA}/images")
    monkeypatch.setenv("P2R_DATA", str(path.parent))
    assert len(load_task(path).scans) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": {0: "background", 1: "organ"}}, "classes.0"),
        ({"classes": {1: "organ", 3: "other"}}, "without a gap"),
        ({"classes": {1: "organ", 2: "organ"}}, "different names"),
        ({"classes": {}}, "classes"),
        ({"subject_pattern": "sub-[0-9]+"}, "needs a group"),
        ({"subject_pattern": "(sub"}, "not a regular expression"),
        ({"name": "My Task"}, "name"),
        ({"licence": ""}, "licence"),
        ({"lables": "labels"}, "did you mean labels"),
        ({"splits": {"train": ["sub-01"], "test": ["sub-02"]}}, "splits.validation: missing"),
        ({"splits": {"train": ["sub-[02-01]"], "validation": ["sub-03"], "test": ["sub-04"]}}, "splits.train"),
        ({"images": "s3://bucket/images"}, "paths, file:// or template://"),
    ],
)
def test_a_broken_task_file_is_refused_with_its_name(
    make_task: MakeTask, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=r"task .*toy\.yaml") as refusal:
        load_task(make_task(**changes))
    assert message in str(refusal.value)


def test_what_is_no_task_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        load_task(tmp_path / "absent.yaml")
    for content in ("- a list", "images: [", ""):
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(DataError, match=r"bad\.yaml"):
            load_task(tmp_path / "bad.yaml")


def test_a_label_on_another_grid_is_refused(make_task: MakeTask) -> None:
    task = load_task(make_task())
    rewrite_label(task, array=np.zeros((20, 24, 5), np.uint8))
    with pytest.raises(DataError, match=r"sub-01_T1w.*\(20, 24, 5\).*\(20, 24, 6\).*resample"):
        load_scan(task.scans[0], task, PREPARATION)


@pytest.mark.parametrize("shift_mm", [0.0009, 0.002])
def test_a_label_whose_affine_is_off_by_more_than_a_thousandth_is_refused(make_task: MakeTask, shift_mm: float) -> None:
    task = load_task(make_task())
    affine = np.diag([1.0, 1.0, 4.0, 1.0])
    affine[0, 3] = shift_mm
    rewrite_label(task, affine=affine)
    if shift_mm < 1e-3:
        load_scan(task.scans[0], task, PREPARATION)
    else:
        with pytest.raises(DataError, match=r"affine of .*labels/sub-01_T1w.* differs by up to 0\.002"):
            load_scan(task.scans[0], task, PREPARATION)


def test_a_mirrored_label_is_refused(make_task: MakeTask) -> None:
    task = load_task(make_task())
    rewrite_label(task, affine=np.diag([-1.0, 1.0, 4.0, 1.0]))
    with pytest.raises(DataError, match="affine"):
        load_scan(task.scans[0], task, PREPARATION)


def test_for_a_network_of_volumes_a_scan_and_its_label_stay_whole(make_task: MakeTask) -> None:
    task = load_task(make_task())
    preparation = Preparation(dimensions=3, spacing_mm=2.0, image_size=32, intensity_percentiles=(0.0, 100.0))
    scan = load_scan(task.scans[0], task, preparation)
    assert scan.planes.images.shape == (1, 1, 10, 12, 12)
    assert scan.label_planes.shape == scan.planes.inside.shape == (1, 10, 12, 12)
    assert set(scan.label_planes.unique().tolist()) == {0, 1, 2}
    task = load_task(make_task())
    affine = np.diag([1.0, 1.0, 4.0, 1.0])
    rewrite_label(task, affine=affine, array=np.full((20, 24, 6), 7, np.uint8))
    with pytest.raises(DataError, match="holds the value 7"):
        load_scan(task.scans[0], task, preparation)


def test_a_label_value_that_the_task_does_not_name_is_refused(make_task: MakeTask) -> None:
    task = load_task(make_task())
    rewrite_label(task, array=np.full((20, 24, 6), 7, np.uint8))
    with pytest.raises(DataError, match=r"holds the value 7, the task names 0 background, 1 bright, 2 brightest"):
        load_scan(task.scans[0], task, PREPARATION)


@pytest.fixture
def real_data() -> None:
    if not os.environ.get("P2R_DATA"):
        pytest.skip("P2R_DATA is not set: it names the folder with the real MRI")


@pytest.mark.data
@pytest.mark.usefixtures("real_data")
def test_acdc_loads_with_69_10_and_20_patients_and_both_frames() -> None:
    task = load_task(TASKS / "acdc.yaml")
    assert [len(task.subjects[split]) for split in ("train", "validation", "test")] == [69, 10, 20]
    assert len(task.scans) == 2 * 99
    assert all(len(task.scans_of((subject,))) == 2 for subject in task.subjects["test"])


@pytest.mark.data
@pytest.mark.usefixtures("real_data")
def test_unseen_pathology_tests_on_the_last_twenty_patients() -> None:
    task = load_task(TASKS / "acdc-unseen-pathology.yaml")
    assert [len(task.subjects[split]) for split in ("train", "validation", "test")] == [70, 9, 20]
    assert task.subjects["test"] == tuple(f"patient{number:03d}" for number in range(81, 101))


@pytest.mark.data
@pytest.mark.usefixtures("real_data")
def test_a_real_scan_and_its_label_are_cut_alike() -> None:
    task = load_task(TASKS / "acdc.yaml")
    scan = load_scan(task.scans[0], task, Preparation(spacing_mm=1.5, image_size=160))
    assert scan.label_planes.shape == (scan.planes.images.shape[0], *scan.planes.images.shape[2:])
    assert set(scan.label_planes.unique().tolist()) == {0, 1, 2, 3}
    # A left ventricle at end-diastole holds 50 to 400 ml: the voxel size in mm is right.
    left_ventricle_ml = (scan.labels.data == 3).sum() * np.prod(scan.volume.spacing_mm) / 1000
    assert 50 < left_ventricle_ml < 400


def test_the_template_task_uses_every_virtual_subject_that_it_makes() -> None:
    config = TaskConfig.model_validate(yaml.safe_load((TASKS / "template.yaml").read_text()))
    subjects = [subject for patterns in config.splits.model_dump().values() for subject in expand_subjects(patterns)]
    assert subjects == [f"sub-{number:03d}" for number in range(1, len(subjects) + 1)]
    assert config.images == f"template://icbm152/images?subjects={len(subjects)}&seed=0"
    assert config.labels == config.images.replace("images", "labels")


def test_virtual_subjects_load_with_their_labels(tmp_path: Path) -> None:
    values = yaml.safe_load((TASKS / "template.yaml").read_text())
    values["splits"] = {"train": ["sub-001"], "validation": ["sub-002"], "test": ["sub-003"]}
    for key in ("images", "labels"):
        values[key] = f"template://icbm152/{key}?subjects=3&seed=0"
    (tmp_path / "template.yaml").write_text(yaml.safe_dump(values))
    task = load_task(tmp_path / "template.yaml", cache=tmp_path)
    scan = load_scan(task.scans[0], task, Preparation(spacing_mm=2.0, image_size=96))
    assert set(scan.label_planes.unique().tolist()) == {0, 1, 2}


def test_every_task_file_says_what_it_is_its_licence_and_its_citation() -> None:
    for path in TASKS.glob("*.yaml"):
        text = path.read_text()
        values = yaml.safe_load(text)
        assert text.startswith("# "), path.name
        assert "# Licence:" in text, path.name
        assert values["citation"], path.name
        assert values["name"] == path.stem
