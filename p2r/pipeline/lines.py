"""Lines of a `PretrainReport` for people, with metrics as fields for readers of JSON logs."""

from collections.abc import Iterator

from p2r.engine.report import PretrainReport
from p2r.logs import Line, Say, fields_of
from p2r.stages import STAGES

FINISHED = "this job is finished, and nothing that it was made from or has made has changed"

METRICS = (
    "loss",
    "images_per_s",
    "wait_fraction",
    "learning_rate",
    "gradient_norm",
    "equivariance_error",
    "probe_dice",
)
"""Fields of a report that become fields of its line, which trackers read."""


def report_lines(report: PretrainReport, *, rank: int = 0) -> Iterator[Line]:
    """Yield the lines of a report; the first report of a resumed run also states the step."""
    if report.resumed_from is not None:
        yield Line(f"pretrain | resumed from step {report.resumed_from}", rank=rank, step=report.resumed_from)
    figures = {name: getattr(report, name) for name in METRICS}
    yield Line(
        f"pretrain | {report.line()}",
        rank=rank,
        step=report.step,
        num_steps=report.num_steps,
        checkpoint=report.checkpoint,
        **figures,
    )


def say_for_variant(say: Say, name: str, num_variants: int) -> Say:
    """Return a logger for the lines of a variant. If several run together, its name follows the stage."""

    def say_one(line: str) -> None:
        text = str(line)
        if num_variants > 1:
            stage, bar, rest = text.partition(" | ")
            text = f"{stage} | {name} | {rest}" if bar and stage in STAGES else f"{name} | {text}"
        say(Line(text, **{**fields_of(line), "variant": name}))

    return say_one
