"""Sources -> a list of scans."""

import os
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from p2r.config import IngestConfig
from p2r.data.folders import images_below
from p2r.data.read import read_scan, sidecar_of
from p2r.data.scans import Scan, expand_subjects, find_scans, search_scans
from p2r.data.volume import write_nifti
from p2r.errors import DataError, RefusedScan, StorageError


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"12345")


def below(folder: Path, **options: Any) -> list[str]:
    """Return the relative paths of the scans below a folder."""
    return [str(Path(scan.path).relative_to(folder)) for scan in find_scans([str(folder)], cache=folder, **options)]


def only(source: str | Path) -> Scan:
    (scan,) = find_scans([str(source)], cache=Path("/nowhere"))
    return scan


def test_scans_are_found_at_any_depth_sorted_and_once(tmp_path: Path) -> None:
    touch(tmp_path / "b.nii", tmp_path / "x" / "y" / "a.nii.gz", tmp_path / "notes.txt", tmp_path / "._a.nii.gz")
    scans = find_scans([str(tmp_path), f"file://{tmp_path}/x", str(tmp_path / "b.nii")], cache=tmp_path)
    assert [scan.path for scan in scans] == [str(tmp_path / "b.nii"), str(tmp_path / "x" / "y" / "a.nii.gz")]
    assert [scan.key for scan in scans] == ["b", "a"]
    assert {scan.num_bytes for scan in scans} == {5}
    assert scans[1].name == "a.nii.gz"


def test_equal_names_are_distinguished_by_their_folders(tmp_path: Path) -> None:
    touch(tmp_path / "s1" / "anat" / "T1.nii", tmp_path / "s2" / "anat" / "T1.nii", tmp_path / "s2" / "T2.nii")
    keys = {scan.path: scan.key for scan in find_scans([str(tmp_path)], cache=tmp_path)}
    assert keys == {
        str(tmp_path / "s1" / "anat" / "T1.nii"): "s1_anat_T1",
        str(tmp_path / "s2" / "anat" / "T1.nii"): "s2_anat_T1",
        str(tmp_path / "s2" / "T2.nii"): "T2",
    }


def test_keys_have_no_dots_and_stay_unique(tmp_path: Path) -> None:
    touch(tmp_path / "a.1.nii", tmp_path / "a_1.nii", tmp_path / "a_1.nii.gz", tmp_path / "b c.nii")
    keys = [scan.key for scan in find_scans([str(tmp_path)], cache=tmp_path)]
    assert len(set(keys)) == 4
    assert not [key for key in keys if "." in key or " " in key]


def test_a_broken_link_is_listed_as_a_scan(tmp_path: Path) -> None:
    touch(tmp_path / "a.nii")
    (tmp_path / "b.nii").symlink_to(tmp_path / "absent.nii")
    assert [scan.num_bytes for scan in find_scans([str(tmp_path)], cache=tmp_path)] == [5, 0]


def test_sources_without_a_scan_are_refused_by_name(tmp_path: Path) -> None:
    touch(tmp_path / "scan.txt")
    for source, rule in (
        (str(tmp_path / "absent"), "does not exist"),
        (str(tmp_path), "holds no"),
        (str(tmp_path / "scan.txt"), "not a .nii"),
        ("ftp://host/scans", "scheme 'ftp'"),
        ("template://other", "icbm152"),
    ):
        with pytest.raises(DataError, match=rule) as refusal:
            find_scans([source], cache=tmp_path)
        assert source in str(refusal.value)


def test_a_template_gives_its_images_and_never_its_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "images" / "sub-001_T1w.nii.gz", tmp_path / "labels" / "sub-001_T1w.nii.gz")
    monkeypatch.setattr(
        "p2r.data.phantom.resolve_source", lambda url, cache: tmp_path / ("images" if "/images" in url else "")
    )
    for source in ("template://icbm152?subjects=1", "template://icbm152/?subjects=1", "template://icbm152/images"):
        paths = [scan.path for scan in find_scans([source], cache=tmp_path)]
        assert paths == [str(tmp_path / "images" / "sub-001_T1w.nii.gz")]


