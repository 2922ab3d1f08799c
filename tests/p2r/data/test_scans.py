"""Sources -> a list of scans; ranges -> subjects."""

import json
import os
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from p2r.config import IngestConfig
from p2r.data import lists
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


@pytest.mark.parametrize(
    "pattern", ["p[0-1000000000000]", "p[0-9999][0-9999][0-9999]", "p[" + "1" * 5000 + "]", "p[1-900000,1-900000]"]
)
def test_ranges_of_too_many_names_are_refused(pattern: str) -> None:
    with pytest.raises(DataError, match=r"expands to more than 1,000,000 names|neither a number nor a range"):
        expand_subjects([pattern])


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


def test_a_list_names_scans_with_their_subjects_and_other_columns(tmp_path: Path) -> None:
    touch(tmp_path / "x" / "a.nii", tmp_path / "b,c.nii.gz", tmp_path / "lists" / "d.hdr", tmp_path / "lists" / "d.img")
    (tmp_path / "lists" / "scans.csv").write_text(
        "path,subject,contrast,age\n"
        "../x/a.nii,anna,T1w,n/a\n"
        f'"{tmp_path}/b,c.nii.gz",,T2w,33\n'
        "\n"
        f"file://{tmp_path}/lists/d.img,berta,,\n"
    )
    scans = find_scans([str(tmp_path / "lists" / "scans.csv")], cache=tmp_path)
    assert [(scan.path, scan.subject, scan.entities) for scan in scans] == [
        (str(tmp_path / "b,c.nii.gz"), None, (("age", "33"), ("contrast", "T2w"))),
        (str(tmp_path / "lists" / "d.hdr"), "berta", ()),
        (str(tmp_path / "x" / "a.nii"), "anna", (("contrast", "T1w"),)),
    ]


def test_the_three_formats_of_lists_are_equivalent(tmp_path: Path) -> None:
    touch(tmp_path / "a.nii", tmp_path / "b.nii")
    (tmp_path / "l.csv").write_text("\ufeffpath,subject,run\r\na.nii,s1,1\r\nb.nii,s2,2\r\n")
    (tmp_path / "l.tsv").write_text("path\tsubject\trun\na.nii\ts1\t1\nb.nii\ts2\t2\n")
    (tmp_path / "l.jsonl").write_text(
        '{"path": "a.nii", "subject": "s1", "run": 1}\n\n{"run": "2", "subject": "s2", "path": "b.nii", "x": null}'
    )
    one, two, three = (find_scans([str(tmp_path / name)], cache=tmp_path) for name in ("l.csv", "l.tsv", "l.jsonl"))
    assert one == two == three
    assert len(one) == 2


def test_a_list_has_precedence_over_its_folder(tmp_path: Path) -> None:
    touch(tmp_path / "a.nii", tmp_path / "b.nii")
    (tmp_path / "l.csv").write_text("path,subject\na.nii,anna\n")
    for sources in ([tmp_path, tmp_path / "l.csv"], [tmp_path / "l.csv", tmp_path]):
        scans = find_scans(map(str, sources), cache=tmp_path)
        assert [scan.subject for scan in scans] == ["anna", None]


def test_a_list_may_name_dicom_folders_and_broken_links(tmp_path: Path, write_series: Any) -> None:
    write_series(tmp_path / "p1" / "t1", suffix="")
    (tmp_path / "gone.nii").symlink_to(tmp_path / "absent")
    (tmp_path / "l.csv").write_text("path,subject\np1/t1,anna\ngone.nii,berta\np1/t1/../t1/IM030001,carla\n")
    scans = find_scans([str(tmp_path / "l.csv")], cache=tmp_path)
    assert [(Path(scan.path).name, scan.subject, len(scan.files)) for scan in scans] == [
        ("gone.nii", "berta", 0),
        ("t1", "anna", 6),
        ("IM030001", "carla", 1),
    ]


