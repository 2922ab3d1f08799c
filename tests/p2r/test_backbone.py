"""A backbone or model: configuration, features, and the checks before its weights are read. Tiny networks, no training."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.applying import predict
from p2r.artefact import open_artefact
from p2r.artefact_manifest import BackboneManifest, ModelManifest
from p2r.backbone import (
    BACKBONE_FORMAT,
    MODEL_FORMAT,
    ArtefactConfig,
    check_pulled,
    load_backbone,
    load_model,
    publish,
)
from p2r.errors import CheckpointError, InputError
from p2r.model.backbones import build_backbone
from p2r.model.heads import PrototypeHead, SegmentationHead
from p2r.model.pix2rep import Segmenter
from p2r.reference import parse_reference
from p2r.storage import Storage, json_bytes
from p2r.tensors import MAX_HEADER_BYTES
from tests.p2r.artefact.conftest import file_of, put, verify
from tests.publishing import MODEL, PREPARATION, publish_toy

CLASSES = {1: "RV", 2: "LV"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    publish_toy(str(tmp_path / "toy"))
    return tmp_path / "toy"


@pytest.fixture
def scan() -> nibabel.Nifti1Image:
    voxels = np.random.default_rng(0).normal(size=(40, 36, 3)).cumsum(0).astype(np.float32)
    return nibabel.Nifti1Image(voxels, np.diag([2.0, 2.0, 8.0, 1.0]))


def config_of(**facts: Any) -> ArtefactConfig:
    return ArtefactConfig(**{"model": MODEL, "preparation": PREPARATION, **facts})


def wider(channels: int) -> bytes:
    """The toy's configuration with a larger network."""
    model = MODEL.model_copy(update={"channels": (channels,) * 5})
    return json.dumps(config_of(model=model).model_dump(mode="json")).encode()


# Configuration


def test_a_configuration_writes_only_the_prototype_settings_that_differ_from_their_defaults() -> None:
    plain = config_of().model_dump()
    assert set(plain) == {"model", "preparation", "classes", "num_prototypes", "largest_component"}
    assert plain["largest_component"] is False
    settings = {
        "prototype_clusterings": 2,
        "prototype_smoothing_pixels": 1.5,
        "prototypes_are_centred": True,
    }
    assert settings.items() <= config_of(num_prototypes=(2, 1, 1) * 2, **settings).model_dump().items()


