"""`p2r predict` and `p2r embed`: apply a published model or backbone to one scan, to several, to every scan of a folder, or to the scans
by contrast of one patient or many.

For several scans, results keep the scans' relative paths below the output (`cluster.outputs`); for several patients, they are named by
their keys (`cluster.patients`). An unusable scan is reported and left out. Results that are there already are not computed again.
"""

import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from cluster.dicom_output import ENDING, predict_series
from cluster.outputs import (
    ENDINGS,
    Result,
    Target,
    check_targets,
    holds_only_dicom,
    is_folder,
    is_many,
    list_targets,
    process_each,
    rows_of_earlier_calls,
)
from cluster.patients import KEY, describe_patients, has_keys, list_patients
from p2r.allocator import keep_freed_memory
from p2r.console import show
from p2r.data.volume import Volume, to_source_grid, write_nifti
from p2r.data.zarr_output import ENDING as ZARR
from p2r.data.zarr_output import write_zarr
from p2r.errors import InputError
from p2r.files import write_csv
from p2r.logs import Say
from p2r.version import __version__

if TYPE_CHECKING:  # imports torch
    from p2r.evaluate.models import Model

_NAMED = re.compile(r"(\w+(?:\s*,\s*\w+)*)\s*=(.*)", re.ASCII)
"""A scan by contrast: `t1=t1.nii.gz`, or of several along its fourth axis: `t1,flair=scan.nii.gz`. Names of contrasts are in lower case."""


def predict(
    urls: Sequence[str],
    scans: Sequence[str],
    output: str,
    *,
    has_probabilities: bool = False,
    form: str = "nifti",
    device: str,
    say: Say,
) -> None:
    """Segment a scan, several scans, or a folder of scans.

    Args:
        urls: Of the model; of several, the mean of their probabilities is used.
        scans: Scans, or folders of scans; or the scans of one patient by contrast, `NAME=SCAN` each, or `NAME,NAME=SCAN` for contrasts
            along its fourth axis; or of many patients, with `{key}` in each path.
        output: File of one segmentation, or folder of several.
        has_probabilities: Write the probability of each class beside each segmentation, too.
        form: Form of the files in a folder: nifti or zarr.
        device: Where the networks run.
        say: Receives a line of progress for each scan.

    Raises:
        InputError: The output cannot be written, the scan cannot be used, no scan of the folder can, the model does not read one of
            the contrasts, or models differ in classes or preprocessing.
    """
    paths, contrasts = _parse_scans(scans)
    if device == "cpu":
        keep_freed_memory()
    if output.endswith(ENDING):
        _check_dicom_output(
            output, has_probabilities=has_probabilities, is_single=contrasts is None and len(paths) == 1
        )
        predict_series(urls, paths[0], output, device=device, say=say)
        return
    has_many = is_many(paths, output) if contrasts is None else has_keys(contrasts)
    targets = _targets(paths, output, form, has_many=has_many, contrasts=contrasts, say=say)
    if has_probabilities:
        targets = [target._replace(beside=_path_beside(target.path)) for target in targets]
    check_targets(targets)
    from p2r.data.preprocess import check_names
    from p2r.evaluate.models import ensemble, load_model  # after the cheap checks: torch takes seconds to import

    model = ensemble([load_model(url, device=device) for url in urls])
    check_names(list(contrasts or ()), model.config.preparation)
    segment = partial(_segment, model=model, say=say)
    if has_many:
        inputs: dict[str, object] = {
            "models": [one.sha256 for one in model.members],
            "probabilities": has_probabilities,
            "code": __version__,
        }
        if len(model.classes) > 9:  # rows of earlier versions had the order 1, 10, 2
            inputs["classes"] = list(model.classes.values())
        results = process_each(targets, segment, Path(output), inputs=inputs, say=say)
        table = Path(output) / "volumes.csv"
        whose = ["scan"] if contrasts is None else ["key", "contrasts"]
        columns = [*whose, "frame", *(f"{name}_ml" for name in model.classes.values())]
        rows = [row for result in results for row in result.rows]
        # A call for patients has a column more than one for scans, so only one kind fits into a table.
        rows += [row for row in rows_of_earlier_calls(targets, Path(output), inputs=inputs) if len(row) == len(columns)]
        write_csv(table, columns, rows)
        show(f"{len(results)} segmentations and {table}")
        return
    for line in segment(targets[0]).text.split("; "):
        show(line)
    show(output)
    if targets[0].beside is not None:
        show(f"{targets[0].beside}: {', '.join(['background', *model.classes.values()])}")


