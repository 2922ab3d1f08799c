"""Runs to compare, read from URLs of storages, reports or backbones, with errors by name.

A report comes from elsewhere, so its rows are validated first. A published backbone selects its own rows, and the rows from
scratch, in its storage's report.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

from pydantic import FailFast, Field, TypeAdapter, ValidationError

from p2r.artefact import open_artefact
from p2r.documents import FewKeys
from p2r.errors import CheckpointError, DataError, StorageError
from p2r.evaluate.rows import JsonModel, TrialRow, digests_of
from p2r.pointers import resolve
from p2r.reference import parse_reference
from p2r.report.tables import code_of, protocol_of
from p2r.report.text import one_line
from p2r.storage import Storage

_MOST_RUNS = 8
_WAY_OUT = "give the storage, or the report.json, of a job that fine-tuned it"

Dice = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Setting = tuple[str, str, str]
"""Task, protocol and split: results must agree in them to be compared."""


class _ReportRow(TrialRow):
    """A row with the fields that a comparison needs, within bounds."""

    subjects: Annotated[list[str], FailFast()]
    protocol: str
    dice_mean: Dice | None
    dice: Annotated[dict[str, Dice | None], FewKeys]
    dice_by_subject: Annotated[dict[str, Dice | None], FewKeys]


class Choice(JsonModel):
    """Settings that a search chose for a task and mode."""

    task: str | None = None
    mode: str | None = None
    settings: dict[str, object] = Field(default_factory=dict)


_CHOICES = TypeAdapter(list[Choice])


@dataclass(frozen=True)
class Run:
    """One report, and the letter by which it is named."""

    letter: str
    url: str
    job: str
    backbone: str
    backbone_sha256: str
    code: str
    seed: str
    licence: str
    finetune: dict[str, object]
    """The job's section; empty: not in the report."""
    chosen: tuple[Choice, ...]
    """Choices of the search."""
    rows: tuple[TrialRow, ...]


class _Published(NamedTuple):
    """A published backbone, by its manifest."""

    url: str
    sha256: str
    licence: str


def open_report(url: str) -> Run:
    """Read and validate the report of a job, or of a backbone that it published.

        report = p2r.open_report("/data/runs/mine")
        best = max(report.rows, key=lambda row: row.dice_mean or 0)
        best.mode, best.num_labelled, best.dice

    Args:
        url: Storage of a job, its `report.json`, or a backbone in such a storage.

    Raises:
        DataError: The report breaks a rule.
        StorageError: There is no report.
    """
    return _read_run(url, "A")


def read_runs(urls: Sequence[str]) -> list[Run]:
    """Read the reports at several URLs: of a job's storage, a report.json, or a backbone that a job published in its storage.

    Raises:
        DataError: A URL has no report, or its report breaks a rule; names the URL.
    """
    if not 2 <= len(urls) <= _MOST_RUNS:
        raise DataError(f"a comparison needs 2 to {_MOST_RUNS} reports, got {len(urls)}")
    runs = [_read_run(url, chr(ord("A") + number)) for number, url in enumerate(urls)]
    first: dict[tuple[str, str], str] = {}
    for run in runs:
        if first.setdefault((run.url, run.backbone_sha256), run.letter) != run.letter:
            raise DataError(f"{run.url} was given twice; give two reports")
    return runs


def _read_run(url: str, letter: str) -> Run:
    storage, found, published = _find_report(url)
    where = storage.at(found)
    report = storage.read_json(found)
    if not isinstance(report, dict) or not str(report.get("format")).startswith("p2r-report/"):
        raise DataError(f"{where} is not a p2r report (format p2r-report/1)")
    rows = report.get("rows")
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{where} holds no rows: there is nothing to compare")
    checked = _check_rows(rows, where)
    if published is not None:
        checked = _select_rows(published, checked, where)
    if len({row.backbone for row in checked}) > 1:
        raise DataError(f"{where} already holds rows of several backbones; give reports of one backbone each")
    _refuse_repeated_trials(checked, where)
    context = _mapping_or_empty(report.get("context"))
    backbone = _mapping_or_empty(context.get("backbone"))
    return Run(
        letter,
        where,
        str(context.get("job") or ""),
        str((published.url if published else backbone.get("url")) or ""),
        ", ".join(digests_of(checked)),
        code_of(checked, str(context.get("code") or "")),
        str(context.get("seed", "")),
        str((published.licence if published else context.get("licence")) or ""),
        _mapping_or_empty(context.get("finetune")),
        _chosen_settings(context.get("chosen")),
        tuple(checked),
    )


