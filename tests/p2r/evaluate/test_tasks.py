"""Tasks that load, and tasks that are refused with a helpful message."""

import json
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import yaml

from p2r.data.corpus import expand_subjects
from p2r.data.phantom import CLASSES, REGIONS
from p2r.data.preprocess import Preparation
from p2r.data.volume import read_labels, write_nifti
from p2r.errors import DataError
from p2r.evaluate.tasks import Task, TaskConfig, check_classes_present, check_scans, load_scan, load_task, task_sha256

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
        ({"dimensions": 3, "slice_axis": 0}, "leave one of both out"),
        ({"dimensions": 4}, "dimensions"),
        ({"thirds": ["base", "apex"]}, "three different names"),
        ({"thirds": ["base", "middle", "base"]}, "three different names"),
        ({"thirds": ["base", "", "apex"]}, "thirds"),
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


def test_a_grid_that_differs_is_printed_with_shape_and_affine_of_both(make_task: MakeTask) -> None:
    task = load_task(make_task())
    for array in (np.zeros((20, 24, 6), np.uint8), np.zeros((24, 20, 6), np.uint8)):
        rewrite_label(
            task, array=array, affine=np.array([[-2, 0, 0, 30], [0, 1, 0, 0], [0, 0, 4, -7.5], [0, 0, 0, 1.0]])
        )
        with pytest.raises(DataError) as refusal:
            load_scan(task.scans[0], task, PREPARATION)
        assert f"labels/sub-01_T1w.nii.gz has shape {array.shape} x 1 frames" in str(refusal.value)
        assert "affine [-2 0 0 30; 0 1 0 0; 0 0 4 -7.5], its image" in str(refusal.value)
        assert "images/sub-01_T1w.nii.gz shape (20, 24, 6) x 1 frames, affine [1 0 0 0; 0 1 0 0; 0 0 4 0]" in str(
            refusal.value
        )


@pytest.mark.parametrize("shift_mm", [0.0009, 0.002])
def test_a_label_whose_affine_is_off_by_more_than_a_thousandth_is_refused(make_task: MakeTask, shift_mm: float) -> None:
    task = load_task(make_task())
    affine = np.diag([1.0, 1.0, 4.0, 1.0])
    affine[0, 3] = shift_mm
    rewrite_label(task, affine=affine)
    if shift_mm < 1e-3:
        load_scan(task.scans[0], task, PREPARATION)
    else:
        with pytest.raises(DataError, match=r"affines differ by up to 0\.002 .*labels/sub-01_T1w"):
            load_scan(task.scans[0], task, PREPARATION)


def test_a_label_of_other_voxels_is_refused(make_task: MakeTask) -> None:
    task = load_task(make_task())
    for path, zooms in ((task.scans[0].image, (1.0, 1.0, 4.0)), (task.scans[0].label, (1.1, 1.0, 4.0))):
        image = nibabel.Nifti1Image(
            np.asarray(nibabel.load(path).dataobj), np.eye(4)
        )  # as in ACDC: only pixdim states it
        image.header.set_zooms(zooms)
        image.to_filename(path)
    with pytest.raises(
        DataError, match=r"states voxels of 1.1 x 1 x 4 mm, its image .* 1 x 1 x 4; where the files of two scans"
    ):
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
    with pytest.raises(DataError, match=r"holds the value 7, but the task names 0 background, 1 bright, 2 brightest"):
        load_scan(task.scans[0], task, PREPARATION)


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


HUNDRED = tuple(f"p{number:03d}" for number in range(100))


