"""Sidecars: only technical tags are kept, inherited by the rules of BIDS, and hostile JSON is harmless."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2r.data.bids import applies, entities_of
from p2r.data.sidecar import MAX_BYTES, TAGS, allowed_tags, common_tags, read_sidecar

# Tags that dcm2niix 1.0.20260724 writes with `-b y -ba y`, its anonymisation option.
ANONYMISED = """{
    "Modality": "MR", "MagneticFieldStrength": 3, "Manufacturer": "Siemens", "ManufacturersModelName": "Prisma",
    "InstitutionName": "SECRET", "InstitutionalDepartmentName": "SECRET", "DeviceSerialNumber": "SECRET",
    "StationName": "SECRET", "MRAcquisitionType": "3D", "SeriesDescription": "SECRET", "ProtocolName": "SECRET",
    "ScanningSequence": "GR", "ImageType": ["ORIGINAL", "PRIMARY", "M", "ND", "MAGNITUDE"],
    "NonlinearGradientCorrection": false, "SeriesNumber": 3, "AcquisitionTime": "SECRET", "ImageComments": "SECRET",
    "SliceThickness": 4, "EchoTime": 0.003, "RepetitionTime": 2, "SpoilingState": true, "FlipAngle": 9
}"""


def write(path: Path, **tags: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tags))


def test_personal_tags_that_dcm2niix_keeps_are_dropped() -> None:
    tags, num_ignored = allowed_tags(ANONYMISED.encode())
    assert "SECRET" not in str(tags)
    assert num_ignored == 0
    assert tags["EchoTime"] == 0.003
    assert tags["ImageType"] == ["ORIGINAL", "PRIMARY", "M", "ND", "MAGNITUDE"]
    assert tags["SpoilingState"] is True
    assert len(tags) == 13


def test_no_listed_tag_is_a_name_a_date_a_place_or_free_text() -> None:
    for word in ("Name", "Date", "Time", "ID", "Comment", "Description", "Serial", "Institution", "Station", "Birth"):
        named = {tag for tag in TAGS if word in tag}
        assert named <= {
            "ManufacturersModelName", "SequenceName", "ReceiveCoilName", "EchoTime", "EchoTime1", "EchoTime2",
            "RepetitionTime", "RepetitionTimeExcitation", "RepetitionTimePreparation", "InversionTime", "DwellTime",
            "TotalReadoutTime", "InPlanePhaseEncodingDirectionDICOM",
        }, word  # fmt: skip


@pytest.mark.parametrize(
    ("tag", "value", "is_kept"),
    [
        ("EchoTime", 0.003, True),
        ("EchoTime", 3, True),
        ("EchoTime", [0.003, 0.006], True),
        ("EchoTime", "Jane Doe", False),
        ("EchoTime", True, False),
        ("EchoTime", [[1]], False),
        ("EchoTime", {"a": 1}, False),
        ("EchoTime", None, False),
        ("EchoTime", 10**400, False),
        ("EchoTime", [0.1] * 513, False),
        ("Manufacturer", "GE", True),
        ("Manufacturer", 3, False),
        ("Manufacturer", "x" * 65, False),
        ("Manufacturer", "line\nbreak", False),
        ("Manufacturer", "naïve", False),
        ("ScanOptions", ["FS", "SAT1"], True),
        ("ScanOptions", ["FS", 1], False),
        ("MTState", False, True),
        ("MTState", 0, False),
        ("PatientName", "Jane Doe", None),
        ("patientname", "Jane Doe", None),
    ],
)
def test_a_value_must_have_the_type_of_its_tag(tag: str, value: Any, is_kept: bool | None) -> None:
    tags, num_ignored = allowed_tags(json.dumps({tag: value}).encode())
    assert tags == ({tag: value} if is_kept else {})
    assert num_ignored == (is_kept is False)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"EchoTime": ' + b"9" * 5000 + b"}",
        b'{"EchoTime": 1, "x": "' + b"x" * MAX_BYTES + b'"}',
    ],
)
def test_unusable_json_is_skipped_and_counted(content: bytes) -> None:
    assert allowed_tags(content) == ({}, 1)


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_nonfinite_numbers_are_not_kept(constant: str) -> None:
    assert allowed_tags(f'{{"EchoTime": {constant}}}'.encode()) == ({}, 1)


VALUES: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from([None, True, [], [[]], {}, {"a": 1}, [None], ["a", 1], 10**400, "x" * 65, "\0", [1e308] * 600]),
    st.text(max_size=8),
    st.floats(),
    st.integers(),
)
JSON = st.dictionaries(st.sampled_from([*sorted(TAGS), "PatientName"]), VALUES, max_size=4)


@settings(max_examples=300, derandomize=True, database=None, deadline=None)
@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_give_tags_that_json_can_represent(content: bytes) -> None:
    tags, num_ignored = allowed_tags(content)
    assert set(tags) <= set(TAGS)
    assert num_ignored >= 0
    assert json.loads(json.dumps(tags, allow_nan=False)) == tags


def test_the_sidecar_beside_a_scan_is_read(tmp_path: Path) -> None:
    write(tmp_path / "scan.json", EchoTime=1, PatientName="secret")
    write(tmp_path / "other.json", EchoTime=2)
    write(tmp_path / "T1w.json", FlipAngle=9)
    for name in ("scan.nii", "scan.nii.gz", "scan.hdr"):
        assert read_sidecar(str(tmp_path / name)) == ({"EchoTime": 1}, 0)
    assert read_sidecar(str(tmp_path / "sub-01_T1w.nii")) == ({}, 0), "no data set, nothing is inherited"


def test_in_a_data_set_the_nearest_and_most_specific_sidecar_has_precedence(tmp_path: Path) -> None:
    write(tmp_path / "bold.json", EchoTime=0)  # above the data set
    data = tmp_path / "ds"
    write(data / "dataset_description.json")
    write(data / "bold.json", EchoTime=1, FlipAngle=1, RepetitionTime=1, EchoNumber=1, InversionTime=1)
    write(data / "task-rest_bold.json", FlipAngle=2, RepetitionTime=2, EchoNumber=2)
    write(data / "task-other_bold.json", FlipAngle=99)
    write(data / "sub-01" / "sub-01_bold.json", RepetitionTime=3, EchoNumber=3)
    write(data / "sub-01" / "func" / "sub-01_task-rest_run-1_bold.json", EchoNumber=4)
    write(data / "sub-01" / "func" / "sub-01_task-rest_run-2_bold.json", EchoNumber=99)
    write(data / "sub-01" / "func" / "sub-01_task-rest_run-1_sbref.json", EchoNumber=99)
    scan = data / "sub-01" / "func" / "sub-01_task-rest_run-1_bold.nii.gz"
    expected = {"EchoTime": 1, "FlipAngle": 2, "RepetitionTime": 3, "EchoNumber": 4, "InversionTime": 1}
    assert read_sidecar(str(scan)) == (expected, 0)
    (data / "sub-01" / "sub-01_bold.json").write_text("{")
    assert read_sidecar(str(scan)) == ({**expected, "RepetitionTime": 2}, 1)


def test_a_folder_or_broken_link_is_no_sidecar(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    (tmp_path / "b.json").symlink_to(tmp_path / "absent")
    assert read_sidecar(str(tmp_path / "a.nii")) == read_sidecar(str(tmp_path / "b.nii")) == ({}, 0)


def test_entities_are_read_from_valid_names() -> None:
    assert entities_of("sub-01_ses-2_acq-a_ce-gd_rec-x_dir-AP_run-03_T1w.nii.gz") == {
        "sub": "01", "ses": "2", "acq": "a", "ce": "gd", "rec": "x", "dir": "AP", "run": "03", "suffix": "T1w",
    }  # fmt: skip
    for name in ("sub-01_sub-02_T1w.nii", "sub-_T1w.nii", "sub-01_T1w copy.nii", "sub-01_a-b-c_T1w.nii", "-_x.nii"):
        assert entities_of(name) == {}
    assert applies("task-rest_bold.json", "sub-01_task-rest_bold.nii.gz")
    assert not applies("task-rest_bold.json", "sub-01_bold.nii.gz")
    assert not applies("sub-01_bold.nii.gz", "sub-01_bold.nii.gz")


def test_common_tags_are_those_equal_in_all_images() -> None:
    assert common_tags([{"a": 1, "b": 2}, {"a": 1, "b": 3}]) == {"a": 1}
    assert common_tags([{"a": 1}, {}]) == {}
