"""From scans to a few-shot report with a network of volumes; nothing is cut into planes."""

from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

import p2r
from p2r.backbone import load_model
from p2r.data.volume import read_volume, write_nifti
from p2r.evaluate.inference import embed_volume, predict_volume
from p2r.job import read_job
from p2r.pipeline.local import LocalExecutor
from p2r.pipeline.stages import run_job
from p2r.storage import Storage

JOB = """
kind: pipeline
name: balls
ingest:
  sources: ["{data}/images"]
  licence: CC0-1.0
  subjects_of: {{task: {data}/task.yaml, split: train}}
pretrain:
  image: {{dimensions: 3, spacing_mm: 2.0, size: 16, patches_per_volume: 2}}
  model: {{name: dynunet, channels: [4, 8, 8], feature_channels: 4, head_channels: 16, embedding_channels: 8}}
  loss: {{pixel_pairs_per_image: 16}}
  steps: 2
  global_batch: 2
publish: {{name: balls}}
finetune:
  tasks: ["{data}/task.yaml"]
  num_labelled: [1]
  draws: 1
  steps: 20
  batch_size: 2
  search: {{learning_rates: {{scratch: [2.0e-2], linear_probe: [5.0e-2], fine_tune: [2.0e-2]}}}}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five subjects with a bright ball in noise, of unequal size, on voxels that are not cubes."""
    folder = tmp_path_factory.mktemp("balls")
    rng = np.random.default_rng(0)
    for number in range(1, 6):
        shape = (18 + number, 20, 12)
        grid = np.stack(
            np.meshgrid(*(np.arange(n) * mm for n, mm in zip(shape, (2, 2, 3), strict=True)), indexing="ij")
        )
        ball = ((grid - rng.uniform(16, 22, (3, 1, 1, 1))) ** 2).sum(axis=0) < 9**2
        image = (200 + 600 * ball + rng.normal(0, 40, shape)).clip(1).astype(np.int16)
        affine = np.diag([-2.0, -2.0, 3.0, 1.0])
        write_nifti(folder / "images" / f"sub-{number:02d}_T1w.nii.gz", image, affine)
        write_nifti(folder / "labels" / f"sub-{number:02d}_T1w.nii.gz", ball.astype(np.int16), affine)
    (folder / "task.yaml").write_text(
        "name: balls\ntitle: Balls\nimages: images\nlabels: labels\nlicence: CC0-1.0\nclasses: {1: BALL}\n"
        "splits: {train: ['sub-[01-03]'], validation: [sub-04], test: [sub-05]}\n"
    )
    return folder


@pytest.fixture
def run(data: Path, tmp_path: Path) -> Callable[..., tuple[dict[str, str], Storage]]:
    def run(*overrides: str) -> tuple[dict[str, str], Storage]:
        path = tmp_path / "balls.yaml"
        path.write_text(JOB.format(data=data) + f"storage: {tmp_path}/storage\n")
        job = read_job(path, overrides)
        made = run_job(job, LocalExecutor(torch.device("cpu"), None), say=lambda line: None).to_json()
        return made, Storage(job.storage)

    return run


def test_volumes_go_all_the_way_to_a_report(run: Callable[..., tuple[dict[str, str], Storage]], data: Path) -> None:
    made, storage = run("finetune.modes=[scratch, linear_probe]")
    rows = {row["mode"]: row for row in storage.read_json("report/report.json")["rows"]}
    assert set(rows) == {"scratch", "linear_probe"}
    assert rows["scratch"]["dice_mean"] > 0.7
    pictures = {path.rsplit("/", 1)[-1] for path in storage.list("report/pictures")}
    of_task = {f"{name}-balls.png" for name in ("few-shot", "embedding", "outlines", "case-only")}
    assert {"view-pairs.png", *of_task} <= pictures
    backbone = p2r.load_backbone(made["backbone"])
    assert backbone.preparation.dimensions == 3
    scan = data / "images/sub-05_T1w.nii.gz"
    images = backbone.prepare(scan).images
    assert images.shape == (1, 1, 16, 16, 16)
    assert backbone(images).shape == (1, 4, 16, 16, 16)
    card = storage.read_bytes(f"backbones/balls/1/{backbone.manifest['files']['card']['name']}").decode()
    assert "4 features for every voxel of an MRI scan" in card
    assert "16 x 16 x 16 voxels of 2 mm" in card

    segmenter, config, _ = load_model(made["models"]["balls"])  # type: ignore[index]
    found = predict_volume(segmenter, read_volume(scan), preparation=config.preparation, num_classes=2)
    assert found.shape == (*nibabel.load(scan).shape, 1)
    features, _ = embed_volume(
        backbone, read_volume(scan), preparation=backbone.preparation, size_divisor=backbone.config.model.size_divisor
    )
    assert features.shape == (23, 20, 18, 1, 4)


def test_so_they_do_at_a_coarser_level_and_in_bfloat16(
    run: Callable[..., tuple[dict[str, str], Storage]], data: Path
) -> None:
    made, storage = run(
        *("pretrain.model.level=1", "pretrain.precision=bf16", "pretrain.model.checkpoint_activations=all"),
        *("finetune.modes=[linear_probe]", "finetune.steps=4", "finetune.planes=centre", "pretrain.micro_batch=1"),
    )
    assert storage.read_json("report/report.json")["rows"]
    backbone = p2r.load_backbone(made["backbone"])
    assert backbone(backbone.prepare(data / "images/sub-05_T1w.nii.gz").images).shape == (1, 4, 8, 8, 8)
    card = storage.read_bytes(f"backbones/balls/1/{backbone.manifest['files']['card']['name']}").decode()
    assert "4 features for every 2 x 2 x 2 voxels of an MRI scan" in card