def test_a_scan_has_its_modification_time(tmp_path: Path) -> None:
    touch(tmp_path / "a.nii")
    os.utime(tmp_path / "a.nii", ns=(7_000_000_123, 9_000_000_456))
    assert only(tmp_path).modified == "9000000456"
    (tmp_path / "a.nii").unlink()
    (tmp_path / "a.nii").symlink_to(tmp_path / "absent")
    assert only(tmp_path).modified == ""


def test_a_header_and_its_voxels_are_one_scan(tmp_path: Path) -> None:
    touch(tmp_path / "a.hdr", tmp_path / "a.img", tmp_path / "b.HDR.GZ", tmp_path / "b.IMG.GZ", tmp_path / "c.img")
    os.utime(tmp_path / "a.img", ns=(0, 5_000_000_000))
    os.utime(tmp_path / "a.hdr", ns=(0, 4_000_000_000))
    scans = find_scans([str(tmp_path), str(tmp_path / "a.img")], cache=tmp_path)
    assert [(Path(scan.path).name, scan.key, scan.num_bytes) for scan in scans] == [
        ("a.hdr", "a", 10),
        ("b.HDR.GZ", "b", 10),
        ("c.img", "c", 5),
    ]
    assert scans[0].files == (str(tmp_path / "a.hdr"), str(tmp_path / "a.img"))
    assert scans[0].modified == "5000000000"


def test_hidden_folders_are_skipped_unless_they_are_the_source(tmp_path: Path) -> None:
    touch(tmp_path / ".git" / "annex" / "a.nii", tmp_path / "b.nii")
    assert below(tmp_path) == ["b.nii"]
    assert below(tmp_path / ".git") == ["annex/a.nii"]


def test_links_to_files_and_folders_are_followed_each_folder_once(tmp_path: Path) -> None:
    touch(tmp_path / "store" / "a.nii", tmp_path / "elsewhere" / "sub-2" / "b.nii", tmp_path / "outside.nii")
    data = tmp_path / "data"
    touch(data / "sub-1" / "c.nii")
    (data / "a.nii").symlink_to(tmp_path / "store" / "a.nii")
    (data / "sub-2").symlink_to(tmp_path / "elsewhere" / "sub-2")
    (data / "again").symlink_to(tmp_path / "elsewhere")
    (data / "aaa").symlink_to(data / "sub-1")
    (data / "loop").symlink_to(data)
    (data / "above").symlink_to(tmp_path)
    (tmp_path / "elsewhere" / "sub-2" / "back").symlink_to(data)
    (data / "self.nii").symlink_to(data / "self.nii")
    (data / "sub-3").symlink_to(tmp_path / "not_mounted")
    (data / "README").symlink_to(".git/annex/objects/x/y/README")
    found = ["a.nii", "again/sub-2/b.nii", "self.nii", "sub-1/c.nii", "sub-3"]
    assert below(data) == found, "the folder behind a dead link is listed, and refused by reading"
    assert below(data / "sub-2") == ["b.nii", "back/a.nii", "back/self.nii", "back/sub-1/c.nii", "back/sub-3"]


def test_folders_of_operating_systems_are_skipped(tmp_path: Path) -> None:
    touch(tmp_path / "a.nii")
    for name in (".snapshot", "~snapshot", "@eaDir", "#recycle", "lost+found", "__MACOSX", ".ipynb_checkpoints"):
        touch(tmp_path / name / "hourly.0" / "a.nii")
    assert below(tmp_path) == ["a.nii"]
    assert [path.name for path in images_below(tmp_path)] == ["a.nii"]


def test_both_unicode_forms_of_a_name_are_equal(tmp_path: Path) -> None:
    one, two = (unicodedata.normalize(form, "Müller") for form in ("NFC", "NFD"))
    touch(tmp_path / "images" / f"{one}_T1.nii", tmp_path / "images" / f"{two}_T2.nii")
    scans = find_scans([str(tmp_path / "images")], cache=tmp_path, include=[f"{two}*"])
    assert sorted(scan.name for scan in scans) == [f"{one}_T1.nii", f"{one}_T2.nii"]
    assert expand_subjects([two, one]) == [one]


