import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from p2r.backbone import load_backbone
from p2r.errors import InputError
from p2r.export import export
from p2r.export.add_to_plans import add_configuration

Publish = Callable[..., str]
needs_nnunet = pytest.mark.skipif(
    find_spec("nnunetv2") is None, reason="nnunetv2 is not installed: pip install nnunetv2 in an environment of its own"
)

TRAIN = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from nnunetv2.run import run_training
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
trainer = run_training.get_trainer_from_args("1", sys.argv[1], 0, device=torch.device("cpu"))
trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, 5, 1
trainer.initialize()
run_training.maybe_load_checkpoint(trainer, False, False, sys.argv[2])
saved = torch.load(sys.argv[2], weights_only=True)["network_weights"]
loaded = trainer.network.state_dict()
assert all(torch.equal(loaded[name], value) for name, value in saved.items()), "weights were not loaded"
trainer.run_training()
changed = sum(not torch.equal(trainer.network.state_dict()[name], value) for name, value in saved.items())
print("STEPS 5, LOSS", float(trainer.logger.get_value("train_losses", -1)) if hasattr(trainer.logger, "get_value")
      else float(trainer.logger.my_fantastic_logging["train_losses"][-1]), "CHANGED", changed, "OF", len(saved))
"""


@pytest.mark.parametrize(("name", "dimensions"), [("dynunet", 2), ("dynunet", 3), ("residual_encoder_unet", 3)])
def test_a_checkpoint_for_nnunet_starts_p2r_with_the_same_features(
    publish_toy: Publish, tmp_path: Path, name: str, dimensions: int
) -> None:
    from p2r.model.backbones import build_backbone
    from p2r.model.foreign import transfer

    url = publish_toy(name, dimensions=dimensions)
    lines = export(url, to="nnunet", folder=tmp_path / "nnunet")
    assert any("read back by p2r: the same weights" in line for line in lines)
    saved = torch.load(tmp_path / "nnunet" / "checkpoint.pth", weights_only=True)
    backbone: Any = load_backbone(url).network
    again: Any = build_backbone(backbone.config, dimensions=dimensions)
    again.load_state_dict(backbone.state_dict())
    torch.nn.init.zeros_(next(again.unet.parameters()))
    moved = transfer(
        saved["network_weights"],
        lambda config: build_backbone(config, dimensions=dimensions),
        backbone.config,
        where="checkpoint",
    )
    again.load_state_dict(moved.weights, strict=False)
    image = torch.rand(1, 1, *[32] * dimensions)
    with torch.no_grad():
        assert torch.equal(again(image), backbone(image))


def test_the_configuration_is_added_to_plans_with_a_patch_that_the_network_can_halve(
    publish_toy: Publish, tmp_path: Path
) -> None:
    export(publish_toy("dynunet"), to="nnunet", folder=tmp_path / "nnunet")
    plans = tmp_path / "nnUNetPlans.json"
    plans.write_text(json.dumps({"configurations": {"2d": {"patch_size": [36, 5], "batch_size": 2}}}))
    command = [sys.executable, str(tmp_path / "nnunet" / "add_to_plans.py"), str(plans)]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
    made = json.loads(plans.read_text())["configurations"]["2d_p2r"]
    assert made["patch_size"] == [36, 8]
    assert made["inherits_from"] == "2d"
    assert made["architecture"]["network_class_name"].endswith(".PlainConvUNet")
    with pytest.raises(KeyError, match="2d"):
        add_configuration({"configurations": {}}, json.loads((tmp_path / "nnunet/configuration.json").read_text()))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("basic_unet", {}, "the tool has no basic_unet, but dynunet"),
        ("dynunet", {"normalisation": "group", "groups": 2}, "instance normalisation, this one has group"),
        ("dynunet", {"level": 1}, "ends at level 1 of the decoder, and the tool's networks at level 0"),
    ],
)
def test_a_network_that_nnunet_lacks_is_refused_by_name(
    publish_toy: Publish, tmp_path: Path, name: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        export(publish_toy(name, **settings), to="nnunet", folder=tmp_path / "nnunet")
    assert not (tmp_path / "nnunet").exists()


@needs_nnunet
def test_nnunets_own_commands_train_from_the_checkpoint(publish_toy: Publish, toy_data: Path, tmp_path: Path) -> None:
    raw = tmp_path / "raw" / "Dataset001_Disc"
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True)
    scans = sorted((toy_data / "images").glob("*.nii.gz"))[:5]
    for number, scan in enumerate(scans):
        (raw / "imagesTr" / f"disc_{number:03d}_0000.nii.gz").write_bytes(scan.read_bytes())
        (raw / "labelsTr" / f"disc_{number:03d}.nii.gz").write_bytes((toy_data / "labels" / scan.name).read_bytes())
    facts = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "disc": 1},
        "numTraining": len(scans),
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(facts))
    places = {f"nnUNet_{place}": str(tmp_path / place) for place in ("raw", "preprocessed", "results")}
    environment = {**os.environ, **places, "nnUNet_n_proc_DA": "1", "nnUNet_compile": "f", "OMP_NUM_THREADS": "1"}
    plan = "from nnunetv2.experiment_planning.plan_and_preprocess_entrypoints import plan_and_preprocess_entry as run; run()"

    def run(*command: str, **more: str) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", *command],
            env={**environment, **more},
            capture_output=True,
            text=True,
            timeout=550,
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        return done.stdout

    run("-c", plan, "-d", "1", "-c", "2d", "-np", "1", "-npfp", "1")
    plans = tmp_path / "preprocessed" / "Dataset001_Disc" / "nnUNetPlans.json"
    for name in ("dynunet", "residual_encoder_unet"):
        exported = tmp_path / name
        lines = export(publish_toy(name, channels=(8, 16, 16)), to="nnunet", folder=exported)
        assert any("nnU-Net's own network" in line and "0.0e+00" in line for line in lines)
        run(str(exported / "add_to_plans.py"), str(plans))
        told = run("-c", TRAIN, "2d_p2r", str(exported / "checkpoint.pth"), nnUNet_n_proc_DA="0")
        (line,) = (line for line in told.splitlines() if line.startswith("STEPS 5"))
        print(name, line)
        assert "CHANGED 0" not in line