def test_a_rule_parts_all_subjects_and_the_seed_decides_how(tmp_path: Path, task_of: Callable[..., Task]) -> None:
    people(tmp_path, *HUNDRED)
    drawn = [task_of(split_rule={"seed": seed, "validation": 10, "test": 0.2}).subjects for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    for subjects in drawn:
        assert sorted(subject for split in subjects.values() for subject in split) == list(HUNDRED)
        assert len(subjects["validation"]) == 10
        assert 10 < len(subjects["test"]) < 30
        assert all(list(split) == sorted(split) for split in subjects.values())
    exact = task_of(split_rule={"validation": 10, "test": 20}).subjects
    assert [len(exact[split]) for split in ("train", "validation", "test")] == [70, 10, 20]


def test_with_fractions_a_subject_that_joins_moves_nobody(tmp_path: Path, task_of: Callable[..., Task]) -> None:
    rule = {"seed": 3, "validation": 0.2, "test": 0.3}
    people(tmp_path, *HUNDRED[:60])
    before = task_of(split_rule=rule).subjects
    people(tmp_path, *HUNDRED[60:], "late")
    after = task_of(split_rule=rule).subjects
    assert all(set(before[split]) <= set(after[split]) for split in before)
    assert 10 < len(after["validation"]) < 30
    assert 20 < len(after["test"]) < 40


def test_with_numbers_a_subject_that_joins_moves_at_most_one_of_each_split(
    tmp_path: Path, task_of: Callable[..., Task]
) -> None:
    people(tmp_path, *HUNDRED[:40])
    before = task_of(split_rule={"validation": 8, "test": 10}).subjects
    for late in HUNDRED[40:50]:
        people(tmp_path, late)
        after = task_of(split_rule={"validation": 8, "test": 10}).subjects
        assert all(len(set(before[split]) - set(after[split])) <= 1 for split in ("validation", "test"))
        before = after


def test_a_stratified_rule_takes_every_split_from_all_strata(tmp_path: Path, task_of: Callable[..., Task]) -> None:
    people(tmp_path, *HUNDRED)
    strata = {"NOR": ["p[000-049]"], "DCM": ["p[050-079]"], "RV": ["p[080-099]"]}
    task = task_of(strata=strata, split_rule={"validation": 10, "test": 0.2, "stratified": True})
    counts = {split: Counter(task.strata[subject] for subject in task.subjects[split]) for split in task.subjects}
    assert counts == {
        "train": {"NOR": 35, "DCM": 21, "RV": 14},
        "validation": {"NOR": 5, "DCM": 3, "RV": 2},
        "test": {"NOR": 10, "DCM": 6, "RV": 4},
    }


def test_who_is_left_out_of_a_rule_is_in_no_split(tmp_path: Path, task_of: Callable[..., Task]) -> None:
    people(tmp_path, *HUNDRED[:10])
    (tmp_path / "labels/p003.nii.gz").unlink()
    rule = {"validation": 2, "test": 2, "leave_out": ["p[003-004]"]}
    found = task_of(split_rule=rule, strata={"a": ["p[000-004]"]})
    assert sorted(scan.subject for scan in found.scans) == [
        name for name in HUNDRED[:10] if name not in ("p003", "p004")
    ]
    assert found.strata == {"p000": "a", "p001": "a", "p002": "a"}
    with pytest.raises(DataError, match=r"split_rule\.leave_out names p077 without any scan"):
        task_of(split_rule={**rule, "leave_out": ["p077"]})
    with pytest.raises(DataError, match=r"p003\.nii\.gz .* has no label map"):
        task_of(split_rule={**rule, "leave_out": []})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"splits": {"train": ["p000"], "validation": ["p001"], "test": ["p002"]}},
            "exactly one of splits and split_rule",
        ),
        ({"split_rule": None}, "exactly one of splits and split_rule"),
        ({"split_rule": {"validation": 0.5, "test": 0.5}}, "leave some for training"),
        ({"split_rule": {"validation": 1.5, "test": 0.5}}, "a number of subjects, or a fraction"),
        ({"split_rule": {"validation": 0, "test": 0.5}}, "a number of subjects, or a fraction"),
        ({"split_rule": {"validation": 5, "test": 5}}, "leaves train without subjects, of 10"),
        ({"split_rule": {"validation": 5, "test": 20}}, "leaves train, validation without subjects, of 10"),
        ({"split_rule": {"validation": 0.001, "test": 0.2}}, "leaves validation without subjects"),
        ({"split_rule": {"validation": 2, "test": 2, "stratified": True}}, "stratified needs strata"),
        ({"split_rule": {"validation": 2, "test": 2, "leave_out": ["p[9-1]"]}}, "split_rule.leave_out: subjects"),
        ({"split_rule": {"validation": 2, "test": 2, "stratify": True}}, "did you mean stratified"),
        ({"strata": {"a": ["p[000-005]"], "b": ["p005"]}}, "p005 is in the strata a and b"),
        ({"strata": {"a": ["p[5-1]"]}}, "strata.a: subjects"),
        ({"label_name": "gt"}, "label_name"),
        ({"image_name": "{key}/{key}"}, "image_name"),
    ],
)
def test_a_broken_rule_is_refused(
    tmp_path: Path, task_of: Callable[..., Task], changes: dict[str, Any], message: str
) -> None:
    people(tmp_path, *HUNDRED[:10])
    with pytest.raises(DataError) as refusal:
        task_of(**{"split_rule": {"validation": 2, "test": 2}, **changes})
    assert message in str(refusal.value)


