"""A task of discs in noise: subjects that take no time to make, read or learn."""

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
