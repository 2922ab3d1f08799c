"""Weights from elsewhere -> the first weights of a run: of a published backbone, or of another run's checkpoint.

Only safetensors are read, after their digest was checked: whoever made them gets no code to run here. Everything must fit.
A backbone leaves the projection head as it was drawn; a temperature that is learnt on one side only is left out.
"""

from collections.abc import Mapping
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from p2r.backbone import BACKBONE_FORMAT
from p2r.engine.checkpoint import FORMAT
from p2r.errors import CheckpointError, DamagedError
from p2r.model.pix2rep import Pix2Rep
from p2r.storage import Storage, file_sha256

_FILE = "model.safetensors"
_OPTIONAL = {"log_temperature"}
_NUM_NAMED = 8


def init_weights(model: Pix2Rep, url: str) -> dict[str, Any]:
    """Give a model the weights that lie at a URL.

    Args:
        model: Of the run.
        url: Folder of a published backbone, or of a checkpoint; or the `model.safetensors` in one of them.

    Returns:
        What a checkpoint keeps of it: URL, format, SHA-256 of the weights, and the step of a checkpoint.

    Raises:
        StorageError: It is absent or damaged.
        CheckpointError: It is something else, or its weights do not fit the model.
    """
    storage = Storage(url.rstrip("/").removesuffix(f"/{_FILE}"))
    where = f"pretrain.init_from {storage.url}"
    if not storage.exists("manifest.json"):
        raise CheckpointError(
            f"{where} holds no manifest.json: give the folder of a published backbone, such as STORAGE/backbones/NAME/1, "
            "or of a checkpoint, such as STORAGE/pretrain/checkpoints/step-00001000"
        )
    manifest = storage.read_json("manifest.json")
    format = manifest.get("format") if isinstance(manifest, dict) else None
    if format not in (BACKBONE_FORMAT, FORMAT):
        raise CheckpointError(f"{where} has format {format!r}; weights are taken from {BACKBONE_FORMAT} and {FORMAT}")
    entry = manifest["files"][_FILE]
    weights = checked_weights(storage, _FILE, entry)
    if format == BACKBONE_FORMAT:
        _load(model.backbone, weights, where=where, optional=set())
    else:
        _load(model, weights, where=where, optional=_OPTIONAL)
    step = {"step": manifest["step"]} if "step" in manifest else {}
    return {"url": storage.url, "format": format, "sha256": entry["sha256"], **step}


def checked_weights(storage: Storage, path: str, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read safetensors that are what a manifest's entry says of them.

    Raises:
        DamagedError: They are absent, or others.
    """
    local = storage.local(path, sha256=entry["sha256"], num_bytes=entry["num_bytes"])
    if file_sha256(local) != entry["sha256"]:
        raise DamagedError(f"{storage.at(path)} does not have the sha256 of its manifest: it is damaged")
    weights: dict[str, Tensor] = load_file(local)
    return weights


def _load(module: Any, weights: dict[str, Tensor], *, where: str, optional: set[str]) -> None:
    wanted = module.state_dict()
    for name in optional:
        if (name in weights) != (name in wanted):
            weights.pop(name, None)
            wanted.pop(name, None)
    problems = [
        f"{name}: {_shape(weights.get(name))} there, {_shape(wanted.get(name))} in this job"
        for name in sorted(weights.keys() | wanted.keys())
        if name not in weights or name not in wanted or weights[name].shape != wanted[name].shape
    ]
    if problems:
        more = [f"and {len(problems) - _NUM_NAMED} more"] if len(problems) > _NUM_NAMED else []
        lines = "\n".join(f"  {line}" for line in (*problems[:_NUM_NAMED], *more))
        raise CheckpointError(
            f"{where}: its weights do not fit pretrain.model:\n{lines}\nTake over its model section, or leave init_from out."
        )
    module.load_state_dict(weights, strict=False)


def _shape(weight: Tensor | None) -> str:
    return "none" if weight is None else " x ".join(map(str, weight.shape)) or "a number"


def backbone_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those of a whole model's weights that are the backbone's, under its own names."""
    prefix = "backbone."
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
