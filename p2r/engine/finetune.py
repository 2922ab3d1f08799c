"""One few-shot trial: labelled patients of a task x mode x learning rate -> Dice on validation, and, once frozen, on test.

The labels of validation and test patients enter nowhere but the scores: training sees the drawn patients only, every
scan is whole (no crop by the label), and every trial of one (n, draw) sees the same images in the same order whatever
its mode.

`P` images: all planes of the labelled scans, or all their frames for a network of volumes, padded about their centre to a
common size `*S` (`H W`, or `X Y Z`).
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn

from p2r.backbone import Backbone, load_backbone
from p2r.config import FinetuneConfig, Mode
from p2r.data.corpus import contains
from p2r.data.preprocess import Preparation
from p2r.data.shards import voxels_sha256
from p2r.engine.schedule import learning_rate
from p2r.errors import DataError, TrainingError
from p2r.evaluate.inference import predict_volume
from p2r.evaluate.metrics import Summary, score_volume, summarise
from p2r.evaluate.protocol import TRANSDUCTIVE, Trial
from p2r.evaluate.tasks import LabelledScan, Split, Task, load_scan, load_task, read_task_config, task_sha256
from p2r.model.backbones import build_backbone
from p2r.model.heads import SegmentationHead
from p2r.model.pix2rep import Segmenter
from p2r.randomness import keyed_generator
from p2r.storage import Storage, json_bytes
from p2r.views.pair import augment_labelled

WAYS_OUT = (
    "Pretrain without it (ingest.subjects_of), take it out of the split, or label every row with --allow-transductive"
)

_WARMUP_FRACTION = 0.05


@dataclass(frozen=True)
class TrialSetup:
    """What all trials of one task share; plain values, so that it travels to another machine."""

    config: FinetuneConfig
    task: str
    """Path of the task's YAML."""
    backbone: str
    """URL of the published backbone."""
    backbone_sha256: str
    """Its digest: a trial that finds another one under the URL refuses."""
    storage: str
    """URL of `<storage>/finetune/<task>`."""
    is_transductive: bool = False
    """Whether validation or test patients of the task are known to be in the backbone's corpus."""

    def preparation(self, backbone: Backbone) -> Preparation:
        """What the trials' models do to a scan: the backbone's way, how much of a plane they read, and what the task states."""
        own_way = backbone.preparation.model_copy(update={"planes": self.config.planes})
        return read_task_config(Path(self.task)).preparation(own_way)

    def result_path(self, trial: Trial) -> str:
        """Where the trial's result lies below `storage`: its name holds a digest of everything that it depends on."""
        task = task_sha256(Path(self.task))
        config = self.config.model_dump(
            mode="json", include={"seed", "steps", "batch_size", "weight_decay", "views", "planes", "nsd_tolerance_mm"}
        )
        recipe: dict[str, Any] = {
            "config": config,
            "trial": asdict(trial),
            "task": task,
            "backbone": self.backbone_sha256,
        }
        if trial.purpose == "final":
            recipe["score_on"] = self.config.score_on
        if self.config.allow_transductive:
            recipe["transductive"] = True
        return f"trials/{trial.id}-{hashlib.sha256(json_bytes(recipe)).hexdigest()[:12]}.json"


