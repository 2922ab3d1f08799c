"""The last stage: rows of test figures and the backbone -> report.json, report.md and pictures.

Pictures show training images (view pairs) and validation patients (embedding, outlines): making them reads no test patient.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from p2r.backbone import Backbone, load_model
from p2r.data.preprocess import slice_axis, volume_to_planes
from p2r.data.stream import stream
from p2r.engine.corpora import corpora_of
from p2r.engine.finetune import TrialSetup
from p2r.evaluate.inference import predict_volume
from p2r.evaluate.tasks import LabelledScan, Task, load_scan, load_task
from p2r.job import Job
from p2r.loss import corresponding_points
from p2r.randomness import keyed_generator
from p2r.report import (
    embedding_pca,
    few_shot_curve,
    label_of,
    markdown_variants,
    outlines,
    split_of,
    table,
    variants_picture,
    view_pairs,
    write_report,
)
from p2r.storage import Storage
from p2r.views.pair import make_views

_OF_CORPUS = ("url", "sha256", "weight", "licence", "provenance", "num_samples", "num_subjects")
_NUM_VIEWS = 4
_NUM_SLICES = 3


def make_report(
    job: Job,
    storage: Storage,
    *,
    backbone: Backbone,
    setups: Sequence[TrialSetup],
    rows: Sequence[dict[str, Any]],
    models: dict[str, str],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Write the report below `<storage>/report` and return its URLs, and the table for a terminal."""
    pictures: dict[str, bytes] = {}
    captions: dict[str, str] = {}
    tasks = [load_task(Path(setup.task)) for setup in setups]
    if (
        job.pretrain is not None and job.pretrain.image.dimensions == 2
    ):  # joined points of volumes lie in no common slice
        pictures["view-pairs"] = _view_pairs(job, storage)
        captions["view-pairs"] = "Two views of training images, and points that show the same anatomy in both."
    for task in tasks:
        of_task = [row for row in rows if row["task"] == task.name]
        pictures[f"few-shot-{task.name}"] = few_shot_curve(of_task, task.name)
        scan = load_scan(task.scans_of(task.subjects["validation"][:1])[0], task, backbone.preparation)
        pictures[f"embedding-{task.name}"] = _embedding(backbone, scan)
        captions[f"few-shot-{task.name}"] = (
            f"Dice on {split_of(of_task)} patients against the number of labelled patients; a dot is one draw."
        )
        captions[f"embedding-{task.name}"] = (
            f"Features of validation patient {scan.scan.subject}: three principal components as red, green and blue."
        )
        if task.name in models:
            captions[f"outlines-{task.name}"] = f"The published model on validation patient {scan.scan.subject}."
            pictures[f"outlines-{task.name}"] = _outlines(models[task.name], scan, task)
    where = storage.child("report")
    written = write_report(
        where,
        rows=list(rows),
        context={**_context(job, backbone, tasks, models), **facts, "captions": captions},
        pictures=pictures,
    )
    return {"report": where.at("report.md"), "pictures": where.at("pictures"), "table": table(written["rows"])}


def write_variants(job: Job, storage: Storage, rows: Sequence[dict[str, Any]]) -> str:
    """Write what the variants of an ablation reached below `<storage>/report`, and return the URL of the page."""
    where = storage.child("report")
    where.write_bytes("pictures/variants.png", variants_picture(rows, title=f"{job.name}: what each variant reaches"))
    facts = {"job": job.name, "variants": job.variants, "seed": job.finetune.seed if job.finetune else None}
    where.write_json("report.json", {"format": "p2r-ablation/1", **facts, "rows": list(rows)})
    lines = [
        f"# {job.name}",
        "",
        f"Dice on {split_of(rows)} patients, mean ± standard deviation over draws{label_of(rows)}.",
        "",
    ]
    lines += markdown_variants(rows)
    lines += ["", "![what each variant reaches](pictures/variants.png)", "", "| variant | changes |", "| --- | --- |"]
    for name, changes in job.variants.items():
        lines.append(f"| {name} | {', '.join(f'`{key}: {value}`' for key, value in changes.items())} |")
    where.write_bytes("report.md", ("\n".join(lines) + "\n").encode())
    return where.at("report.md")


