"""Tasks, backbones and scans that are refused before any trial runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import yaml

import p2r
from p2r.errors import DataError
from p2r.evaluate.tasks import load_task
from p2r.fewshot.checks import check_task
from p2r.fewshot.protocol import Trial, final_trials, settings_of
from p2r.fewshot.setup import TrialSetup

Make = Callable[..., TrialSetup]


def final(setup: TrialSetup, mode: str, **settings: float) -> Trial:
    chosen = settings_of(setup.config, mode, {"learning_rate": 1e-2, **settings})
    config = setup.config.model_copy(update={"modes": (mode,)})
    return final_trials(config, load_task(Path(setup.task)), {mode: chosen})[0]


@pytest.mark.parametrize(
    ("stated", "field"),
    [({"dimensions": 3}, "dimensions"), ({"dimensions": 2}, "dimensions"), ({"slice_axis": 0}, "slice_axis")],
)
def test_a_backbone_of_another_dimension_is_refused_before_anything_runs(
    make: Make, copy: Path, published: dict[str, str], stated: dict[str, Any], field: str
) -> None:
    setup, backbone = make(data=copy), p2r.load_backbone(published["backbone"])
    wanted = stated.get("dimensions", 2)
    backbone.preparation = backbone.preparation.model_copy(update={"dimensions": 5 - wanted})
    path = copy / "task.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **stated}))
    both = {2: "slices", 3: "volumes"}
    expected = rf"task disc is for networks of {both[wanted]} \({field}\), the backbone .* reads {both[5 - wanted]}"
    with pytest.raises(DataError, match=expected):
        check_task(load_task(path), backbone, setup)


def test_an_image_size_that_the_network_cannot_take_is_refused_before_anything_runs(make: Make) -> None:
    with pytest.raises(DataError, match=r"finetune\.image_size must be divisible by \d+ .*, got 33"):
        make(image_size=33)


def test_a_class_that_no_labelled_patient_has_is_refused_before_anything_runs(make: Make, copy: Path) -> None:
    (subject,) = final(make(data=copy), "scratch").subjects
    path = copy / f"labels/{subject}_T1w.nii.gz"
    image = nibabel.load(path)
    nibabel.Nifti1Image(np.zeros(image.shape, np.int16), image.affine).to_filename(path)
    with pytest.raises(DataError, match=rf"class 1 DISC is empty in all labelled patients \({subject}\)"):
        make(data=copy)


@pytest.mark.parametrize(("split", "subject"), [("test", "sub-07"), ("validation", "sub-06")])
def test_a_scan_that_the_backbone_saw_under_another_name_is_refused_before_anything_runs(
    make: Make, copy: Path, split: str, subject: str
) -> None:
    for kind in ("images", "labels"):
        (copy / f"{kind}/sub-01_T1w.nii.gz").replace(copy / f"{kind}/{subject}_T1w.nii.gz")
    path = copy / "task.yaml"
    task = yaml.safe_load(path.read_text())
    task["splits"]["train"] = ["sub-[02-05]"]
    path.write_text(yaml.safe_dump(task))
    with pytest.raises(
        DataError, match=rf"scan {subject}_T1w of the {split} split is in the backbone's corpus .*would leak"
    ):
        make(data=copy)
    setup = make(data=copy, allow_transductive=True)
    assert setup.is_transductive


def test_exchanged_label_maps_are_refused_unless_the_task_allows_them(make: Make, copy: Path) -> None:
    one, other = (copy / f"labels/sub-0{number}_T1w.nii.gz" for number in (1, 2))
    kept = one.read_bytes()
    other.replace(one)
    other.write_bytes(kept)
    with pytest.raises(DataError, match=r"task disc: sub-01_T1w.nii.gz and sub-02_T1w.nii.gz fit each other's images"):
        make(data=copy)
    with (copy / "task.yaml").open("a") as file:
        file.write("find_mix_ups: false\n")
    make(data=copy)


def test_patients_without_a_search_need_not_have_every_class(make: Make, copy: Path) -> None:
    (subject,) = final(make(data=copy), "scratch").subjects
    path = copy / f"labels/{subject}_T1w.nii.gz"
    image = nibabel.load(path)
    nibabel.Nifti1Image(np.zeros(image.shape, np.int16), image.affine).to_filename(path)
    make(data=copy, num_labelled=["all"])
    with pytest.raises(DataError, match="class 1 DISC is empty"):
        make(data=copy, num_labelled=["all"], search={"learning_rates": {"scratch": [1e-3, 1e-2]}})
