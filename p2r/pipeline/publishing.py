"""The stage publish: a checkpoint -> a backbone on the storage, with its head, metrics, curves, lineage and card; the pointer `latest`."""

import hashlib
import json
import re
from collections.abc import Sequence

from torch import Tensor

from p2r.artefact import MANIFEST, MAX_MANIFEST_BYTES, CorpusFacts, Manifest, Published
from p2r.artefact_manifest import Lineage, Parent, Role
from p2r.backbone import BACKBONE_FORMAT, ArtefactConfig, publish
from p2r.config import ImageConfig, ModelConfig, PretrainConfig, PublishConfig
from p2r.contrasts import example_scan
from p2r.data.manifest import describe_records
from p2r.data.preprocess import Preparation, SliceAxis
from p2r.data.stream import Corpus
from p2r.engine.ancestry import added, ancestry, corpus_facts
from p2r.engine.checkpoint_manifest import InitialWeights, SavedCheckpoint
from p2r.engine.corpora import corpora_of
from p2r.engine.history import read_history
from p2r.engine.pretrain import checkpoint_at, finished_checkpoint
from p2r.engine.report import HISTORY
from p2r.engine.weights import backbone_weights, checked_weights, head_weights
from p2r.errors import DamagedError, DataError, JobError
from p2r.job import Job
from p2r.logs import Say
from p2r.model.backbones import cost_of
from p2r.pipeline.imported import published_record
from p2r.published.metrics import TrainingMetrics
from p2r.published.promotion import move_latest
from p2r.reference import Reference
from p2r.report import pretraining_curves
from p2r.report.text import for_markdown
from p2r.storage import Storage, json_bytes

_FORBIDS_OTHER_TERMS = re.compile(
    r"(?<![A-Z])(?:NC|SA|ND|NON-?COMMERCIAL|SHARE-?ALIKE|NO-?DERIV\w*|[AL]?GPL(?:V\d)?|ODBL)(?![A-Z])", re.IGNORECASE
)
"""Parts of a licence's name, such as CC-BY-NC-4.0, that forbid to publish what is derived under other terms."""


def publish_backbone(job: Job, storage: Storage, say: Say, *, step: int | None = None) -> Published[Manifest]:
    """Publish the weights of a checkpoint, move the pointer `latest` to them, and return the artefact's manifest.

    If a moving average of the weights was kept, it is published, with the last step's weights beside it. The projection head has a file
    of its own.

    Args:
        job: The job.
        storage: Its storage.
        say: Receives lines of progress.
        step: Step of a complete checkpoint, which may be one of a run at work; it is published as VERSION-step-N. None: the last step.

    Raises:
        CheckpointError: The checkpoint is absent, or another backbone is published there.
    """
    config, pretrain = job.publish, job.pretrain
    assert config is not None
    if pretrain is None:
        raise JobError("kind publish needs the pretrain section of the run whose checkpoint it publishes")
    where = storage.child(f"backbones/{config.name}/{config.version}" + ("" if step is None else f"-step-{step}"))
    trained = storage.child("pretrain")
    checkpoint = finished_checkpoint(trained, pretrain) if step is None else checkpoint_at(trained, pretrain, step)
    corpora = corpora_of(pretrain, storage.child("corpus"), stream=checkpoint.manifest.state.stream)
    inherited = ancestry(checkpoint.manifest.init_from)
    licence = _choose_licence(config, [*(corpus.manifest.facts.licence for corpus in corpora), *inherited.licences])
    slice_axis = _slice_axis_of(corpora) if pretrain.image.dimensions == 2 else "auto"
    preparation = preparation_of_backbone(pretrain.image, slice_axis, contrasts=pretrain.model.contrasts)
    weights, tensors = _read_weights(trained, checkpoint, pretrain)
    storage.child("backbones").check_conditional()
    published = publish(
        where,
        format=BACKBONE_FORMAT,
        weights=weights,
        config=ArtefactConfig(model=pretrain.model, preparation=preparation),
        card=_write_card(job, config, corpora, where.url, licence, step=checkpoint.step),
        facts={
            "licence": licence,
            "job": job.name,
            "description": config.description,
            "corpora": None
            if inherited.corpora is None
            else added(list(map(_corpus_facts, corpora)), inherited.corpora),
            **_describe_training(checkpoint, pretrain),
            "lineage": _lineage(trained, checkpoint),
        },
        tensors=tensors,
        documents=_documents(trained, step=checkpoint.step, title=f"{config.name}, pretraining"),
    )
    move_latest(where, published.sha256, is_new=published.is_new)
    if inherited.corpora is None:
        say(
            "publish | CORPORA UNKNOWN: the pretraining data of the initial weights cannot be read; evaluation will refuse this backbone"
        )
    say(f"publish | {published.pin} | licence {licence}" + " | was published already" * (not published.is_new))
    if config.exports:
        from p2r.pipeline.exporting import write_exports  # ONNX takes seconds to import

        write_exports(config, storage, published, say)
    return published


