"""Pictures of a few-shot report: cases, views of training images, features and outlines.

Pictures show training images (view pairs), validation patients (embedding, outlines), and cases of the reported split. The cases
use the stored predictions of its trials: no model reads a test patient here.
"""

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from p2r.backbone import Backbone, load_model
from p2r.data.preprocess import intensity_window, percentile_table, slice_axis, volume_to_planes
from p2r.data.stream import stream
from p2r.engine.corpora import balance_of, corpora_of
from p2r.errors import DataError, StorageError, error_text
from p2r.evaluate.inference import predict_volume
from p2r.evaluate.rows import TrialRow
from p2r.evaluate.tasks import LabelledScan, Task, TaskScan, load_scan
from p2r.fewshot.results import TrialFacts
from p2r.fewshot.setup import TrialSetup
from p2r.job import Job
from p2r.loss import corresponding_points
from p2r.modes import MODES
from p2r.randomness import keyed_generator
from p2r.report import (
    Drawing,
    ShownCase,
    embedding_pca,
    outlines,
    shown_cases,
    split_of,
    trials_line,
    view_pairs,
)
from p2r.storage import Storage
from p2r.views.blocks import mask_view
from p2r.views.draws import Draws
from p2r.views.pair import ViewPair, make_views

_NUM_VIEWS = 4
_NUM_POINTS = 64  # candidates from which a picture of views chooses
_NUM_SLICES = 3
_NUM_CASE_SLICES = 5
_UNREADABLE = (StorageError, DataError, ValueError, EOFError, zipfile.BadZipFile)
"""Errors of a prediction that is missing, damaged, or of another scan; the report is then made without its picture."""


@dataclass(frozen=True)
class Pictures:
    """Pictures of a report by name, each with its caption and, for a case, the task whose section shows it."""

    drawn: dict[str, Drawing | bytes] = field(default_factory=dict)
    captions: dict[str, str] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    """Pictures that could not be drawn, each with its reason."""

    def add(self, name: str, picture: Drawing, caption: str, *, task: Task | None = None) -> None:
        """Add a picture with its caption; a picture of a case with its task."""
        self.drawn[name], self.captions[name] = picture, caption
        if task is not None:
            self.places[name] = task.name


def draw_pictures(
    job: Job,
    storage: Storage,
    backbone: Backbone,
    setups: Sequence[TrialSetup],
    tasks: Sequence[Task],
    rows: Sequence[TrialRow],
    models: Mapping[str, str],
    *,
    code: str,
) -> Pictures:
    """Draw all pictures of a few-shot report; arguments as in `make_report`, with the version of the code."""
    pictures = Pictures()
    for setup, task in zip(setups, tasks, strict=True):
        _add_cases(pictures, task, setup, backbone, rows, code)
    if job.pretrain is not None:
        try:
            views = _draw_view_pairs(job, storage, source=_backbone_line(backbone))
        except (StorageError, DataError) as error:
            pictures.left_out.append(f"views of training images: {error}")
        else:
            caption = "Two views of training images, and points that show the same anatomy in both."
            if job.pretrain.loss.reconstruction is not None:
                caption += " Masked blocks of view b are shaded, too: the network predicts their intensities."
            pictures.add("view-pairs", views, caption)
    for task in tasks:
        _add_validation_patient(pictures, task, backbone, models, rows, code)
    return pictures


def _add_cases(
    pictures: Pictures, task: Task, setup: TrialSetup, backbone: Backbone, rows: Sequence[TrialRow], code: str
) -> None:
    """Add the best, median and worst cases of a task, from the stored predictions."""
    for case in shown_cases([row for row in rows if row.task == task.name]):
        try:
            picture = _draw_case(case, task, setup, backbone, code)
        except _UNREADABLE as error:
            pictures.left_out.append(f"{case.rank} case of {task.name}, {case.scan}: {error_text(error)}")
            continue
        dice = ", ".join(f"{name} {found:.2f}" for name, found in case.dice.items())
        who = f"{case.subject}, frame {case.frame + 1}" + (f", {case.stratum}" if case.stratum else "")
        caption = f"The {case.rank} case: {who}. Dice, mean of classes: {dice}."
        pictures.add(f"case-{case.rank}-{task.name}", picture, caption, task=task)


