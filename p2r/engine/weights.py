"""Initial weights of a run, from a published backbone or another run's checkpoint.

Of p2r's own formats, only safetensors are read, after their digest was checked: their author cannot run code here. All tensors
must fit. A backbone's projection head is taken over if it was published and has the model's shapes; otherwise it keeps its random
weights. A temperature that is learnt on only one side is left out, and so are the heads of other terms that only one side has.
A weights file of another tool passes through `p2r.weights_file`, which runs no code, and a key map, `p2r.model.foreign`.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from p2r.artefact import MAX_MANIFEST_BYTES, MAX_MANIFEST_MEMORY_BYTES, Artefact, BackboneManifest, open_artefact
from p2r.config import ModelConfig
from p2r.documents import FileEntry, read_json
from p2r.engine.ancestry import origins_of_backbone, origins_of_checkpoint
from p2r.engine.checkpoint_manifest import FORMAT, InitialWeights, parse_manifest
from p2r.errors import CheckpointError
from p2r.model.backbones import EncoderDecoder, build_backbone
from p2r.model.foreign import Transfer, transfer
from p2r.model.pix2rep import Pix2Rep
from p2r.pointers import resolve
from p2r.reference import Reference, parse_reference
from p2r.storage import Storage
from p2r.tensors import check_fit, read_tensors, shapes_of, unallocated
from p2r.weights_file import is_weights_file, read_weights_file

_FILE = "model.safetensors"
_BACKBONE = "backbone."
_MAX_CITATIONS = 4000
_OPTIONAL = {"log_temperature"}
_OTHER_HEADS = ("level_heads.", "reconstruction_head.")  # not published
_WAY_OUT = "Take over its model section, or leave init_from out."


def init_weights(model: Pix2Rep, url: str) -> InitialWeights:
    """Load the weights stored at a URL into a model.

    Args:
        model: Model of the run.
        url: Folder of a published backbone or of a checkpoint, or the safetensors file in one of them; or a weights file of another
            tool. `@sha256:HEX` adds the digest of `manifest.json`, or of that file.

    Returns:
        Record for the checkpoint: URL, format, SHA-256 of the weights and of the manifest, pins of the pretraining data (None:
        unknown), the step of a checkpoint, and the table of another tool's weights.

    Raises:
        StorageError: The weights are absent or damaged, or differ from the pin.
        CheckpointError: The URL holds something else, or the weights do not fit the model.
    """
    given = resolve(parse_reference(url))
    if is_weights_file(given):
        backbone = model.backbone
        assert isinstance(backbone, EncoderDecoder)
        found, record = foreign_weights(
            given, backbone.config, dimensions=backbone.dimensions, key="pretrain.init_from"
        )
        backbone.load_state_dict(found.weights, strict=False)
        return record
    reference = Reference(re.sub(r"/model(-[0-9a-f]{64})?\.safetensors$", "", given.url.rstrip("/")), given.sha256)
    storage = Storage(reference.url)
    where = f"pretrain.init_from {storage.url}"
    if not storage.exists("manifest.json"):
        raise CheckpointError(
            f"{where} holds no manifest.json: give the folder of a published backbone, such as STORAGE/backbones/NAME/1, "
            "or of a checkpoint, such as STORAGE/pretrain/checkpoints/step-00001000"
        )
    content = storage.read_bytes("manifest.json", max_bytes=MAX_MANIFEST_BYTES)
    manifest = read_json(
        content,
        where=where,
        max_bytes=MAX_MANIFEST_BYTES,
        max_memory_bytes=MAX_MANIFEST_MEMORY_BYTES,
        error=CheckpointError,
    )
    format = manifest.get("format") if isinstance(manifest, dict) else None
    facts = InitialWeights(url=storage.url, format=format)
    if str(format).startswith("p2r-backbone/"):
        return facts.model_copy(update=_load_backbone(model, reference, where=where))
    if format != FORMAT:
        raise CheckpointError(f"{where} has format {format!r}; weights are taken from p2r-backbone/2 and {FORMAT}")
    saved = parse_manifest(manifest, where=where)
    reference.check(content)
    weights = checked_weights(storage, _FILE, saved.files[_FILE])
    others = {name for name in weights.keys() | model.state_dict().keys() if name.startswith(_OTHER_HEADS)}
    _load_fitting(model, weights, where=where, optional=_OPTIONAL | others)
    origin = {
        "manifest_sha256": hashlib.sha256(content).hexdigest(),
        "weights_sha256": saved.files[_FILE].sha256,
        "origins": origins_of_checkpoint(saved, storage.url),
        "step": saved.step,
    }
    return facts.model_copy(update=origin)


def _load_backbone(model: Pix2Rep, reference: Reference, *, where: str) -> dict[str, object]:
    """Load the weights of a published backbone, and its projection head if it fits; return their record."""
    artefact = open_artefact(reference, format="p2r-backbone")
    assert isinstance(artefact.manifest, BackboneManifest)
    entry = artefact.manifest.files.weights
    weights = read_tensors(artefact.read("weights"), where=artefact.storage.at(entry.name))
    _load_fitting(model.backbone, weights, where=where, optional=set())
    head = _take_over_head(model, artefact)
    step: dict[str, object] = {} if artefact.manifest.step is None else {"step": artefact.manifest.step}
    return {
        "manifest_sha256": artefact.sha256,
        "weights_sha256": entry.sha256,
        "origins": origins_of_backbone(artefact),
        **head,
        **step,
    }


def _take_over_head(model: Pix2Rep, artefact: Artefact) -> dict[str, str]:
    """Load the published projection head if it has the model's shapes, and return the outcome; empty if none was published."""
    entry = artefact.manifest.files.head
    if entry is None:
        return {}
    weights = read_tensors(artefact.read("head"), where=artefact.storage.at(entry.name))
    wanted = head_weights(model.state_dict())
    for name in _OPTIONAL:
        if (name in weights) != (name in wanted):
            weights.pop(name, None)
            wanted.pop(name, None)
    if shapes_of(weights) != shapes_of(wanted):
        return {"head": "random: the published head has other shapes"}
    model.load_state_dict(weights, strict=False)
    return {"head": "taken over"}


