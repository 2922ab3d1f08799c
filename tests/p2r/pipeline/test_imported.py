"""A checkpoint in nnssl's format starts a pretraining run, and is fine-tuned as it is; report and manifest say what was matched."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import p2r
from p2r.config import ModelConfig, OtherConfig
from p2r.errors import CheckpointError, DataError, InputError, JobError
from p2r.fewshot.others import load_other
from p2r.job import read_job
from p2r.model.backbones import build_backbone
from p2r.pipeline.local import LocalExecutor
from p2r.pipeline.stages import run_job
from p2r.storage import Storage
from tests.nnunet_names import nnunet_state, save_nnssl

MODEL = "{name: residual_encoder_unet, channels: [4, 8, 8], blocks: [1, 2, 2], feature_channels: 4}"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(7)
    config = ModelConfig(name="residual_encoder_unet", channels=(4, 8, 8), blocks=(1, 2, 2), feature_channels=4)
    path = tmp_path / "checkpoint_final.pth"
    save_nnssl(path, nnunet_state(build_backbone(config).state_dict()))
    return path


def run(job: Path, *overrides: str) -> tuple[dict[str, Any], str]:
    lines: list[str] = []
    made = run_job(read_job(job, overrides), LocalExecutor(torch.device("cpu"), None), say=lines.append).to_json()
    return made, "\n".join(lines)


def test_a_run_starts_from_another_tools_weights_and_says_what_was_matched(
    write_toy_job: Callable[..., Path], checkpoint: Path, tmp_path: Path
) -> None:
    job = write_toy_job(tmp_path)
    overrides = (f"pretrain.model={MODEL}", f"pretrain.init_from={checkpoint}", "pretrain.steps=2", "kind=pretrain")
    made, said = run(job, *overrides)
    assert "initial weights of nnU-Net's ResidualEncoderUNet" in said and "matched" in said and "left out" in said
    record = json.loads((Path(made["checkpoint"].removeprefix("file://")) / "manifest.json").read_text())["init_from"]
    assert record["format"] == "foreign" and record["origins"] is None and "OpenMind" in record["citations"]
    assert {row["outcome"] for row in record["table"]} == {"matched", "left out"}
    published, said = run(job, *overrides[:-1], "kind=publish")
    assert "CORPORA UNKNOWN" in said
    manifest = p2r.load_backbone(published["backbone"]).manifest
    assert manifest["initial_weights"]["file"] == "checkpoint_final.pth" and "unknown" in manifest["licence"]
    checkpoint.unlink()
    assert "initial weights" not in run(job, *overrides)[1], "a finished run does not need the file again"
    with pytest.raises(CheckpointError, match="does not exist"):
        run(job, *overrides, f"storage={tmp_path}/other")


def test_another_tools_weights_are_fine_tuned_and_reported(
    write_toy_job: Callable[..., Path], checkpoint: Path, tmp_path: Path
) -> None:
    job = write_toy_job(tmp_path)
    imported = f"{{model: {MODEL}, image: {{size: 32, spacing_mm: 2.0}}, licence: CC-BY-4.0}}"
    overrides = (
        *("kind=finetune", f"finetune.backbone={checkpoint}", f"finetune.imported={imported}", "finetune.steps=2"),
        *("finetune.num_labelled=[1]", "finetune.modes=[fine_tune]"),
    )
    with pytest.raises(InputError, match="does not list the corpora of its pretraining"):
        run(job, *overrides)
    made, said = run(job, *overrides, "finetune.allow_transductive=true")
    assert "weights of nnU-Net's ResidualEncoderUNet" in said and "TRANSDUCTIVE" in said
    report = Storage(made["storage"]).read_json("report/report.json")
    (row,) = report["rows"]
    assert row["mode"] == "fine_tune" and report["context"]["initial_weights"]["source"].startswith("nnU-Net")
    page = Path(made["page"].removeprefix("file://")).read_text(encoding="utf-8")
    for words in ("Weights of another tool", "checkpoint_final.pth", "second name of the same layers", "OpenMind"):
        assert words in page
    backbone = p2r.load_backbone(report["context"]["backbone"]["url"])
    theirs = torch.load(checkpoint, weights_only=True)["network_weights"]
    assert torch.equal(
        backbone.state_dict()["network.unet.encoder.stem.convs.0.conv.weight"],
        theirs["encoder.stem.convs.0.conv.weight"],
    )


def test_a_weights_file_needs_its_description_and_only_it(write_toy_job: Callable[..., Path], tmp_path: Path) -> None:
    job = write_toy_job(tmp_path)
    with pytest.raises(JobError, match=r"is a weights file, which states neither network nor image nor licence"):
        read_job(job, ("kind=finetune", "finetune.backbone=/x/a.pth"))
    described = f"finetune.imported={{model: {MODEL}, image: {{size: 32}}, licence: MIT}}"
    with pytest.raises(JobError, match="imported describes a weights file, and backbone names none"):
        read_job(job, ("kind=finetune", "finetune.backbone=/x/a", described))


def test_another_tools_frozen_network_has_a_row_of_its_own(
    write_toy_job: Callable[..., Path], published: dict[str, str], tmp_path: Path
) -> None:
    job = write_toy_job(tmp_path)
    other = (
        "{name: edges, build: tests.other_network:edges, image: {size: 24, spacing_mm: 2.0}, options: {features: 3}}"
    )
    overrides = (
        *("kind=finetune", f"finetune.backbone={published['backbone']}", f"finetune.other={other}"),
        *("finetune.steps=4", "finetune.num_labelled=[1]", "finetune.modes=[linear_probe, other_probe]"),
    )
    made, said = run(job, *overrides, "finetune.search.learning_rates={linear_probe: [5.0e-2], other_probe: [5.0e-2]}")
    assert "other network: edges, 3 features" in said
    rows = {row["mode"]: row for row in Storage(made["storage"]).read_json("report/report.json")["rows"]}
    ours, theirs = rows["linear_probe"], rows["other_probe"]
    assert theirs["corpora"] == "unknown" and theirs["transductive"] and not ours["transductive"]
    assert theirs["backbone_sha256"] != ours["backbone_sha256"] and theirs["dice_mean"] is not None
    report = Path(made["report"].removeprefix("file://")).read_text(encoding="utf-8")
    assert "other, probe" in report and "linear_probe" in made["models"]["disc"]
    with pytest.raises(JobError, match="other and the mode other_probe need each other"):
        read_job(job, (*overrides[:-1], "finetune.modes=[linear_probe]"))


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        ("tests.other_network:none", "cannot be built: AttributeError"),
        ("no_such_package:build", "cannot be built: ModuleNotFoundError"),
        ("tests.other_network:vector", r"must return features \(B, F, H, W\), or on a coarser grid; got \(1, 5\)"),
        ("tests.other_network:picky", r"refuses an image \(1, 1, 24, 24\): ValueError: not this size"),
        ("tests.other_network:text", "returned str; it must return a torch.nn.Module"),
    ],
)
def test_a_network_that_cannot_stand_in_is_refused(function: str, rule: str) -> None:
    config = OtherConfig.model_validate({"name": "x", "build": function, "image": {"size": 24}})
    with pytest.raises(DataError, match=rule):
        load_other(config)