def test_a_stratified_rule_names_who_has_no_stratum(tmp_path: Path, task_of: Callable[..., Task]) -> None:
    people(tmp_path, *HUNDRED[:10])
    rule = {"validation": 2, "test": 2, "stratified": True}
    with pytest.raises(DataError, match=r"a stratum for every subject, p008, p009 have none"):
        task_of(split_rule=rule, strata={"a": ["p[000-003]"], "b": ["p[004-007]"]})


def test_a_tasks_digest_tells_what_decides_figures_and_nothing_else(make_task: MakeTask) -> None:
    digest = task_sha256(make_task())
    words = {
        "title": "Another",
        "caveat": "Read on.",
        "citation": "Me",
        "thirds": ["a", "b", "c"],
        "find_mix_ups": False,
    }
    assert task_sha256(make_task(**words)) == digest
    splits = {"train": ["sub-[01-02]"], "validation": ["sub-04"], "test": ["sub-03"]}
    for change in ({"splits": splits}, {"spacing_mm": 1.0}, {"classes": {1: "bright", 2: "brighter"}}):
        assert task_sha256(make_task(**change)) != digest


def test_a_tasks_digest_tells_that_a_rule_splits_others(tmp_path: Path, task_of: Callable[..., Task]) -> None:
    people(tmp_path, *HUNDRED[:10])
    digests = set()
    for seed in (0, 1):
        task_of(split_rule={"validation": 2, "test": 2, "seed": seed})
        digests.add(task_sha256(tmp_path / "toy.yaml"))
        assert task_sha256(tmp_path / "toy.yaml") in digests
    people(tmp_path, "late")
    assert len({*digests, task_sha256(tmp_path / "toy.yaml")}) == 3


def test_without_strata_nobody_has_one(make_task: MakeTask) -> None:
    assert load_task(make_task()).strata == {}
    strata = load_task(make_task(strata={"old": ["sub-[01-02]", "sub-99"], "young": ["sub-03"]})).strata
    assert strata == {"sub-01": "old", "sub-02": "old", "sub-03": "young"}


def test_label_maps_may_have_a_suffix_of_their_own_in_the_same_folder(
    tmp_path: Path, task_of: Callable[..., Task]
) -> None:
    for patient in ("p1", "p2", "p3"):
        (tmp_path / patient).mkdir()
        for name in ("frame01", "frame01_gt", "frame12", "frame12_gt"):
            (tmp_path / patient / f"{patient}_{name}.nii.gz").touch()
    task = task_of(images=".", labels=".", label_name="{key}_gt", split_rule={"validation": 1, "test": 1})
    assert [scan.key for scan in task.scans][:2] == ["p1_p1_frame01", "p1_p1_frame12"]
    assert len(task.scans) == 6
    assert all(scan.label.name == scan.image.name.replace(".nii", "_gt.nii") for scan in task.scans)
    (tmp_path / "p2/p2_frame12_gt.nii.gz").unlink()
    with pytest.raises(DataError, match=r"p2_frame12\.nii\.gz .* has no label map .*'\{key\}_gt'"):
        task_of(images=".", labels=".", label_name="{key}_gt", split_rule={"validation": 1, "test": 1})


