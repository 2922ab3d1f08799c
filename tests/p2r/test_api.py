"""What people who write Python import from `p2r`: typed, lazy, and the same as the commands."""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

import p2r
from p2r.data.volume import read_volume
from p2r.errors import InputError, JobError, RefusedScan
from p2r.evaluate.models import ensemble
from p2r.job import read_job


def test_importing_p2r_imports_neither_torch_nor_numpy() -> None:
    code = "import sys, p2r; p2r.__all__; assert not {'torch', 'numpy', 'ray', 'nibabel'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert {name for name in p2r.__all__ if getattr(p2r, name)} == set(p2r.__all__) <= set(dir(p2r))


def test_a_model_segments_a_path_an_image_and_a_volume_alike(
    published: dict[str, str], toy_data: Path, tmp_path: Path
) -> None:
    model = p2r.load_model(published["model"])
    scan = toy_data / "images/sub-07_T1w.nii.gz"
    found = model.predict(scan)
    assert isinstance(found, nibabel.Nifti1Image)
    assert np.array_equal(found.affine, nibabel.load(scan).affine) and found.shape == (36, 40, 3)
    for other in (str(scan), nibabel.load(scan), read_volume(scan)):
        assert np.array_equal(np.asarray(model.predict(other).dataobj), np.asarray(found.dataobj))
    found.to_filename(tmp_path / "segmentation.nii.gz")
    assert dict(model.classes) == {1: "DISC"}
    assert model.volumes_ml(model.labels(read_volume(scan)), read_volume(scan))["DISC"][0] > 0
    with pytest.raises(RefusedScan, match="constant"):
        model.predict(nibabel.Nifti1Image(np.ones((20, 20, 3), np.int16), np.eye(4)))


def test_what_an_ensemble_cannot_join_is_refused_by_name(published: dict[str, str]) -> None:
    model = p2r.load_model(published["model"])
    assert ensemble([model]) is model
    changes: list[tuple[dict[str, Any], str]] = [
        ({"classes": {1: "SPHERE"}}, "its classes differ, {1: 'SPHERE'} instead of {1: 'DISC'}"),
        (
            {"preparation": model.config.preparation.model_copy(update={"spacing_mm": 1.5})},
            "its preparation differs, spacing_mm 1.5 instead of 2.0",
        ),
        ({"largest_component": True}, "its largest_component differs, True instead of False"),
    ]
    for change, words in changes:
        other = replace(
            model,
            config=model.config.model_copy(update=change),
            members=(replace(model.members[0], url="file:///other"),),
        )
        with pytest.raises(InputError, match=re.escape(words)) as refused:
            ensemble([model, other])
        assert str(refused.value).startswith(f"file:///other cannot join an ensemble with {model.manifest['url']}")
    with pytest.raises(InputError, match="at least one model"):
        ensemble([])
    copied = replace(model, members=(replace(model.members[0], url="file:///copy"),))
    for again, words in ((model, "is given twice"), (copied, f"has the weights of {model.manifest['url']}")):
        with pytest.raises(InputError, match=re.escape(words)):
            ensemble([model, again])


def test_a_backbone_gives_features_without_a_graph(published: dict[str, str], toy_data: Path) -> None:
    backbone = p2r.load_backbone(published["backbone"])
    features = backbone.features(toy_data / "images/sub-07_T1w.nii.gz")
    assert features.shape == (3, 4, 32, 32) and not features.requires_grad
    images = backbone.prepare(toy_data / "images/sub-07_T1w.nii.gz").images
    assert torch.equal(backbone.features(images), features)


def test_a_backbone_of_volumes_prepares_volumes(published: dict[str, str], toy_data: Path) -> None:
    backbone = p2r.load_backbone(published["backbone"])
    backbone.preparation = backbone.preparation.model_copy(update={"dimensions": 3})
    assert backbone.prepare(toy_data / "images/sub-07_T1w.nii.gz").images.shape == (1, 1, 32, 32, 32)


def test_the_published_model_is_what_its_words_say(published: dict[str, str]) -> None:
    best, on_all = p2r.load_model(published["model"]), p2r.load_model(f"{published['storage']}/models/disc/all")
    trial = on_all.manifest["trial"]
    assert best.manifest["trial"]["mode"] == trial["mode"] == "fine_tune"
    assert trial["subjects"] == [f"sub-{number:02d}" for number in range(1, 6)] and trial["purpose"] == "publish"
    report = p2r.open_report(published["storage"])
    assert {row["purpose"] for row in report.rows} == {"final"}
    page = Path(published["storage"].removeprefix("file://"), "report/report.md").read_text()
    assert "The published model (fine-tuned) on" in page


def test_run_takes_a_path_or_a_job_and_overrides(write_toy_job: Callable[..., Path], tmp_path: Path) -> None:
    path = write_toy_job(tmp_path)
    said: list[str] = []
    made = p2r.run(path, kind="ingest", ingest__subjects_of=None, say=said.append)
    assert made["corpus"].endswith("storage/corpus") and any("8 scans of 8 subjects" in line for line in said)
    job = read_job(path, ("kind=ingest", "ingest.subjects_of=null"))
    again = p2r.run(job, ingest__shard_size_mib=1.0, storage=str(tmp_path / "other"), say=said.append)
    assert again["corpus"].endswith("other/corpus")
    with pytest.raises(JobError, match="did you mean steps"):
        p2r.run(path, pretrain__stpes=3, say=said.append)
