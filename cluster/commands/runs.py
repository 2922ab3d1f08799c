"""Commands that read runs and their reports: status, compare."""

from typing import TYPE_CHECKING, Annotated

import typer

from p2r.console import console, show, show_json
from p2r.errors import InputError

if TYPE_CHECKING:
    pass

from cluster.commands.options import Debug, Overrides


def status(
    job_or_url: Annotated[str, typer.Argument(metavar="JOB-or-URL", help="A job file, or the storage of a run.")],
    set_: Overrides = None,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh until Ctrl-C.")] = False,
    web: Annotated[bool, typer.Option("--web", help="Serve a live page until Ctrl-C.")] = False,
    port: Annotated[int, typer.Option(help="Port of the page; 0: any free one.")] = 8321,
    host: Annotated[str, typer.Option(help="Address on which the page listens.")] = "127.0.0.1",
    json_: Annotated[bool, typer.Option("--json", help="Print the content of the page as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Show the state of a run, read only from its storage: from any machine, while it runs or after it died."""
    from cluster.status import target_of
    from cluster.status_reader import Reader

    if watch + web + json_ > 1:
        raise InputError("--watch, --web and --json exclude one another: give one of them")
    name, storage = target_of(job_or_url, tuple(set_ or ()))
    reader = Reader(name, storage)
    if web:
        from cluster.status_server import serve

        serve(reader, host=host, port=port, is_local=storage.is_local)
        return
    if json_:
        show_json(reader.read().to_json())
        return
    from cluster.status_terminal import show_run, watch_run

    (watch_run if watch else show_run)(reader)


def compare(
    urls: Annotated[
        list[str],
        typer.Argument(
            metavar="A B...",
            help="Storages of finished jobs, URLs of a report.json, or backbones inside such a storage "
            "(STORAGE/backbones/NAME/VERSION). A comes first.",
        ),
    ],
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", help="Folder or URL for comparison.html, comparison.json and pictures."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Compare the reports of several runs or backbones, with their differences patient by patient.

    A backbone selects its own rows in its storage's report, and the rows from scratch. Settings that differ between the jobs
    are listed above the results.
    """
    from p2r.report.comparison import compare_runs
    from p2r.report.comparison_page import write_comparison
    from p2r.report.comparison_tables import comparison_table, notes_of, reasons_of, settings_table
    from p2r.report.runs import read_runs
    from p2r.storage import Storage

    storage = None if output is None else Storage(output)
    if storage is not None:
        storage.check_writable()
    runs = read_runs(urls)
    comparison = compare_runs(runs)
    tables = console(width=140)
    for run in runs:
        named = [run.job, run.backbone, run.backbone_sha256[:12]]
        show(f"{run.letter}  {' '.join(filter(None, (*named, run.url)))}")
    for note in notes_of(comparison):
        show(f"note: {note}")
    differ = settings_table(comparison)
    if differ.row_count:
        tables.print(differ)
    tables.print(comparison_table(comparison))
    for reason in reasons_of(comparison):
        show(reason)
    if storage is not None:
        show(f"page: {write_comparison(storage, comparison)}")