def _add_validation_patient(
    pictures: Pictures,
    task: Task,
    backbone: Backbone,
    models: Mapping[str, str],
    rows: Sequence[TrialRow],
    code: str,
) -> None:
    """Add the features of a task's first validation patient, and the outlines of the published model, if there is one."""
    scan = _load_for_pictures(task.scans_of(task.subjects["validation"][:1])[0], task, backbone)
    who = f"validation patient {scan.scan.subject}"
    pictures.add(
        f"embedding-{task.name}",
        _draw_embedding(backbone, scan, source=f"{_backbone_line(backbone)} · task {task.name}, {who}"),
        f"Features of {who}: three principal components as red, green and blue.",
    )
    by_contrast = _draw_embedding_of_contrasts(
        backbone, scan, source=f"{_backbone_line(backbone)} · task {task.name}, {who}"
    )
    if by_contrast is not None:
        pictures.add(
            f"embedding-contrasts-{task.name}",
            by_contrast,
            f"Features of {who}, from one contrast at a time: equal colours mean equal features, also in different contrasts.",
        )
    if task.name in models:
        pictures.add(
            f"outlines-{task.name}",
            _draw_outlines(models[task.name], scan, task, rows, code, who=who),
            f"The published model ({_mode_title(models[task.name])}) on {who}.",
        )


def _backbone_line(backbone: Backbone) -> str:
    """Return the source line of a picture that depends only on the backbone, not on a task, draw or protocol."""
    digests = [corpus.sha256[:12] for corpus in backbone.manifest.facts.corpora or []]
    code = backbone.manifest.facts.code
    parts = [
        f"backbone {backbone.manifest.sha256[:12]}",
        f"pretrained on corpus {', '.join(digests)}" if digests else "",
        f"by code {code}" if code else "",
    ]
    return " · ".join(filter(None, parts))


def _draw_view_pairs(job: Job, storage: Storage, *, source: str) -> Drawing:
    config = job.pretrain
    assert config is not None
    corpora = corpora_of(config, storage.child("corpus"))
    contrasts = config.model.contrasts
    batches = stream(
        corpora,
        image=config.image,
        seed=config.seed,
        global_batch=config.global_batch,
        contrasts=contrasts,
        balance=balance_of(config, corpora),
        frames_apart=config.views.frames_apart,
    )
    try:
        batch, _ = next(batches)
    finally:
        batches.close()
    # Show the fullest images of the batch, since pictures of air explain nothing.
    images, insides, covered, other = batch.prepare_frames()
    fullest = images.flatten(1).mean(1).argsort(descending=True)[:_NUM_VIEWS]
    images, epochs, positions = images[fullest], batch.epochs[fullest.numpy()], batch.positions[fullest.numpy()]
    views = make_views(
        images,
        insides[fullest],
        config=config.views,
        spacing_mm=batch.spacing_mm,
        seed=config.seed,
        epochs=epochs,
        positions=positions,
        present=None if batch.present is None else batch.present[fullest.numpy()],
        covered=None if covered is None else covered[fullest],
        other=None if other is None else other[fullest],
    )
    if config.loss.reconstruction is not None:
        draws = Draws.of_samples(config.seed, epochs=epochs, positions=positions)
        masked = mask_view(views, draws, config=config.loss.reconstruction, spacing_mm=batch.spacing_mm)
        views = replace(views, b=masked.image, valid=masked.visible)
    generators = [
        keyed_generator(config.seed, "points", int(epoch), int(position))
        for epoch, position in zip(epochs, positions, strict=True)
    ]
    names = contrasts or ()
    if config.image.dimensions == 3:
        return view_pairs(*_shared_planes(images, views, generators), of_volumes=True, contrasts=names, source=source)
    # The picture shows a few of these, far apart.
    pairs = corresponding_points(views.warp, views.valid, num_points=_NUM_POINTS, generators=generators)
    return view_pairs(images, views, pairs.a, pairs.b, contrasts=names, source=source)


