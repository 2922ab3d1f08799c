"""From a folder of scans to a segmentation, in Python: the first hour with own data.

    python examples/first_hour.py FOLDER                      # 8 virtual subjects; about 10 minutes on two CPU cores
    python examples/first_hour.py FOLDER --scans /data/mine   # own scans: NIfTI, nnU-Net, Decathlon or BIDS

`FOLDER` gets job.yaml, task.yaml, the storage of the run and segmentation.nii.gz. Every step finds the results of an earlier call, so
the script can be interrupted and started again.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

import p2r
from cluster import own
from p2r.data.phantom import virtual_subjects
from p2r.data.survey import survey
from p2r.storage import cache_folder


def main(folder: Path, scans: Path | None, **overrides: Any) -> Path:
    """Pretrain, fine-tune and segment one scan; return the segmentation.

    Args:
        folder: For the job and its results.
        scans: Folder of own scans and label maps; None: virtual subjects, deformed copies of one averaged brain.
        overrides: Fields of the job, with two underscores for a dot, such as `pretrain__steps=20`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("P2R_LICENCE", "LicenseRef-ICBM-152" if scans is None else "unknown")
    os.environ.setdefault("P2R_PROVENANCE", "Virtual subjects of ICBM-152" if scans is None else "own scans")
    scans = scans or virtual_subjects(folder / "data", num_subjects=8, seed=0)

    # 1. A job and a task, from the content of the folder. Read both before a long run.
    if not (folder / "job.yaml").exists():
        own.init(
            folder, scans=str(scans), labels=None, form=None, contrast=None, name="mine", licence=None, provenance=None
        )

    # 2. Scans -> corpus -> backbone -> few-shot trials -> models and a report.
    made = p2r.run(folder / "job.yaml", storage=str(folder.absolute() / "run"), **overrides)
    for row in p2r.open_report(made["storage"]).rows:
        print(
            f"{row['mode']:<13} {row['num_labelled']:>3} labelled, draw {row['draw']}: test Dice {row['dice_mean']:.3f}"
        )

    # 3. The backbone's features of a scan: (planes, features, height, width).
    scan = survey(scans, cache=cache_folder()).scans[0].path
    backbone = p2r.load_backbone(made["backbone"])
    print("features", tuple(backbone.features(scan).shape))

    # 4. The model that learned from all labelled patients segments the scan on its own grid.
    model = p2r.load_model(made["models"]["mine/all"])
    segmentation = model.predict(scan)
    output = folder / "segmentation.nii.gz"
    segmentation.to_filename(output)
    voxel_ml = float(np.prod(segmentation.header.get_zooms()[:3])) / 1000
    for value, name in model.classes.items():
        print(f"{name}: {np.count_nonzero(np.asarray(segmentation.dataobj) == value) * voxel_ml:.1f} ml")
    assert segmentation.shape[:3] == nibabel.load(scan).shape[:3]
    return output


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scans", type=Path)
    arguments = parser.parse_args()
    print(main(arguments.folder, arguments.scans))
