"""The stage publish: the weights of the last checkpoint -> a backbone on the storage, with its corpora, licence and card."""

import json
from collections.abc import Sequence

from p2r.artefact import CorpusFacts, Manifest, Published
from p2r.backbone import BACKBONE_FORMAT, ArtefactConfig, publish
from p2r.config import ImageConfig, PretrainConfig, PublishConfig
from p2r.data.manifest import describe_records
from p2r.data.preprocess import Preparation, SliceAxis
from p2r.data.stream import Corpus
from p2r.engine.ancestry import added, ancestry, corpus_facts
from p2r.engine.checkpoint_manifest import SavedCheckpoint
from p2r.engine.corpora import corpora_of
from p2r.engine.pretrain import finished_checkpoint
from p2r.engine.weights import backbone_weights, checked_weights
from p2r.errors import DataError, JobError
from p2r.job import Job
from p2r.logs import Say
from p2r.model.backbones import cost_of
from p2r.pipeline.imported import published_record
from p2r.report.text import for_markdown
from p2r.storage import Storage


def publish_backbone(job: Job, storage: Storage, say: Say) -> Published[Manifest]:
    """Publish the weights of the last checkpoint, without the projection head, and return the artefact's manifest.

    If a moving average of the weights was kept, it is published instead.
    """
    config, pretrain = job.publish, job.pretrain
    assert config is not None
    if pretrain is None:
        raise JobError("kind publish needs the pretrain section of the run whose checkpoint it publishes")
    where = storage.child(f"backbones/{config.name}/{config.version}")
    checkpoint = finished_checkpoint(storage.child("pretrain"), pretrain)
    corpora = corpora_of(pretrain, storage.child("corpus"), stream=checkpoint.manifest.state.stream)
    inherited = ancestry(checkpoint.manifest.init_from)
    licence = _choose_licence(config, [*(corpus.manifest.facts.licence for corpus in corpora), *inherited.licences])
    slice_axis = _slice_axis_of(corpora) if pretrain.image.dimensions == 2 else "auto"
    preparation = preparation_of_backbone(pretrain.image, slice_axis, contrasts=pretrain.model.contrasts)
    name = "model.safetensors" if pretrain.ema_decay is None else "ema.safetensors"
    weights = checked_weights(storage.child("pretrain"), f"{checkpoint.path}/{name}", checkpoint.manifest.files[name])
    published = publish(
        where,
        format=BACKBONE_FORMAT,
        weights=backbone_weights(weights),
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
        },
    )
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
    if any(word in corpus_licence.upper() for word in ("NC", "SA", "ND")):
        raise JobError(
            f"publish.licence is {config.licence!r}, but the corpus is under {corpus_licence!r}, which forbids other terms: leave it out"
        )
    return config.licence


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
        "input": f"one contrast, {' x '.join([str(image.size)] * image.dimensions)} {pixel}s of {image.spacing_mm:g} mm; intensities "
        "as in config.json",
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
    features = backbone(backbone.prepare("scan.nii.gz").images)

| | |
|---|---|
{rows}

{sources}

Not a medical device. Its results depend on the test patients: see the report of the job that made this backbone.
"""