def test_of_images_with_several_channels_one_is_taken(tmp_path: Path, task_of: Callable[..., Task]) -> None:
    for case in ("c1", "c2", "c3"):
        people(tmp_path, case)
        (tmp_path / f"images/{case}.nii.gz").rename(tmp_path / f"images/{case}_0000.nii.gz")
        (tmp_path / f"images/{case}_0001.nii.gz").touch()
    task = task_of(image_name="{key}_0000", split_rule={"validation": 1, "test": 1})
    assert [(scan.key, scan.image.name, scan.label.name) for scan in task.scans] == [
        (case, f"{case}_0000.nii.gz", f"{case}.nii.gz") for case in ("c1", "c2", "c3")
    ]


def test_a_patient_may_be_named_by_a_folder(tmp_path: Path, task_of: Callable[..., Task]) -> None:
    people(tmp_path, "P1/t1", "P1/t2", "P2/t1", "P3/t1")
    task = task_of(subject_pattern=r"^(P\d+)/", split_rule={"validation": 1, "test": 1})
    assert [(scan.key, scan.subject) for scan in task.scans] == [
        ("P1_t1", "P1"),
        ("P1_t2", "P1"),
        ("P2_t1", "P2"),
        ("P3_t1", "P3"),
    ]


def test_two_scans_of_one_name_are_refused(tmp_path: Path, task_of: Callable[..., Task]) -> None:
    people(tmp_path, "P1/a_b", "P1_a/b", "P2/a", "P3/a")
    with pytest.raises(DataError, match=r"a_b\.nii\.gz and .*b\.nii\.gz would have the same key P1_a_b"):
        task_of(subject_pattern=r"^(P\d)", split_rule={"validation": 1, "test": 1})


@pytest.mark.parametrize("dimensions", [2, 3])
def test_any_folder_of_images_and_labels_is_a_task(
    make_task: MakeTask, monkeypatch: pytest.MonkeyPatch, dimensions: int
) -> None:
    folder = make_task().parent
    monkeypatch.setenv("P2R_TASK", str(folder))
    monkeypatch.setenv("P2R_LICENCE", "CC0-1.0")
    monkeypatch.setenv("P2R_PROVENANCE", "Toys")
    values = yaml.safe_load((TASKS / "folder.yaml").read_text())
    values |= {"classes": {1: "a", 2: "b"}, "split_rule": {"validation": 1, "test": 1}}
    (folder / "folder.yaml").write_text(yaml.safe_dump(values))
    task = load_task(folder / "folder.yaml")
    assert sorted(subject for split in task.subjects.values() for subject in split) == [
        f"sub-{number:02d}_T1w" for number in range(1, 5)
    ]
    preparation = Preparation(dimensions=dimensions, spacing_mm=2.0, image_size=32)
    assert check_scans(task, preparation) == {scan.subject: {1, 2} for scan in task.scans}


def test_the_folder_task_loads_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    people(tmp_path, *HUNDRED)
    monkeypatch.setenv("P2R_TASK", str(tmp_path))
    monkeypatch.setenv("P2R_LICENCE", "CC0-1.0")
    monkeypatch.setenv("P2R_PROVENANCE", "Toys")
    task = load_task(TASKS / "folder.yaml")
    assert sum(map(len, task.subjects.values())) == 100
    assert all(task.subjects.values())