def _check_rows(rows: Sequence[object], where: str) -> list[TrialRow]:
    checked: list[TrialRow] = []
    for number, row in enumerate(rows):
        try:
            checked.append(_ReportRow.model_validate(row))
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(map(str, problem["loc"])) or "the row"
            raise DataError(f"{where}: row {number}: {one_line(key)}: {one_line(problem['msg'])}") from None
    return checked


def _refuse_repeated_trials(rows: Sequence[TrialRow], where: str) -> None:
    trials = [(*setting_of(row), row.num_labelled, row.mode, row.draw) for row in rows]
    for number, trial in enumerate(trials):
        if trial in trials[:number]:
            raise DataError(f"{where}: rows {trials.index(trial)} and {number} are of one trial: {one_line(trial)}")


def _chosen_settings(chosen: object) -> tuple[Choice, ...]:
    """Return the choices in a report; older reports have none, or other ones."""
    try:
        return tuple(_CHOICES.validate_python(chosen))
    except ValidationError:
        return ()


def _find_report(url: str) -> tuple[Storage, str, _Published | None]:
    """Return the location of a URL's report, and the backbone whose rows are meant, if the URL is of one."""
    reference = resolve(parse_reference(url))
    if url.endswith(".json"):
        folder, _, path = url.rpartition("/")
        storage, paths = Storage(folder or "."), [path]
    else:
        storage, paths = Storage(reference.url), ["report/report.json", "report.json"]
    for path in paths if reference.sha256 is None else []:
        if storage.exists(path):
            return storage, path, None
    try:
        artefact = open_artefact(reference, format="p2r-backbone")
    except (StorageError, CheckpointError) as error:
        if reference.sha256 is not None:
            raise
        raise DataError(
            f"{storage.url} has no report (looked for {', '.join(paths)}) and is not a published backbone. Give the "
            "storage of a finished job, a backbone in it (STORAGE/backbones/NAME/VERSION), or the URL of a report.json"
        ) from error
    place = re.fullmatch(r"(.+)/backbones/[^/]+/[^/]+", storage.url)
    if place is None:
        raise DataError(
            f"backbone {storage.url} is not in the storage of a job (STORAGE/backbones/NAME/VERSION), where its report "
            f"would be; {_WAY_OUT}"
        )
    published = _Published(storage.url, artefact.sha256, artefact.manifest.licence)
    job = Storage(place[1])
    if not job.exists("report/report.json"):
        raise DataError(
            f"backbone {storage.url}: its storage has no report, {job.at('report/report.json')}; run its job to the "
            f"end, or {_WAY_OUT}"
        )
    return job, "report/report.json", published


def _select_rows(published: _Published, rows: Sequence[TrialRow], where: str) -> list[TrialRow]:
    """Keep the rows of a backbone, and the rows from scratch, which have no backbone."""
    digests = digests_of(rows)
    if published.sha256 not in digests:
        raise DataError(
            f"{where} has no row of backbone {published.url} (sha256 {published.sha256[:12]}): its rows are of "
            f"{', '.join(digest[:12] for digest in digests) or 'no backbone'}; {_WAY_OUT}"
        )
    return [row for row in rows if row.backbone_sha256 in (None, published.sha256)]


def _mapping_or_empty(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}


def setting_of(row: TrialRow) -> Setting:
    """Return the setting in which a row's result can be compared with others."""
    return row.task, protocol_of(row), row.split
