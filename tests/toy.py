"""A task of discs in noise: subjects that take no time to make, read or learn."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np


def write_toy_data(folder: Path, *, num_subjects: int = 8) -> Path:
    """Write subjects of three thick slices with a bright disc in noise: images/, labels/ and task.yaml."""
    from p2r.data.volume import write_nifti

    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(np.arange(36), np.arange(40), indexing="ij"))
    for number in range(1, num_subjects + 1):
        centre = rng.uniform(12, 24, size=(2, 1, 1))
        disc = ((grid - centre) ** 2).sum(axis=0) < rng.uniform(36, 64)
        label = np.repeat(disc[..., None], 3, axis=2).astype(np.int16)
        image = (200 + 600 * label + rng.normal(0, 60, size=label.shape)).clip(1).astype(np.int16)
        affine = np.diag([-2.0, -2.0, 8.0, 1.0])
        write_nifti(folder / "images" / f"sub-{number:02d}_T1w.nii.gz", image, affine)
        write_nifti(folder / "labels" / f"sub-{number:02d}_T1w.nii.gz", label, affine)
    (folder / "task.yaml").write_text(
        "name: disc\ntitle: Discs\nimages: images\nlabels: labels\nlicence: CC0-1.0\nclasses: {1: DISC}\n"
        "splits: {train: ['sub-[01-05]'], validation: ['sub-06'], test: ['sub-[07-08]']}\n"
    )
    return folder


CONTRASTS = {"flair": "{key}_FLAIR", "t1": "{key}_T1w", "t1ce": "{key}_ce-GD_T1w"}
"""Contrasts of the toy sessions, and the names of their files."""


def write_toy_sessions(
    folder: Path, *, num_subjects: int = 8, missing: Mapping[str, Sequence[str]] | None = None
) -> Path:
    """Write subjects with three contrasts of a disc in noise, in BIDS names: sub-*/anat/, labels/ and task.yaml.

    Args:
        folder: Where to write.
        num_subjects: Number of subjects.
        missing: Contrasts that a subject lacks.
    """
    from p2r.data.volume import write_nifti

    rng = np.random.default_rng(1)
    grid = np.stack(np.meshgrid(np.arange(36), np.arange(40), indexing="ij"))
    affine = np.diag([-2.0, -2.0, 8.0, 1.0])
    for number in range(1, num_subjects + 1):
        subject = f"sub-{number:02d}"
        centre = rng.uniform(12, 24, size=(2, 1, 1))
        disc = ((grid - centre) ** 2).sum(axis=0) < rng.uniform(36, 64)
        label = np.repeat(disc[..., None], 3, axis=2).astype(np.int16)
        for step, (contrast, name) in zip((600, -150, 300), CONTRASTS.items(), strict=True):
            image = (200 + step * label + rng.normal(0, 30, size=label.shape)).clip(1).astype(np.int16)
            if contrast not in (missing or {}).get(subject, ()):
                write_nifti(folder / subject / "anat" / f"{name.format(key=subject)}.nii.gz", image, affine)
        write_nifti(folder / "labels" / f"{subject}.nii.gz", label, affine)
    names = ", ".join(f'{contrast}: "{name}"' for contrast, name in CONTRASTS.items())
    (folder / "task.yaml").write_text(
        f"name: discs\ntitle: Discs\nimages: .\nimage_name: {{{names}}}\nlabels: labels\nlicence: CC0-1.0\nclasses: {{1: DISC}}\n"
        "splits: {train: ['sub-[01-05]'], validation: ['sub-06'], test: ['sub-[07-08]']}\n"
    )
    return folder
