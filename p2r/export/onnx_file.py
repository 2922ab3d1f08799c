"""An ONNX file with a dynamic batch and, except for swin_unetr, dynamic sides; and the preparation of a scan as JSON.

    model.onnx          image (B, C, *S) in [0, 1] -> features or logits (B, F or K, *S)
    preparation.json    preparation of a scan, names of inputs and outputs, divisor of the sides
    pixels.py           the same preparation and the windows in Python (`p2r.export.bundle_script`), without p2r
    README.md           model card

Weights are inside the file up to 2 GiB, the limit of protobuf. ONNX Runtime computes the outputs of two sizes and batches, and
they are compared with torch before the folder gets its name.
"""

import importlib.metadata
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx  # noqa: F401 (a missing package is named before anything is computed)
import onnxruntime
import onnxscript  # noqa: F401
import torch
from torch import Tensor
from torch.export import Dim

from p2r.errors import InputError, error_text
from p2r.export import bundle_script
from p2r.export.source import Source, Written, largest_difference
from p2r.version import __version__

_MAX_DIFFERENCE = 1e-4
_OPSET = 18
_MAX_BYTES = 2**31
_AXES = {2: ("height", "width"), 3: ("x", "y", "z")}


def write(source: Source, folder: Path) -> Written:
    """Write the file into an empty folder.

    Raises:
        InputError: The file would be too large, ONNX lacks an operator of the network, or the outputs differ from p2r.
    """
    if source.num_parameters * 4 >= _MAX_BYTES:
        raise InputError(f"{source.name} has {source.num_parameters:,} weights, more than an ONNX file of 2 GiB holds")
    path = folder / "model.onnx"
    output = "logits" if source.is_model else "features"
    _convert(source, path, output)
    difference = _compare(source, path)
    facts = _facts(source, output, difference)
    (folder / "preparation.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (folder / "pixels.py").write_bytes(Path(str(bundle_script.__file__)).read_bytes())
    (folder / "README.md").write_text(source.card, encoding="utf-8")
    version = importlib.metadata.version("onnxruntime")
    tried = "batches of 1 and 3" + ("" if _has_fixed_sides(source) else ", two sizes")
    return Written(
        checks=(
            f"onnxruntime {version}, {tried}: largest difference from p2r {difference:.1e} (allowed {_MAX_DIFFERENCE:g})",
        ),
        commands=(
            f"python -c \"import onnxruntime; print([i.shape for i in onnxruntime.InferenceSession('{folder.name}/model.onnx')"
            '.get_inputs()])"',
        ),
        notes=("swin_unetr has fixed sides in ONNX: read larger images in windows of this size",)
        if _has_fixed_sides(source)
        else (),
    )


def _facts(source: Source, output: str, difference: float) -> dict[str, object]:
    """Return the content of `preparation.json`."""
    return {
        "format": "p2r-onnx/1",
        "pin": source.manifest.pin,
        "licence": source.manifest.facts.licence,
        "preparation": source.preparation.model_dump(mode="json"),
        "input": {
            "name": "image",
            "shape": ["batch", source.model.in_channels, *_sides(source)],
            "dtype": "float32",
            "range": [0, 1],
            "sides_divisible_by": source.model.size_divisor,
            "smallest_side": source.preparation.image_size
            if _has_fixed_sides(source)
            else 2 * source.model.size_divisor,
        },
        "output": {
            "name": output,
            "channels": {str(number): name for number, name in source.outputs.items()},
            "pixels_per_value": 1 if source.is_model else source.model.stride,
        },
        "windows": {"side": source.preparation.image_size, "overlap": 0.25, "blending": "gaussian", "of": "softmax"}
        if source.is_model
        else None,
        "largest_component": source.config.largest_component,
        "opset": _OPSET,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "onnx", "onnxscript", "onnxruntime")}
        | {"p2r": __version__},
        "largest_difference": difference,
    }


def _sides(source: Source) -> list[str | int]:
    return (
        [source.preparation.image_size] * source.dimensions if _has_fixed_sides(source) else [*_AXES[source.dimensions]]
    )


def _convert(source: Source, path: Path, output: str) -> None:
    divisor = source.model.size_divisor
    shapes: dict[int, Any] = {0: Dim("batch", min=1, max=4096)}
    if not _has_fixed_sides(source):
        for axis, name in enumerate(_AXES[source.dimensions], start=2):
            shapes[axis] = divisor * Dim(f"{name}_blocks", min=2, max=4096)
    example = source.images(batch=2, blocks=None if _has_fixed_sides(source) else 4)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)
            program = torch.onnx.export(
                source.network,
                (example,),
                dynamo=True,
                dynamic_shapes=(shapes,),
                input_names=["image"],
                output_names=[output],
                opset_version=_OPSET,
                verbose=False,
            )
            assert program is not None
            program.save(str(path), external_data=False)
    except (RuntimeError, torch.onnx.OnnxExporterError) as error:
        first = next((line for line in error_text(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"{source.name} ({source.model.name}) cannot become an ONNX file: {first[:300]}") from error


def _has_fixed_sides(source: Source) -> bool:
    """Return whether the sides are fixed: attention within windows has a mask that the conversion computes for one size."""
    return source.model.name == "swin_unetr"


def _compare(source: Source, path: Path) -> float:
    run = _open_session(source, path)
    found = 0.0
    other = source.images(batch=3, seed=1)
    if not _has_fixed_sides(source):
        other = source.images(batch=3, blocks=3, seed=1)[..., : 2 * source.model.size_divisor]
    for images in (source.images(), other):
        with torch.no_grad():
            wanted = source.network(images)
        output = run(images)
        found = max(
            found,
            largest_difference(output, wanted, at_most=_MAX_DIFFERENCE, what="ONNX Runtime"),
        )
    return found


def _open_session(source: Source, path: Path) -> Callable[[Tensor], Tensor]:
    """Open the file in ONNX Runtime, which may lack an operator or a version of one."""

    def refusal(error: Exception) -> InputError:
        version = importlib.metadata.version("onnxruntime")
        return InputError(
            f"onnxruntime {version} cannot run the ONNX file of {source.name} (opset {_OPSET}): {str(error)[:300]}; install another "
            "version of onnxruntime"
        )

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common class
        raise refusal(error) from error

    def run(images: Tensor) -> Tensor:
        try:
            (output,) = session.run(None, {"image": images.numpy()})
        except Exception as error:
            raise refusal(error) from error
        return torch.from_numpy(np.asarray(output))

    return run
