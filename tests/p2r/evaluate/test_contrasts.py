"""Tasks of several contrasts: their files, one grid for each case, missing contrasts, and refusals by name."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
import yaml

import p2r
from p2r.data.contrasts import on_one_grid
from p2r.data.preprocess import Preparation, frames_of, planes_of
from p2r.data.volume import read_volume, write_nifti
from p2r.errors import DataError, RefusedScan
from p2r.evaluate.prepared import prepared_images, prepared_scan
from p2r.evaluate.tasks import Task, check_scans, load_scan, load_task, task_sha256
from tests.publishing import publish_toy
from tests.toy import CONTRASTS, write_toy_sessions

NAMES = tuple(CONTRASTS)
PREPARATION = Preparation(spacing_mm=2.0, image_size=32, contrasts=NAMES)


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Toy sessions in which sub-02 lacks t1 and sub-08 has only FLAIR."""
    missing = {"sub-02": ["t1"], "sub-08": ["t1", "t1ce"]}
    return write_toy_sessions(tmp_path_factory.mktemp("sessions"), missing=missing)


@pytest.fixture
def copy(sessions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("P2R_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(sessions, tmp_path / "copy"))


def retask(folder: Path, **changes: Any) -> Path:
    """Replace keys of the task's YAML; None removes one."""
    path = folder / "task.yaml"
    values = {**yaml.safe_load(path.read_text()), **changes}
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}, sort_keys=False))
    return path


def file_of(folder: Path, subject: str, contrast: str) -> Path:
    return folder / subject / "anat" / f"{CONTRASTS[contrast].format(key=subject)}.nii.gz"


def rewrite(path: Path, change: Callable[[Any], Any], affine: np.ndarray[Any, Any] | None = None) -> None:
    image = nibabel.load(path)
    write_nifti(path, change(np.asarray(image.dataobj)), image.affine if affine is None else affine)


def test_the_files_of_a_case_are_found_by_contrast_and_missing_ones_are_missing(sessions: Path) -> None:
    task = load_task(sessions / "task.yaml")
    assert task.config.contrasts == NAMES
    found = {scan.subject: tuple(scan.contrasts) for scan in task.scans}
    assert found == {f"sub-{number:02d}": NAMES for number in range(1, 9)} | {
        "sub-02": ("flair", "t1ce"),
        "sub-08": ("flair",),
    }
    first = task.scans[0]
    assert first.contrasts == {name: file_of(sessions, "sub-01", name) for name in NAMES}
    assert first.image == first.contrasts["flair"] and first.label == sessions / "labels/sub-01.nii.gz"


def test_another_contrast_or_repeat_beside_a_case_is_no_unlabelled_case(copy: Path) -> None:
    (copy / "labels/sub-03.nii.gz").unlink()
    for name in ("sub-01_ce-OTHER", "sub-03_run-2"):
        subject = name.partition("_")[0]
        shutil.copy(file_of(copy, subject, "t1"), file_of(copy, subject, "t1").with_name(f"{name}_T1w.nii.gz"))
    rule = {"seed": 0, "validation": 1, "test": 2}
    task = load_task(retask(copy, unlabelled="use", splits=None, split_rule=rule))
    assert [(scan.subject, scan.image.name) for scan in task.unlabelled] == [("sub-03", "sub-03_FLAIR.nii.gz")]


def test_the_channels_of_nnunet_and_folders_by_contrast_are_the_same_task(sessions: Path, tmp_path: Path) -> None:
    for subject in (f"sub-{number:02d}" for number in range(1, 9)):
        for channel, contrast in enumerate(NAMES):
            if file_of(sessions, subject, contrast).exists():
                for target in (f"imagesTr/{subject}_{channel:04d}.nii.gz", f"{contrast}/{subject}.nii.gz"):
                    (tmp_path / target).parent.mkdir(exist_ok=True)
                    shutil.copy(file_of(sessions, subject, contrast), tmp_path / target)
    shutil.copytree(sessions / "labels", tmp_path / "labels")
    shutil.copy(sessions / "task.yaml", tmp_path / "task.yaml")
    channels = {contrast: f"{{key}}_{channel:04d}" for channel, contrast in enumerate(NAMES)}
    expected = [(scan.subject, tuple(scan.contrasts)) for scan in load_task(sessions / "task.yaml").scans]
    for changes in (
        {"images": "imagesTr", "image_name": channels},
        {"images": {contrast: contrast for contrast in NAMES}, "image_name": None},
    ):
        task = load_task(retask(tmp_path, **changes))
        assert [(scan.subject, tuple(scan.contrasts)) for scan in task.scans] == expected
        assert [scan.key for scan in task.scans] == [f"sub-{number:02d}" for number in range(1, 9)]


