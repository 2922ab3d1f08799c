"""The `p2r` command: its list of commands, and its exit codes. Results go to stdout, progress to stderr."""

import io
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from cluster.commands import artefacts, exchange, jobs, own_data, planning, published, runs, use
from p2r.console import show, visible
from p2r.exits import INTERRUPTED, INVALID_INPUT, exit_code_of
from p2r.logs import say

app = typer.Typer(
    name="p2r",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(jobs.validate)
app.command()(jobs.run)
app.command()(own_data.check)
app.command()(own_data.init)
app.command()(jobs.submit)
app.command()(jobs.schema)
app.command()(artefacts.inspect)
app.command(name="show")(artefacts.inspect)
app.command(name="list")(published.list_versions)
app.command()(published.promote)
app.command()(published.gc)
app.command()(artefacts.verify)
app.command()(artefacts.publish)
app.command()(artefacts.sign)
app.command()(exchange.export)
app.command()(exchange.push)
app.command()(exchange.pull)
app.command()(runs.status)
app.command(name="tune-batch")(planning.tune_batch)
app.command()(planning.plan)
app.command()(runs.compare)
app.command()(use.views)
app.command()(use.embed)
app.command()(use.predict)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from p2r.version import __version__, code_version

        show(f"p2r {__version__} ({code_version()})")
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and the commit."),
    ] = False,
) -> None:
    """Pixel-level foundation models for MRI: from scans to a few-shot report."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code, see `p2r.exits`.

    Args:
        argv: Arguments without the name of the program. None: those of this process.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    return exit_code_of(lambda: _run_command(arguments), what="this command", is_debug="--debug" in arguments)


def _run_command(arguments: list[str]) -> int:
    try:
        code = app(arguments, standalone_mode=False, prog_name="p2r")
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        for line in _usage_lines(error):
            say(line)
        return INVALID_INPUT
    if code == INTERRUPTED:  # typer catches Ctrl-C
        raise KeyboardInterrupt
    return code or 0


def _usage_lines(error: Any) -> list[str]:
    """Return the lines of a usage error, whose message repeats an argument."""
    written = io.StringIO()
    error.show(file=written)
    message = error.format_message()
    return written.getvalue().replace(message, visible(message)).splitlines()
