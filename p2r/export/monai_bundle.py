"""A MONAI bundle: MONAI's own network, its weights, and the inference of `p2r predict` or `p2r embed` on a folder of scans.

    configs/metadata.json     facts about the model, and the shape of its input and output
    configs/inference.json    network, preprocessing, inferer and postprocessing
    configs/logging.conf      format of MONAI's log
    models/model.pt           weights; a dictionary of tensors, which torch loads with weights_only=True
    scripts/pixels.py         copy of `p2r.export.bundle_script`; the bundle does not need p2r
    docs/README.md            model card
    docs/data_license.txt     licence of the weights

Two checks run before the folder gets its name. The network gives the outputs of p2r. The whole inference gives the
segmentation or the features of p2r on a test scan that is rotated, mirrored and anisotropic.
"""

import importlib.metadata
import json
import logging
import platform
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.transforms import SaveImaged
from numpy.typing import NDArray

from p2r.data.volume import read_volume, to_source_grid, write_nifti
from p2r.documents import read_json
from p2r.errors import InputError
from p2r.evaluate.inference import embed_volume, predict_volume
from p2r.export import bundle_script
from p2r.export.source import Source, Written, largest_difference
from p2r.export.stock import definition, load_stock
from p2r.version import __version__

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
REQUIRED = {
    *("schema", "version", "changelog", "monai_version", "pytorch_version", "numpy_version", "task", "description"),
    *("authors", "copyright", "network_data_format"),
}
"""Keys that MONAI's specification requires of `metadata.json`."""

_SCRIPTS = "scripts.pixels"
_MAX_DIFFERENCE = 1e-5
_MAX_CONFIG_BYTES = 2**20
_MAX_VOXELS_DIFFERENT = 1e-3  # rounding may decide between two equally probable classes
_LOGGING = """[loggers]
keys=root

[handlers]
keys=consoleHandler

[formatters]
keys=fullFormatter

[logger_root]
level=INFO
handlers=consoleHandler

[handler_consoleHandler]
class=StreamHandler
level=INFO
formatter=fullFormatter
args=(sys.stdout,)

[formatter_fullFormatter]
format=%(asctime)s - %(name)s - %(levelname)s - %(message)s
"""

_DATASET = {
    "_target_": "Dataset",
    "data": "$[{'image': path} for path in @datalist]",
    "transform": "@preprocessing",
}
_DATALOADER = {
    "_target_": "DataLoader",
    "dataset": "@dataset",
    "batch_size": 1,
    "shuffle": False,
    "num_workers": 0,
}
_EVALUATOR = {
    "_target_": "SupervisedEvaluator",
    "device": "@device",
    "val_data_loader": "@dataloader",
    "network": "@network",
    "inferer": "@inferer",
    "postprocessing": "@postprocessing",
    "val_handlers": "@handlers",
}


def write(source: Source, folder: Path) -> Written:
    """Write the bundle into an empty folder.

    Raises:
        InputError: The bundle does not give the outputs of p2r.
    """
    network = _build(source, scripts=bundle_script.__name__)
    load_stock(network, source)
    difference = _compare_networks(network, source)
    metadata = _metadata(source)
    for name in ("configs", "models", "scripts", "docs"):
        (folder / name).mkdir()
    _write_json(folder / "configs" / "metadata.json", metadata)
    _write_json(folder / "configs" / "inference.json", _inference(source, scripts=_SCRIPTS))
    (folder / "configs" / "logging.conf").write_text(_LOGGING)
    torch.save(network.state_dict(), folder / "models" / "model.pt")
    (folder / "scripts" / "__init__.py").write_text('"""Code of this bundle."""\n')
    (folder / "scripts" / "pixels.py").write_bytes(Path(str(bundle_script.__file__)).read_bytes())
    (folder / "docs" / "README.md").write_text(source.card, encoding="utf-8")
    (folder / "docs" / "data_license.txt").write_text(f"{source.manifest['licence']}\n", encoding="utf-8")
    agreement = _compare_inference(source, folder)
    return Written(
        checks=(
            f"network: largest difference from p2r {difference:.1e} (allowed {_MAX_DIFFERENCE:g})",
            f"whole inference, on a test scan: {agreement}",
            f"metadata: the {len(REQUIRED)} required keys are present (MONAI's own schema needs a network: see the guide)",
        ),
        commands=(
            f"cd {folder.name} && python -m monai.bundle run --config_file configs/inference.json --dataset_dir SCANS "
            "--output_dir RESULTS",
        ),
    )


def _build(source: Source, *, scripts: str) -> Any:
    parser = ConfigParser({"network_def": definition(source, scripts=scripts)})
    return parser.get_parsed_content("network_def").eval()


def _compare_networks(network: Any, source: Source) -> float:
    """Compare the network with p2r at the training size, and on two larger images."""
    found = 0.0
    for images in (source.images(), source.images(batch=2, blocks=3, seed=1)):
        with torch.no_grad():
            difference = largest_difference(
                network(images), source.network(images), at_most=_MAX_DIFFERENCE, what="MONAI's network"
            )
        found = max(found, difference)
    return found


