"""Commands as people expect them: on folders, with volumes as a table, with a version and short help."""

import csv
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel
import numpy as np
import pytest

from cluster.outputs import RECORD
from cluster.session import session
from cluster.starting import started_session
from p2r.errors import TrainingError
from tests.dicom_cases import Series

P2R = Callable[..., tuple[int, str]]


@pytest.fixture
def folder(toy_data: Path, tmp_path: Path) -> Path:
    """Two scans, one in a folder of its own, one broken file and a label map."""
    root = tmp_path / "scans"
    (root / "later").mkdir(parents=True)
    shutil.copy(toy_data / "images/sub-07_T1w.nii.gz", root)
    shutil.copy(toy_data / "images/sub-08_T1w.nii.gz", root / "later")
    shutil.copy(toy_data / "labels/sub-07_T1w.nii.gz", root / "sub-07_seg.nii.gz")
    (root / "broken.nii.gz").write_bytes(b"no scan")
    return root


def test_predict_segments_a_folder_with_progress_and_a_table_of_volumes(
    p2r: P2R, published: dict[str, str], folder: Path, tmp_path: Path
) -> None:
    code, said = p2r("predict", published["model"], folder, "-o", tmp_path / "out")
    assert code == 0, said
    assert "1/3 | " in said and "3/3 | " in said and "[not_nifti]" in said and "sub-07_seg" not in said
    made = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*"))
    assert made == [RECORD, "later/sub-08_T1w.nii.gz", "sub-07_T1w.nii.gz", "volumes.csv"]
    with (tmp_path / "out/volumes.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    labels = np.asarray(nibabel.load(tmp_path / "out/sub-07_T1w.nii.gz").dataobj)
    (row,) = [row for row in rows if row["scan"].endswith("sub-07_T1w.nii.gz")]
    assert float(row["DISC_ml"]) == pytest.approx((labels == 1).sum() * 2 * 2 * 8 / 1000, rel=1e-3)
    code, said = p2r("predict", published["model"], folder, "-o", tmp_path / "out.nii.gz")
    assert code == 2 and "several scans go into a folder" in said


def test_probabilities_of_an_ensemble_are_written_beside_its_segmentation(
    p2r: P2R, published: dict[str, str], toy_data: Path, tmp_path: Path
) -> None:
    voxels = np.asarray(nibabel.load(toy_data / "images/sub-07_T1w.nii.gz").dataobj)
    affine = np.diag([-2.0, 2.0, 8.0, 1.0])
    nibabel.Nifti1Image(np.stack([voxels, voxels[::-1]], -1), affine).to_filename(tmp_path / "cine.nii.gz")
    members = (published["model"], f"{published['storage']}/models/disc/all")
    of_members = []
    for number, model in enumerate(members):
        code, said = p2r(
            "predict", model, tmp_path / "cine.nii.gz", "-o", tmp_path / f"{number}.nii", "--probabilities"
        )
        assert code == 0, said
        assert f"{tmp_path}/{number}_probabilities.nii: background, DISC" in said
        of_members.append(nibabel.load(tmp_path / f"{number}_probabilities.nii").get_fdata())
    code, said = p2r(
        *("predict", members[0], tmp_path / "cine.nii.gz", "-o", tmp_path / "both.nii.gz"),
        *("--ensemble", members[1], "--probabilities"),
    )
    assert code == 0, said
    image, labels = (nibabel.load(tmp_path / f"both{name}.nii.gz") for name in ("_probabilities", ""))
    assert np.allclose(image.affine, affine) and image.shape == (36, 40, 3, 4), "two classes of two frames"
    found = image.get_fdata()
    assert np.allclose(found, np.mean(of_members, axis=0), atol=1e-5) and not np.allclose(
        of_members[0], of_members[1], atol=1e-3
    )
    of_frames = found.reshape(36, 40, 3, 2, 2)
    assert np.allclose(of_frames.sum(-1), 1, atol=1e-6) and found.min() >= 0
    assert np.array_equal(of_frames.argmax(-1), np.asarray(labels.dataobj))


def test_embed_on_the_scan_s_own_grid(p2r: P2R, published: dict[str, str], toy_data: Path, tmp_path: Path) -> None:
    scan = toy_data / "images/sub-07_T1w.nii.gz"
    code, said = p2r("embed", published["backbone"], scan, "-o", tmp_path / "features.nii.gz", "--native")
    assert code == 0, said
    features, image = nibabel.load(tmp_path / "features.nii.gz"), nibabel.load(scan)
    assert features.shape == (*image.shape, 4) and np.array_equal(features.affine, image.affine)
    # The toy scans have the backbone's pixel size: features on both grids are the same ones.
    p2r("embed", published["backbone"], scan, "-o", tmp_path / "other.nii.gz")
    other = nibabel.load(tmp_path / "other.nii.gz")
    ours = nibabel.as_closest_canonical(features).get_fdata()
    assert np.allclose(ours, other.get_fdata(), atol=1e-4)


def test_inspect_shows_backbones_and_models_as_tables(p2r: P2R, published: dict[str, str]) -> None:
    code, said = p2r("inspect", published["backbone"])
    for words in ("CC0-1.0", "@sha256:", "basic_unet", "2D, 32 pixels of 2.0 mm", "Pretrained on"):
        assert code == 0 and words in said, said
    code, said = p2r("inspect", f"{published['storage']}/models/disc/all")
    for words in ("fine-tuned", "labelled patients", "validation Dice"):
        assert code == 0 and words in said, said


def test_version_and_short_help_import_nothing_that_is_slow() -> None:
    for argument, words in (("--version", "p2r 0."), ("-h", "validate")):
        code = f"import sys; sys.argv = ['p2r', '{argument}']; from cluster import cli; assert cli.main() == 0\n"
        code += "assert not {'torch', 'ray', 'numpy', 'pydantic', 'nibabel'} & set(sys.modules)"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=dict(os.environ)
        )
        assert done.returncode == 0 and words in done.stdout, done.stderr