def stack(folder: Path, to: Path) -> Path:
    """Write the task with one image of all contrasts along its fourth axis for each subject that has them all."""
    for subject in ("sub-01", *(f"sub-{number:02d}" for number in range(3, 8))):
        images = [nibabel.load(file_of(folder, subject, name)) for name in NAMES]
        (to / "images").mkdir(exist_ok=True, parents=True)
        write_nifti(
            to / f"images/{subject}.nii.gz",
            np.stack([np.asarray(image.dataobj) for image in images], axis=-1),
            images[0].affine,
        )
    shutil.copytree(folder / "labels", to / "labels")
    shutil.copy(folder / "task.yaml", to / "task.yaml")
    rule = {"seed": 0, "validation": 1, "test": 2}
    return retask(to, images="images", image_name=None, fourth_axis=list(NAMES), splits=None, split_rule=rule)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_contrasts_along_the_fourth_axis_are_those_of_files_of_their_own(
    copy: Path, tmp_path: Path, dimensions: int
) -> None:
    stacked, separate = load_task(stack(copy, tmp_path / "stacked")), load_task(copy / "task.yaml")
    preparation = PREPARATION.model_copy(update={"dimensions": dimensions})
    assert stacked.config.contrasts == NAMES and len(stacked.scans) == 6
    assert check_scans(stacked, preparation).keys() == {scan.subject for scan in stacked.scans}
    alone = {scan.subject: load_scan(scan, separate, preparation) for scan in separate.scans}
    for scan in stacked.scans:
        assert scan.contrasts == dict.fromkeys(NAMES, scan.image) and scan.files == (scan.image, scan.label)
        for loaded in (load_scan(scan, stacked, preparation), *(prepared_scan(scan, stacked, preparation),) * 2):
            assert torch.equal(loaded.planes.images, alone[scan.subject].planes.images)
            assert tuple(loaded.contrasts) == NAMES
        images = prepared_images(scan, stacked, preparation)
        assert torch.equal(images.images, prepared_images_of(separate, scan.subject, preparation))
    fewer = preparation.model_copy(update={"contrasts": NAMES[1:]})
    first = stacked.scans[0]
    assert torch.equal(load_scan(first, stacked, fewer).planes.images, alone[first.subject].planes.images[:, 1:])


def prepared_images_of(task: Task, subject: str, preparation: Preparation) -> torch.Tensor:
    """Return the images of a subject, read without its label map."""
    (scan,) = [scan for scan in task.scans if scan.subject == subject]
    return prepared_images(scan, task, preparation).images