def _metadata(source: Source) -> dict[str, object]:
    manifest = source.manifest
    what = f"Segments {', '.join(source.config.classes.values())}" if source.is_model else "Features of every pixel"
    return {
        "schema": SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": f"exported by p2r {__version__} from {manifest.pin}"},
        "monai_version": importlib.metadata.version("monai"),
        "pytorch_version": torch.__version__.partition("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {
            name: importlib.metadata.version(name)
            for name in ("nibabel", "scipy", *(["einops"] * _needs_einops(source)))
        },
        "supported_apps": {},
        "name": source.name,
        "task": f"{what} of MRI, {source.dimensions}D",
        "description": f"{what}. {source.model.name}, {source.num_parameters:,} weights, pretrained by p2r without labels.",
        "authors": "the publisher of the weights",
        "copyright": f"weights: {manifest.facts.licence}; scripts: Apache-2.0",
        "data_source": "; ".join(corpus.provenance for corpus in manifest.facts.corpora or []) or "unknown",
        "data_type": "nibabel",
        "image_classes": "single-channel MRI of any contrast in the corpora",
        "label_classes": ", ".join(f"{value}: {name}" for value, name in source.outputs.items())
        if source.is_model
        else "none",
        "pred_classes": f"{source.num_outputs} channels",
        "eval_metrics": _validation(source),
        "intended_use": "research; not a medical device",
        "references": ["Seince et al., Pix2Rep, MIDL 2024, https://arxiv.org/abs/2407.20395"],
        "p2r": {"pin": manifest.pin, "python_version": platform.python_version(), **_preparation(source)},
        "network_data_format": _data_format(source),
    }


def _data_format(source: Source) -> dict[str, object]:
    shape = [source.preparation.image_size] * source.dimensions
    image = {
        "type": "image",
        "format": "magnitude",
        "modality": "MR",
        "num_channels": source.model.in_channels,
        "spatial_shape": shape,
        "dtype": "float32",
        "value_range": [0, 1],
        "is_patch_data": True,
        "channel_def": {str(channel): "image" for channel in range(source.model.in_channels)},
    }
    prediction = {
        "type": "image",
        "format": "segmentation" if source.is_model else "latent",
        "modality": "n/a",
        "num_channels": source.num_outputs,
        "spatial_shape": shape,
        "dtype": "float32",
        "value_range": [0, 1] if source.is_model else [],
        "is_patch_data": True,
        "channel_def": {str(number): name for number, name in source.outputs.items()},
    }
    return {"inputs": {"image": image}, "outputs": {"pred": prediction}}


def _needs_einops(source: Source) -> bool:
    return source.model.name == "swin_unetr"


def _validation(source: Source) -> dict[str, float]:
    return {} if source.validation_dice is None else {"mean_dice_validation": source.validation_dice}


def _preparation(source: Source) -> dict[str, object]:
    return {"preparation": source.preparation.model_dump(mode="json")}


def _inference(source: Source, *, scripts: str) -> dict[str, object]:
    """Return `inference.json`, which imports the classes of `bundle_script` from the module `scripts`."""
    preparation = source.preparation
    grid: dict[str, object] = {
        "dimensions": source.dimensions,
        "slice_axis": preparation.slice_axis,
        "spacing_mm": preparation.spacing_mm,
    }
    windows = {**grid, "image_size": preparation.image_size}
    if source.is_model:
        inferer = {"_target_": f"{scripts}.PixelInferer", **windows, "planes": preparation.planes}
    else:
        inferer = {"_target_": f"{scripts}.FeatureInferer", **windows, "size_divisor": source.model.size_divisor}
    return {
        "imports": ["$import glob"],
        "bundle_root": ".",
        "dataset_dir": "scans",
        "output_dir": "results",
        **({"probabilities": False} if source.is_model else {}),
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network_def": definition(source, scripts=scripts),
        "network": "$@network_def.to(@device)",
        "preprocessing": _preprocessing(source, scripts=scripts),
        "datalist": "$sorted(glob.glob(@dataset_dir + '/*.nii*'))",
        "dataset": _DATASET,
        "dataloader": _DATALOADER,
        "inferer": inferer,
        "postprocessing": {"_target_": "Compose", "transforms": _postprocessing(source, grid, scripts=scripts)},
        "handlers": [
            {
                "_target_": "CheckpointLoader",
                "load_path": "$@bundle_root + '/models/model.pt'",
                "load_dict": {"model": "@network"},
            },
            {"_target_": "StatsHandler", "iteration_log": False},
        ],
        "evaluator": _EVALUATOR,
        "initialize": ["$monai.utils.set_determinism(seed=0)"],
        "run": ["$@evaluator.run()"],
    }


def _preprocessing(source: Source, *, scripts: str) -> dict[str, object]:
    preparation = source.preparation
    return {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "LoadImaged", "keys": "image"},
            {"_target_": "EnsureChannelFirstd", "keys": "image"},
            {
                "_target_": "Orientationd",
                "keys": "image",
                "axcodes": "RAS",
                "labels": [["L", "R"], ["P", "A"], ["I", "S"]],
            },
            {
                "_target_": f"{scripts}.NonzeroPercentilesd",
                "keys": "image",
                "percentiles": list(preparation.intensity_percentiles),
            },
        ],
    }


