"""Results of a report -> the backbone that it fine-tuned, which may be in another storage."""

from p2r.artefact import open_artefact
from p2r.errors import InputError
from p2r.evaluate.statistics import few_shot_statistics
from p2r.published.results import add_results, results_from
from p2r.reference import parse_reference
from p2r.report.runs import open_report


def add_report(reference: str, report: str) -> str:
    """Add the results of a report to a backbone, and return a line about it.

    Args:
        reference: The backbone.
        report: Storage of a job, or its `report.json`.

    Raises:
        DataError: The report breaks a rule, or is of another backbone.
    """
    artefact = open_artefact(parse_reference(reference), is_fresh=True)
    run = open_report(report)
    rows = [row for row in run.rows if row.backbone_sha256 in (None, artefact.sha256)]
    if not any(row.backbone_sha256 == artefact.sha256 for row in rows):
        raise InputError(
            f"{run.url} has no result of {artefact.pin}; its rows are of {run.backbone_sha256 or 'no backbone'}: give the report of a job "
            "that fine-tuned this version"
        )
    seed = int(run.seed) if run.seed.isdigit() else 0
    added = results_from(few_shot_statistics(rows, seed=seed), report=run.url)
    add_results(artefact, added)
    return f"{len(added)} results of {run.url} added to {artefact.storage.url}"