def _context(job: Job, backbone: Backbone, tasks: Sequence[Task], models: dict[str, str]) -> dict[str, Any]:
    assert job.finetune is not None
    corpora = backbone.manifest.get("corpora", [])
    return {
        "title": f"Few-shot report of {job.name}",
        "job": job.name,
        "caveats": [task.config.caveat for task in tasks if task.config.caveat],
        "backbone": {
            "url": backbone.manifest["url"],
            "sha256": backbone.manifest["sha256"],
            "step": backbone.manifest.get("step"),
            "negatives": backbone.manifest.get("negatives"),
        },
        **{
            "corpus" if len(corpora) == 1 else f"corpus {number}": {key: corpus.get(key) for key in _OF_CORPUS}
            for number, corpus in enumerate(corpora, start=1)
        },
        "licence": backbone.manifest["licence"],
        "code": backbone.manifest.get("code"),
        "seed": job.finetune.seed,
        "finetune": job.finetune.model_dump(mode="json", exclude={"tasks", "backbone"}),
        "models": models,
        "tasks": {
            task.name: {
                "title": task.config.title,
                "licence": task.config.licence,
                "citation": task.config.citation,
                "splits": {split: list(subjects) for split, subjects in task.subjects.items()},
            }
            for task in tasks
        },
    }


def _view_pairs(job: Job, storage: Storage) -> bytes:
    config = job.pretrain
    assert config is not None
    corpora = corpora_of(config, storage.child("corpus"))
    batches = stream(corpora, image=config.image, seed=config.seed, global_batch=config.global_batch)
    try:
        batch, _ = next(batches)
    finally:
        batches.close()
    # The fullest images of the batch: a picture of air explains nothing.
    images, insides = batch.images()
    fullest = images.mean(dim=(1, 2, 3)).argsort(descending=True)[:_NUM_VIEWS]
    epochs, positions = batch.epochs[fullest.numpy()], batch.positions[fullest.numpy()]
    views = make_views(
        images[fullest],
        insides[fullest],
        config=config.views,
        spacing_mm=batch.spacing_mm,
        seed=config.seed,
        epochs=epochs,
        positions=positions,
    )
    pairs = corresponding_points(
        views.warp,
        views.valid,
        num_points=64,  # the picture shows a few of them, far apart
        generators=[
            keyed_generator(config.seed, "points", int(epoch), int(position))
            for epoch, position in zip(epochs, positions, strict=True)
        ],
    )
    return view_pairs(images[fullest], views, pairs.a, pairs.b)


def _embedding(backbone: Backbone, scan: LabelledScan) -> bytes:
    images = backbone.prepare(scan.volume).images
    images = images[_slices(scan.label_planes.numpy())] if images.ndim == 4 else images[:1]
    with torch.inference_mode():
        features = backbone(images)
    if features.shape[2:] != images.shape[2:]:
        features = F.interpolate(features, size=images.shape[2:])
    if images.ndim == 5:  # cut across the last axis: (1, C, X, Y, Z) -> (Z, C, X, Y)
        images, features = (maps[0].permute(3, 0, 1, 2) for maps in (images, features))
    return embedding_pca(images, features, num_slices=_NUM_SLICES)


def _outlines(model: str, scan: LabelledScan, task: Task) -> bytes:
    segmenter, config, _ = load_model(model)
    prediction = predict_volume(segmenter, scan.volume, preparation=config.preparation, num_classes=task.num_classes)
    axis = slice_axis(scan.volume.spacing_mm, config.preparation.slice_axis)
    planes, predicted, reference = (
        volume_to_planes(data, axis) for data in (scan.volume.data, prediction, scan.labels.data)
    )
    chosen = _slices(scan.label_planes.numpy() if config.preparation.dimensions == 2 else reference)
    low, high = scan.planes.low, scan.planes.high
    images = np.clip((planes[chosen].astype(np.float32) - low) / (high - low), 0, 1)
    return outlines(
        images,
        predicted[chosen],
        reference[chosen],
        list(task.config.classes.values()),
        title=f"Validation patient {scan.scan.subject}",
    )


def _slices(labels: NDArray[Any]) -> list[int]:
    """Planes evenly spread over those of `labels` (P, H, W) that have any foreground."""
    labelled = np.flatnonzero((labels > 0).any((1, 2))).tolist() or list(range(len(labels)))
    return [labelled[len(labelled) * (2 * number + 1) // (2 * _NUM_SLICES)] for number in range(_NUM_SLICES)]