def _postprocessing(source: Source, grid: dict[str, object], *, scripts: str) -> list[dict[str, object]]:
    save: dict[str, object] = {
        "_target_": "SaveImaged",
        "keys": "pred",
        "output_dir": "@output_dir",
        "output_postfix": "$'probabilities' if @probabilities else 'segmentation'" if source.is_model else "features",
        "separate_folder": False,
        "resample": False,
        "output_dtype": "$numpy.float32 if @probabilities else numpy.uint8" if source.is_model else "$numpy.float32",
    }
    if not source.is_model:
        return [{"_target_": f"{scripts}.FeatureGridd", "keys": "pred", "image": "image", **grid}, save]
    labels: dict[str, object] = {
        "_target_": f"{scripts}.Labelsd",
        "keys": "pred",
        "num_classes": source.num_outputs,
        "largest_component": source.config.largest_component,
        "probabilities": "@probabilities",
    }
    invert = {
        "_target_": "Invertd",
        "keys": "pred",
        "transform": "@preprocessing",
        "orig_keys": "image",
        "nearest_interp": False,
        "to_tensor": True,
    }
    return [labels, invert, save]


def _compare_inference(source: Source, folder: Path) -> str:
    """Run the written bundle on a test scan, from its files to the result, and compare it with p2r."""
    scan = folder / "check.nii.gz"
    try:
        _write_test_scan(scan, source)
        volume = read_volume(scan)
        found = _run_bundle(source, folder, scan)
    finally:
        scan.unlink(missing_ok=True)
    if source.is_model:
        labels = predict_volume(
            source.network,
            volume,
            preparation=source.preparation,
            num_classes=source.num_outputs,
            largest_component=source.config.largest_component,
        )
        wanted = to_source_grid(labels, volume)[..., 0]
        different = int((found[0] != wanted).sum())
        if different > _MAX_VOXELS_DIFFERENT * wanted.size:
            raise InputError(
                f"the bundle labels {different:,} of {wanted.size:,} voxels of a test scan otherwise than p2r: nothing was exported"
            )
        return f"{different:,} of {wanted.size:,} voxels differ from p2r predict"
    features, _ = embed_volume(
        source.network, volume, preparation=source.preparation, size_divisor=source.model.size_divisor
    )
    expected = torch.from_numpy(np.moveaxis(features[..., 0, :], -1, 0).copy())
    difference = largest_difference(
        torch.from_numpy(found), expected, at_most=10 * _MAX_DIFFERENCE, what="the bundle's whole inference"
    )
    return f"features differ from p2r embed by {difference:.1e}"


def _run_bundle(source: Source, folder: Path, scan: Path) -> NDArray[Any]:
    """Run preprocessing, network, inferer and postprocessing of the written files; return the result in the order of `SaveImaged`."""
    text = (folder / "configs" / "inference.json").read_text()
    content = text.replace(_SCRIPTS, bundle_script.__name__).encode()
    parser = ConfigParser(read_json(content, where="inference.json", max_bytes=_MAX_CONFIG_BYTES))
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(folder / "models" / "model.pt", weights_only=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI warns of readers that are not used here
        logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").disabled = True
        preprocessing = parser.get_parsed_content("preprocessing")
    made = preprocessing({"image": str(scan)})
    made["pred"] = parser.get_parsed_content("inferer")(made["image"][None], network)[0]
    for transform in parser.get_parsed_content("postprocessing").transforms:
        if not isinstance(transform, SaveImaged):
            made = transform(made)
    result: NDArray[Any] = np.asarray(made["pred"])
    return result


def _write_test_scan(path: Path, source: Source) -> None:
    """Write an ellipsoid in noise: wider than a window, with another order and direction of axes than RAS, and oblique."""
    window_mm = source.preparation.image_size * source.preparation.spacing_mm
    if source.dimensions == 3:
        spacing, extent = (0.9, 1.1, 1.3), (1.2, 0.7, 0.6)
    else:
        spacing, extent = (0.9, 1.1, 4.0), (1.2, 0.7, 0.0)
    spacing_mm = [factor * source.preparation.spacing_mm for factor in spacing]
    shape = [max(6, round(window_mm * part / mm)) for part, mm in zip(extent, spacing_mm, strict=True)]
    generator = np.random.default_rng(0)
    axes = np.meshgrid(*[np.linspace(-1, 1, size) for size in shape], indexing="ij")
    inside = sum(axis**2 for axis in axes) < 0.7
    voxels = (200 * inside + 40 * generator.normal(size=shape) + 100).clip(0).astype(np.int16)
    tilt = np.array([[1, 0, 0], [0, np.cos(0.2), -np.sin(0.2)], [0, np.sin(0.2), np.cos(0.2)]])
    affine = np.eye(4)
    affine[:3, :3] = tilt @ np.diag([-1.0, 1.0, -1.0]) @ np.eye(3)[[1, 0, 2]] @ np.diag(spacing_mm)
    affine[:3, 3] = (10, -20, 30)
    write_nifti(path, voxels, affine)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