def test_a_pipe_is_listed_and_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.nii")
    os.mkfifo(tmp_path / "plain")
    with pytest.raises(RefusedScan) as refusal:
        read_scan(only(tmp_path), IngestConfig(sources=("x",), licence="CC0-1.0"))
    assert refusal.value.code == "unreadable"


def test_patterns_match_the_path_below_the_source(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("T1.nii", "s1/anat/T1.nii", "s1/anat/T2.nii", "s1/func/bold.nii")))
    assert below(tmp_path, include=["**/T1.nii"]) == ["T1.nii", "s1/anat/T1.nii"]
    assert below(tmp_path, include=["s1/**/T?.nii"]) == ["s1/anat/T1.nii", "s1/anat/T2.nii"]
    assert below(tmp_path, include=["*.nii"], exclude=["*/func/*", "T1*"]) == ["s1/anat/T1.nii", "s1/anat/T2.nii"]
    assert below(tmp_path, exclude=["s1/*"]) == ["T1.nii"]
    assert below(tmp_path / "s1", include=["anat/T[12].nii"]) == ["anat/T1.nii", "anat/T2.nii"]
    with pytest.raises(DataError, match=r"include and ingest\.exclude"):
        below(tmp_path, include=["nothing"])
    with pytest.raises(DataError, match="more than four"):
        below(tmp_path, include=["**/" * 5])


BIDS_NAMES = (
    "dataset_description.json",
    "sub-01/anat/sub-01_acq-hi_run-2_T1w.nii.gz",
    "sub-01/ses-a/func/sub-01_ses-a_task-rest_echo-1_part-mag_bold.nii.gz",
    "sub-02/anat/odd name.nii",
    "derivatives/fmriprep/sub-01/sub-01_T1w.nii.gz",
    "sourcedata/sub-01/raw.nii",
    "code/test.nii",
    "sub-03/derivatives/sub-03_T2w.nii",
)


def test_a_bids_data_set_is_read_by_its_names(tmp_path: Path) -> None:
    touch(*(tmp_path / "ds" / name for name in BIDS_NAMES))
    touch(tmp_path / "sub-09_T1w.nii")
    outside, *scans = sorted(find_scans([str(tmp_path)], cache=tmp_path), key=lambda scan: "/ds/" in scan.path)
    assert (outside.subject, outside.entities) == (None, ()), "no data set, no promise"
    assert [(Path(scan.path).name, scan.subject, dict(scan.entities)) for scan in scans] == [
        (
            "sub-01_acq-hi_run-2_T1w.nii.gz",
            "sub-01",
            {"sub": "01", "acq": "hi", "run": "2", "suffix": "T1w"},
        ),
        (
            "sub-01_ses-a_task-rest_echo-1_part-mag_bold.nii.gz",
            "sub-01",
            {"sub": "01", "ses": "a", "task": "rest", "echo": "1", "part": "mag", "suffix": "bold"},
        ),
        ("odd name.nii", None, {}),
        ("sub-03_T2w.nii", "sub-03", {"sub": "03", "suffix": "T2w"}),
    ]
    folders = search_scans([str(tmp_path)], cache=tmp_path).passed_over
    assert [Path(folder.path).name for folder in folders] == ["code", "derivatives", "sourcedata"]
    assert all("not read as scans (1 images)" in folder.passed_over for folder in folders)
    assert not search_scans([str(tmp_path)], cache=tmp_path, exclude=["ds/code/*", "ds/der*", "*raw*"]).passed_over


