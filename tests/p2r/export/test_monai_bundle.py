import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from p2r.backbone import load_backbone, load_model
from p2r.data.volume import read_volume, to_source_grid
from p2r.errors import InputError
from p2r.evaluate.models import load_model as load_predictor
from p2r.export import export
from p2r.export.monai_bundle import REQUIRED

Publish = Callable[..., str]


_TEXT = {"type": "string", "minLength": 1}
_TENSORS = {
    "type": "object",
    "minProperties": 1,
    "additionalProperties": {
        "type": "object",
        "properties": {
            "type": {"enum": ["image", "series", "tuples", "probabilities"]},
            "format": {
                "enum": [
                    *("magnitude", "hounsfield", "kspace", "raw", "labels", "classes", "segmentation", "points"),
                    *("normals", "indices", "sequence", "latent", "gradient"),
                ]
            },
            "modality": _TEXT,
            "num_channels": {"type": "integer", "minimum": 1},
            "spatial_shape": {
                "type": "array",
                "minItems": 1,
                "maxItems": 3,
                "items": {"anyOf": [{"type": "integer", "minimum": 1}, _TEXT]},
            },
            "dtype": {"enum": ["float32", "float16", "int32", "int64"]},
            "value_range": {"type": "array", "maxItems": 2, "items": {"type": "number"}},
            "is_patch_data": {"type": "boolean"},
            "channel_def": {"type": "object", "minProperties": 1, "additionalProperties": _TEXT},
        },
        "required": [
            *("type", "format", "modality", "num_channels", "spatial_shape", "dtype", "value_range", "is_patch_data"),
            "channel_def",
        ],
    },
}
METADATA_SCHEMA = {
    "type": "object",
    "required": sorted(REQUIRED),
    "properties": {
        **dict.fromkeys(REQUIRED - {"changelog", "network_data_format"}, _TEXT),
        "changelog": {"type": "object", "additionalProperties": _TEXT},
        "required_packages_version": {"type": "object", "additionalProperties": _TEXT},
        **dict.fromkeys(("intended_use", "data_source", "data_type"), _TEXT),
        "references": {"type": "array", "items": _TEXT},
        "network_data_format": {
            "type": "object",
            "required": ["inputs", "outputs"],
            "properties": {"inputs": _TENSORS, "outputs": _TENSORS},
        },
    },
}
"""Fields of `metadata.json` as MONAI's bundle specification documents them, with the types and words that it lists."""


def _load_bundle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ConfigParser, Any]:
    for name in [name for name in sys.modules if name.partition(".")[0] == "scripts"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(folder))
    parser = ConfigParser()
    parser.read_config(folder / "configs" / "inference.json")
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(folder / "models" / "model.pt", weights_only=True))
    return parser, network


@pytest.mark.parametrize(
    ("name", "dimensions", "kind"),
    [
        ("basic_unet", 2, "model"),
        ("basic_unet", 3, "backbone"),
        ("unet", 3, "model"),
        ("unet", 2, "prototypes"),
        ("dynunet", 3, "model"),
        ("dynunet", 2, "backbone"),
        ("residual_dynunet", 2, "model"),
        ("swin_unetr", 2, "model"),
    ],
)
def test_a_bundle_gives_the_outputs_of_p2r(
    publish_toy: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dimensions: int, kind: str
) -> None:
    url = publish_toy(name, dimensions=dimensions, kind=kind)
    lines = export(url, to="monai", folder=tmp_path / "bundle")
    assert any("of the " in line and "wrote" in line for line in lines)
    _, network = _load_bundle(tmp_path / "bundle", monkeypatch)
    own = load_backbone(url).network if kind == "backbone" else load_model(url)[0]
    image = torch.rand(2, 1, *[32 * (2 if name == "swin_unetr" else 1)] * dimensions)
    with torch.no_grad():
        torch.testing.assert_close(network(image), own(image), rtol=1e-5, atol=1e-5)