def _slice_axis_of(corpora: Sequence[Corpus]) -> SliceAxis:
    """Return the rule by which corpora cut their planes.

    Raises:
        DataError: They have different rules.
    """
    rules = {corpus.manifest.facts.preprocessing.slice_axis for corpus in corpora}
    if len(rules) > 1:
        raise DataError(
            f"the corpora cut planes across different axes (slice_axis {', '.join(map(str, sorted(rules, key=str)))}): "
            "a backbone has one rule; ingest them alike"
        )
    return rules.pop()


def _read_weights(
    storage: Storage, checkpoint: SavedCheckpoint, config: PretrainConfig
) -> tuple[dict[str, Tensor], dict[Role, dict[str, Tensor]]]:
    """Return the published weights of a checkpoint, and the weights that get files of their own: head, and not averaged ones."""

    def read(name: str) -> dict[str, Tensor]:
        return checked_weights(storage, f"{checkpoint.path}/{name}", checkpoint.manifest.files[name])

    try:
        last = read("model.safetensors")
        published = last if config.ema_decay is None else read("ema.safetensors")
    except DamagedError as error:
        raise DamagedError(
            f"{error}; training removes checkpoints that are older than the newest pretrain.keep_checkpoints "
            f"({config.keep_checkpoints}), unless pretrain.keep_every keeps their step"
        ) from None
    tensors: dict[Role, dict[str, Tensor]] = {"head": head_weights(published)}
    if published is not last:
        tensors["unaveraged"] = backbone_weights(last)
    return backbone_weights(published), tensors


def _lineage(storage: Storage, checkpoint: SavedCheckpoint) -> Lineage:
    before = checkpoint.manifest.init_from
    content = storage.read_bytes(f"{checkpoint.path}/{MANIFEST}", max_bytes=MAX_MANIFEST_BYTES)
    return Lineage(
        parents=[] if before is None else [_parent(before)],
        origins=[] if before is None else list(before.origins or []),
        checkpoint_sha256=hashlib.sha256(content).hexdigest(),
        code=str((checkpoint.manifest.model_extra or {}).get("code", ""))[:100],
    )


def _parent(before: InitialWeights) -> Parent:
    format = before.format or "unknown"
    if before.manifest_sha256 is None:  # another tool's weights: the name of the file, without a path of this machine
        return Parent(reference=before.url.rpartition("/")[2], format=format, sha256=before.weights_sha256 or "0" * 64)
    pin = Reference(before.url, before.manifest_sha256)
    return Parent(reference=str(pin), format=format, sha256=before.manifest_sha256, step=before.step)


def _documents(storage: Storage, *, step: int, title: str) -> dict[Role, bytes]:
    """Return the metrics of a run at a step, and their curves; empty without a history."""
    if not storage.exists(HISTORY):
        return {}
    rows = [row.to_json() for row in read_history(storage, HISTORY)]
    metrics = TrainingMetrics.from_history(rows, step=step)
    documents: dict[Role, bytes] = {"metrics": json_bytes(metrics.model_dump(mode="json"))}
    picture = pretraining_curves(rows, step=step, title=title)
    return documents if picture is None else {**documents, "picture": picture}


