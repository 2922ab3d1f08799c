"""A `PretrainReport` -> the lines in which people read it, with the figures that a log's reader wants as fields."""

from collections.abc import Iterator, Mapping
from typing import Any

from p2r.engine.report import PretrainReport
from p2r.logs import Line

FINISHED = "this job is finished, and nothing that it was made from or has made has changed"

_FIGURES = ("loss", "images_per_s", "wait_fraction", "learning_rate", "gradient_norm", "equivariance_error")


def made_lines(made: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a run prints of the things it made, a name and a URL a line; several of one kind are indented below it."""
    for name, value in made.items():
        if isinstance(value, dict):
            yield f"{name}:"
            yield from (f"  {key}: {child}" for key, child in value.items())
        else:
            yield f"{name}: {value}"


def report_lines(report: PretrainReport, *, rank: int = 0) -> Iterator[Line]:
    """Yield what there is to say: where a run was resumed, and the report itself."""
    if report.resumed_from is not None:
        yield Line(f"pretrain | resumed from step {report.resumed_from}", rank=rank, step=report.resumed_from)
    figures = {name: getattr(report, name) for name in _FIGURES}
    yield Line(
        f"pretrain | {report.line()}",
        rank=rank,
        step=report.step,
        num_steps=report.num_steps,
        checkpoint=report.checkpoint,
        **figures,
    )