def test_patterns_select_rows_of_a_list(tmp_path: Path) -> None:
    touch(tmp_path / "x" / "a.nii", tmp_path / "b.nii")
    (tmp_path / "l.csv").write_text("path\nx/a.nii\nb.nii\n")
    (scan,) = find_scans([str(tmp_path / "l.csv")], cache=tmp_path, include=["x/*"])
    assert scan.path == str(tmp_path / "x" / "a.nii")


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("l.csv", "path\na.nii\nabsent.nii\n", "line 3: there is no"),
        ("l.csv", "path\na.nii\n./a.nii\n", "line 3 names .* as line 2 does"),
        ("l.csv", "path\nnotes.txt\n", "line 2: there is no"),
        ("l.csv", "path\n" + "x" * 4000 + ".nii\n", "line 2: there is no"),
        ("l.csv", "path\nempty\n", "line 2: there is no"),
        ("l.csv", "file,subject\na.nii,s\n", "line 1: .*`path`"),
        ("l.csv", "path,path\na.nii,a.nii\n", "each column once"),
        ("l.csv", "path,\na.nii,\n", "line 1"),
        ("l.csv", "path,subject\na.nii\n", "line 2: 1 values for 2 columns"),
        ("l.csv", "path\na.nii,b\n", "line 2: 2 values for 1 columns"),
        ("l.csv", 'path\n"a.nii\n', "line 2"),
        ("l.csv", "path,subject\n,anna\n", "line 2: `path` is empty"),
        ("l.csv", "path\nn/a\n", "`path` is empty"),
        ("l.csv", "path\nftp://host/a.nii\n", "line 2: .*neither a path nor"),
        ("l.csv", "path\na\0.nii\n", "line 2"),
        ("l.csv", "", "holds no"),
        ("l.csv", "path\n", "holds no"),
        ("l.tsv", "path,subject\na.nii,s\n", "line 1"),
        ("l.jsonl", '{"path": "a.nii"}\n{"path": ', "line 2 is not JSON"),
        ("l.jsonl", '["a.nii"]', "line 1: .*the key `path`"),
        ("l.jsonl", '{"subject": "s"}', "line 1: .*the key `path`"),
        ("l.jsonl", '{"path": ["a.nii"]}', "line 1: `'path'` must be a number, or a text"),
        ("l.jsonl", '{"path": "a.nii", "tags": {"x": 1}}', "line 1: `'tags'` must be a number, or a text"),
        ("l.jsonl", '{"path": "\\ud800"}', "line 1"),
        (
            "l.jsonl",
            '{"path": "a.nii", "subject": "s\\u001b[2J"}',
            "line 1: `'subject'` .* without control characters",
        ),
        (
            "l.csv",
            f"path,subject\na.nii,{'s' * 5000}\n",
            "line 2: `'subject'` must be a number, or a text of up to 4096 characters",
        ),
        ("l.jsonl", "[" * 100_000, "line 1 is not valid: objects and lists may be 4 deep"),
        ("l.jsonl", '{"path": ' + "9" * 5000 + "}", "line 1"),
    ],
)
def test_a_list_that_breaks_a_rule_is_refused_with_the_line(tmp_path: Path, name: str, content: str, rule: str) -> None:
    touch(tmp_path / "a.nii", tmp_path / "notes.txt")
    (tmp_path / "empty").mkdir()
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=rule) as refusal:
        find_scans([str(tmp_path / name)], cache=tmp_path)
    assert str(tmp_path / name) in str(refusal.value)
    assert len(str(refusal.value)) < 5000


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("l.csv", "path\n" + "\n" * 32, "has more than 20 lines"),
        ("l.csv", "path\r" + "\r" * 32, "has more than 20 lines"),
        ("l.jsonl", "\n" * 32, "has more than 20 lines"),
        ("l.tsv", "path\t" + "\t" * 20, "line 1: 22 values; a row may have up to 10"),
        ("l.csv", "\n" + "," * 20, "line 2: 21 values; a row may have up to 10"),
        ("l.csv", "path\n" + " " * 300, "line 2: the line exceeds 200 characters"),
        (
            "l.jsonl",
            json.dumps(dict.fromkeys(["path", *map(str, range(10))])),
            "line 1: 11 keys; a row may have up to 10",
        ),
        ("l.csv", "path\n" + "a" * 2001, "has more than 2,000 bytes"),
    ],
)
def test_a_list_beyond_its_bounds_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str, rule: str
) -> None:
    for bound, value in {"MAX_LINES": 20, "_MAX_COLUMNS": 10, "_MAX_LINE_LENGTH": 200, "MAX_BYTES": 2000}.items():
        monkeypatch.setattr(lists, bound, value)
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=rule):
        only(tmp_path / name)


@pytest.mark.parametrize("letter", "\x85\x9b\u061c\u200b\u2028\u202e\u2066\ufeff\U000e0041")
@pytest.mark.parametrize("column", ["path", "subject", "site"])
def test_control_and_direction_characters_in_a_list_are_refused(tmp_path: Path, letter: str, column: str) -> None:
    touch(tmp_path / "a.nii")
    row = {"path": "a.nii", "subject": "s", "site": "x"}
    row[column] = f"a{letter}b"
    (tmp_path / "l.jsonl").write_text(json.dumps(row))
    (tmp_path / "l.csv").write_text("path,subject,site\n" + ",".join(row.values()))
    for name in ("l.jsonl", "l.csv"):
        with pytest.raises(
            DataError, match=r"line [12]: `.*` must be a number, or a text of up to 4096 characters without control"
        ) as refusal:
            only(tmp_path / name)
        assert letter not in str(refusal.value)


def test_a_list_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_bytes(b"path\n\xff\xfe.nii\n")
    with pytest.raises(DataError, match="not UTF-8"):
        find_scans([str(tmp_path / "l.csv")], cache=tmp_path)


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


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.csv", "path, subject\n{0}, A\n"),
        ("l.csv", "Path,Subject\n{0},A\n,\n"),
        ("l.csv", "subject;path\nA;{0}\n"),
        ("l.csv", "\npath\tSUBJECT_ID\n{0}\tA\n"),
        ("l.tsv", "participant_id\tpath\nA\t{0}\n\t\n"),
        ("l.jsonl", '{{"path": "{0}", "Participant_ID": "A"}}\n'),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lists_are_read_as_spreadsheets_write_them(tmp_path: Path, name: str, text: str, encoding: str) -> None:
    touch(tmp_path / "a b.nii")
    (tmp_path / name).write_bytes(text.format("a b.nii").encode(encoding))
    (scan,) = find_scans([str(tmp_path / name)], cache=tmp_path)
    assert (scan.path, scan.subject, scan.entities) == (str(tmp_path / "a b.nii"), "A", ())


def test_a_list_in_another_encoding_is_refused_with_advice(tmp_path: Path) -> None:
    touch(tmp_path / "a.nii")
    (tmp_path / "l.csv").write_bytes("path,subject\na.nii,Müller\n".encode("latin1"))
    with pytest.raises(DataError, match="iconv -f LATIN1"):
        only(tmp_path / "l.csv")


def test_a_tilde_in_a_list_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    touch(tmp_path / "scans" / "a.nii")
    (tmp_path / "l.csv").write_text("path,subject\n~/scans/a.nii,A\n")
    assert only(tmp_path / "l.csv").path == str(tmp_path / "scans" / "a.nii")


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