def test_a_configuration_with_ten_or_more_classes_keeps_them_in_the_order_of_their_values() -> None:
    config = config_of(classes={value: f"organ {value}" for value in range(1, 13)})
    read = ArtefactConfig.model_validate(json.loads(json_bytes(config.model_dump(mode="json"))))
    assert list(read.classes.items()) == [(value, f"organ {value}") for value in range(1, 13)]
    assert read == config and read.sha256() == config.sha256()


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"classes": dict.fromkeys(range(1, 1002), "x")}, "at most 1000"),
        ({"num_prototypes": (1, 1, 1), "prototype_clusterings": 2}, "as many numbers for every clustering"),
    ],
)
def test_a_configuration_that_no_model_has_is_refused(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(**facts)


def test_a_configuration_nested_deeper_than_ours_is_refused(folder: Path) -> None:
    value = json.loads(file_of(folder, "config").read_bytes())
    deep: Any = 0
    for _ in range(8):
        deep = [deep]
    put(folder, "config", json.dumps({**value, "unknown": deep}).encode())
    with pytest.raises(CheckpointError, match="may be 8 deep"):
        load_backbone(str(folder))


def test_a_model_has_a_head_for_each_class_and_the_background() -> None:
    head = config_of(classes=CLASSES).head()
    assert isinstance(head, SegmentationHead)
    assert head(torch.zeros(1, MODEL.feature_channels, 4, 4)).shape == (1, 3, 4, 4)


def test_a_prototype_head_smooths_in_pixels_of_the_features() -> None:
    coarse = MODEL.model_copy(update={"level": 1})
    facts = {"classes": CLASSES, "num_prototypes": (2, 1, 1), "prototype_smoothing_pixels": 2.0}
    head, of_coarse = config_of(**facts).head(), config_of(model=coarse, **facts).head()
    assert isinstance(head, PrototypeHead) and isinstance(of_coarse, PrototypeHead)
    assert len(head.kernel) == 13 and len(of_coarse.kernel) == 7  # three standard deviations to each side


# Features


def test_features_of_a_scan_equal_those_of_its_images_and_have_no_graph(
    folder: Path, scan: nibabel.Nifti1Image
) -> None:
    backbone = load_backbone(str(folder))
    images = backbone.prepare(scan).images
    assert images.shape == (3, 1, 32, 32)
    features = backbone.features(scan)
    assert features.shape == (3, 2, 32, 32) and not features.requires_grad
    assert torch.equal(features, backbone.features(images)) and torch.equal(features, backbone(images).detach())
    assert not backbone.training and backbone.manifest.is_new is False


def test_levels_are_returned_in_the_order_asked(folder: Path) -> None:
    backbone = load_backbone(str(folder))
    image = torch.rand(1, 1, 32, 32)
    coarse, own = backbone.features(image, levels=[2, 0])
    assert coarse.shape[2:] == (8, 8) and torch.equal(own, backbone.features(image))
    backbone.network = torch.nn.Conv2d(1, 2, 1)
    with pytest.raises(InputError, match="Conv2d has no decoder levels"):
        backbone.features(image, levels=[0])


def test_a_backbone_of_volumes_prepares_volumes(folder: Path, scan: nibabel.Nifti1Image) -> None:
    backbone = load_backbone(str(folder))
    backbone.preparation = PREPARATION.model_copy(update={"dimensions": 3})
    assert backbone.prepare(scan).images.shape == (1, 1, 32, 32, 32)


# Models


def publish_model(url: str, *, classes: Mapping[int, str] = CLASSES, **facts: Any) -> Segmenter:
    """Publish a tiny model, and return what was published."""
    config = config_of(classes=classes, largest_component=True)
    segmenter = Segmenter(build_backbone(MODEL), config.head())
    corpora: Mapping[str, Any] = {"licence": "CC0-1.0", "corpora": []}
    made = publish(
        Storage(url),
        format=MODEL_FORMAT,
        weights=segmenter.state_dict(),
        config=config,
        card="# toy\n",
        facts={**corpora, **facts},
    )
    assert made.is_new and isinstance(open_artefact(parse_reference(url)).manifest, ModelManifest)
    return segmenter.eval()


def test_a_model_loads_as_it_was_published_and_is_not_taken_for_a_backbone(folder: Path, tmp_path: Path) -> None:
    url = str(tmp_path / "model")
    made = publish_model(url, task="heart")
    loaded, config, manifest = load_model(url)
    image = torch.rand(1, 1, 32, 32)
    assert torch.equal(loaded(image), made(image)) and loaded(image).shape == (1, 3, 32, 32)
    assert config.classes == CLASSES and config.largest_component and manifest["task"] == "heart"
    assert not loaded.training and manifest.is_new is False
    assert isinstance(open_artefact(parse_reference(str(folder))).manifest, BackboneManifest)
    for load, other in ((load_backbone, url), (load_model, str(folder))):
        with pytest.raises(CheckpointError, match="has format 'p2r-"):
            load(other)


def test_predict_gives_each_of_twelve_classes_the_volume_of_its_own_label(
    scan: nibabel.Nifti1Image, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish_model(str(tmp_path / "model"), classes={value: f"organ {value}" for value in range(1, 13)})
    scan.to_filename(tmp_path / "scan.nii.gz")
    output = tmp_path / "labels.nii.gz"
    predict(
        [str(tmp_path / "model")],
        [str(tmp_path / "scan.nii.gz")],
        str(output),
        has_probabilities=True,
        device="cpu",
        say=print,
    )
    *volumes, _, beside = capsys.readouterr().out.splitlines()
    labels = np.asarray(nibabel.load(output).dataobj)
    ml = {value: float(np.sum(labels == value)) * 0.032 for value in range(1, 13)}
    for value, line in enumerate(volumes, start=1):
        name, volume = line.split(": ")
        assert name == f"{value} organ {value}" and float(volume.removesuffix(" ml")) == pytest.approx(
            ml[value], abs=0.051
        )
    assert beside.endswith(": background, " + ", ".join(f"organ {value}" for value in range(1, 13)))


def test_the_table_of_volumes_lists_the_segmentations_of_earlier_calls_too(
    scan: nibabel.Nifti1Image, tmp_path: Path
) -> None:
    publish_model(str(tmp_path / "model"))
    for names in (("a", "b"), ("b", "c")):
        scans = [str(tmp_path / f"{name}.nii.gz") for name in names]
        for path in scans:
            scan.to_filename(path)
        predict([str(tmp_path / "model")], scans, str(tmp_path / "out"), device="cpu", say=print)
    header, *rows = (tmp_path / "out/volumes.csv").read_text().splitlines()
    assert header == "scan,frame,RV_ml,LV_ml"
    assert [Path(row.split(",")[0]).name for row in rows] == ["b.nii.gz", "c.nii.gz", "a.nii.gz"]


def test_an_entry_that_the_manifest_cannot_hold_is_named_and_nothing_is_published(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be published: transductive: Input should be a valid boolean"):
        publish_model(str(tmp_path / "model"), transductive="perhaps")
    assert not (tmp_path / "model").exists()


def test_further_weights_and_documents_are_published_beside_the_network(tmp_path: Path) -> None:
    head = {"layer": torch.arange(3.0)}
    publish(
        Storage(str(tmp_path / "x")),
        format=BACKBONE_FORMAT,
        weights=build_backbone(MODEL).state_dict(),
        config=config_of(),
        card="# toy\n",
        facts={"licence": "CC0-1.0", "corpora": []},
        tensors={"head": head},
        documents={"metrics": b"{}"},
    )
    assert torch.equal(load_file(file_of(tmp_path / "x", "head"))["layer"], head["layer"])
    assert file_of(tmp_path / "x", "metrics").read_bytes() == b"{}"
    verify(tmp_path / "x")


# Checks before the weights are read


def test_other_bytes_with_the_same_configuration_and_weights_are_found_published(folder: Path) -> None:
    put(folder, "config", file_of(folder, "config").read_bytes() + b"\n")
    weights = file_of(folder, "weights")
    save_file(load_file(weights), folder / "again", metadata={"format": "pt", "note": "written by another version"})
    put(folder, "weights", (folder / "again").read_bytes())
    assert not publish_toy(str(folder)).is_new
    put(folder, "config", json.dumps(config_of(largest_component=True).model_dump(mode="json")).encode())
    with pytest.raises(CheckpointError, match="already published with other config"):
        publish_toy(str(folder))


@pytest.mark.parametrize("change", ["a larger network", "smaller than its weights"])
def test_weights_whose_size_no_network_of_the_configuration_has_are_refused_unread(folder: Path, change: str) -> None:
    if change == "a larger network":
        put(folder, "config", wider(16))
    else:
        excess = {**load_file(file_of(folder, "weights")), "more": torch.zeros(MAX_HEADER_BYTES // 4)}
        save_file(excess, folder / "excess", metadata={"format": "pt"})
        put(folder, "weights", (folder / "excess").read_bytes())
    for use in (load_backbone, verify):
        with pytest.raises(CheckpointError, match=r"do not fit its config\.json: they have [\d,]+ bytes, the network"):
            use(str(folder))


def test_a_pulled_folder_is_checked_by_names_and_shapes(folder: Path) -> None:
    check_pulled(folder, open_artefact(parse_reference(str(folder))))
    put(folder, "config", wider(3))
    with pytest.raises(CheckpointError, match=r"its weights do not fit its config\.json"):
        check_pulled(folder, open_artefact(parse_reference(str(folder))))