def test_a_shell_completes_commands() -> None:
    asked = {"_P2R_COMPLETE": "complete_bash", "COMP_WORDS": "p2r va", "COMP_CWORD": "1"}
    command = [sys.executable, "-m", "cluster"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **asked})
    assert done.stdout.split() == ["validate"], done.stderr


def test_validating_a_job_and_its_task_imports_neither_torch_nor_ray(toy_data: Path) -> None:
    code = f"import sys; sys.argv = ['p2r', 'validate', '{toy_data}/task.yaml']; from cluster import cli; assert cli.main() == 0\n"
    code += "assert not {'torch', 'ray', 'nibabel', 'scipy', 'pydicom'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "5 patients to train" in done.stdout, done.stderr


def test_a_ray_that_does_not_start_is_tried_once_more_and_named_in_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: list[str | None] = []

    @contextmanager
    def attempt(address: str | None, *, show_worker_logs: bool) -> Iterator[None]:
        """What Ray does on a machine that is too busy for its 30 s."""
        attempts.append(address)
        if len(attempts) < 3:
            raise RuntimeError("the node did not start within 30 seconds\nand much more")
        yield

    monkeypatch.setattr("cluster.session.session", attempt)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    said: list[str] = []
    job = Path("mine/job.yaml")
    with (
        pytest.raises(
            TrainingError, match=r"twice .*\(RuntimeError: the node .* seconds\).*python -m p2r mine/job\.yaml"
        ),
        started_session(None, job=job, show_worker_logs=False, say=said.append),
    ):
        pass
    assert said[0] == "starting Ray on this machine ..." and said[1].endswith("retrying once") and len(attempts) == 2
    with started_session(None, job=job, show_worker_logs=False, say=said.append):
        assert len(attempts) == 3
    attempts.clear()
    with (
        pytest.raises(TrainingError, match=r"cluster at 10\.0\.0\.7:6379 cannot be joined"),
        started_session("10.0.0.7:6379", job=job, show_worker_logs=False, say=said.append),
    ):
        pass
    assert attempts == ["10.0.0.7:6379"]


def test_the_log_of_a_failed_start_of_ray_is_not_printed_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    logger, printed = logging.getLogger("ray._private.services"), io.StringIO()
    handler = logging.StreamHandler(printed)

    def init(**_: object) -> None:
        logger.error("Failed to start the dashboard")
        raise RuntimeError("the node did not start")

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    logger.addHandler(handler)
    try:
        for show_worker_logs, shown in ((False, ""), (True, "Failed to start the dashboard\n")):
            with pytest.raises(RuntimeError, match="did not start"), session(show_worker_logs=show_worker_logs):
                pass
            assert printed.getvalue() == shown
    finally:
        logger.removeHandler(handler)


def test_a_list_of_scans_is_resumed_and_a_damaged_result_is_made_again(
    p2r: P2R, published: dict[str, str], folder: Path, tmp_path: Path
) -> None:
    scans = [folder / "sub-07_T1w.nii.gz", folder / "later/sub-08_T1w.nii.gz"]
    command = ("predict", published["model"], *scans, "-o", tmp_path / "out")
    code, said = p2r(*command)
    assert code == 0 and "1/2 | " in said and "there already" not in said, said
    results = [tmp_path / "out/sub-07_T1w.nii.gz", tmp_path / "out/later/sub-08_T1w.nii.gz"]
    first, table = results[0].read_bytes(), (tmp_path / "out/volumes.csv").read_text()
    results[0].write_bytes(first[:-9])  # cut off
    with (tmp_path / "out" / RECORD).open("a") as file:
        file.write('{"result": "sub-07_T1w.nii.gz", "inp')
    code, said = p2r(*command)
    assert code == 0 and said.count("there already") == 1 and results[0].read_bytes() == first
    assert (tmp_path / "out/volumes.csv").read_text() == table
    code, said = p2r(*command, "--probabilities")
    assert code == 0 and "there already" not in said, "other inputs"
    probabilities = tmp_path / "out/sub-07_T1w_probabilities.nii.gz"
    second = probabilities.read_bytes()
    probabilities.unlink()
    code, said = p2r(*command, "--probabilities")
    assert code == 0 and said.count("there already") == 1 and probabilities.read_bytes() == second, said
    code, said = p2r("predict", published["model"], *scans, "-o", tmp_path / "one.nii.gz")
    assert code == 2 and "several scans go into a folder" in said
    code, said = p2r("predict", published["model"], scans[0], f"t1={scans[1]}", "-o", tmp_path / "out")
    assert code == 2 and "has no contrast" in said