def test_the_order_along_the_fourth_axis_is_part_of_a_task(copy: Path, tmp_path: Path) -> None:
    path = stack(copy, tmp_path / "stacked")
    digest = task_sha256(path)
    other = [NAMES[1], NAMES[0], *NAMES[2:]]
    assert task_sha256(retask(tmp_path / "stacked", fourth_axis=other)) != digest
    task = load_task(path)
    scan = task.scans[0]
    assert task.config.contrasts == tuple(other)
    loaded = prepared_scan(scan, task, PREPARATION)
    np.testing.assert_array_equal(loaded.contrasts[NAMES[1]].data[..., 0], read_volume(scan.image).data[..., 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fourth_axis": ["flair"]}, "fourth_axis: .* at least 2 items"),
        ({"fourth_axis": ["flair", "t1", "flair"]}, "must be different names, got flair more than once"),
        ({"image_name": {"flair": "{key}_FLAIR", "t1": "{key}_T1w"}}, "fourth_axis names the contrasts in each file"),
        ({"fourth_axis": ["flair", "t1"]}, "sub-01 has 3 images along its fourth axis, .* name as many as it has"),
        ({"fourth_axis": ["flair", "t1", "t1ce", "t2"]}, "sub-01 has 3 images along its fourth axis"),
    ],
)
def test_a_fourth_axis_that_does_not_fit_its_names_is_refused(
    copy: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    stack(copy, tmp_path / "stacked")
    path = retask(tmp_path / "stacked", **changes)
    with pytest.raises((DataError, RefusedScan), match=message):
        check_scans(load_task(path), PREPARATION)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_an_image_has_the_channels_of_its_contrasts_and_zeros_for_missing_ones(copy: Path, dimensions: int) -> None:
    task = load_task(copy / "task.yaml")
    preparation = PREPARATION.model_copy(update={"dimensions": dimensions})
    single = preparation.model_copy(update={"contrasts": None})
    make = planes_of if dimensions == 2 else frames_of
    for scan in task.scans[:2]:
        loaded = load_scan(scan, task, preparation)
        for channel, name in enumerate(NAMES):
            images = loaded.planes.images[:, channel]
            if name in scan.contrasts:
                alone = make(read_volume(scan.contrasts[name]), preparation=single, size=None)
                assert torch.equal(images, alone.images[:, 0])
            else:
                assert (scan.subject, name) == ("sub-02", "t1") and not images.any()
        for _ in range(2):
            kept = prepared_scan(scan, task, preparation)
            assert torch.equal(kept.planes.images, loaded.planes.images)
            assert kept.contrasts.keys() == loaded.contrasts.keys()
            assert np.array_equal(kept.volume.data, loaded.volume.data)


def test_a_case_without_its_label_map_has_the_same_images(copy: Path) -> None:
    task = load_task(copy / "task.yaml")
    truth = load_scan(task.scans[1], task, PREPARATION).planes
    task.scans[1].label.write_bytes(b"no label map")
    assert torch.equal(prepared_images(task.scans[1], task, PREPARATION).images, truth.images)


def test_a_contrast_on_another_grid_is_resampled_to_that_of_the_label_map(copy: Path) -> None:
    task = load_task(copy / "task.yaml")
    before = load_scan(task.scans[0], task, PREPARATION).planes.images
    path = file_of(copy, "sub-01", "flair")
    coarse = np.diag([-4.0, -4.0, 8.0, 1.0])
    coarse[:2, 3] = -1.0  # the same corners
    rewrite(path, lambda data: data.reshape(18, 2, 20, 2, 3).mean((1, 3)).astype(np.int16), affine=coarse)
    after = load_scan(task.scans[0], task, PREPARATION)
    assert after.volume.key == "sub-01_T1w", "the reference is the first contrast on the grid of the label map"
    assert torch.equal(after.planes.images[:, 1:], before[:, 1:])
    assert 0.01 < (after.planes.images[:, 0] - before[:, 0]).abs().mean() < 0.15


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a contrast that is a copy of another": (
        lambda folder: shutil.copy(file_of(folder, "sub-01", "t1"), file_of(folder, "sub-01", "flair")),
        "sub-01_FLAIR and sub-01_T1w are one image, given as flair and as t1",
    ),
    "a contrast that is another in other units": (
        lambda folder: (
            rewrite(file_of(folder, "sub-01", "flair"), lambda data: data)
            or write_nifti(
                file_of(folder, "sub-01", "t1"),
                np.asarray(nibabel.load(file_of(folder, "sub-01", "flair")).dataobj) * 3 + 7,
                np.diag([-2.0, -2.0, 8.0, 1.0]),
            )
        ),
        "sub-01_FLAIR and sub-01_T1w are one image",
    ),
    "a contrast that is another at another position": (
        lambda folder: write_nifti(
            file_of(folder, "sub-01", "t1"),
            np.asarray(nibabel.load(file_of(folder, "sub-01", "flair")).dataobj),
            np.array([[-2.0, 0, 0, 2], [0, -2, 0, 0], [0, 0, 8, 0], [0, 0, 0, 1]]),
        ),
        "sub-01_FLAIR and sub-01_T1w are one image",
    ),
    "a contrast of another place": (
        lambda folder: rewrite(
            file_of(folder, "sub-01", "t1"),
            lambda data: data,
            affine=np.array([[-2.0, 0, 0, 60], [0, -2, 0, 0], [0, 0, 8, 0], [0, 0, 0, 1]]),
        ),
        r"sub-01_T1w covers \d+% of the voxels of flair by the headers' positions, min_coverage is 90%",
    ),
    "a fourth axis of contrasts": (
        lambda folder: [
            rewrite(path, lambda data: np.stack([data] * 4, -1)) for path in (folder / "sub-01/anat").iterdir()
        ],
        r"the grids differ: .*; if the fourth axis holds contrasts, name them in the task, as in fourth_axis: \[flair, t1\]",
    ),
    "a vector image": (
        lambda folder: nibabel.Nifti1Image(np.ones((36, 40, 3, 1, 3), np.float32), np.eye(4)).to_filename(
            file_of(folder, "sub-01", "t1")
        ),
        r"sub-01_T1w.nii.gz has 5 axes \[36, 40, 3, 1, 3\]",
    ),
    "a colour image": (
        lambda folder: nibabel.Nifti1Image(
            np.zeros((36, 40, 3), [("R", "u1"), ("G", "u1"), ("B", "u1")]), np.eye(4)
        ).to_filename(file_of(folder, "sub-01", "t1")),
        r"sub-01_T1w.nii.gz holds voxels of type RGB",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_contrasts_that_do_not_fit_together_are_refused_by_name(copy: Path, case: str) -> None:
    spoil, message = CASES[case]
    spoil(copy)
    task = load_task(copy / "task.yaml")
    with pytest.raises(DataError, match=message):
        load_scan(task.scans[0], task, PREPARATION)


def test_a_fourth_axis_of_contrasts_is_named_in_a_task_of_one_contrast(copy: Path) -> None:
    task = load_task(retask(copy, image_name="{key}_FLAIR"))
    rewrite(file_of(copy, "sub-01", "flair"), lambda data: np.stack([data, data], -1))
    with pytest.raises(
        DataError, match=r"the grids differ: .*; if the fourth axis holds contrasts, name them in the task"
    ):
        load_scan(task.scans[0], task, PREPARATION.model_copy(update={"contrasts": None}))


def test_a_case_with_none_of_the_contrasts_read_is_refused_by_name(copy: Path) -> None:
    task = load_task(copy / "task.yaml")
    with pytest.raises(DataError, match=r"case sub-08_anat_sub-08 has none of the contrasts t1, only flair"):
        load_scan(task.scans[-1], task, PREPARATION.model_copy(update={"contrasts": ("t1",)}))


def test_a_contrast_of_one_patient_under_another_name_is_refused(copy: Path) -> None:
    shutil.copy(file_of(copy, "sub-07", "t1ce"), file_of(copy, "sub-01", "t1"))
    with pytest.raises(DataError, match=r"sub-01_T1w.nii.gz of subject sub-01 .* have the same voxels: one patient"):
        check_scans(load_task(copy / "task.yaml"), PREPARATION)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_name": {"flair": "{key}_FLAIR", "t2": "{key}_FLAIR"}}, "flair and t2 would be the same files"),
        ({"image_name": {"FLAIR": "{key}_FLAIR"}}, "pattern"),
        (
            {"image_name": {"flair": "{key}_FLAIR", "t1": "{key}_t1w"}},
            r"no case has the contrast t1: no scan in \. is called '\{key\}_t1w', in upper and lower case as written",
        ),
        ({"images": {"flair": ".", "t1": "x"}}, "must name the same contrasts, got flair, t1 and flair, t1, t1ce"),
    ],
)
def test_names_that_cannot_be_contrasts_are_refused(copy: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_task(retask(copy, **changes))


def test_the_contrasts_are_part_of_a_tasks_digest(copy: Path) -> None:
    before = task_sha256(copy / "task.yaml")
    assert task_sha256(retask(copy, image_name={"flair": "{key}_FLAIR"})) != before


def test_a_backbone_prepares_scans_by_contrast_and_names_those_it_never_saw(sessions: Path, tmp_path: Path) -> None:
    backbone = p2r.load_backbone(publish_toy(str(tmp_path / "toy"), contrasts=NAMES)["url"])
    assert backbone.preparation.contrasts == NAMES
    t1, flair = (file_of(sessions, "sub-01", name) for name in ("t1", "flair"))
    images = backbone.prepare({"t1": t1, "flair": str(flair)}).images
    assert images.shape == (3, 3, 32, 32) and not images[:, 2].any()
    assert torch.equal(images, backbone.prepare({"flair": read_volume(flair), "t1": t1}).images)
    assert backbone.features({"flair": flair}).shape == (3, 2, 32, 32)
    for scan, message in (
        ({"t2": t1}, "the network never saw the contrast t2, it reads flair, t1, t1ce"),
        (t1, "sub-01_T1w is one scan without the name of its contrast, the network reads flair, t1, t1ce: name it"),
        (
            {"flair": flair, "t1": flair},
            "sub-01_FLAIR has 1 image along its fourth axis, which 2 contrasts are to share",
        ),
    ):
        with pytest.raises(RefusedScan, match=re.escape(message)):
            backbone.prepare(scan)


def test_a_network_of_one_contrast_without_a_name_takes_no_names(sessions: Path, tmp_path: Path) -> None:
    backbone = p2r.load_backbone(publish_toy(str(tmp_path / "toy"))["url"])
    with pytest.raises(RefusedScan, match="reads one contrast without a name, not flair: give one scan without a name"):
        backbone.prepare({"flair": file_of(sessions, "sub-01", "flair")})


def test_volumes_on_one_grid_stay_as_they_are(sessions: Path) -> None:
    volumes = {name: read_volume(file_of(sessions, "sub-01", name)) for name in NAMES}
    joined = on_one_grid(volumes)
    assert all(joined[name].data is volumes[name].data for name in NAMES)
