"""`p2r predict MODEL SERIES -o NAME.dcm`: the segmentation of a DICOM series as a DICOM object that refers to its images."""

from collections.abc import Sequence
from pathlib import Path

from p2r.console import show
from p2r.data.names import local_path
from p2r.errors import InputError
from p2r.logs import Say

ENDING = ".dcm"


def predict_series(urls: Sequence[str], folder: str, output: str, *, device: str, say: Say) -> None:
    """Segment the series of a folder, and write one DICOM segmentation.

    Args:
        urls: Of the model; of several, the mean of their probabilities is used.
        folder: Folder of one DICOM series.
        output: File that ends in .dcm.
        device: Device of the networks.
        say: Receives notes about the series.

    Raises:
        InputError: The folder is not one series, or the output cannot be written.
    """
    from cluster.applying import check_output

    check_output(output, (ENDING,))
    path = local_path(folder)
    if path is None or not path.expanduser().is_dir():
        raise InputError(
            f"-o {output}: a DICOM segmentation refers to the images of a series, and {folder} is not a local folder. Give the "
            "folder of a DICOM series, or an output that ends in .nii.gz"
        )
    if path.expanduser().resolve() in Path(output).resolve().parents:
        raise InputError(
            f"-o {output} is in the folder of the series, which would then hold two series: give a file outside {folder}"
        )
    from p2r.data.dicom_seg import read_series, write_segmentation
    from p2r.evaluate.models import ensemble, load_model

    scan = read_series(path.expanduser())
    if Path(output).resolve() in {Path(file).resolve() for file in scan.files}:
        raise InputError(f"-o {output} would replace an image of the series: give another file")
    model = ensemble([load_model(url, device=device) for url in urls])
    labels = model.labels(scan.volume)
    pins = [member.pin for member in model.members]
    name = "-".join(pins[0].partition("@")[0].rstrip("/").split("/")[-2:])
    num_images = write_segmentation(
        Path(output),
        labels[..., 0],
        scan,
        classes=model.classes,
        name=name,
        details=" ".join(pin.partition("@")[2] for pin in pins),
    )
    for note in scan.volume.notes:
        say(f"{folder}: {note}")
    for title, volumes in model.volumes_ml(labels, scan.volume).items():
        show(f"{title}: {volumes[0]:.3g} ml")
    show(f"{output}: DICOM segmentation of {len(model.classes)} classes, refers to {num_images} images")
