"""From sources to a list of scans, and from ranges to subjects."""

from pathlib import Path

import pytest

from p2r.data.scans import expand_subjects, find_scans
from p2r.errors import DataError


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"12345")


def test_ranges_expand_like_slurms_host_lists() -> None:
    assert expand_subjects(["patient[001-003]"]) == ["patient001", "patient002", "patient003"]
    assert expand_subjects(["p[8-11]"]) == ["p8", "p9", "p10", "p11"]
    assert expand_subjects(["p[098-101,007]x"]) == ["p098x", "p099x", "p100x", "p101x", "p007x"]
    assert expand_subjects(["a[1-2]b[1-2]"]) == ["a1b1", "a1b2", "a2b1", "a2b2"]
    assert expand_subjects(["sub-01", "sub-[01-02]", "plain"]) == ["sub-01", "sub-02", "plain"]
    assert expand_subjects([]) == []


@pytest.mark.parametrize("pattern", ["p[3-1]", "p[1-2", "p1-2]", "p[]", "p[a-b]", "p[[1-2]]", "p[1-]", "", "p[1 2]"])
def test_broken_ranges_are_refused_by_name(pattern: str) -> None:
    with pytest.raises(DataError, match="subjects"):
        expand_subjects(["fine", pattern])


def test_scans_are_found_at_any_depth_sorted_and_once(tmp_path: Path) -> None:
    touch(tmp_path / "b.nii", tmp_path / "x" / "y" / "a.nii.gz", tmp_path / "notes.txt", tmp_path / "._a.nii.gz")
    scans = find_scans([str(tmp_path), f"file://{tmp_path}/x", str(tmp_path / "b.nii")], cache=tmp_path)
    assert [scan.path for scan in scans] == [str(tmp_path / "b.nii"), str(tmp_path / "x" / "y" / "a.nii.gz")]
    assert [scan.key for scan in scans] == ["b", "a"]
    assert {scan.num_bytes for scan in scans} == {5}
    assert scans[1].name == "a.nii.gz"


def test_equal_names_are_told_apart_by_their_folders(tmp_path: Path) -> None:
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


def test_a_broken_link_is_a_scan_that_reading_will_refuse(tmp_path: Path) -> None:
    touch(tmp_path / "a.nii")
    (tmp_path / "b.nii").symlink_to(tmp_path / "absent.nii")
    assert [scan.num_bytes for scan in find_scans([str(tmp_path)], cache=tmp_path)] == [5, 0]


def test_sources_that_hold_no_scan_are_refused_by_name(tmp_path: Path) -> None:
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
        "p2r.data.scans.resolve_source", lambda url, cache: tmp_path / ("images" if "/images" in url else "")
    )
    for source in ("template://icbm152?subjects=1", "template://icbm152/?subjects=1", "template://icbm152/images"):
        paths = [scan.path for scan in find_scans([source], cache=tmp_path)]
        assert paths == [str(tmp_path / "images" / "sub-001_T1w.nii.gz")]