def foreign_weights(
    reference: Reference, config: ModelConfig, *, dimensions: int, key: str
) -> tuple[Transfer, InitialWeights]:
    """Read a weights file of another tool, and map its tensors to a backbone.

    Args:
        reference: The file.
        config: Model section for the backbone.
        dimensions: Dimensions of the image, 2 or 3.
        key: Key of the job that names the file, for messages.

    Returns:
        The matched weights, and the record of their origin.

    Raises:
        StorageError, CheckpointError: See `p2r.weights_file.read_weights_file` and `p2r.model.foreign.transfer`.
    """
    where = f"{key} {reference.url}"

    def build(section: ModelConfig) -> nn.Module:
        return unallocated(lambda: build_backbone(section, dimensions=dimensions), where=where)

    file = read_weights_file(reference, where=where)
    found = transfer(file.tensors, build, config, where=where)
    citations = str(file.facts.get("citations") or "")[:_MAX_CITATIONS]
    record = {
        "url": reference.url,
        "format": "foreign",
        "weights_sha256": file.sha256,
        "origins": None,
        **found.facts(),
        **({"citations": citations} if citations else {}),
    }
    return found, InitialWeights.model_validate(record)


def checked_weights(storage: Storage, path: str, entry: FileEntry) -> dict[str, Tensor]:
    """Read safetensors of a checkpoint and check them: digest, float32, finite; parsed from the same bytes that were hashed.

    Raises:
        DamagedError: They are absent, or have another digest.
        CheckpointError: They are not safetensors in float32, or not finite.
    """
    content = storage.read_hashed(path, sha256=entry.sha256, num_bytes=entry.num_bytes)
    weights = read_tensors(content, where=storage.at(path))
    # p2r 0.1.0 also saved this table of swin_unetr, which follows from the window size and is no part of a state.
    return {name: value for name, value in weights.items() if not name.endswith(".relative_position_index")}


def _load_fitting(module: Any, weights: dict[str, Tensor], *, where: str, optional: set[str]) -> None:
    wanted = module.state_dict()
    for name in optional:
        if (name in weights) != (name in wanted):
            weights.pop(name, None)
            wanted.pop(name, None)
    check_fit(shapes_of(weights), shapes_of(wanted), where=where, of="pretrain.model", way_out=_WAY_OUT)
    module.load_state_dict(weights, strict=False)


def head_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the projection head of a whole model's weights, and a learnt temperature; not the heads of other terms."""
    return {name: value for name, value in weights.items() if not name.startswith((_BACKBONE, *_OTHER_HEADS))}


def backbone_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the backbone's part of a whole model's weights, under the backbone's own names."""
    return {name.removeprefix(_BACKBONE): value for name, value in weights.items() if name.startswith(_BACKBONE)}