def _check_dicom_output(output: str, *, has_probabilities: bool, is_single: bool) -> None:
    if has_probabilities:
        raise InputError(f"-o {output}: --probabilities are written as NIfTI only: give an output that ends in .nii.gz")
    if not is_single:
        raise InputError(
            f"-o {output}: a DICOM segmentation refers to one series; for contrasts of a patient, end it in .nii.gz; for several scans or "
            "patients, name a folder"
        )


def _segment(target: Target, *, model: "Model", say: Say) -> Result:
    """Write the labels of a scan, and the probabilities beside them; return the volumes of the classes."""
    from p2r.data.contrasts import scans_from
    from p2r.data.preprocess import reference_of

    given = scans_from(target.given)
    volume = reference_of(given)
    if target.beside is not None:
        probabilities = model.probabilities(given)
        labels = model.labels_of(probabilities)
        frames, classes = probabilities.shape[3:]
        # Class by class within a frame, background first, frame after frame.
        flat = probabilities.reshape(*probabilities.shape[:3], frames * classes)
        _write_on_scan(target.beside, flat, volume, last="class")
    else:
        labels = model.labels(given)
    _write_on_scan(target.path, labels, volume, last="frame")
    volumes = model.volumes_ml(labels, volume)
    for note in volume.notes:
        say(f"{target.title}: {note}")
    whose = [target.key, " ".join(dict(target.contrasts))] if target.key else [target.scan]
    rows: list[list[str | int | float]] = [
        [*whose, frame + 1, *(float(f"{of_class[frame]:.4g}") for of_class in volumes.values())]
        for frame in range(labels.shape[3])
    ]
    return Result(_describe_volumes(volumes), rows)


def _parse_scans(arguments: Sequence[str]) -> tuple[list[str], dict[str, str] | None]:
    """Return the scans, and the scans by contrast if they have names; then the first is the scan.

    Raises:
        InputError: Scans without names are mixed with others, a contrast is named twice, or has no scan; a path with `{key}` has no name.
    """
    named = [None if Path(argument).exists() else _NAMED.fullmatch(argument) for argument in arguments]
    if not any(named):
        for path in arguments:
            if KEY in path and not Path(path).exists():
                raise InputError(
                    f"{path} has no contrast: {KEY} is for patients with several, as in flair={path}; without contrasts, give the folder"
                )
        return list(arguments), None
    contrasts: dict[str, str] = {}
    for argument, match in zip(arguments, named, strict=True):
        if match is None:
            raise InputError(
                f"{argument} has no contrast: give scans without names, or all by contrast, as in t1=t1.nii.gz flair=flair.nii.gz"
            )
        names, path = re.split(r"\s*,\s*", match[1].lower()), match[2].lstrip()
        if not path:
            raise InputError(
                f"{argument} names no scan: write its path after =, or leave out a contrast that is missing"
            )
        for name in names:
            if name in contrasts or names.count(name) > 1:
                raise InputError(
                    f"the contrast {name} is named twice, {contrasts.get(name, path)} and {path}: give it once"
                )
        path = str(Path(path).expanduser()) if path.startswith("~") else path  # shells do not expand it after =
        if is_folder(path) and not holds_only_dicom(path):
            raise InputError(
                f"{argument} is a folder: give the scan, or the DICOM series, of each contrast of one patient"
            )
        if other := next((name for name, known in contrasts.items() if known == path), None):
            raise InputError(
                f"{path} is given as {other} and as {names[0]}: if its fourth axis holds several contrasts, name them in its order, as in "
                f"{other},{names[0]}={path}"
            )
        contrasts |= dict.fromkeys(names, path)
    return [next(iter(contrasts.values()))], contrasts


