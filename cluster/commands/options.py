"""Arguments and options that several commands share, and output that they share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from p2r.console import console, show
from p2r.errors import JobError

if TYPE_CHECKING:  # `p2r --help` imports none of them
    from p2r.config import PretrainConfig
    from p2r.job import Job
    from p2r.pipeline.outputs import Outputs

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a field of the job, such as pretrain.steps=20."),
]
JobPath = Annotated[
    Path,
    typer.Argument(metavar="JOB", help="A job file, or the name of a job that comes with p2r, such as demo."),
]
AllowTransductive = Annotated[
    bool,
    typer.Option(
        "--allow-transductive",
        help="Continue although validation or test patients are in the backbone's corpus; every row of the report is labelled.",
    ),
]
Sign = Annotated[
    Path | None, typer.Option(metavar="KEY", help="Private key (PEM file) with which to sign the published artefact.")
]
Fork = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Start a new run at step 0 from the newest checkpoint's weights, in <storage>-NAME (or NAME, if a URL); the same command "
        "resumes it.",
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks, and the output of workers.")]
Form = Annotated[
    str | None,
    typer.Option("--from", metavar="FORM", help="Layout of the scans: nnunet, msd, bids or folder; default: detected."),
]
Labels = Annotated[Path | None, typer.Option(help="Folder of the label maps; default: searched below the scans.")]
Contrast = Annotated[
    str | None,
    typer.Option(help="Part of the labelled scans' names, if there are several contrasts."),
]


def pretrain_config(job: "Job", path: Path) -> "PretrainConfig":
    """Return the job's section pretrain, or raise JobError."""
    if job.pretrain is None:
        raise JobError(f"job {path} has no section pretrain; give a job of kind pretrain, pipeline or ablation")
    return job.pretrain


def print_outputs(made: "Outputs") -> None:
    """Print the table and the outputs of a job."""
    if made.table is not None:
        console().print(made.table)
    for line in made.lines():
        show(line)


def print_rows(columns: tuple[str, ...], rows: list[tuple[str, ...]], *, title: str | None = None) -> None:
    """Print a table without borders."""
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left", box=None)
    for row in rows:
        table.add_row(*row)
    console().print(table)