def _describe_training(checkpoint: SavedCheckpoint, config: PretrainConfig) -> dict[str, object]:
    """Return the facts about the training of a checkpoint's weights."""
    manifest = checkpoint.manifest
    before = manifest.init_from
    return {
        "step": checkpoint.step,
        "samples_seen": checkpoint.step * config.global_batch,
        # Without the probe, which does not affect the weights and has a path of this machine.
        "pretrain": {key: value for key, value in manifest.config.to_json().items() if key != "probe"},
        "negatives": config.negatives,
        "initial_weights": published_record(before) if before and before.format == "foreign" else None,
    }


def _corpus_facts(corpus: Corpus) -> CorpusFacts:
    return corpus_facts(
        corpus.manifest.facts, url=corpus.storage.url, sha256=corpus.manifest.sha256, weight=corpus.weight
    )


def preparation_of_backbone(
    image: ImageConfig, slice_axis: SliceAxis, *, contrasts: tuple[str, ...] | None = None
) -> Preparation:
    """Return the preprocessing of a backbone that is pretrained on such images."""
    return Preparation(
        dimensions=image.dimensions,
        slice_axis=slice_axis,
        intensity_percentiles=image.intensity_percentiles,
        spacing_mm=image.spacing_mm,
        image_size=image.size,
        contrasts=contrasts,
    )


def describe_network(config: PretrainConfig) -> str:
    """Return the network with its channels and its cost, for the log and the card."""
    model, image = config.model, config.image
    cost = cost_of(model, dimensions=image.dimensions, size=image.size)
    return f"{model.name}, channels {', '.join(map(str, model.channels))}; {cost}"


def _choose_licence(config: PublishConfig, of_corpora: Sequence[str]) -> str:
    corpus_licence = " AND ".join(sorted(set(of_corpora)))
    if config.licence is None or config.licence == corpus_licence:
        return corpus_licence
    if _FORBIDS_OTHER_TERMS.search(corpus_licence):
        raise JobError(
            f"publish.licence is {config.licence!r}, but the corpus is under {corpus_licence!r}, which forbids other terms: leave it out"
        )
    return config.licence


def _describe_contrasts(model: ModelConfig) -> str:
    if model.contrasts is None:
        return "one contrast" if model.in_channels == 1 else f"{model.in_channels} contrasts"
    return f"contrasts {', '.join(model.contrasts)}, of which some may be missing"


def _write_card(
    job: Job, config: PublishConfig, corpora: Sequence[Corpus], url: str, licence: str, *, step: int
) -> str:
    assert job.pretrain is not None
    model, loss, image = job.pretrain.model, job.pretrain.loss, job.pretrain.image
    batch = job.pretrain.global_batch
    pixel, scan = ("pixel", "slice") if image.dimensions == 2 else ("voxel", "scan")
    block = "" if model.level == 0 else f"{' x '.join([str(model.stride)] * image.dimensions)} "
    facts = {
        "method": f"{loss.name} over {loss.pixel_pairs_per_image * batch} pixel pairs a step, {step} steps of {batch} images",
        "negatives": job.pretrain.negatives,
        "network": describe_network(job.pretrain),
        "input": f"{_describe_contrasts(model)}, {' x '.join([str(image.size)] * image.dimensions)} {pixel}s of {image.spacing_mm:g} mm; "
        "intensities as in config.json",
        **{
            f"corpus{f' {number}' if len(corpora) > 1 else ''}": f"{corpus.manifest.facts.num_subjects} subjects, "
            f"{describe_records(corpus.manifest.facts)}, {corpus.manifest.facts.num_samples} planes; sha256 {corpus.manifest.sha256}"
            for number, corpus in enumerate(corpora, start=1)
        },
        "licence": licence,
    }
    rows = "\n".join(f"| {name} | {for_markdown(value)} |" for name, value in facts.items())
    sources = "\n\n".join(for_markdown(corpus.manifest.facts.provenance) for corpus in corpora)
    return f"""# {config.name} {config.version}

A backbone that gives {model.feature_channels} features for every {block}{pixel}{"s" * bool(block)} of an MRI {scan}, pretrained without
labels by p2r.
{for_markdown(config.description)}

    import p2r
    backbone = p2r.load_backbone({json.dumps(url)})
    features = backbone.features({example_scan(model.contrasts)})

| property | value |
|---|---|
{rows}

{sources}

Not a medical device. Its results depend on the test patients: see the report of the job that made this backbone.
"""