def test_the_example_of_the_readme_is_a_task() -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", (TASKS.parent / "README.md").read_text(), flags=re.DOTALL)
    assert TaskConfig.model_validate(yaml.safe_load(example)).classes == {1: "liver", 2: "tumour"}


def test_a_task_may_state_how_its_scans_are_read(make_task: MakeTask) -> None:
    stated = load_task(make_task(spacing_mm=1.0, slice_axis=0)).config.preparation(PREPARATION)
    assert (stated.spacing_mm, stated.slice_axis, stated.image_size) == (1.0, 0, PREPARATION.image_size)
    assert load_task(make_task()).config.preparation(PREPARATION) == PREPARATION


# Errors that would invalidate metrics, over all scans.


def replace_scan(task: Task, number: int, part: str, array: np.ndarray[Any, Any]) -> None:
    write_nifti(getattr(task.scans[number], part), array, np.diag([1.0, 1.0, 4.0, 1.0]))


def test_all_scans_are_read_and_tell_who_has_which_class(make_task: MakeTask) -> None:
    task = load_task(make_task())
    replace_scan(task, 1, "label", np.zeros((20, 24, 6), np.uint8))
    replace_scan(task, 2, "label", np.ones((20, 24, 6), np.uint8))
    assert check_scans(task, PREPARATION) == {"sub-01": {1, 2}, "sub-02": set(), "sub-03": {1}, "sub-04": {1, 2}}


@pytest.mark.parametrize(("other", "splits"), [(2, r"train.*validation"), (1, r"train.*train")])
def test_one_image_under_two_subjects_is_refused_with_both(make_task: MakeTask, other: int, splits: str) -> None:
    task = load_task(make_task())
    image = np.asanyarray(nibabel.load(task.scans[0].image).dataobj)
    replace_scan(task, other, "image", image.astype(np.int32))  # other bytes, the same voxels
    with pytest.raises(DataError, match=rf"sub-01 \(.*sub-0{other + 1} \(.* have the same voxels") as refusal:
        check_scans(task, PREPARATION)
    assert [word in str(refusal.value) for word in splits.split(".*")] == [True, True]


def test_one_subject_may_have_the_same_scan_twice(make_task: MakeTask) -> None:
    path = make_task()
    for part in ("images", "labels"):
        shutil.copy(path.parent / part / "sub-01_T1w.nii.gz", path.parent / part / "sub-01_T2w.nii.gz")
    assert check_scans(load_task(path), PREPARATION)["sub-01"] == {1, 2}


def test_a_label_map_that_was_copied_to_another_patient_is_refused(make_task: MakeTask) -> None:
    task = load_task(make_task())
    shutil.copy(task.scans[0].label, task.scans[3].label)
    with pytest.raises(DataError, match=r"labels/sub-01.*of subject sub-01 and .*labels/sub-04.* the same labels"):
        check_scans(task, PREPARATION)


def test_empty_label_maps_are_no_copies(make_task: MakeTask) -> None:
    task = load_task(make_task())
    for number in (0, 1):
        replace_scan(task, number, "label", np.zeros((20, 24, 6), np.uint8))
    assert check_scans(task, PREPARATION)["sub-02"] == frozenset()


@pytest.mark.parametrize(("number", "split"), [(2, "validation"), (3, "test")])
def test_patients_to_compare_with_must_have_a_class(make_task: MakeTask, number: int, split: str) -> None:
    task = load_task(make_task())
    replace_scan(task, number, "label", np.zeros((20, 24, 6), np.uint8))
    with pytest.raises(DataError, match=rf"all label maps of the {split} patients \(sub-0{number + 1}\) are empty"):
        check_scans(task, PREPARATION)


def test_what_the_network_does_not_see_of_a_class_is_not_there(make_task: MakeTask) -> None:
    task = load_task(make_task())
    label = np.ones((20, 24, 6), np.uint8)
    label[:2] = 2
    replace_scan(task, 0, "label", label)
    centre = partial(load_scan, size=8)  # 16 of 20 voxels along the first axis
    assert check_scans(task, PREPARATION)["sub-01"] == {1, 2}
    assert check_scans(task, PREPARATION, load=centre)["sub-01"] == {1}


