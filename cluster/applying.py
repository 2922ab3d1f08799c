"""`p2r predict` and `p2r embed`: apply a published model or backbone to one scan, or to every scan of a folder.

For a folder, results keep the scans' relative paths below the output; an unusable scan is reported and left out.
"""

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cluster.dicom_output import ENDING, predict_series
from p2r.console import show
from p2r.data.folders import images_below
from p2r.data.label_maps import label_map_by_name
from p2r.data.names import local_path, scan_key
from p2r.data.volume import Volume, read_volume, to_source_grid, write_nifti
from p2r.errors import InputError, RefusedScan
from p2r.files import write_csv
from p2r.logs import Say

if TYPE_CHECKING:  # importing it takes seconds
    from p2r.data.preprocess import Scans

_ENDINGS = (".nii", ".nii.gz")
_NAMED = re.compile(r"([a-z0-9_]+)=(.+)")


def predict(
    urls: Sequence[str], scans: Sequence[str], output: str, *, has_probabilities: bool = False, device: str, say: Say
) -> None:
    """Segment a scan, or a folder of scans.

    Args:
        urls: Of the model; of several, the mean of their probabilities is used.
        scans: A scan, or a folder of scans; or the scans of one patient by contrast, `NAME=SCAN` each.
        output: File, or folder, of the segmentations.
        has_probabilities: Write the probability of each class beside each segmentation, too.
        device: Where the networks run.
        say: Receives a line of progress for each scan.

    Raises:
        InputError: The output cannot be written, the scan cannot be used, no scan of the folder can, or models differ in
            classes or preprocessing.
    """
    scan, contrasts = _parse_scans(scans)
    if output.endswith(ENDING):
        if has_probabilities:
            raise InputError(
                f"-o {output}: --probabilities are written as NIfTI only: give an output that ends in .nii.gz"
            )
        if contrasts is not None:
            raise InputError(
                f"-o {output}: a DICOM segmentation refers to one series; for named contrasts, end it in .nii.gz"
            )
        predict_series(urls, scan, output, device=device, say=say)
        return
    targets = list(_list_targets(scan, output, is_single=contrasts is not None))
    from p2r.data.preprocess import reference_of  # after the cheap checks: torch takes seconds to import
    from p2r.evaluate.models import ensemble, load_model

    model = ensemble([load_model(url, device=device) for url in urls])
    rows: list[tuple[str | float, ...]] = []

    def segment(path: str, target: Path) -> str:
        given = _read(path, contrasts)
        volume = reference_of(given)
        if has_probabilities:
            probabilities = model.probabilities(given)
            labels = model.labels_of(probabilities)
            _write_probabilities(beside(target), probabilities, volume)
        else:
            labels = model.labels(given)
        on_scan = to_source_grid(labels, volume)
        flat = on_scan[..., 0] if on_scan.shape[-1] == 1 else on_scan
        write_nifti(target, flat, volume.source_affine, like=volume)
        volumes = model.volumes_ml(labels, volume)
        rows.extend(
            (path, frame + 1, *(float(f"{of_class[frame]:.4g}") for of_class in volumes.values()))
            for frame in range(labels.shape[3])
        )
        for note in volume.notes:
            say(f"{path}: {note}")
        return _describe_volumes(volumes)

    if contrasts is None and _is_folder(scan):
        _process_each(targets, segment, say)
        table = Path(output) / "volumes.csv"
        write_csv(table, ["scan", "frame", *(f"{name}_ml" for name in model.classes.values())], rows)
        show(f"{len({row[0] for row in rows})} segmentations and {table}")
    else:
        for line in segment(scan, targets[0][1]).split("; "):
            show(line)
        show(output)
        if has_probabilities:
            show(f"{beside(targets[0][1])}: {', '.join(['background', *model.classes.values()])}")


def beside(segmentation: Path) -> Path:
    """Return the file of the probabilities that belong to a segmentation."""
    ending = next(ending for ending in reversed(_ENDINGS) if segmentation.name.endswith(ending))
    return segmentation.with_name(f"{segmentation.name.removesuffix(ending)}_probabilities{ending}")


def _write_probabilities(path: Path, probabilities: NDArray[np.float32], volume: Volume) -> None:
    """Write (X, Y, Z, T, K) as (X, Y, Z, T K): class by class within a frame, background first, frame after frame."""
    frames, classes = probabilities.shape[3:]
    flat = probabilities.reshape(*probabilities.shape[:3], frames * classes)
    write_nifti(path, to_source_grid(flat, volume), volume.source_affine, like=volume)