def run_trial(
    setup: TrialSetup, trial: Trial, *, device: str, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Train and score one trial, or return the result that the storage already holds.

    A search trial is scored on validation patients. A final one is scored on the split that is reported too, and leaves
    its weights beside its result.

    Args:
        setup: What the task's trials share.
        trial: Which one.
        device: `cpu` or `cuda`.
        say: Receives a line of progress now and then.
    """
    storage, path = Storage(setup.storage), setup.result_path(trial)
    if storage.exists(path):
        done: dict[str, Any] = storage.read_json(path)
        return done
    config = setup.config
    task = load_task(Path(setup.task))
    backbone = load_backbone(setup.backbone)
    if backbone.manifest["sha256"] != setup.backbone_sha256:
        raise DataError(f"{setup.backbone} changed while its trials ran: run the job again")

    segmenter = build_segmenter(trial.mode, backbone, num_classes=task.num_classes, seed=config.seed).to(device)
    preparation = setup.preparation(backbone)
    scans = task.scans_of(trial.subjects)
    images, inside, labels = _labelled_images([load_scan(scan, task, preparation) for scan in scans])
    train_loss = train_segmenter(
        segmenter,
        images,
        inside,
        labels,
        trial=trial,
        config=config,
        preparation=preparation,
        device=device,
        say=say,
    )
    validation, is_known = _score(segmenter, task, "validation", backbone, setup, device)
    result: dict[str, Any] = {"trial": trial.to_row(), "train_loss": train_loss, "validation": validation.to_row()}
    if trial.purpose == "final":
        reported = validation
        if config.score_on == "test":
            reported, is_test_known = _score(segmenter, task, "test", backbone, setup, device)
            is_known |= is_test_known
        is_transductive = setup.is_transductive or is_known
        result["row"] = {
            **trial.to_row(),
            "transductive": is_transductive,
            **({"protocol": TRANSDUCTIVE} if is_transductive else {}),
            "seed": config.seed,
            "split": config.score_on,
            "validation_dice_mean": validation.dice_mean,
            # From scratch, nothing of the backbone is used but its architecture and its way to prepare a scan.
            "backbone_sha256": None if trial.mode == "scratch" else setup.backbone_sha256,
            **reported.to_row(),
        }
        result["weights"] = path.removesuffix(".json") + ".safetensors"
        storage.write_bytes(
            result["weights"], save({key: value.cpu().contiguous() for key, value in segmenter.state_dict().items()})
        )
    storage.write_json(path, result)
    return result


def build_segmenter(mode: Mode, backbone: Backbone, *, num_classes: int, seed: int) -> Segmenter:
    """Return the network of a mode: the backbone's architecture, its weights unless from scratch, frozen for a linear probe."""
    torch.manual_seed(seed)
    model, dimensions = backbone.config.model, backbone.preparation.dimensions
    network: nn.Module = build_backbone(model, dimensions=dimensions)
    if mode != "scratch":
        network.load_state_dict(backbone.network.state_dict())
    if mode == "linear_probe":
        network.requires_grad_(False)
    return Segmenter(network, SegmentationHead(model.feature_channels, num_classes, dimensions=dimensions))


def train_segmenter(
    segmenter: Segmenter,
    images: Tensor,
    inside: Tensor,
    labels: Tensor,
    *,
    trial: Trial,
    config: FinetuneConfig,
    preparation: Preparation,
    device: str,
    say: Callable[[str], None],
) -> float:
    """Train in place with Dice + cross-entropy on augmented images, and return the mean loss of the last tenth of the steps.

    Args:
        segmenter: Network; parameters that do not require a gradient stay as they are.
        images: (P, 1, *S) in [0, 1].
        inside: (P, *S), pixels of the scan.
        labels: (P, *S).
        trial: Keys the order and augmentation: by (n, draw), not by mode.
        config: Steps, batch, augmentation.
        preparation: Pixel size and image size.
        device: Where it trains.
        say: Receives a line of progress now and then.
    """
    criterion = DiceCELoss(softmax=True, to_onehot_y=True, batch=True)
    parameters = [parameter for parameter in segmenter.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=trial.learning_rate, weight_decay=config.weight_decay)
    segmenter.train()
    tail: list[float] = []
    for step in range(config.steps):
        key = ("finetune", trial.task, trial.num_labelled, trial.draw, step)
        chosen = keyed_generator(config.seed, *key).integers(len(images), size=config.batch_size)
        generators = [keyed_generator(config.seed, *key, slot) for slot in range(config.batch_size)]
        image, is_scan, label = _windows(images, inside, labels, chosen, generators, preparation)
        image, label = augment_labelled(
            image,
            label,
            config=config.views,
            size=preparation.image_size,
            spacing_mm=preparation.spacing_mm,
            generators=generators,
            inside=is_scan,
        )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step, peak=trial.learning_rate, num_steps=config.steps, warmup_fraction=_WARMUP_FRACTION
            )
        loss = criterion(segmenter(image.to(device)), label[:, None].to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if not torch.isfinite(loss):
            raise TrainingError(
                f"trial {trial.id}: the loss is {float(loss)} at step {step + 1}; lower finetune.search.learning_rates"
            )
        if step >= config.steps * 0.9 or step == config.steps - 1:
            tail.append(float(loss.detach()))
        if (step + 1) % 100 == 0:
            say(f"{trial.id} | step {step + 1}/{config.steps} | loss {float(loss.detach()):.3f}")
    segmenter.eval()
    return sum(tail) / len(tail)


def _windows(
    images: Tensor,
    inside: Tensor,
    labels: Tensor,
    chosen: NDArray[np.int64],
    generators: list[np.random.Generator],
    preparation: Preparation,
) -> tuple[Tensor, Tensor, Tensor]:
    """The chosen images about their centre, or, if the model is to read all of them, about a place drawn anywhere in them.

    The windows have twice the edge of the network's image, room for augmentation to turn and cut about their centre.
    """
    if preparation.planes == "centre":
        return images[chosen], inside[chosen], labels[chosen]
    size = preparation.image_size
    cut = []
    for image, generator in zip(chosen, generators, strict=True):
        # A window may reach over the edge only as far as it must: an image that fits is always seen whole.
        extents = images.shape[2:]
        starts = [_start(extent, size, generator) - size // 2 for extent in extents]
        padding = [
            amount
            for start, extent in zip(reversed(starts), reversed(extents), strict=True)
            for amount in (-start, start + 2 * size - extent)
        ]
        cut.append([F.pad(all_of_them[int(image)], padding) for all_of_them in (images, inside, labels)])
    window_images, window_inside, window_labels = (torch.stack(parts) for parts in zip(*cut, strict=True))
    return window_images, window_inside, window_labels


def _start(extent: int, size: int, generator: np.random.Generator) -> int:
    if extent <= size:
        return -((size - extent) // 2)
    return int(generator.integers(extent - size + 1))


def _labelled_images(scans: list[LabelledScan]) -> tuple[Tensor, Tensor, Tensor]:
    """All images of the scans (P, 1, *S), what is inside (P, *S), and labels (P, *S).

    They are padded about their centre, because augmentation turns and cuts about the centre.
    """
    size = [max(sides) for sides in zip(*(scan.label_planes.shape[1:] for scan in scans), strict=True)]

    def pad(maps: Tensor) -> Tensor:
        missing = [want - have for want, have in zip(size, maps.shape[-len(size) :], strict=True)]
        return F.pad(maps, [amount for side in reversed(missing) for amount in (side // 2, side - side // 2)])

    return (
        torch.cat([pad(scan.planes.images) for scan in scans]),
        torch.cat([pad(scan.planes.inside) for scan in scans]),
        torch.cat([pad(scan.label_planes) for scan in scans]),
    )


def _score(
    segmenter: Segmenter, task: Task, split: Split, backbone: Backbone, setup: TrialSetup, device: str
) -> tuple[Summary, bool]:
    """Return the figures of a split, and whether a scan of it is in the backbone's corpus."""
    preparation = setup.preparation(backbone)
    scores = []
    is_known = False
    for scan in task.scans_of(task.subjects[split]):
        loaded = load_scan(scan, task, preparation)
        is_known |= _is_known(loaded, backbone, split, is_allowed=setup.config.allow_transductive)
        prediction = predict_volume(
            segmenter, loaded.volume, preparation=preparation, num_classes=task.num_classes, device=device
        )
        scores += [
            (
                scan.subject,
                score_volume(
                    prediction[..., frame],
                    loaded.labels.data[..., frame],
                    classes=task.config.classes,
                    spacing_mm=loaded.volume.spacing_mm,
                    nsd_tolerance_mm=setup.config.nsd_tolerance_mm,
                ),
            )
            for frame in range(prediction.shape[3])
        ]
    return summarise(scores), is_known


def _is_known(scan: LabelledScan, backbone: Backbone, split: Split, *, is_allowed: bool) -> bool:
    digest = voxels_sha256(scan.volume)
    for corpus in backbone.manifest.get("corpora", []):
        if contains(corpus, voxels_sha256=digest):
            if not is_allowed:
                raise DataError(
                    f"scan {scan.scan.key} of the {split} split is in the backbone's corpus {corpus['url']}: its figures would leak. "
                    f"{WAYS_OUT}"
                )
            return True
    return False