def test_a_result_never_replaces_a_scan_or_another_result(
    p2r: P2R, published: dict[str, str], folder: Path, tmp_path: Path
) -> None:
    scan = folder / "sub-07_T1w.nii.gz"
    shutil.copy(scan, folder / "sub-07_T1w_probabilities.nii.gz")
    before = {path: path.read_bytes() for path in folder.rglob("*.gz")}
    link = tmp_path / "link"
    link.symlink_to(folder)
    predict = ("predict", published["model"])
    for given in (
        (*predict, scan, "-o", scan),
        (*predict, scan, "-o", link / scan.name),
        (*predict, folder, "-o", folder),
        (*predict, f"t1={folder / 'later/sub-08_T1w.nii.gz'}", f"flair={scan}", "-o", scan),
        ("embed", published["backbone"], scan, "-o", scan),
    ):
        code, said = p2r(*given)
        assert code == 2 and "would replace the scan" in said, said
    code, said = p2r(*predict, folder, "-o", tmp_path / "out", "--probabilities")
    assert code == 2 and "would both become" in said, said
    for _ in range(2):  # results below the folder of the scans are not read as scans
        code, said = p2r(*predict, folder, "-o", folder / "out")
        assert code == 0 and "4/4 | " in said, said
    assert before == {path: path.read_bytes() for path in before}


def test_features_in_zarr_are_those_in_nifti(
    p2r: P2R, published: dict[str, str], toy_data: Path, tmp_path: Path
) -> None:
    scan = toy_data / "images/sub-07_T1w.nii.gz"
    for name in ("a.nii.gz", "a.zarr"):
        code, said = p2r("embed", published["backbone"], scan, "-o", tmp_path / name)
        assert code == 0, said
    image = nibabel.load(tmp_path / "a.nii.gz")
    about = json.loads((tmp_path / "a.zarr/.zarray").read_text())
    attributes = json.loads((tmp_path / "a.zarr/.zattrs").read_text())
    assert about["shape"] == list(image.shape) and np.allclose(attributes["affine"], image.affine)
    content = zlib.decompress((tmp_path / "a.zarr/0.0.0.0").read_bytes())
    chunk = np.frombuffer(content, about["dtype"]).reshape(about["chunks"])
    assert np.allclose(chunk, image.get_fdata(), atol=1e-6)
    code, said = p2r("embed", published["backbone"], toy_data / "images", "-o", tmp_path / "out", "--as", "zarr")
    assert code == 0 and (tmp_path / "out/sub-08_T1w.zarr/.zarray").is_file()
    code, said = p2r("embed", published["backbone"], toy_data / "images", "-o", tmp_path / "out", "--as", "hdf5")
    assert code == 2 and "nifti or zarr" in said


def test_a_dicom_series_is_segmented_to_one_file(p2r: P2R, published: dict[str, str], tmp_path: Path) -> None:
    Series().write(tmp_path / "series")
    code, said = p2r("predict", published["model"], tmp_path / "series", "-o", tmp_path / "out.nii.gz")
    assert code == 0 and nibabel.load(tmp_path / "out.nii.gz").shape == (18, 20, 8), said
    code, said = p2r("predict", published["model"], tmp_path / "series", "-o", tmp_path / "out")
    assert code == 0 and (tmp_path / "out/series.nii.gz").is_file(), said


def test_a_dicom_segmentation_is_not_written_into_the_folder_of_its_series(p2r: P2R, tmp_path: Path) -> None:
    Series().write(tmp_path / "series")
    (tmp_path / "link").symlink_to(tmp_path / "series")
    (tmp_path / "series/made").mkdir()
    for output in ("series/seg.dcm", "link/seg.dcm", "series/made/seg.dcm"):
        code, said = p2r("predict", "model", tmp_path / "series", "-o", tmp_path / output)
        assert code == 2 and f"give a file outside {tmp_path / 'series'}" in said, said
    code, said = p2r("predict", "model", tmp_path / "series", "-o", tmp_path / "seg.dcm")
    assert code == 2 and "give a file outside" not in said, said
