"""Commands for a first job on own scans: check, init."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from p2r.errors import InputError

if TYPE_CHECKING:
    pass

from cluster.commands.options import Contrast, Debug, Form, Labels


def check(
    folder: Annotated[str, typer.Argument(help="A folder of scans, or s3://: nnU-Net, Decathlon, BIDS or any other.")],
    labels: Labels = None,
    form: Form = None,
    contrast: Contrast = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="PNG file: middle planes of some scans.")] = Path(
        "p2r-check.png"
    ),
    read_all: Annotated[bool, typer.Option("--all", help="Read every scan, not only a sample within seconds.")] = False,
    debug: Debug = False,
) -> None:
    """Report within seconds how p2r reads a folder: scans, subjects, label maps, and the job and task it would write."""
    from cluster import first_job
    from cluster.applying import check_output

    check_output(output, (".png",))
    first_job.check(folder, labels=labels, form=_check_form(form), contrast=contrast, output=output, read_all=read_all)


def init(
    folder: Annotated[Path, typer.Argument(help="Folder for job.yaml and task.yaml; created if absent.")],
    scans: Annotated[str, typer.Option(help="Folder of the scans, or s3://: nnU-Net, Decathlon, BIDS or any other.")],
    labels: Labels = None,
    form: Form = None,
    contrast: Contrast = None,
    name: Annotated[str | None, typer.Option(help="Name of the job and the task; default: the name of FOLDER.")] = None,
    licence: Annotated[str | None, typer.Option(help="Licence of the data: an SPDX identifier or a name.")] = None,
    provenance: Annotated[str | None, typer.Option(help="Origin of the data, and how to cite them.")] = None,
    debug: Debug = False,
) -> None:
    """Write the first job and task for your own scans, and print the next commands."""
    from cluster import first_job

    first_job.init(
        folder,
        scans=scans,
        labels=labels,
        form=_check_form(form),
        contrast=contrast,
        name=name,
        licence=licence,
        provenance=provenance,
    )


def _check_form(name: str | None) -> Any:
    from p2r.data.survey import NAMES

    if name is not None and name not in NAMES:
        raise InputError(f"--from {name}: must be one of {', '.join(NAMES)}")
    return name
