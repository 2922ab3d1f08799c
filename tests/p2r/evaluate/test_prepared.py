"""The cache of prepared scans returns exactly the scans that would be prepared again, and never stale ones."""

import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from p2r.data.preprocess import Preparation
from p2r.errors import DataError, StorageError
from p2r.evaluate.prepared import cached, prepared_images, prepared_scan
from p2r.evaluate.tasks import LabelledScan, Task, load_scan, load_task
from p2r.fewshot.checks import _files_sha256

PREPARATION = Preparation(spacing_mm=1.5, image_size=32)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("P2R_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/prepared"


@pytest.fixture
def task(toy_data: Path, tmp_path: Path) -> Task:
    return load_task(Path(shutil.copytree(toy_data, tmp_path / "data")) / "task.yaml")


def assert_same(ours: LabelledScan, theirs: LabelledScan) -> None:
    for one, other in ((ours.volume, theirs.volume), (ours.labels, theirs.labels), (ours.planes, theirs.planes)):
        assert type(one) is type(other)
        for name, value in vars(other).items():
            found = getattr(one, name)
            if isinstance(value, np.ndarray):
                assert found.dtype == value.dtype and np.array_equal(found, value), name
            elif isinstance(value, torch.Tensor):
                assert found.dtype == value.dtype and torch.equal(found, value), name
            else:
                assert type(found) is type(value) and found == value, name
    assert ours.label_planes.dtype == torch.int64 and torch.equal(ours.label_planes, theirs.label_planes)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("size", [None, 32])
def test_a_kept_scan_is_the_scan_that_was_made(folder: Path, task: Task, dimensions: int, size: int | None) -> None:
    preparation = PREPARATION.model_copy(update={"dimensions": dimensions})
    scan = task.scans[0]
    truth = load_scan(scan, task, preparation, size=size)
    assert_same(prepared_scan(scan, task, preparation, size=size), truth)
    (file,) = folder.iterdir()
    made = file.stat().st_ino
    assert_same(prepared_scan(scan, task, preparation, size=size), truth)
    assert [path.stat().st_ino for path in folder.iterdir()] == [made]


def test_other_labels_or_another_preparation_are_prepared_again(folder: Path, task: Task) -> None:
    scan = task.scans[0]
    before = prepared_scan(scan, task, PREPARATION)
    image = nibabel.load(scan.label)
    nibabel.Nifti1Image(np.roll(np.asarray(image.dataobj), 2, axis=0), image.affine).to_filename(scan.label)
    assert not torch.equal(prepared_scan(scan, task, PREPARATION).label_planes, before.label_planes)
    coarser = prepared_scan(scan, task, PREPARATION.model_copy(update={"spacing_mm": 3.0}))
    assert coarser.planes.images.shape != before.planes.images.shape
    assert len(list(folder.iterdir())) == 3


def test_scans_in_two_files_are_told_apart_by_their_voxels(folder: Path, task: Task, tmp_path: Path) -> None:
    first, second = task.scans[:2]
    headers, affine = [], nibabel.load(first.image).affine
    for scan in (first, second):
        for path in (scan.image, scan.label):
            image = nibabel.load(path)
            pair = nibabel.Nifti1Pair(np.asarray(image.dataobj), affine)
            path.unlink()
            pair.to_filename(path.with_name(path.name.replace(".nii.gz", ".hdr")))
        headers.append(scan.image.with_name(scan.image.name.replace(".nii.gz", ".hdr")).read_bytes())
    assert headers[0] == headers[1]
    pairs = load_task(tmp_path / "data/task.yaml")
    first, second = pairs.scans[:2]
    assert {path.suffix for path in first.files} == {".hdr", ".img"} and len(first.files) == 4
    images = [prepared_images(scan, pairs, PREPARATION).images for scan in (first, second)]
    assert not torch.equal(*images)
    before, data = prepared_scan(first, pairs, PREPARATION), _files_sha256([first])
    voxels = first.label.with_suffix(".img")
    content = voxels.read_bytes()
    voxels.write_bytes(content[len(content) // 2 :] + content[: len(content) // 2])
    assert not torch.equal(prepared_scan(first, pairs, PREPARATION).label_planes, before.label_planes)
    assert _files_sha256([first]) != data, "other labels are another recipe"


def test_images_of_unlabelled_patients_are_those_of_labelled_ones_and_need_no_label(folder: Path, task: Task) -> None:
    scan = task.scans[0]
    truth = load_scan(scan, task, PREPARATION).planes
    scan.label.unlink()
    for _ in range(2):
        found = prepared_images(scan, task, PREPARATION)
        assert torch.equal(found.images, truth.images) and torch.equal(found.inside, truth.inside)


def test_a_scan_that_is_refused_is_refused_every_time(folder: Path, task: Task) -> None:
    scan = task.scans[0]
    image = nibabel.load(scan.label)
    nibabel.Nifti1Image(np.asarray(image.dataobj) * 5, image.affine).to_filename(scan.label)
    for _ in range(2):
        with pytest.raises(DataError, match="holds the value 5"):
            prepared_scan(scan, task, PREPARATION)
    assert not folder.exists()


def test_a_file_that_was_cut_is_made_again(folder: Path, task: Task) -> None:
    scan = task.scans[0]
    prepared_scan(scan, task, PREPARATION)
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    assert_same(prepared_scan(scan, task, PREPARATION), load_scan(scan, task, PREPARATION))


@pytest.mark.parametrize(
    "facts", ["", "{}", "[]", "7", '{"volume": 1, "labels": [], "planes": {}}', "[" * 100_000, '{"a": NaN}', None]
)
def test_a_file_with_other_facts_is_made_again(folder: Path, task: Task, facts: str | None) -> None:
    scan = task.scans[0]
    prepared_scan(scan, task, PREPARATION)
    (file,) = folder.iterdir()
    save_file(load_file(file), file, metadata=None if facts is None else {"facts": facts})
    assert_same(prepared_scan(scan, task, PREPARATION), load_scan(scan, task, PREPARATION))
    sound = file.read_bytes()
    prepared_scan(scan, task, PREPARATION)
    assert file.read_bytes() == sound


def test_the_folder_stays_below_its_bound_and_the_longest_unused_goes_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("P2R_PREPARED_GIB", str(100_000 / 2**30))
    made: list[int] = []

    def ask(number: int) -> None:
        def make() -> tuple[dict[str, np.ndarray], dict[str, int]]:
            made.append(number)
            return {"x": np.full(40_000, number, np.uint8)}, {"number": number}

        arrays, facts = cached("test", {"number": number}, make, use=lambda arrays, facts: (arrays, facts))
        assert facts == {"number": number} and set(arrays["x"]) == {number}

    for number in (1, 2, 1, 3, 1, 2):  # 3 evicts 2, the least recently used
        ask(number)
        assert sum(path.stat().st_size for path in folder.iterdir()) <= 100_000
    assert made == [1, 2, 3, 2]
    monkeypatch.setenv("P2R_PREPARED_GIB", "0")
    ask(4)
    ask(4)
    assert made[-2:] == [4, 4]
    monkeypatch.setenv("P2R_PREPARED_GIB", "much")
    with pytest.raises(StorageError, match="P2R_PREPARED_GIB must be a number of at least 0"):
        ask(5)


def test_a_folder_that_cannot_be_written_costs_time_and_no_trial(
    folder: Path, task: Task, caplog: pytest.LogCaptureFixture
) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_text("a file in the way")
    assert_same(prepared_scan(task.scans[0], task, PREPARATION), load_scan(task.scans[0], task, PREPARATION))
    assert "cannot cache prepared scans" in caplog.text
