"""Commands for the life of published versions: list, promote, gc."""

from typing import Annotated

import typer

from cluster.commands.options import Debug
from p2r.console import console, show, show_json
from p2r.logs import say

Place = Annotated[
    str,
    typer.Argument(metavar="URL", help="A job's storage, or the folder of one name, such as STORAGE/backbones/NAME."),
]


def list_versions(
    url: Place,
    json_: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """List published backbones and models: versions, dates, digests, pointers, sizes and results."""
    from p2r.published.collection import read_collections

    collections = read_collections(url)
    if json_:
        from p2r.published.collection import describe

        show_json(
            [
                {
                    "name": one.name,
                    "url": one.storage.url,
                    "pointers": {
                        **{name: pointer.model_dump() for name, pointer in one.pointers.items()},
                        **{name: {"problem": problem} for name, problem in one.damaged_pointers.items()},
                    },
                    "versions": [describe(one, version) for version in one.versions],
                }
                for one in collections
            ]
        )
        return
    from cluster.listing import collections_table

    if not collections:
        say(f"{url} holds no published backbone or model")
    else:
        console().print(collections_table(collections))


def promote(
    reference: Annotated[
        str,
        typer.Argument(metavar="VERSION", help="NAME/VERSION, with or without @sha256:HEX; or NAME@latest."),
    ],
    to: Annotated[str, typer.Option("--to", metavar="POINTER", help="Pointer to move, such as stable.")],
    report: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Report of a job that fine-tuned the backbone: its results are first added to the backbone's.",
        ),
    ] = None,
    force: Annotated[
        str | None,
        typer.Option(metavar="REASON", help="Move it although a check fails; the pointer records the reason."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Move a pointer of a name to a version, unless the version is damaged, has collapsed, or segments worse than the present one."""
    from p2r.published.promotion import promote as move_pointer

    if report is not None:
        from p2r.published.reports import add_report

        say(f"promote | {add_report(reference, report)}")
    moved = move_pointer(reference, to, forced=force, say=say)
    show(f"{moved.name}@{moved.pointer}: version {moved.target.version}, sha256:{moved.target.sha256}")
    if moved.target.forced is not None:
        show(f"forced: {moved.target.forced}")


def gc(
    url: Place,
    older_than: Annotated[float, typer.Option(metavar="DAYS", min=0, help="Keep everything younger than this.")] = 7.0,
    delete: Annotated[
        bool, typer.Option("--delete", help="Remove it; default: only list what would be removed.")
    ] = False,
    debug: Debug = False,
) -> None:
    """List, or remove, versions that no pointer, parent or model names, and files that interrupted publishers left."""
    from p2r.published.removal import plan_removal, remove

    items = (remove if delete else plan_removal)(url, min_age_days=older_than)
    for item in items:
        show(item.line())
    num_bytes = sum(item.num_bytes for item in items if item.is_removed)
    count = sum(item.is_removed for item in items)
    outcome = f"{count} of {len(items)} removed" if delete else f"{count} of {len(items)} would be removed by --delete"
    show(f"{outcome}, {num_bytes / 2**20:.1f} MiB")
