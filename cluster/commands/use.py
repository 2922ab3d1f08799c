"""Commands that apply views, a backbone or a model to scans: views, embed, predict."""

from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.options import Debug, JobPath, Overrides, pretrain_config
from p2r.console import show
from p2r.logs import say

Scans = Annotated[
    list[str],
    typer.Argument(
        metavar="SCAN...",
        help="Scans (NIfTI: a path, file:// or s3://; DICOM: a folder), or folders of scans; or the scans of one patient by contrast, "
        "as in t1=t1.nii.gz flair=flair.nii.gz, or t1,flair=scan.nii.gz if its fourth axis holds them in this order; or of many patients, "
        "as in 't1={key}_t1.nii.gz' 'flair={key}_flair.nii.gz', who may lack contrasts. The grid of a result is that of the first.",
    ),
]


def views(
    path: JobPath,
    output: Annotated[Path, typer.Option("-o", "--output", help="PNG file.")],
    scan: Annotated[Path | None, typer.Option(help="A NIfTI scan; default: a virtual subject.")] = None,
    set_: Overrides = None,
    debug: Debug = False,
) -> None:
    """Draw the effect of a job's section pretrain.views on an image: every transform over its range."""
    from cluster.applying import check_output
    from p2r.data.phantom import resolve_source
    from p2r.data.volume import read_volume
    from p2r.job import read_job
    from p2r.report import image_of, view_sheet

    job = read_job(path, tuple(set_ or ()))
    config = pretrain_config(job, path)
    check_output(output, (".png",))
    volume = read_volume(scan or next(resolve_source("template://icbm152/images?subjects=1").glob("*.nii.gz")))
    image, inside = image_of(volume, config.image)
    output.write_bytes(view_sheet(image, inside, config=config.views, spacing_mm=config.image.spacing_mm))
    show(output)


def embed(
    backbone: Annotated[
        str, typer.Argument(metavar="BACKBONE", help="URL of a published backbone; @sha256:HEX pins its manifest.")
    ],
    scans: Scans,
    output: Annotated[
        str,
        typer.Option(
            "-o",
            "--output",
            help="File for the features (X, Y, Z, F), .nii.gz or .zarr; for several scans or patients: a folder.",
        ),
    ],
    native: Annotated[
        bool, typer.Option("--native", help="Use the scan's own grid instead of the backbone's.")
    ] = False,
    form: Annotated[
        str, typer.Option("--as", metavar="FORM", help="Form of the files in a folder: nifti or zarr.")
    ] = "nifti",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    debug: Debug = False,
) -> None:
    """Write the features of every pixel of a scan, or of all scans of a folder, in the scan's world coordinates."""
    from cluster.applying import embed as apply

    apply(backbone, scans, output, native=native, form=form, device=device, say=say)


def predict(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="URL of a published model; @sha256:HEX pins its manifest.")
    ],
    scans: Scans,
    output: Annotated[
        str,
        typer.Option(
            "-o",
            "--output",
            help="NIfTI file for the segmentation, on the scan's own grid; for a folder or many patients: a folder. For the folder of one "
            "DICOM series: a file that ends in .dcm, a DICOM segmentation.",
        ),
    ],
    probabilities: Annotated[
        bool,
        typer.Option(
            "--probabilities",
            help="Write NAME_probabilities.nii.gz beside NAME.nii.gz, too: a volume per class, background first, which add up to 1.",
        ),
    ] = False,
    ensemble: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL",
            help="One more model, whose probabilities are averaged with MODEL's; may be repeated. Same classes, same preparation.",
        ),
    ] = None,
    form: Annotated[
        str, typer.Option("--as", metavar="FORM", help="Form of the files in a folder: nifti or zarr.")
    ] = "nifti",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    debug: Debug = False,
) -> None:
    """Segment a scan, or all scans of a folder; for a folder, volumes per class are also written to volumes.csv."""
    from cluster.applying import predict as apply

    models = [model, *(ensemble or ())]
    apply(models, scans, output, has_probabilities=probabilities, form=form, device=device, say=say)
