"""Commands that move a published backbone or model to another tool."""

from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.options import Debug
from p2r.console import show


def export(
    reference: Annotated[
        str, typer.Argument(metavar="URL", help="A published backbone or model; @sha256:HEX pins its manifest.")
    ],
    to: Annotated[str, typer.Option("--to", metavar="TOOL", help="monai, onnx, huggingface or nnunet.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="New or empty folder.")],
    key: Annotated[
        str | None, typer.Option(help="Public key that must have signed it: a PEM file, or ed25519:HEX.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Write a published backbone or model for another tool, and check that it gives the same outputs there."""
    from p2r.export import export as write_export
    from p2r.export import export_name

    for line in write_export(reference, to=export_name(to), folder=output, key=key):
        show(line)


def push(
    reference: Annotated[
        str, typer.Argument(metavar="URL", help="A published backbone or model; @sha256:HEX pins its manifest.")
    ],
    target: Annotated[str, typer.Argument(metavar="hf://ORG/NAME", help="Repository, which is created if absent.")],
    private: Annotated[bool, typer.Option("--private", help="Create the repository as private.")] = False,
    tag: Annotated[str | None, typer.Option(help="Name of the new commit, such as v1.")] = None,
    debug: Debug = False,
) -> None:
    """Upload a published backbone or model to a Hugging Face hub, in one commit. The token comes from `hf auth login` or HF_TOKEN."""
    from p2r.export.transfer import push as upload

    for line in upload(reference, target, is_private=private, tag=tag):
        show(line)


def pull(
    reference: Annotated[
        str,
        typer.Argument(metavar="URL", help="hf://ORG/NAME@REVISION, s3:// or file://; @sha256:HEX pins its manifest."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="New or empty folder.")],
    key: Annotated[
        str | None, typer.Option(help="Public key that must have signed it: a PEM file, or ed25519:HEX.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Copy a published backbone or model to a folder of this machine, and check every digest."""
    from p2r.export.transfer import pull as download

    for line in download(reference, folder=output, key=key):
        show(line)
