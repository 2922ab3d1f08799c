"""The subjects that a survey finds in the names of a folder, without reading a voxel."""

from pathlib import Path

import pytest

from p2r.data.survey import survey
from tests.folder_cases import touch

LAYOUTS = {
    "a folder for each patient, with the patient's name in each file": "train/BraTS20_{0}/BraTS20_{0}_{1}.nii.gz",
    "a folder for each patient": "P{0}/{1}.nii.gz",
    "a folder for each contrast": "{1}/P{0}.nii.gz",
    "contrasts at the ends of names with two numbers": "BraTS20_{0}_{1}.nii.gz",
    "a number in each name": "P{0}_{1}.nii.gz",
    "words and a number in each name": "UPENN-GBM-{0}_{1}.nii.gz",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_contrasts_of_a_patient_are_of_one_subject(tmp_path: Path, layout: str) -> None:
    """Else the contrasts of a test patient would count as other patients, and pretraining would read them."""
    names = [LAYOUTS[layout].format(number, word) for number in range(6) for word in ("flair", "t1", "t1ce")]
    found = survey(touch(tmp_path, names), cache=tmp_path)
    assert len(found.subjects) == 6 and {len(scans) for scans in found.subjects.values()} == {3}


def test_a_long_name_without_a_number_is_surveyed_at_once(tmp_path: Path) -> None:
    names = ["y" * 240 + ".nii", "SiemensAxialFlairOfTheFirstParticipant.nii"]
    assert len(survey(touch(tmp_path, names), cache=tmp_path).subjects) == 2
