"""A published segmentation model in Python: a scan -> a label map on the scan's own grid.

model = p2r.load_model("s3://bucket/models/liver/all")
segmentation = model.predict("scan.nii.gz")        # nibabel.Nifti1Image
segmentation.to_filename("segmentation.nii.gz")
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import nn

from p2r.artefact import ModelManifest, Published
from p2r.backbone import ArtefactConfig
from p2r.backbone import load_model as load_segmenter
from p2r.data.contrasts import ScansLike, scans_from
from p2r.data.grids import check_room
from p2r.data.preprocess import Scans, reference_of
from p2r.data.volume import Volume, nifti_image, to_source_grid
from p2r.errors import InputError
from p2r.evaluate.inference import images_read, predict_probabilities, predict_volume
from p2r.evaluate.metrics import largest_components
from p2r.model.ensemble import EnsembleSegmenter


@dataclass(frozen=True)
class Model:
    """A published model, or an ensemble of several, in evaluation mode."""

    segmenter: nn.Module
    """The network: images (B, 1, *S) -> scores (B, 1 + classes, *S)."""
    config: ArtefactConfig
    """Architecture, preparation and classes."""
    members: tuple[Published[ModelManifest], ...]
    """Manifest of the model, or of each model of an ensemble."""
    device: str = "cpu"
    """Device of the weights."""

    @property
    def manifest(self) -> Mapping[str, Any]:
        """The artefact's manifest, with `sha256` and `url`; for an ensemble, the manifests of its `members`."""
        if len(self.members) == 1:
            return self.members[0]
        return {"members": [dict(member) for member in self.members]}

    @property
    def classes(self) -> Mapping[int, str]:
        """Name of each label; 0 is the background."""
        return self.config.classes

    def predict(
        self,
        scan: ScansLike,
        *,
        spacing_mm: float | Sequence[float] | None = None,
        affine: ArrayLike | None = None,
    ) -> Any:
        """Segment a scan, or the scans of a patient by contrast.

        Args:
            scan: A scan in any form that `Backbone.prepare` takes.
            spacing_mm: For an array without affine: voxel size, mm; its axes then point to the right, anterior and superior.
            affine: For an array: (4, 4), voxel -> mm in RAS.

        Returns:
            A `nibabel.Nifti1Image` of labels on the scan's own grid, (X, Y, Z), or (X, Y, Z, T) for a series of frames. It has
            the sform, qform, codes and units of the scan. With several contrasts, the grid is that of the first.

        Raises:
            InputError: The scan has no such form, or no voxel size.
            RefusedScan: if the scan cannot be used; its code gives the reason.
        """
        scans = scans_from(scan, spacing_mm=spacing_mm, affine=affine)
        volume = reference_of(scans)
        on_scan = to_source_grid(self.labels(scans), volume)
        flat = on_scan[..., 0] if on_scan.shape[-1] == 1 else on_scan
        return nifti_image(flat, volume.source_affine, like=volume)

    def labels(self, scans: Scans) -> NDArray[np.uint8]:
        """Return labels (X, Y, Z, T) on the grid of the volumes, in RAS order."""
        return predict_volume(
            self.segmenter,
            scans,
            preparation=self.config.preparation,
            num_classes=len(self.classes) + 1,
            device=self.device,
            largest_component=self.config.largest_component,
        )

    def probabilities(self, scans: Scans) -> NDArray[np.float32]:
        """Return the probability of each class, (X, Y, Z, T, 1 + classes) on the grid of the volumes, background first.

        They sum to 1 in every voxel, and take 4 bytes per voxel, frame and class.
        """
        return predict_probabilities(
            self.segmenter,
            images_read(scans, self.config.preparation),
            preparation=self.config.preparation,
            num_classes=len(self.classes) + 1,
            device=self.device,
        )

    def labels_of(self, probabilities: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Return the labels (X, Y, Z, T) for `probabilities`."""
        labels = probabilities.argmax(-1).astype(np.uint8)
        return largest_components(labels, classes=self.classes) if self.config.largest_component else labels

    def volumes_ml(self, labels: NDArray[np.uint8], volume: Volume) -> dict[str, list[float]]:
        """Return the volume of each class in each frame, ml."""
        voxel_ml = float(np.prod(volume.spacing_mm)) / 1000
        counts = {name: (labels == value).sum(axis=(0, 1, 2)) for value, name in self.classes.items()}
        return {name: [float(count) * voxel_ml for count in by_frame] for name, by_frame in counts.items()}


def load_model(url: str, *, sha256: str | None = None, key: str | None = None, device: str = "cpu") -> Model:
    """Load a published segmentation model, in evaluation mode.

    Args:
        url: `file://`, `s3://` or a path of its folder; or `URL@sha256:HEX`.
        sha256: Pin of the version, if it is not in `url`: SHA-256 of `manifest.json`.
        key: Public key of the required signer: `ed25519:HEX`, or the path of a PEM file.
        device: Device for the weights.

    Raises:
        StorageError: if the model is absent or damaged, differs from the pinned version, or is not signed by the key.
        CheckpointError: if it is not a model, or this version cannot build it.
    """
    segmenter, config, manifest = load_segmenter(url, sha256=sha256, key=key, device=device)
    return Model(segmenter, config, (manifest,), device)


def ensemble(models: Sequence[Model]) -> Model:
    """Combine several models, such as the draws of a task, into one that averages their probabilities.

    Args:
        models: Models with the same classes and preparation, on the same device; their networks may differ.

    Raises:
        InputError: if there is no model, one is given twice, or one differs from the first in classes, preparation or device.
    """
    if not models:
        raise InputError("an ensemble needs at least one model")
    first = models[0]
    for other in models[1:]:
        for name in ("classes", "preparation", "largest_component"):
            ours, theirs = (getattr(model.config, name) for model in (first, other))
            if ours != theirs:
                where = f"{other.members[0].url} cannot join an ensemble with {first.members[0].url}"
                raise InputError(
                    f"{where}: its {name} {'differ' if name == 'classes' else 'differs'}, {_describe_difference(theirs, ours)}; "
                    "use models of one task and one preparation"
                )
        if other.device != first.device:
            raise InputError(f"the models of an ensemble must be on one device, got {first.device} and {other.device}")
    if len(models) == 1:
        return first
    _refuse_repeated(models)
    members = tuple(member for model in models for member in model.members)
    segmenter = EnsembleSegmenter([model.segmenter for model in models])
    return Model(segmenter.eval(), first.config, members, first.device)


def _refuse_repeated(models: Sequence[Model]) -> None:
    """Refuse a model that is given twice, by the digest of its weights: it would count twice in the mean."""
    urls: dict[str, str] = {}
    for model in models:
        for member in model.members:
            weights = member.facts.files.weights.sha256
            if (url := urls.get(weights)) is not None:
                again = "is given twice" if url == member.url else f"has the weights of {url}"
                raise InputError(f"{member.url} {again}: give each model of an ensemble once")
            urls[weights] = member.url


def _describe_difference(theirs: Any, ours: Any) -> str:
    """Return the values in which two parts of a configuration differ."""
    if hasattr(ours, "model_dump"):
        pairs = [(name, getattr(theirs, name), getattr(ours, name)) for name in type(ours).model_fields]
        return ", ".join(f"{name} {a!r} instead of {b!r}" for name, a, b in pairs if a != b)
    return f"{theirs!r} instead of {ours!r}"


def on_scan_grid(features: NDArray[np.float32], affine: NDArray[np.float64], volume: Volume) -> NDArray[np.float32]:
    """Resample features to the grid of a scan's file, trilinearly; positions outside get the nearest features.

    Args:
        features: (X', Y', Z', F) on the grid of `affine`, as from `embed_volume`.
        affine: (4, 4) voxel of `features` -> mm.
        volume: The scan.

    Returns:
        (X, Y, Z, F) in the order of the scan's file.
    """
    from scipy import ndimage

    to_features = np.linalg.inv(affine) @ volume.affine
    shape = volume.data.shape[:3]
    check_room(
        math.prod(shape) * features.shape[3],
        f"{volume.key}: {features.shape[3]} features of {' x '.join(map(str, shape))} voxels",
        "leave out --native, or embed a part of the scan",
    )
    found = np.empty((*shape, features.shape[3]), np.float32)
    for channel in range(features.shape[3]):
        ndimage.affine_transform(
            features[..., channel], to_features[:3, :3], to_features[:3, 3], shape, found[..., channel], 1, "nearest"
        )
    return np.asarray(to_source_grid(found, volume))