def embed(url: str, scans: Sequence[str], output: str, *, native: bool, device: str, say: Say) -> None:
    """Write the features of a scan, or of a folder of scans. Arguments as in `predict`.

    Raises:
        InputError: See `predict`.
    """
    scan, contrasts = _parse_scans(scans)
    targets = list(_list_targets(scan, output, is_single=contrasts is not None))
    from p2r.backbone import load_backbone
    from p2r.data.preprocess import reference_of
    from p2r.evaluate.inference import embed_volume
    from p2r.evaluate.models import on_scan_grid

    backbone = load_backbone(url, device=device)

    def write(path: str, target: Path) -> str:
        given = _read(path, contrasts)
        volume = reference_of(given)
        divisor = backbone.config.model.size_divisor
        features, affine = embed_volume(
            backbone, given, preparation=backbone.preparation, size_divisor=divisor, device=device
        )
        frames, channels = features.shape[3:]
        flat = features.reshape(*features.shape[:3], frames * channels)
        if native:
            flat = on_scan_grid(flat, affine, volume)
            write_nifti(target, flat, volume.source_affine, like=volume)
        else:
            write_nifti(target, flat, affine, world=volume)
        size = " x ".join(map(str, flat.shape[:3]))
        return f"{channels} features of {size} voxels{f', {frames} frames' if frames > 1 else ''}"

    if contrasts is None and _is_folder(scan):
        show(f"{_process_each(targets, write, say)} files of features in {output}")
    else:
        show(f"{output}: {write(scan, targets[0][1])}")


def check_output(output: str | Path, endings: tuple[str, ...] = _ENDINGS) -> None:
    """Refuse an output file that could not be written, before anything is computed.

    Raises:
        InputError: The file cannot be written; names the file and the rule.
    """
    path = Path(output)
    if "://" in str(output):
        raise InputError(
            f"output {output}: results are written to a folder of this machine; give a path, and copy the file"
        )
    if not path.name.endswith(endings):
        raise InputError(f"output {path} must end in {' or '.join(endings)}")
    if not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise InputError(f"output {path}: the folder {path.absolute().parent} does not exist or cannot be written")


def _is_folder(scan: str) -> bool:
    path = local_path(scan)
    return path is not None and path.expanduser().is_dir()


def _parse_scans(arguments: Sequence[str]) -> tuple[str, dict[str, str] | None]:
    """Return a scan, and the scans by contrast if they have names; then the first is the scan.

    Raises:
        InputError: Scans without names are mixed with others, or a contrast is named twice.
    """
    named = [_NAMED.fullmatch(argument) for argument in arguments]
    if len(arguments) == 1 and (named[0] is None or Path(arguments[0]).exists()):
        return arguments[0], None
    contrasts: dict[str, str] = {}
    for argument, match in zip(arguments, named, strict=True):
        if match is None:
            raise InputError(
                f"{argument} has no contrast: give one scan, or several by contrast, as in t1=t1.nii.gz flair=flair.nii.gz"
            )
        name, path = match[1], match[2]
        if name in contrasts:
            raise InputError(f"the contrast {name} is named twice, {contrasts[name]} and {path}: give it once")
        if _is_folder(path):
            raise InputError(f"{argument} is a folder: give the scan of each contrast of one patient")
        contrasts[name] = path
    return next(iter(contrasts.values())), contrasts


def _read(path: str, contrasts: Mapping[str, str] | None) -> "Scans":
    if contrasts is None:
        return read_volume(path)
    from p2r.data.contrasts import read_contrasts  # torch takes seconds to import

    return read_contrasts(contrasts)


def _list_targets(scan: str, output: str, *, is_single: bool) -> Iterator[tuple[str, Path]]:
    """Yield each scan with the path of its result."""
    if is_single or not _is_folder(scan):
        check_output(output)
        yield scan, Path(output)
        return
    if "://" in output or output.endswith(_ENDINGS) or Path(output).is_file():
        raise InputError(f"output {output}: {scan} is a folder of scans, so its results go into a folder; name one")
    root = (local_path(scan) or Path(scan)).expanduser()
    found = [
        path for path in sorted(images_below(root)) if label_map_by_name(path.relative_to(root).as_posix()) is None
    ]
    if not found:
        raise InputError(f"{scan} holds no NIfTI scan, at any depth; name the folder that has them")
    for path in found:
        yield str(path), Path(output) / path.relative_to(root).parent / f"{scan_key(path)}.nii.gz"


def _process_each(targets: list[tuple[str, Path]], work: Callable[[str, Path], str], say: Say) -> int:
    """Process every scan of a folder, with a log line for each; return the number of scans processed."""
    began, refused = time.monotonic(), []
    for number, (path, target) in enumerate(targets, start=1):
        try:
            told = work(path, target)
        except RefusedScan as error:
            refused.append(path)
            told = f"refused: {error}"
        left_s = (time.monotonic() - began) / number * (len(targets) - number)
        say(f"{number}/{len(targets)} | {path} | {told}" + f" | {left_s:.0f} s left" * (number < len(targets)))
    if len(refused) == len(targets):
        raise InputError(f"none of the {len(targets)} scans could be used; the lines above say why")
    return len(targets) - len(refused)


def _describe_volumes(volumes: dict[str, list[float]]) -> str:
    parts = []
    for value, (name, of_class) in enumerate(volumes.items(), start=1):
        in_ml = ", ".join(_format_volume(ml) for ml in of_class)
        parts.append(f"{value} {name}: {in_ml} ml" + f" in frames 1 to {len(of_class)}" * (len(of_class) > 1))
    return "; ".join(parts)


def _format_volume(ml: float) -> str:
    return f"{ml:.1f}" if ml >= 1 or ml == 0 else f"{ml:.2g}"
