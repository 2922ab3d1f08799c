"""A `Report` -> the lines in which people read it, with the figures that a log's reader wants as fields."""

from collections.abc import Iterator

from p2r.engine.pretrain import Report
from p2r.logs import Line

_FIGURES = ("loss", "images_per_s", "wait_fraction", "learning_rate", "gradient_norm", "equivariance_error")


def report_lines(report: Report, *, rank: int = 0) -> Iterator[Line]:
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
