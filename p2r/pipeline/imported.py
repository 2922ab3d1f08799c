"""Weights of another tool: checked against a job's network before training, or published as a backbone for fine-tuning."""

from collections.abc import Sequence

import torch

from p2r.backbone import BACKBONE_FORMAT, ArtefactConfig, publish
from p2r.config import ImportedConfig, PretrainConfig
from p2r.data.preprocess import Preparation
from p2r.engine.checkpoint_manifest import InitialWeights
from p2r.engine.weights import foreign_weights
from p2r.logs import Say
from p2r.model.backbones import build_backbone
from p2r.model.foreign import Row
from p2r.reference import parse_reference
from p2r.storage import Storage
from p2r.weights_file import is_weights_file

_DIGITS = 12


def check_initial_weights(config: PretrainConfig, say: Say) -> None:
    """Map the initial weights of a run to its network and show the table, before any worker starts.

    Raises:
        CheckpointError: They are another tool's, and do not fit; the message gives the rule and the way out.
    """
    if config.init_from is None or not is_weights_file(reference := parse_reference(config.init_from)):
        return
    found, record = foreign_weights(
        reference, config.model, dimensions=config.image.dimensions, key="pretrain.init_from"
    )
    digest = (record.weights_sha256 or "")[:_DIGITS]
    say(f"pretrain | initial weights of {found.source}, sha256 {digest}\n{found.table()}")


def publish_imported(url: str, config: ImportedConfig, storage: Storage, say: Say) -> str:
    """Publish a weights file of another tool as a backbone of the job's storage, and return its URL.

    Layers that the file lacks get random weights from a fixed seed.

    Args:
        url: The file.
        config: Its network, image and licence.
        storage: Storage of the job.
        say: Receives the table of what was matched.

    Raises:
        StorageError, CheckpointError: See `p2r.engine.weights.foreign_weights`.
    """
    reference, dimensions = parse_reference(url), config.image.dimensions
    found, record = foreign_weights(reference, config.model, dimensions=dimensions, key="finetune.backbone")
    digest = (record.weights_sha256 or "")[:_DIGITS]
    say(f"finetune | weights of {found.source}, sha256 {digest}\n{found.table()}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_backbone(config.model, dimensions=dimensions)
    network.load_state_dict(found.weights, strict=False)
    artefact = ArtefactConfig(model=config.model, preparation=preparation_of(config))
    name = f"{digest}-{artefact.sha256()[:_DIGITS]}"
    made = publish(
        storage.child(f"backbones/imported/{name}"),
        format=BACKBONE_FORMAT,
        weights=network.state_dict(),
        config=artefact,
        card=_write_card(config, record, found.rows),
        facts={
            "licence": config.licence,
            "description": config.provenance or None,
            "initial_weights": published_record(record),
        },
    )
    return made.url


def published_record(record: InitialWeights) -> dict[str, object]:
    """Return the record of another tool's weights for a manifest: with the file's name in place of a path of this machine."""
    kept = record.model_dump(include={"source", "weights_sha256", "table", "citations"}, exclude_unset=True)
    return {"file": record.url.rpartition("/")[2], **kept}


def preparation_of(config: ImportedConfig) -> Preparation:
    """Return the preparation of scans for an imported network, with slices across the axis of the largest spacing."""
    image = config.image
    return Preparation(
        dimensions=image.dimensions,
        intensity_percentiles=image.intensity_percentiles,
        spacing_mm=image.spacing_mm,
        image_size=image.size,
        contrasts=config.model.contrasts,
    )


def _write_card(config: ImportedConfig, record: InitialWeights, rows: Sequence[Row]) -> str:
    name, sha256 = record.url.rpartition("/")[2], record.weights_sha256
    lines = [
        f"# Weights of {record.source}",
        "",
        f"Imported from `{name}`, sha256 `{sha256}`. Licence: {config.licence}. {config.provenance}",
        "",
        "The pretraining corpora are unknown.",
        "",
        "| outcome | part | tensors | values | reason |",
        "| --- | --- | --- | --- | --- |",
        *(f"| {row.outcome} | {row.part} | {row.num_tensors:,} | {row.num_values:,} | {row.reason} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"
