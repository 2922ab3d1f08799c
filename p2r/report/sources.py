"""Source line below every picture: the origin of its values."""

from collections.abc import Iterator, Sequence

from p2r.evaluate.rows import TrialRow, digests_of
from p2r.modes import SCRATCH
from p2r.report.tables import aggregate, code_of, protocol_of, series_name, series_of, split_of


def source_line(rows: Sequence[TrialRow], code: str | None) -> str:
    """Return the source line of a picture: backbone, task, protocol, patients, draws, seed and code."""
    backbones = [digest[:12] for digest in digests_of(rows)]
    numbers = sorted({row.num_labelled for row in rows})
    draws = sorted({cell.num_draws for cell in aggregate(rows)})
    parts = [
        f"backbone {', '.join(backbones)}" if backbones else "",
        series_name((SCRATCH, "")) if all(row.mode == SCRATCH for row in rows) else "",
        f"task {', '.join(sorted({row.task for row in rows}))}",
        f"{', '.join(sorted({protocol_of(row) for row in rows}))}, {split_of(rows)} patients",
        f"n = {', '.join(map(str, numbers))}",
        f"{draws[0]} draw{'s' * (draws[0] > 1)}" if len(draws) == 1 else f"{draws[0]} to {draws[-1]} draws",
        *_seed_and_code(rows, code),
    ]
    return " · ".join(filter(None, parts))


def trials_line(rows: Sequence[TrialRow], code: str | None, *, patient: str) -> str:
    """Return the source line of a picture of single trials: the trials with their backbones, and the code.

    Args:
        rows: Rows of the trials, all from the same labelled patients.
        code: Commit of the report, for rows that do not name one.
        patient: The patient shown, with the split.
    """
    backbones = [(row.backbone_sha256 or "")[:12] for row in rows]
    trials = [
        series_name(series_of(row)) + (f" of backbone {backbone}" if backbone else "")
        for row, backbone in zip(rows, backbones, strict=True)
    ]
    parts = [
        "; ".join(trials),
        f"task {rows[0].task}",
        f"{', '.join(sorted({protocol_of(row) for row in rows}))}, {patient}",
        f"n = {rows[0].num_labelled}, draw {rows[0].draw}",
        *_seed_and_code(rows, code),
    ]
    return " · ".join(parts)


def _seed_and_code(rows: Sequence[TrialRow], code: str | None) -> Iterator[str]:
    if seeds := sorted({str(row.seed) for row in rows if row.seed is not None}):
        yield f"seed {', '.join(seeds)}"
    if codes := code_of(rows, code):
        yield f"code {codes}"
