"""Paths with `{key}`: the scans of each patient, the commands on many patients, and the paths that are refused."""

from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest

from cluster.patients import describe_patients, has_keys, list_patients
from p2r.data.volume import write_nifti
from p2r.errors import InputError
from tests.publishing import publish_toy
from tests.toy import write_toy_sessions

Write = Callable[..., Path]
P2R = Callable[..., tuple[int, str]]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes empty files, by their paths below a folder that it returns."""

    def write(*names: str) -> Path:
        for name in names:
            path = tmp_path / "scans" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path / "scans"

    return write


def grouped(root: Path, **contrasts: str) -> dict[str, dict[str, str]]:
    """Return the scans of each key by contrast, relative to the folder."""
    patients = list_patients({name: f"{root}/{path}" for name, path in contrasts.items()}, str(root / "out"))
    for one in patients:
        assert one.scan == one.scans[0] and one.path == root / f"out/{one.key}.nii.gz"
    return {one.key: {name: str(Path(scan).relative_to(root)) for name, scan in one.contrasts} for one in patients}


def test_the_files_of_one_key_are_one_patient_in_the_order_of_the_contrasts(write: Write) -> None:
    root = write(
        "a_t1.nii.gz", "a_flair.NII.GZ", "site/b_t1.nii.gz", "a_flair_seg.nii.gz", "out/a_t1.nii.gz", "a_t1.txt"
    )
    assert grouped(root, flair="{key}_flair.nii.gz", t1="{key}_t1.nii.gz") == {
        "a": {"flair": "a_flair.NII.GZ", "t1": "a_t1.nii.gz"},
        "site/b": {"t1": "site/b_t1.nii.gz"},
    }


def test_a_key_may_be_a_folder_and_occur_twice(write: Write) -> None:
    root = write("s1/anat/s1_T1w.nii.gz", "s1/anat/s1_ce-GD_T1w.nii.gz", "s2/anat/other_T1w.nii.gz", "s2/t2/1.dcm")
    assert grouped(root, t1="{key}/anat/{key}_T1w.nii.gz", t2="{key}/t2") == {
        "s1": {"t1": "s1/anat/s1_T1w.nii.gz"},
        "s2": {"t2": "s2/t2"},
    }
    # Of both contrasts that fit s1_ce-GD_T1w, the one with the shorter key.
    assert grouped(root, t1="{key}_T1w", t1ce="{key}_ce-GD_T1w") == {
        "s1/anat/s1": {"t1": "s1/anat/s1_T1w.nii.gz", "t1ce": "s1/anat/s1_ce-GD_T1w.nii.gz"},
        "s2/anat/other": {"t1": "s2/anat/other_T1w.nii.gz"},
    }


def test_contrasts_along_the_fourth_axis_share_a_path(write: Write) -> None:
    root = write("a.nii.gz", "b.nii.gz", "b_t2.nii.gz")
    four = f"{root}/{{key}}.nii.gz"
    found = list_patients({"flair": four, "t1": four, "t2": f"{root}/{{key}}_t2.nii.gz"}, str(root / "out"))
    assert [(one.key, one.contrasts) for one in found] == [
        ("a", (("flair", f"{root}/a.nii.gz"), ("t1", f"{root}/a.nii.gz"))),
        ("b", (("flair", f"{root}/b.nii.gz"), ("t1", f"{root}/b.nii.gz"), ("t2", f"{root}/b_t2.nii.gz"))),
    ]


def test_a_key_never_leaves_the_output(write: Write) -> None:
    root = write("a../b/t1.nii.gz", "a/c/t1.nii.gz", "a1/t1.nii.gz")
    assert set(grouped(root, t1="a{key}/t1.nii.gz")) == {"1"}


def test_the_numbers_of_patients_show_a_name_that_fits_one_contrast_only(write: Write) -> None:
    root = write("a_t1.nii.gz", "a_flair.nii.gz", "b_t1.nii.gz", "b_flair.nii.gz", "c_t1.nii.gz", "C_flair.nii.gz")
    contrasts = {name: f"{root}/{{key}}_{name}.nii.gz" for name in ("t1", "flair")}
    assert list(describe_patients(list_patients(contrasts, str(root / "out")), list(contrasts))) == [
        "4 patients: t1 of 3, flair of 3",
        "1 without t1: C",
        "1 without flair: c",
    ]


@pytest.mark.parametrize(
    ("contrasts", "output", "message"),
    [
        ({"t1": "{root}/{key}_t1.nii.gz", "t2": "{root}/{key}_t2.nii.gz"}, "out", "no scan matches t2=.*leave t2 out"),
        (
            {"t1": "{root}/{key}_t1.nii.gz", "t2": "{root}/a_t2.nii.gz"},
            "out",
            "t2=.* has no {key}, but other contrasts",
        ),
        ({"t1": "{root}/{subject}_t1.nii.gz"}, "out", "for a patient is {key}, not {subject}"),
        ({"t1": "{root}/{key}_t1"}, "out", "a_t1.nii and .*a_t1.nii.gz both are the contrast t1 of a"),
        ({"t1": "{root}/{key}_t1.nii", "t2": "{root}/{key}_t1"}, "out", "a_t1.nii matches t1=.* and t2="),
        ({"t1": "{root}/absent/{key}.nii"}, "out", "there is no folder"),
        ({"t1": "s3://bucket/{key}_t1.nii"}, "out", "only folders of this machine are searched"),
        ({"t1": "{root}/{key}_t1.nii"}, "out/{key}.nii.gz", "go into a folder"),
    ],
)
def test_paths_that_do_not_name_patients_are_refused(
    write: Write, contrasts: dict[str, str], output: str, message: str
) -> None:
    root = write("a_t1.nii.gz", "a_t1.nii")
    given = {name: path.replace("{root}", str(root)) for name, path in contrasts.items()}
    with pytest.raises(InputError, match=message):
        assert has_keys(given)
        list_patients(given, output)


def test_an_image_of_contrasts_along_its_fourth_axis_has_the_features_of_separate_scans(
    p2r: P2R, tmp_path: Path
) -> None:
    data = write_toy_sessions(tmp_path / "data", num_subjects=1)
    url = publish_toy(str(tmp_path / "backbone"), contrasts=("flair", "t1"))["url"]
    flair, t1 = (data / f"sub-01/anat/sub-01_{name}.nii.gz" for name in ("FLAIR", "T1w"))
    both = tmp_path / "t1-flair.nii.gz"
    images = [nibabel.load(path) for path in (t1, flair)]
    write_nifti(both, np.stack([np.asarray(image.dataobj) for image in images], -1), images[0].affine)
    for name, scans in {"separate": [f"t1={t1}", f"flair={flair}"], "both": [f"t1, FLAIR = {both}"]}.items():
        code, said = p2r("embed", url, *scans, "-o", tmp_path / f"{name}.nii.gz")
        assert code == 0, said
    found = [nibabel.load(tmp_path / f"{name}.nii.gz").get_fdata() for name in ("separate", "both")]
    np.testing.assert_array_equal(*found)
    for given, message in {
        (
            f"t1={both}",
            f"flair={both}",
        ): "is given as t1 and as flair: if its fourth axis holds several contrasts, name them",
        (f"t1,t1={both}",): "the contrast t1 is named twice",
        (f"t1,flair={t1}",): "has 1 image along its fourth axis, which 2 contrasts are to share, t1, flair",
        (f"t1,flair={both}", f"t1={t1}"): "the contrast t1 is named twice",
        (f"t1,flair,t2={both}",): "never saw the contrast t2",
    }.items():
        code, said = p2r("embed", url, *given, "-o", tmp_path / "refused.nii.gz")
        assert code == 2 and message in said, said


def test_embed_writes_the_features_of_each_patient_into_a_folder(p2r: P2R, tmp_path: Path) -> None:
    data = write_toy_sessions(tmp_path / "data", num_subjects=2, missing={"sub-02": ["t1"]})
    url = publish_toy(str(tmp_path / "backbone"), contrasts=("flair", "t1"))["url"]
    given = [f"t1={data}/{{key}}/anat/{{key}}_T1w.nii.gz", f"flair={data}/{{key}}/anat/{{key}}_FLAIR.nii.gz"]
    code, said = p2r("embed", url, *given, "-o", tmp_path / "out", "--native")
    assert code == 0 and "1 without t1: sub-02" in said and "2/2 | sub-02 (flair) | 2 features" in said, said
    assert nibabel.load(tmp_path / "out/sub-02.nii.gz").shape == (36, 40, 3, 2)
    for arguments, message in (
        ((*given, "-o", tmp_path / "out.nii.gz"), "of several scans go into a folder"),
        ((given[0].removeprefix("t1="), "-o", tmp_path / "out"), "has no contrast: {key} is for patients"),
        ((given[0].replace("t1=", "t2="), "-o", tmp_path / "out"), "never saw the contrast t2"),
        ((f"t1={data}/labels/{{key}}.nii.gz", "-o", data / "labels"), "would replace the scan"),
    ):
        code, said = p2r("embed", url, *arguments)
        assert code == 2 and message in said, said