def test_derivatives_are_searched_only_if_a_source_names_them(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in BIDS_NAMES))
    assert below(tmp_path / "derivatives") == ["fmriprep/sub-01/sub-01_T1w.nii.gz"]
    assert only(tmp_path / "derivatives").subject == "sub-01"
    assert below(tmp_path / "sourcedata" / "sub-01") == ["raw.nii"]
    (tmp_path / "dataset_description.json").unlink()
    assert len(below(tmp_path)) == 7


def test_the_images_of_a_split_series_never_get_a_scans_key(tmp_path: Path, write_series: Any) -> None:
    write_series(tmp_path / "p1", echoes=2)
    touch(tmp_path / "other" / "p1_s003_0.nii")
    keys = [scan.key for scan in find_scans([str(tmp_path)], cache=tmp_path)]
    assert keys == ["000000_p1_s003_0", "000001_p1_s003"] or keys == ["000000_p1_s003_0", "000001_p1_s003"][::-1]


def test_a_file_url_is_not_percent_encoded_and_needs_three_slashes(tmp_path: Path) -> None:
    touch(tmp_path / "a b.nii", tmp_path / "100%20.nii")
    for name in ("a b.nii", "100%20.nii"):
        assert only(f"file://{tmp_path}/{name}").path == str(tmp_path / name)
    quoted = (tmp_path / "a b.nii").as_uri()
    with pytest.raises(DataError, match=rf"did you mean file://{tmp_path}/a b\.nii\?"):
        find_scans([quoted], cache=tmp_path)
    (tmp_path / "list.csv").write_text(f"path\n{quoted}\n")
    with pytest.raises(DataError, match=r"line 2: .* did you mean"):
        find_scans([str(tmp_path / "list.csv")], cache=tmp_path)
    with pytest.raises(DataError, match="three slashes"):
        find_scans(["file://data/scans"], cache=tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_an_unreadable_folder_is_an_error(tmp_path: Path) -> None:
    touch(tmp_path / "a.nii", tmp_path / "closed" / "b.nii")
    (tmp_path / "closed").chmod(0)
    with pytest.raises(DataError, match="permissions"):
        below(tmp_path)


@pytest.mark.s3
def test_a_bucket_is_searched_like_a_folder(s3_url: str, tmp_path: Path) -> None:
    import s3fs

    touch(*(tmp_path / name for name in (*BIDS_NAMES, ".git/x.nii", "sub-01/anat/._a.nii", "pair.hdr", "pair.img")))
    (tmp_path / "scans.csv").write_text(
        "path,subject\nsub-02/anat/odd name.nii,anna\nsub-01/anat/sub-01_acq-hi_run-2_T1w.nii.gz,\npair.img,\n"
    )
    bucket = s3fs.S3FileSystem(skip_instance_cache=True)
    bucket.put(f"{tmp_path}/", f"{s3_url.removeprefix('s3://')}/ds/", recursive=True)
    for exclude in ([], ["*bold*"]):
        scans = find_scans([f"{s3_url}/ds"], cache=tmp_path, exclude=exclude)
        here = find_scans([str(tmp_path)], cache=tmp_path, exclude=exclude)
        assert [scan.path.removeprefix(f"{s3_url}/ds/") for scan in scans] == [
            scan.path.removeprefix(f"{tmp_path}/") for scan in here
        ]
        assert [
            (folder.path.removeprefix(f"{s3_url}/ds/"), folder.modified)
            for folder in search_scans([f"{s3_url}/ds"], cache=tmp_path, exclude=exclude).passed_over
        ] == [("code", "1 files"), ("derivatives", "1 files"), ("sourcedata", "1 files")]
        for scan, local in zip(scans, here, strict=True):
            assert (scan.key, scan.num_bytes, scan.subject, scan.entities) == (
                local.key,
                local.num_bytes,
                local.subject,
                local.entities,
            )
            assert scan.modified == " ".join(
                bucket.info(file)["ETag"].strip('"') for file in scan.files or (scan.path,)
            )
    inside = find_scans([f"{s3_url}/ds/sub-01/anat"], cache=tmp_path)
    assert [scan.subject for scan in inside] == ["sub-01"], "the data set is above the source"
    listed = find_scans([f"{s3_url}/ds/scans.csv"], cache=tmp_path)
    assert [(scan.path.rpartition("/")[2], scan.subject) for scan in listed] == [
        ("pair.hdr", None),
        ("sub-01_acq-hi_run-2_T1w.nii.gz", "sub-01"),
        ("odd name.nii", "anna"),
    ]
    bucket.pipe_file(f"{s3_url}/ds/bad.csv", b"path\nabsent.nii\n")
    bucket.pipe_file(f"{s3_url}/ds/out.csv", b"path\n../../../../other/a.nii\n")
    bucket.pipe_file(f"{s3_url}/dicom/a.dcm", b"12345")
    for source, rule in (
        (f"{s3_url}/ds/bad.csv", "line 2: there is no"),
        (f"{s3_url}/ds/out.csv", "line 2: .* leads out of the bucket"),
        (f"{s3_url}/ds/none.csv", "cannot be read"),
        (f"{s3_url}/dicom", "DICOM"),
    ):
        with pytest.raises(DataError, match=rule):
            find_scans([source], cache=tmp_path)


@pytest.mark.s3
def test_scans_of_a_bucket_are_read_like_files(
    s3_url: str, tmp_path: Path, write_scan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nibabel
    import s3fs

    voxels = np.random.default_rng(0).integers(0, 900, (20, 22, 5)).astype(np.int16)
    write_nifti(tmp_path / "ds" / "sub-01" / "anat" / "sub-01_T1w.nii.gz", voxels, np.diag([1.5, 1.5, 4.0, 1.0]))
    nibabel.save(nibabel.Nifti1Pair(voxels, np.diag([1.5, 1.5, 4.0, 1.0])), tmp_path / "ds" / "pair.hdr")
    (tmp_path / "ds" / "dataset_description.json").write_text("{}")
    (tmp_path / "ds" / "T1w.json").write_text('{"EchoTime": 0.003, "PatientName": "secret"}')
    (tmp_path / "ds" / "sub-01" / "anat" / "sub-01_T1w.json").write_text('{"FlipAngle": 9}')
    (tmp_path / "ds" / "pair.json").write_text('{"FlipAngle": 8}')
    bucket = s3fs.S3FileSystem(skip_instance_cache=True)
    bucket.put(f"{tmp_path}/ds/", f"{s3_url.removeprefix('s3://')}/ds/", recursive=True)
    shutil.rmtree(tmp_path / "ds")
    config = IngestConfig(sources=("x",), licence="CC0-1.0")
    pair, single = find_scans([f"{s3_url}/ds"], cache=tmp_path)
    for scan, tags in ((pair, {"FlipAngle": 8}), (single, {"EchoTime": 0.003, "FlipAngle": 9})):
        (volume,) = read_scan(scan, config)
        np.testing.assert_array_equal(volume.data[..., 0], voxels)
        assert volume.sidecar == sidecar_of(scan) == tags
    bucket.rm(single.path)
    with pytest.raises(RefusedScan, match="no such object"):
        read_scan(single, config)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match="cannot read"):
        read_scan(pair, config)


def test_content_not_fetched_is_refused_with_target_and_command(tmp_path: Path) -> None:
    target = ".git/annex/objects/aa/bb/MD5E-s1--0/MD5E-s1--0.nii.gz"
    (tmp_path / "a.nii.gz").symlink_to(target)
    (tmp_path / "b.nii.gz").symlink_to("/not/mounted/b.nii.gz")
    outcomes = {}
    for scan in find_scans([str(tmp_path)], cache=tmp_path):
        with pytest.raises(RefusedScan) as refusal:
            read_scan(scan, IngestConfig(sources=("x",), licence="CC0-1.0"))
        outcomes[scan.key] = refusal.value
    assert outcomes["a"].code == "not_fetched"
    assert target in outcomes["a"].message and f"datalad get {tmp_path}/a.nii.gz" in outcomes["a"].message
    assert "link to /not/mounted/b.nii.gz" in outcomes["b"].message