def _targets(
    scans: Sequence[str], output: str, form: str, *, has_many: bool, contrasts: Mapping[str, str] | None, say: Say
) -> list[Target]:
    """Return the scans or patients with the paths of their results; log the contrasts that many patients have."""
    if has_many and contrasts is not None:
        patients = list_patients(contrasts, output, form=form)
        for line in describe_patients(patients, list(contrasts)):
            say(line)
        return patients
    if has_many:
        return list_targets(scans, output, form=form)
    check_output(output, ENDINGS)
    return [Target(scans[0], Path(output), contrasts=tuple((contrasts or {}).items()))]


def _path_beside(segmentation: Path) -> Path:
    """Return the file of the probabilities that belong to a segmentation."""
    ending = next(ending for ending in reversed(ENDINGS) if segmentation.name.endswith(ending))
    return segmentation.with_name(f"{segmentation.name.removesuffix(ending)}_probabilities{ending}")


def _write_on_scan(path: Path, array: NDArray[Any], volume: Volume, *, last: str) -> None:
    """Write (X, Y, Z, N) on the grid and in the voxel order of the scan's file."""
    on_scan = to_source_grid(array, volume)
    if last == "frame" and on_scan.shape[-1] == 1:
        on_scan = on_scan[..., 0]
    if path.name.endswith(ZARR):
        write_zarr(path, on_scan, volume.source_affine, axes=("i", "j", "k", last)[: on_scan.ndim])
    else:
        write_nifti(path, on_scan, volume.source_affine, like=volume)


def embed(
    url: str, scans: Sequence[str], output: str, *, native: bool, form: str = "nifti", device: str, say: Say
) -> None:
    """Write the features of a scan, of several scans, or of a folder of scans. Arguments as in `predict`.

    Raises:
        InputError: See `predict`.
    """
    paths, contrasts = _parse_scans(scans)
    has_many = is_many(paths, output) if contrasts is None else has_keys(contrasts)
    targets = _targets(paths, output, form, has_many=has_many, contrasts=contrasts, say=say)
    check_targets(targets)
    if device == "cpu":
        keep_freed_memory()
    from p2r.backbone import load_backbone
    from p2r.data.contrasts import scans_from
    from p2r.data.preprocess import check_names, reference_of
    from p2r.evaluate.inference import embed_volume
    from p2r.evaluate.models import on_scan_grid

    backbone = load_backbone(url, device=device)
    check_names(list(contrasts or ()), backbone.preparation)

    def write(target: Target) -> Result:
        given = scans_from(target.given)
        volume = reference_of(given)
        divisor = backbone.config.model.size_divisor
        features, affine = embed_volume(
            backbone, given, preparation=backbone.preparation, size_divisor=divisor, device=device
        )
        frames, channels = features.shape[3:]
        flat = features.reshape(*features.shape[:3], frames * channels)
        if native:
            flat, affine = on_scan_grid(flat, affine, volume), volume.source_affine
        if target.path.name.endswith(ZARR):
            write_zarr(target.path, flat, affine, axes=("i", "j", "k", "feature"))
        elif native:
            write_nifti(target.path, flat, affine, like=volume)
        else:
            write_nifti(target.path, flat, affine, world=volume)
        size = " x ".join(map(str, flat.shape[:3]))
        return Result(f"{channels} features of {size} voxels{f', {frames} frames' if frames > 1 else ''}", [])

    if has_many:
        inputs = {"backbone": backbone.manifest.sha256, "native": native, "code": __version__}
        results = process_each(targets, write, Path(output), inputs=inputs, say=say)
        show(f"{len(results)} files of features in {output}")
    else:
        show(f"{output}: {write(targets[0]).text}")


def check_output(output: str | Path, endings: tuple[str, ...] = ENDINGS) -> None:
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


def _describe_volumes(volumes: dict[str, list[float]]) -> str:
    parts = []
    for value, (name, of_class) in enumerate(volumes.items(), start=1):
        in_ml = ", ".join(_format_volume(ml) for ml in of_class)
        parts.append(f"{value} {name}: {in_ml} ml" + f" in frames 1 to {len(of_class)}" * (len(of_class) > 1))
    return "; ".join(parts)


def _format_volume(ml: float) -> str:
    return f"{ml:.1f}" if ml >= 1 or ml == 0 else f"{ml:.2g}"