def _shared_planes(
    images: Tensor, views: ViewPair, generators: Sequence[np.random.Generator]
) -> tuple[Tensor, ViewPair, Tensor, Tensor]:
    """Reduce volumes and their views to one plane each across Z, with points of view b that are also in view a.

    The plane of view b is its middle one. The plane of the volume and of view a is the one with most of that anatomy: planes
    rotated against each other share a band.

    Args:
        images: (B, C, X, Y, Z).
        views: Views of the images.
        generators: One per volume, for the choice of points.

    Returns:
        Planes (B', C, X, Y), their views, and points (B', n, 2) in both. Volumes whose middle plane of view b is outside the
        scan are left out.

    Raises:
        DataError: All volumes are left out.
    """
    middle = images.shape[-1] // 2
    rows: list[tuple[Tensor, ...]] = []
    is_kept = views.valid[..., middle].flatten(1).any(1).numpy()
    for image, a, b, warp, valid, generator in zip(
        images, views.a, views.b, views.warp[..., middle, :], views.valid[..., middle], generators, strict=True
    ):
        if not valid.any():
            continue
        plane = int(warp[..., 2][valid].round().long().mode().values)
        shared = torch.nonzero(valid & (warp[..., 2].round() == plane))  # (m, 2): x, y in b
        chosen = shared[torch.from_numpy(generator.choice(len(shared), _NUM_POINTS))]
        of_a = warp[chosen[:, 0], chosen[:, 1], :2]
        rows.append((image[..., plane], a[..., plane], b[..., middle], warp[..., :2], valid, of_a, chosen))
    if not rows:
        raise DataError("no volume shows any of its scan")
    planes, a, b, warp, valid, points_a, points_b = (torch.stack(part) for part in zip(*rows, strict=True))
    shown_a, shown_b = (None if shown is None else shown[is_kept] for shown in (views.shown_a, views.shown_b))
    return planes, ViewPair(a, b, warp, valid, shown_a, shown_b), points_a, points_b


def _load_for_pictures(scan: TaskScan, task: Task, backbone: Backbone) -> LabelledScan:
    """Read a scan with the backbone's own pixel size, and all contrasts of the task."""
    return load_scan(scan, task, backbone.preparation.model_copy(update={"contrasts": task.config.contrasts}))


def _images_for(backbone: Backbone, scan: LabelledScan) -> Tensor:
    """Return the images of a case for the backbone itself: of a case with names, the contrasts that it reads, or else any."""
    if backbone.preparation.num_contrasts > 1:
        return backbone.prepare(scan.scans_for(backbone.preparation)).images
    own = (backbone.preparation.contrasts or ("",))[0]
    return backbone.prepare(scan.contrasts.get(own, scan.volume)).images


def _draw_embedding(backbone: Backbone, scan: LabelledScan, *, source: str) -> Drawing:
    images = _choose_images(backbone, scan)
    return embedding_pca(*_features_of(backbone, images), num_slices=_NUM_SLICES, source=source)


def _draw_embedding_of_contrasts(backbone: Backbone, scan: LabelledScan, *, source: str) -> Drawing | None:
    """Draw the features of each contrast by itself, of the same slices and in the same colours; None if there is one only."""
    images, names = _choose_images(backbone, scan), backbone.preparation.contrasts or ()
    present = images.flatten(2).abs().amax((0, 2)) > 0
    found = {}
    for number, name in enumerate(names):
        if present[number]:
            alone = torch.zeros_like(images)
            alone[:, number] = images[:, number]  # the network takes channels of zeros for missing contrasts
            found[name] = _features_of(backbone, alone)
    if len(found) < 2:
        return None
    planes, features = ({name: pair[part] for name, pair in found.items()} for part in (0, 1))
    return embedding_pca(planes, features, num_slices=_NUM_SLICES, source=source)


def _choose_images(backbone: Backbone, scan: LabelledScan) -> Tensor:
    """Return the slices of a scan that a picture shows, or the first of its volumes."""
    images = _images_for(backbone, scan)
    return images[_choose_slices(scan.label_planes.numpy())] if images.ndim == 4 else images[:1]


