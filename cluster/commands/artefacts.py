"""Commands for corpora, backbones and models: inspect, verify, publish, sign."""

from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.options import Debug, JobPath, Overrides, Sign
from p2r.console import show
from p2r.errors import JobError
from p2r.logs import say


def inspect(
    url: Annotated[str, typer.Argument(help="A corpus, backbone, model, NAME@POINTER, or a job's storage.")],
    other: Annotated[
        str | None,
        typer.Argument(help="A later corpus, or a revision (CORPUS@sha256:HEX): shows the drift from the first to it."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the manifest, or the drift, instead of tables.")] = False,
    debug: Debug = False,
) -> None:
    """Show the contents of a URL: a corpus, the manifest, lineage, metrics and results of a backbone or model, or a list.

    With two corpora or revisions: the drift of voxel sizes, extents, intensities, contrasts and scanners between them.
    """
    from cluster.inspect import inspect as show_contents
    from cluster.inspect import inspect_drift

    if other is not None:
        inspect_drift(url, other, as_json=json_)
        return
    show_contents(url, as_json=json_)


def verify(
    url: Annotated[str, typer.Argument(help="A corpus, backbone or model; @sha256:HEX pins its manifest.")],
    key: Annotated[
        str | None,
        typer.Option(help="Public key that must have signed a backbone or model: a PEM file, or ed25519:HEX."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Check every digest of a corpus, backbone or model, and its signature."""
    from cluster.verify import verify as verified

    for line in verified(url, key=key):
        show(line)


def publish(
    path: JobPath,
    set_: Overrides = None,
    step: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Publish the complete checkpoint of this step, as VERSION-step-N, also while training runs.",
        ),
    ] = None,
    sign: Sign = None,
    debug: Debug = False,
) -> None:
    """Publish the last checkpoint of a job's pretraining, as set in its section publish; in this process, without Ray."""
    from p2r.job import read_job
    from p2r.pipeline.publishing import publish_backbone
    from p2r.storage import Storage

    job = read_job(path, tuple(set_ or ()))
    if job.publish is None:
        raise JobError(f"job {path} has no section publish; give a job of kind publish, pipeline or ablation")
    published = publish_backbone(job, Storage(job.storage), say, step=step)
    show(f"backbone: {published.url}")
    show(f"backbone_pin: {published.pin}")
    if sign is not None:
        show(_verify_and_sign(published.pin, sign))
        if job.publish.exports:
            from p2r.pipeline.exporting import sign_exports

            sign_exports(job.publish, Storage(job.storage), published)


def sign(
    url: Annotated[str, typer.Argument(help="A backbone or model; @sha256:HEX pins its manifest.")],
    key: Annotated[
        Path, typer.Option(help="Private key, a PEM file: openssl genpkey -algorithm ed25519 -out private.pem")
    ],
    debug: Debug = False,
) -> None:
    """Check a published backbone or model, and sign its manifest."""
    show(_verify_and_sign(url, key))


def _verify_and_sign(url: str, key: Path) -> str:
    from p2r.artefact import open_artefact
    from p2r.backbone import verify_artefact
    from p2r.reference import parse_reference

    artefact = open_artefact(parse_reference(url), is_fresh=True)
    verify_artefact(artefact)
    return f"signed: {artefact.sign(key)}"
