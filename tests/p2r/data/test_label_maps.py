"""A corpus leaves label maps out unless the job takes them; the ledger has the reason of each omission."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from p2r.config import IngestConfig
from p2r.data.corpus import ingest_locally, load_manifest
from p2r.data.dataset_json import read_dataset_json
from p2r.data.label_maps import label_map_by_name, label_map_by_voxels
from p2r.data.opening import bucket_client
from p2r.data.scans import find_scans
from p2r.data.survey import survey
from p2r.data.volume import read_volume
from p2r.errors import DataError
from p2r.storage import Storage

WriteScan = Callable[..., Path]
SHAPE = (18, 20, 4)


def scan(seed: int) -> Any:
    return np.random.default_rng(seed).integers(1, 500, SHAPE).astype(np.int16)


def blocks(values: int) -> Any:
    """Return an atlas: blocks of one value each."""
    grid = np.indices(SHAPE) // np.array([3, 4, 2])[:, None, None, None]
    return ((grid[0] * 31 + grid[1] * 7 + grid[2]) % values + 1).astype(np.int16)


def config_of(folder: Path, **changes: Any) -> IngestConfig:
    return IngestConfig(**{"sources": (str(folder),), "licence": "CC0-1.0", **changes})


def ingested(config: IngestConfig, folder: Path) -> dict[str, dict[str, Any]]:
    storage = Storage(str(folder))
    list(ingest_locally(config, storage))
    return {row["key"]: row for row in map(json.loads, storage.read_bytes("ledger.jsonl").splitlines())}


@pytest.fixture
def nnunet(write_scan: WriteScan) -> Path:
    """An nnU-Net folder of four training cases in two channels and one test case, with a `dataset.json`."""
    for case in range(4):
        for channel in range(2):
            write_scan(f"imagesTr/case_{case:03d}_{channel:04d}.nii.gz", scan(10 * case + channel))
        path = write_scan(f"labelsTr/case_{case:03d}.nii.gz", blocks(2))
    write_scan("imagesTs/case_009_0000.nii.gz", scan(99))
    root = path.parent.parent
    (root / "dataset.json").write_text(
        '{"channel_names": {"0": "T1", "1": "FLAIR"}, "labels": {"background": 0, "organ": 1, "whole": [1, 2], "ignore": 3}, '
        '"numTraining": 4, "file_ending": ".nii.gz"}'
    )
    return root


@pytest.mark.parametrize(
    ("below", "is_label_map"),
    [
        ("labelsTr/case_001.nii.gz", True),
        ("a/Masks/x.nii", True),
        ("derivatives/manual/sub-01/anat/sub-01_T1w.nii.gz", True),
        ("sub-01/anat/sub-01_desc-brain_mask.nii.gz", True),
        ("sub-01_dseg.nii.gz", True),
        ("BraTS-GLI-00000-000-seg.nii.gz", True),
        ("patient001_frame01_gt.nii.gz", True),
        ("P7/seg.nii.gz", True),
        ("case_labels.NII.GZ", True),
        ("sub-01/anat/sub-01_T1w.nii.gz", False),
        ("imagesTr/case_001_0000.nii.gz", False),
        ("unmasked.nii.gz", False),
        ("labelled_patients_T2.nii.gz", False),
        ("segment3_T1w.nii.gz", False),
    ],
)
def test_label_maps_are_recognised_by_name(below: str, is_label_map: bool) -> None:
    assert (label_map_by_name(below) is not None) == is_label_map


def test_label_maps_are_recognised_by_voxels() -> None:
    assert label_map_by_voxels((blocks(1) - 1 + (np.indices(SHAPE)[0] > 9))[..., None])
    assert label_map_by_voxels(blocks(3)[..., None] * np.float32(1.0000153))
    assert label_map_by_voxels(np.repeat(np.repeat(blocks(90), 6, axis=0), 6, axis=1)[..., None])
    assert not label_map_by_voxels(scan(0)[..., None])
    assert not label_map_by_voxels((scan(0) % 40)[..., None])  # five bits of noise
    assert not label_map_by_voxels(np.random.default_rng(0).normal(size=(*SHAPE, 1)).astype(np.float32))


@pytest.mark.data
@pytest.mark.parametrize("folder", ["acdc", "msd_hippocampus"])
def test_real_label_maps_are_recognised_and_their_scans_are_not(mri: Path, folder: str) -> None:
    for path in sorted((mri / folder / "images").glob("*.nii.gz"))[::40]:
        assert label_map_by_voxels(read_volume(path).data) is None
        assert label_map_by_voxels(read_volume(mri / folder / "labels" / path.name).data)


def test_label_maps_are_left_out_with_a_reason_and_taken_if_asked(write_scan: WriteScan, tmp_path: Path) -> None:
    for number in range(3):
        write_scan(f"p{number}_t1.nii.gz", scan(number))
        write_scan(f"p{number}_seg.nii.gz", blocks(2))
    folder = write_scan("p0_unnamed.nii.gz", blocks(3)).parent
    rows = ingested(config_of(folder), tmp_path / "corpus")
    assert {key for key, row in rows.items() if row["status"] == "accepted"} == {"p0_t1", "p1_t1", "p2_t1"}
    assert {row["reason"] for row in rows.values()} == {"accepted", "label_map"}
    assert "ends in _seg" in rows["p1_seg"]["message"] and "label_maps: take" in rows["p1_seg"]["message"]
    assert "3 different values" in rows["p0_unnamed"]["message"]
    again = ingested(config_of(folder), tmp_path / "corpus")
    assert again == rows
    taken = ingested(config_of(folder, label_maps="take"), tmp_path / "corpus")
    assert {row["reason"] for row in taken.values()} == {"accepted"}


def test_more_label_maps_than_scans_are_accepted(write_scan: WriteScan, tmp_path: Path) -> None:
    for number in range(3):
        write_scan(f"images/p{number}.nii.gz", scan(number))
        for reader in "abc":
            folder = write_scan(f"images/p{number}_{reader}x.nii.gz", blocks(2 + ord(reader) % 3)).parent
    rows = ingested(config_of(folder, max_refused_fraction=0.1), tmp_path / "corpus")
    assert sum(row["reason"] == "label_map" for row in rows.values()) == 9


def test_an_nnunet_folder_yields_scans_cases_and_channels_without_labels(nnunet: Path, tmp_path: Path) -> None:
    rows = ingested(config_of(nnunet), tmp_path / "corpus")
    accepted = [row for row in rows.values() if row["status"] == "accepted"]
    assert {row["subject"] for row in accepted} == {f"case_{number:03d}" for number in (0, 1, 2, 3, 9)}
    assert len(accepted) == 9
    assert sum(row["reason"] == "label_map" for row in rows.values()) == 4
    assert load_manifest(Storage(str(tmp_path / "corpus")))["num_subjects"] == 5
    scans = {Path(found.path).name: dict(found.entities) for found in find_scans([str(nnunet)], cache=tmp_path)}
    assert scans["case_001_0001.nii.gz"] == {"channel": "FLAIR"}


def test_a_dataset_json_of_either_form_is_read(nnunet: Path, tmp_path: Path) -> None:
    found = read_dataset_json(nnunet / "dataset.json")
    assert found is not None
    assert (found.form, found.channels, dict(found.labels)) == ("nnunet", ("T1", "FLAIR"), {1: "organ"})
    assert found.ignored == ("whole", "ignore")
    (tmp_path / "dataset.json").write_text(
        '{"name": "Hippocampus", "licence": "CC-BY-SA 4.0", "reference": "VUMC", "modality": {"0": "MRI"}, '
        '"labels": {"0": "background", "1": "Anterior", "2": "Posterior"}, "numTraining": 1, '
        '"training": [{"image": "./imagesTr/h_1.nii.gz", "label": "./masks/h_1.nii.gz"}], "test": ["./imagesTs/h_2.nii.gz"]}'
    )
    msd = read_dataset_json(tmp_path / "dataset.json")
    assert msd is not None
    assert (msd.form, msd.channels, dict(msd.labels)) == ("msd", ("MRI",), {1: "Anterior", 2: "Posterior"})
    assert msd.training == (("imagesTr/h_1.nii.gz", "masks/h_1.nii.gz"),)
    assert msd.test == ("imagesTs/h_2.nii.gz",)
    assert (msd.licence, msd.reference) == ("CC-BY-SA 4.0", "VUMC")
    (tmp_path / "other.json").write_text('{"files": 3}')
    assert read_dataset_json(tmp_path / "other.json") is None


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "is not JSON"),
        ('{"labels": {"a": 1}, "channel_names": {"1": "T1"}}', "channel_names"),
        ('{"labels": [1], "channel_names": {"0": "T1"}}', "labels must map"),
        (
            '{"labels": {"1": "a"}, "modality": {"0": "x"}, "training": [{"image": "../../etc/x", "label": "y"}]}',
            "below",
        ),
        ('{"labels": {"1": "a"}, "modality": {"0": "x"}, "training": ["x"]}', "training must list"),
    ],
)
def test_a_broken_dataset_json_is_refused_by_name(tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(DataError, match=word) as caught:
        read_dataset_json(tmp_path / "dataset.json")
    assert "dataset.json" in str(caught.value)


def test_a_label_listed_in_a_dataset_json_is_left_out_under_any_name(write_scan: WriteScan, tmp_path: Path) -> None:
    write_scan("a/one.nii.gz", scan(1))
    folder = write_scan("b/one.nii.gz", scan(2)).parent.parent
    (folder / "dataset.json").write_text(
        '{"labels": {"0": "background", "1": "x"}, "modality": {"0": "MRI"}, '
        '"training": [{"image": "a/one.nii.gz", "label": "b/one.nii.gz"}]}'
    )
    rows = ingested(config_of(folder), tmp_path / "corpus")
    assert sorted(row["reason"] for row in rows.values()) == ["accepted", "label_map"]


def test_derivatives_of_a_bids_data_set_have_a_row(write_scan: WriteScan, tmp_path: Path) -> None:
    for number in range(3):
        write_scan(f"sub-{number}/anat/sub-{number}_T1w.nii.gz", scan(number))
        path = write_scan(f"derivatives/fmriprep/sub-{number}/sub-{number}_T1w.nii.gz", scan(9))
    root = path.parents[3]
    (root / "dataset_description.json").write_text("{}")
    said: list[str] = []
    for take in ("leave_out", "take"):
        corpus = Storage(str(tmp_path / "corpus"))
        list(ingest_locally(config_of(root, label_maps=take), corpus, say=said.append))
        rows = [json.loads(line) for line in corpus.read_bytes("ledger.jsonl").splitlines()]
        assert [row["key"] for row in rows if row["status"] == "accepted"] == [f"sub-{n}_T1w" for n in range(3)]
        (row,) = (row for row in rows if row["status"] != "accepted")
        assert (row["status"], row["reason"], row["subject"]) == ("not_selected", "not_raw", None)
        assert str(root / "derivatives") in row["message"] and "(3 images)" in row["message"]
    assert sum("(3 images)" in line for line in said) == 2, "each run says so"
    assert len(corpus.list("manifests")) == 1, "the second run adds nothing"


@pytest.mark.s3
def test_a_dataset_json_in_a_bucket_is_read(nnunet: Path, s3_url: str, tmp_path: Path) -> None:
    bucket = bucket_client()
    bucket.put(f"{nnunet}/", f"{s3_url.removeprefix('s3://')}/d/", recursive=True)
    found, here = (
        [
            (scan.name, scan.case, dict(scan.entities), bool(scan.label_map))
            for scan in find_scans([source], cache=tmp_path)
        ]
        for source in (f"{s3_url}/d", str(nnunet))
    )
    assert found == here and found[0][1:3] == ("case_000", {"channel": "T1"})
    (below,) = find_scans([f"{s3_url}/d/imagesTs"], cache=tmp_path)
    assert below.case == "case_009", "the file is above the source"
    names = survey(f"{s3_url}/d/", cache=tmp_path)
    assert (names.form, len(names.scans), len(names.subjects), len(names.label_maps)) == ("nnunet", 9, 5, 4)
    assert names.test_patterns == ("imagesTs/*",) and names.pairing is None
    bucket.pipe_file(f"{s3_url}/d/dataset.json", b'{"labels": 1, "modality": {"0": "x"}}')
    with pytest.raises(DataError, match=rf"{s3_url}/d/dataset\.json: labels must map"):
        find_scans([f"{s3_url}/d"], cache=tmp_path)


# Subjects of scans


def test_scans_all_of_one_subject_stop_the_job_before_reading(write_scan: WriteScan, tmp_path: Path) -> None:
    for number in range(4):
        path = write_scan(f"brain_{number:03d}.nii.gz", scan(number))
        path.write_bytes(b"not read")
    with pytest.raises(DataError, match=r"all 4 scans .* one subject by ingest\.subject_pattern .* brain.*one_subject"):
        ingested(config_of(path.parent), tmp_path / "corpus")
    assert not list((tmp_path / "corpus").rglob("*.*"))
    for number in range(4):
        write_scan(f"brain_{number:03d}.nii.gz", scan(number))
    assert len(ingested(config_of(path.parent, one_subject=True), tmp_path / "corpus")) == 4
    assert len(ingested(config_of(path.parent, subject_pattern=r"^(.+?)\.nii"), tmp_path / "other")) == 4


def test_a_pattern_is_searched_in_the_path_below_the_source_too(write_scan: WriteScan, tmp_path: Path) -> None:
    for number in range(3):
        folder = write_scan(f"P{number}/t1.nii.gz", scan(number)).parent.parent
    rows = ingested(config_of(folder, subject_pattern=r"^(P\d)/"), tmp_path / "corpus")
    assert {row["subject"] for row in rows.values()} == {"P0", "P1", "P2"}