def _features_of(backbone: Backbone, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return slices (P, C, H, W) and their features (P, F, H, W), of images of slices or of one volume."""
    with torch.inference_mode():
        features = backbone(images)
    if features.shape[2:] != images.shape[2:]:
        features = F.interpolate(features, size=images.shape[2:])
    if images.ndim == 5:  # planes across the last axis: (1, C, X, Y, Z) -> (Z, C, X, Y)
        images, features = (maps[0].permute(3, 0, 1, 2) for maps in (images, features))
    return images, features


def _mode_title(model: str) -> str:
    """Return the title of the mode in which a published model was trained."""
    return MODES[TrialFacts.model_validate(load_model(model)[2].facts.trial).mode].title


def _draw_outlines(
    model: str,
    scan: LabelledScan,
    task: Task,
    rows: Sequence[TrialRow],
    code: str,
    *,
    who: str,
) -> Drawing:
    segmenter, config, manifest = load_model(model)
    trial_id = TrialFacts.model_validate(manifest.facts.trial).id
    trial = next(row for row in rows if row.id == trial_id)
    prediction = predict_volume(
        segmenter,
        scan.scans_for(config.preparation),
        preparation=config.preparation,
        num_classes=task.num_classes,
        largest_component=config.largest_component,
    )
    axis = slice_axis(scan.volume.spacing_mm, config.preparation.slice_axis, shape=scan.volume.data.shape)
    planes, predicted, reference = (
        volume_to_planes(data, axis) for data in (scan.volume.data, prediction, scan.labels.data)
    )
    chosen = _choose_slices(scan.label_planes.numpy() if config.preparation.dimensions == 2 else reference)
    window = config.preparation.intensity_percentiles
    low, high = intensity_window(percentile_table(scan.volume.data, name=scan.volume.key), window)
    images = np.clip((planes[chosen].astype(np.float32) - low) / (high - low), 0, 1)
    return outlines(
        images,
        predicted[chosen],
        reference[chosen],
        list(task.config.classes.values()),
        spacing_mm=_plane_spacing(scan, axis),
        title=f"The published model ({MODES[trial.mode].title}), {who}",
        source=trials_line([trial], code, patient=who),
    )


def _draw_case(case: ShownCase, task: Task, setup: TrialSetup, backbone: Backbone, code: str) -> Drawing:
    """Draw a scan of the reported split with the stored predictions of its trials; no model runs."""
    found = [one for one in task.scans_of((case.subject,)) if one.key == case.scan]
    if not found:
        raise DataError(f"the task has no scan {case.scan} of {case.subject} any more")
    scan = _load_for_pictures(found[0], task, backbone)
    axis = slice_axis(scan.volume.spacing_mm, backbone.preparation.slice_axis, shape=scan.volume.data.shape)
    frame = slice(case.frame, case.frame + 1)
    predictions = {
        name: volume_to_planes(_read_prediction(row, case.scan, setup, scan)[..., frame], axis)
        for name, row in case.trials.items()
    }
    image, reference = (volume_to_planes(volume.data[..., frame], axis) for volume in (scan.volume, scan.labels))
    dice = ", ".join(f"{name} {found:.2f}" for name, found in case.dice.items())
    trials = list(case.trials.values())
    return outlines(
        image.astype(np.float32),
        predictions,
        reference,
        list(task.config.classes.values()),
        spacing_mm=_plane_spacing(scan, axis),
        num_slices=_NUM_CASE_SLICES,
        title=f"{case.rank.capitalize()} case: {case.subject}" + (f" ({case.stratum})" if case.stratum else ""),
        subtitle=f"{trials[0].num_labelled} labelled; Dice: {dice}",
        source=trials_line(trials, code, patient=f"{split_of(trials)} patient {case.subject}"),
    )


def _read_prediction(row: TrialRow, key: str, setup: TrialSetup, scan: LabelledScan) -> NDArray[Any]:
    if row.predictions is None:
        raise DataError(f"trial {row.id} left no predictions")
    content = Storage(setup.storage).read_bytes(row.predictions)
    with np.load(BytesIO(content), allow_pickle=False) as arrays:
        if key not in arrays:
            raise DataError(f"{row.predictions} holds no prediction of {key}")
        found: NDArray[Any] = arrays[key]
    if found.shape != scan.labels.data.shape:
        raise DataError(f"the prediction has the grid {found.shape}, its scan {scan.labels.data.shape}")
    return found


def _plane_spacing(scan: LabelledScan, axis: int) -> tuple[float, float]:
    first, second = (mm for number, mm in enumerate(scan.volume.spacing_mm) if number != axis)
    return first, second


def _choose_slices(labels: NDArray[Any]) -> list[int]:
    """Return planes of `labels` (P, H, W), evenly spread over the planes with foreground."""
    labelled = np.flatnonzero((labels > 0).any((1, 2))).tolist() or list(range(len(labels)))
    return [labelled[len(labelled) * (2 * number + 1) // (2 * _NUM_SLICES)] for number in range(_NUM_SLICES)]
