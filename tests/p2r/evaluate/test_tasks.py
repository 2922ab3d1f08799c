"""Tasks that load, and tasks that are refused with a helpful message."""

import re
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import yaml

from p2r.data.preprocess import Preparation
from p2r.data.volume import write_nifti
from p2r.errors import DataError
from p2r.evaluate.tasks import Task, TaskConfig, check_scans, load_scan, load_task, task_sha256
from tests.p2r.evaluate.conftest import MakeTask, people

TASKS = Path(__file__).parents[3] / "jobs" / "tasks"


PREPARATION = Preparation(spacing_mm=2.0, image_size=32)


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


HUNDRED = tuple(f"p{number:03d}" for number in range(100))


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


def test_classes_in_any_order_are_read_in_the_order_of_their_labels(make_task: MakeTask) -> None:
    digest = task_sha256(make_task())
    path = make_task()
    text = path.read_text()
    path.write_text(text.replace("  1: bright\n  2: brightest\n", "  2: brightest\n  1: bright\n"))
    assert path.read_text() != text
    assert list(load_task(path).config.classes.items()) == [(1, "bright"), (2, "brightest")]
    assert task_sha256(path) == digest


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