def test_labels_where_the_image_is_empty_are_refused(make_task: MakeTask) -> None:
    task = load_task(make_task())
    image, label = np.zeros((20, 24, 6), np.int16), np.zeros((20, 24, 6), np.uint8)
    image[:10] = np.random.default_rng(0).integers(1, 900, size=(10, 24, 6))
    label[12:] = 1
    replace_scan(task, 0, "image", image)
    replace_scan(task, 0, "label", label)
    with pytest.raises(DataError, match=r"the labels of .*labels/sub-01.* are where its image .*sub-01.* is empty"):
        load_scan(task.scans[0], task, PREPARATION)
    label[9] = 1  # a tenth of it is on the body
    replace_scan(task, 0, "label", label)
    load_scan(task.scans[0], task, PREPARATION)


def test_a_class_that_no_labelled_patient_has_is_refused_by_name(make_task: MakeTask) -> None:
    task = load_task(make_task())
    labels = {"sub-01": {1}, "sub-02": {1, 2}}
    check_classes_present(labels, task, subjects=["sub-02"])
    check_classes_present(labels, task, subjects=["sub-01", "sub-02"])
    with pytest.raises(DataError, match=r"class 2 brightest is empty in all labelled patients \(sub-01\)"):
        check_classes_present(labels, task, subjects=["sub-01"])


def test_a_task_finds_the_scans_that_a_corpus_finds(make_task: MakeTask, tmp_path: Path) -> None:
    path = make_task()
    expected = load_task(path)
    images, labels = tmp_path / "images", tmp_path / "labels"
    for folder in (images, labels):
        for hidden in (".snapshot/hourly.0", ".ipynb_checkpoints", ".git/annex/objects", "@eaDir"):
            shutil.copytree(folder, folder / hidden, ignore=shutil.ignore_patterns(".*", "@*"))
    (images / "sub-01_T1w.nii.gz").rename(images / "sub-01_T1w.NII.GZ")
    nibabel.save(nibabel.load(images / "sub-02_T1w.nii.gz"), tmp_path / "pair.img")
    (images / "sub-02_T1w.nii.gz").unlink()
    for suffix in (".hdr", ".img"):
        (tmp_path / f"pair{suffix}").rename(images / f"sub-02_T1w{suffix}")
    (tmp_path / "store").mkdir()
    for folder in (images, labels):
        (folder / "sub-03_T1w.nii.gz").rename(tmp_path / "store" / f"{folder.name}_sub-03.nii.gz")
        (folder / "sub-03_T1w.nii.gz").symlink_to(tmp_path / "store" / f"{folder.name}_sub-03.nii.gz")
    found = load_task(path)
    assert [scan.key for scan in found.scans] == [scan.key for scan in expected.scans]
    assert [scan.image.suffix for scan in found.scans] == [".GZ", ".hdr", ".gz", ".gz"]
    assert found.subjects == expected.subjects
    assert [load_scan(scan, found, PREPARATION).volume.data.shape for scan in found.scans] == [(20, 24, 6, 1)] * 4


def test_a_name_in_both_of_unicodes_forms_is_one_patient(make_task: MakeTask, tmp_path: Path) -> None:
    one, two = (unicodedata.normalize(form, "Müller") for form in ("NFC", "NFD"))
    path = make_task(splits={"train": ["sub-01", two], "validation": ["sub-03"], "test": ["sub-04"]})
    (tmp_path / "images/sub-02_T1w.nii.gz").rename(tmp_path / f"images/{two}_T1w.nii.gz")
    (tmp_path / "labels/sub-02_T1w.nii.gz").rename(tmp_path / f"labels/{one}_T1w.nii.gz")
    assert load_task(path).subjects["train"] == tuple(sorted((one, "sub-01")))
