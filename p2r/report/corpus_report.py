"""Corpus report: a page with pictures of accepted and refused scans, from manifest, ledger and thumbnails.

    <corpus>/report/report.md · accepted.png · refused.png (if any scan was) · histograms.png · alike.csv (if any are)

It depends only on one revision, reads no shard, and can be made again at any time: equal revisions give equal bytes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from p2r.config import PERCENTILES
from p2r.data.drift import ScanGroup, group_scans
from p2r.data.ledger import AcceptedRow, LedgerRow, is_accepted, read_ledger
from p2r.data.likeness import MAX_PAIRS, Alike, find_alike
from p2r.data.manifest import Manifest, facts_of, load_manifest, ranges_of
from p2r.data.preparation import SliceAxis, slice_axis
from p2r.data.revision import read_thumbnails
from p2r.data.thumbnails import MOST, Thumbnails, lowest_lots
from p2r.files import csv_bytes
from p2r.logs import Say
from p2r.report.canvas import CLASS_COLOURS, FAINT, INK, headline, new_figure, plain, show_plane, to_png
from p2r.report.page import Block, Grid, Heading, Paragraph, Picture, markdown
from p2r.storage import Storage

_COLUMNS = 8
_TILE, _GAP, _CAPTION, _TOP = 1.18, 0.1, 0.3, 0.72  # inches
_MOST_LETTERS = 20
_EMPTY = "#ececec"
_NUM_BINS = 36
_MOST_ALIKE = 50
_MOST_GROUPS = 60


def corpus_report_is_current(corpus: Storage) -> bool:
    """Return whether the report beside a corpus is of its current revision."""
    found = corpus.read_tagged("report/report.md")
    return found is not None and load_manifest(corpus).sha256.encode() in found[0]


def write_corpus_report(corpus: Storage, *, say: Say = lambda line: None) -> str:
    """Write the report of the current revision of a corpus, and return the URL of its page.

    `say` receives a line if scans of different subjects look alike.
    """
    manifest = load_manifest(corpus)
    ledger, thumbnails = read_ledger(corpus, manifest), read_thumbnails(corpus, manifest)
    accepted = [row for row in ledger if is_accepted(row)]
    where = corpus.child("report")
    pictures = {
        "accepted": accepted_sheet(ledger, thumbnails),
        "refused": refused_sheet(ledger, thumbnails),
        "histograms": histograms(accepted, rule=manifest.facts.preprocessing.slice_axis),
    }
    for name, content in pictures.items():
        if content is None:
            where.delete(f"{name}.png")
        else:
            where.write_bytes(f"{name}.png", content)
    alike = find_alike(accepted)
    if alike:
        where.write_bytes("alike.csv", csv_bytes([field.name for field in fields(Alike)], map(astuple, alike)))
        say(_describe_alike(alike, where.at("alike.csv")))
    else:
        where.delete("alike.csv")
    made = [name for name, content in pictures.items() if content is not None]
    where.write_bytes(
        "report.md", markdown(list(_list_blocks(manifest, made, alike, group_scans(accepted))), pictures="").encode()
    )
    return where.at("report.md")


def accepted_sheet(ledger: Sequence[LedgerRow], thumbnails: Thumbnails) -> bytes:
    """Draw the middle planes of up to 48 accepted scans, chosen at random."""
    accepted = {row.key: row for row in ledger if is_accepted(row)}
    keys = sorted(
        lowest_lots(accepted.keys() & thumbnails.keys(), MOST), key=lambda key: (accepted[key].contrast or "", key)
    )
    tiles = [(thumbnails[key], key, _describe_tile(accepted[key]), FAINT) for key in keys]
    return contact_sheet(
        tiles,
        f"Accepted: {len(tiles)} of {len(accepted)} scans",
        "middle plane across the axis of the largest spacing, first frame, black to white: percentiles 1 to 99 of the plane",
    )


def refused_sheet(ledger: Sequence[LedgerRow], thumbnails: Thumbnails) -> bytes | None:
    """Draw up to 48 refused scans with their reasons, unreadable ones as empty tiles; None if there are none."""
    refused = {row.key: row for row in ledger if row.status == "refused"}
    if not refused:
        return None
    # Readable scans come first: a sheet of empty tiles shows nothing.
    seen = lowest_lots(refused.keys() & thumbnails.keys(), MOST)
    keys = sorted(
        [*seen, *lowest_lots(refused.keys() - set(seen), MOST - len(seen))], key=lambda key: (refused[key].reason, key)
    )
    tiles = [(thumbnails.get(key), key, refused[key].reason, CLASS_COLOURS[5]) for key in keys]
    subtitle = "grey tiles: no picture of the scan can be made" if any(tile[0] is None for tile in tiles) else ""
    return contact_sheet(tiles, f"Refused: {len(tiles)} of {len(refused)} scans", subtitle)


@dataclass(frozen=True)
class _Sizes:
    """Sizes of scans, split as the corpus cuts them into slices."""

    in_plane_mm: NDArray[np.float64]
    across_mm: NDArray[np.float64]
    in_plane: NDArray[np.float64]
    """Geometric mean of the numbers of rows and columns."""
    num_slices: NDArray[np.float64]


def sizes_of(accepted: Sequence[AcceptedRow], rule: SliceAxis) -> _Sizes:
    """Return the sizes of scans along and across the slices that `ingest.slice_axis` gives."""
    spacing = np.array([row.spacing_mm for row in accepted], dtype=np.float64)
    shape = np.array([row.shape[:3] for row in accepted], dtype=np.float64)
    across = np.array([slice_axis(tuple(row.spacing_mm), rule, shape=tuple(row.shape)) for row in accepted])[:, None]
    across_mm, num_slices = (np.take_along_axis(values, across, axis=1)[:, 0] for values in (spacing, shape))
    return _Sizes(
        (spacing.sum(axis=1) - across_mm) / 2, across_mm, np.sqrt(shape.prod(axis=1) / num_slices), num_slices
    )


def histograms(accepted: Sequence[AcceptedRow], *, rule: SliceAxis) -> bytes:
    """Draw the distributions of voxel size, extent and intensity of the accepted scans."""
    sizes = sizes_of(accepted, rule)
    percentiles = np.array([row.percentiles for row in accepted], dtype=np.float64)
    figure = new_figure(11.4, 3.2)
    panels = [figure.add_axes((0.05 + 0.32 * column, 0.165, 0.275, 0.62)) for column in range(3)]
    _draw_histogram(
        panels[0],
        "voxel size, mm",
        {"in plane": sizes.in_plane_mm, "across planes": sizes.across_mm},
    )
    _draw_histogram(panels[1], "extent, voxels", {"in plane": sizes.in_plane, "across planes": sizes.num_slices})
    _draw_histogram(
        panels[2],
        "intensity, percentiles of the non-zero voxels",
        {f"{p:g} %": percentiles[:, PERCENTILES.index(p)] for p in (0.5, 50.0, 99.5)},
    )
    panels[0].set_ylabel("scans", color=INK)
    headline(figure, f"Voxel size, extent and intensity of {len(accepted)} scans")
    return to_png(figure)


def contact_sheet(tiles: Sequence[tuple[NDArray[np.uint8] | None, str, str, str]], title: str, subtitle: str) -> bytes:
    """Draw tiles of a picture (None: empty), its name, a line below it and that line's colour."""
    rows = max(1, -(-len(tiles) // _COLUMNS))
    width = _GAP + _COLUMNS * (_TILE + _GAP)
    height = _TOP + rows * (_TILE + _CAPTION + _GAP)
    figure = new_figure(width, height)
    for number, (pixels, name, line, colour) in enumerate(tiles):
        row, column = divmod(number, _COLUMNS)
        left = _GAP + column * (_TILE + _GAP)
        low = height - _TOP - row * (_TILE + _CAPTION + _GAP) - _TILE
        _draw_tile(figure, (left / width, low / height, _TILE / width, _TILE / height), pixels)
        for text, below, ink in ((_shorten_name(name), 0.035, INK), (line, 0.155, colour)):
            figure.text(left / width, (low - below) / height, text, fontsize=6.2, color=ink, va="top")
    headline(figure, title, subtitle)
    return to_png(figure)


def _draw_tile(figure: Figure, box: tuple[float, float, float, float], pixels: NDArray[np.uint8] | None) -> None:
    axes = figure.add_axes(box)
    if pixels is not None:
        show_plane(axes, pixels, vmin=0, vmax=255, interpolation="bilinear")
        return
    axes.set_facecolor(_EMPTY)
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)
    axes.text(0.5, 0.5, "no picture", ha="center", va="center", fontsize=7, color=FAINT, transform=axes.transAxes)


def _draw_histogram(axes: Axes, name: str, groups: Mapping[str, NDArray[np.float64]]) -> None:
    values = np.concatenate(list(groups.values()))
    low, high = float(values.min()), float(values.max())
    is_log = low > 0 and high / low > 4
    if is_log:
        bins = np.geomspace(low / 1.05, high * 1.05, _NUM_BINS)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        _label_sparsely(axes, low, high)
    else:
        margin = max(high - low, abs(high), 1e-6) * 0.03
        bins = np.linspace(low - margin, high + margin, _NUM_BINS)
        axes.xaxis.set_major_locator(MaxNLocator(5))
    for colour, (label, of_group) in zip((CLASS_COLOURS[1], CLASS_COLOURS[5], "#0072b2"), groups.items(), strict=False):
        axes.hist(
            of_group, bins=list(bins), color=colour, alpha=0.75, label=f"{label}: median {np.median(of_group):.3g}"
        )
    axes.set_ylim(0, axes.get_ylim()[1] * 1.05)
    axes.set_xlabel(name, color=INK)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    plain(axes)
    # Above the panel, because bars may be anywhere in it.
    axes.legend(
        frameon=False, fontsize=7.2, loc="lower left", bbox_to_anchor=(-0.06, 0.98), ncols=len(groups),
        handlelength=1.0, handletextpad=0.4, columnspacing=1.0, borderaxespad=0.0,
    )  # fmt: skip


def _label_sparsely(axes: Axes, low: float, high: float) -> None:
    """Label a logarithmic axis by round numbers, few enough not to touch."""
    steps = [digit * 10.0**power for power in range(-6, 9) for digit in (1, 2, 5)]
    ticks = [step for step in steps if low / 1.1 <= step <= high * 1.1]
    while len(ticks) > 7:
        ticks = ticks[::3]
    axes.set_xticks(ticks or [low, high])
    axes.set_xticks([], minor=True)


def _describe_alike(alike: Sequence[Alike], where: str) -> str:
    most = "" if len(alike) < MAX_PAIRS else "at least "
    pair = alike[0]
    return (
        f"{most}{len(alike)} pair{'s' * (len(alike) > 1)} of scans of different subjects look alike, such as {pair.first} and "
        f"{pair.second} (similarity {pair.similarity:.2f}); one person under two names leaks between splits: check {where}"
    )


def _list_blocks(
    manifest: Manifest, pictures: Sequence[str], alike: Sequence[Alike], groups: Sequence[ScanGroup]
) -> Iterator[Block]:
    yield Heading(1, f"Corpus of cohort {manifest.facts.cohort}")
    yield Grid(("fact", "value"), facts_of(manifest))
    yield Heading(2, "Outcome of every input")
    yield Grid(("reason", "inputs"), [(reason, str(count)) for reason, count in manifest.facts.reasons.items()])
    yield Paragraph("`ledger.jsonl` has a row for each of them, with the message behind the reason.")
    captions = {
        "accepted": "Accepted scans, chosen at random.",
        "refused": "Refused scans, chosen at random among those that can be shown, with the reason.",
        "histograms": "Voxel size, extent and intensity of all accepted scans.",
    }
    for name in pictures:
        yield Picture(name, captions[name])
    yield Heading(2, "Accepted scans")
    yield Grid(("", "axis", "smallest", "median", "largest"), ranges_of(manifest))
    dtypes = ", ".join(f"{count} {name}" for name, count in manifest.facts.summary.dtypes.items())
    yield Paragraph(f"Voxels are stored as: {dtypes}. Axes refer to the volume in RAS order.")
    if len(groups) > 1 or groups[0].contrast:
        yield from _list_groups(groups)
    if alike:
        yield Heading(2, "Scans of different subjects that look alike")
        yield Grid(
            ("scan", "subject", "scan", "subject", "similarity"),
            [
                (pair.first, pair.first_subject, pair.second, pair.second_subject, f"{pair.similarity:.2f}")
                for pair in alike[:_MOST_ALIKE]
            ],
        )
        yield Paragraph(
            "The same scan with other intensities or voxels has a similarity of about 1. One person under two names leaks between "
            "splits: leave one of the two out, or give both one subject. `alike.csv` lists all pairs."
        )
    yield Heading(2, "Deidentification")
    statement = manifest.facts.deidentification
    yield Grid(("item", "state"), [(name.replace("_", " "), state) for name, state in statement.items()])
    yield Paragraph("Faces can be recognised in scans of heads. This corpus is not anonymous.", note=True)


def _list_groups(groups: Sequence[ScanGroup]) -> Iterator[Block]:
    yield Heading(2, "By contrast and scanner")
    yield Grid(
        ("contrast", "scanner", "field strength", "scans", "subjects", "voxels, mm (R A S)", "extent (R A S)"),
        [
            (
                one.contrast or "not named",
                one.scanner,
                one.field_strength,
                str(one.num_scans),
                str(one.num_subjects),
                " x ".join(f"{mm:.3g}" for mm in one.spacing_mm),
                " x ".join(f"{length:.0f}" for length in one.shape),
            )
            for one in groups[:_MOST_GROUPS]
        ],
    )
    rest = len(groups) - _MOST_GROUPS
    more = f" {rest} further groups are not shown." if rest > 0 else ""
    yield Paragraph(f"Sizes are medians. Scanner and field strength are those of the scans' sidecars.{more}")


def _describe_tile(row: AcceptedRow) -> str:
    spacing = " x ".join(f"{mm:.3g}" for mm in row.spacing_mm)
    return f"{row.contrast}, {spacing} mm" if row.contrast else f"{spacing} mm"


def _shorten_name(name: str) -> str:
    if len(name) <= _MOST_LETTERS:
        return name
    half = (_MOST_LETTERS - 1) // 2
    return f"{name[:half]}…{name[-half:]}"
