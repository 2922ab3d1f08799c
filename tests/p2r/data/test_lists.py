"""Lists of scans: columns, formats, precedence, and the rules that they must keep."""

import json
from pathlib import Path
from typing import Any

import pytest

from p2r.data import lists
from p2r.data.scans import Scan, find_scans
from p2r.errors import DataError


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"12345")


def only(source: str | Path) -> Scan:
    (scan,) = find_scans([str(source)], cache=Path("/nowhere"))
    return scan


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


def test_a_list_has_precedence_over_a_bids_folder_whichever_is_named_first(tmp_path: Path) -> None:
    touch(tmp_path / "bids/dataset_description.json", tmp_path / "bids/sub-01/anat/sub-01_T1w.nii.gz")
    (tmp_path / "l.csv").write_text("path,subject,contrast\nbids/sub-01/anat/sub-01_T1w.nii.gz,anna,t1\n")
    for sources in ([tmp_path / "bids", tmp_path / "l.csv"], [tmp_path / "l.csv", tmp_path / "bids"]):
        (scan,) = find_scans(map(str, sources), cache=tmp_path)
        assert scan.subject == "anna" and dict(scan.entities)["contrast"] == "t1"


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