def test_backbones_of_basic_unet_are_bitwise_equal_in_stock_monai(
    publish_toy: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from monai.networks.nets.basic_unet import BasicUNet

    url = publish_toy("basic_unet")
    export(url, to="monai", folder=tmp_path / "bundle")
    _, network = _load_bundle(tmp_path / "bundle", monkeypatch)
    assert type(network) is BasicUNet
    image = torch.rand(1, 1, 48, 32)
    with torch.no_grad():
        assert torch.equal(network(image), load_backbone(url)(image))


def test_a_bundle_segments_real_files_like_p2r_predict_without_p2r(
    published: dict[str, str], toy_data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ignite", reason="monai.bundle run needs pytorch-ignite")
    pytest.importorskip("fire", reason="python -m monai.bundle needs fire")
    bundle, scans = tmp_path / "bundle", tmp_path / "scans"
    scans.mkdir()
    for scan in sorted((toy_data / "images").glob("*.nii.gz"))[:3]:
        (scans / scan.name).write_bytes(scan.read_bytes())
    export(published["model"], to="monai", folder=bundle)
    code = f"""
import runpy, sys
sys.modules["p2r"] = None
command = ["monai.bundle", "run", "--config_file", "configs/inference.json"]
for more in ([], ["--probabilities", "True"]):
    sys.argv = [*command, "--dataset_dir", {str(scans)!r}, "--output_dir", {str(tmp_path / "results")!r}, *more]
    runpy.run_module("monai.bundle", run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=bundle, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    model = load_predictor(published["model"])
    labelled = 0
    for scan in sorted(scans.iterdir()):
        wanted = model.predict(str(scan))
        found: Any = nibabel.load(tmp_path / "results" / scan.name.replace(".nii", "_segmentation.nii"))
        np.testing.assert_array_equal(np.asarray(found.dataobj), np.asarray(wanted.dataobj))
        np.testing.assert_allclose(found.affine, wanted.affine, atol=1e-5)
        maps: Any = nibabel.load(tmp_path / "results" / scan.name.replace(".nii", "_probabilities.nii"))
        volume = read_volume(scan)
        expected = to_source_grid(model.probabilities(volume)[..., 0, :], volume)
        np.testing.assert_allclose(np.asarray(maps.dataobj), expected, atol=1e-5)
        labelled += int(np.asarray(wanted.dataobj).any())
    assert labelled >= 2


def test_the_metadata_pass_monais_verifications(published: dict[str, str], tmp_path: Path) -> None:
    from monai.bundle.scripts import ckpt_export, verify_metadata, verify_net_in_out

    bundle = tmp_path / "bundle"
    export(published["backbone"], to="monai", folder=bundle)
    files = {"meta_file": str(bundle / "configs/metadata.json"), "config_file": str(bundle / "configs/inference.json")}
    verify_net_in_out(net_id="network_def", device="cpu", **files)
    # MONAI's own schema must be downloaded; a file in its place states the fields that MONAI documents.
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(METADATA_SCHEMA))
    given = {
        "filepath": str(schema),
        "hash_val": hashlib.sha256(schema.read_bytes()).hexdigest(),
        "hash_type": "sha256",
    }
    verify_metadata(meta_file=files["meta_file"], **given)
    metadata = json.loads((bundle / "configs/metadata.json").read_text())
    metadata["network_data_format"]["outputs"]["pred"] |= {"type": "feature", "num_channels": "16"}
    (tmp_path / "wrong.json").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match=r"'feature' is not one of|'16' is not of type 'integer'"):
        verify_metadata(meta_file=str(tmp_path / "wrong.json"), **given)
    with pytest.warns(DeprecationWarning, match="jit"):
        ckpt_export(
            net_id="network_def",
            filepath=str(bundle / "models/model.ts"),
            ckpt_file=str(bundle / "models/model.pt"),
            **files,
        )
    image = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        scripted = torch.jit.load(bundle / "models/model.ts")(image)
        torch.testing.assert_close(scripted, load_backbone(published["backbone"])(image))


def test_a_folder_that_holds_something_is_refused_and_left_as_it_is(publish_toy: Publish, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep")
    with pytest.raises(InputError, match="not empty: name a new folder"):
        export(publish_toy("unet"), to="monai", folder=tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]


def test_a_failed_export_leaves_nothing_behind(
    publish_toy: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from p2r.export import monai_bundle

    monkeypatch.setattr(monai_bundle, "_MAX_DIFFERENCE", -1.0)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="nothing was exported"):
        export(publish_toy("unet"), to="monai", folder=tmp_path / "out" / "bundle")
    assert not list((tmp_path / "out").iterdir())


def test_a_coarser_representation_has_no_bundle_and_the_message_says_so(publish_toy: Publish, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="ends at level 1 of the decoder, and the tool's networks at level 0; the format onnx"
    ):
        export(publish_toy("unet", level=1), to="monai", folder=tmp_path / "bundle")
