"""Reports from rows of few-shot results: a table for the terminal, a page, pictures.

`write_report` makes the page; `table` makes the table; a picture is a `Drawing`, or the bytes of a PNG. Names are imported on
first use, because Matplotlib and torch take seconds and most commands draw nothing. No file has the name of a function, since
a loaded module would hide it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from p2r.report.canvas import Drawing
    from p2r.report.cases import ShownCase, shown_cases
    from p2r.report.corpus_report import corpus_report_is_current, write_corpus_report
    from p2r.report.curve import few_shot_curve
    from p2r.report.curves_of_pretraining import pretraining_curves
    from p2r.report.document import write_report
    from p2r.report.pictures import embedding_pca, outlines, view_pairs
    from p2r.report.sheet import image_of, view_sheet
    from p2r.report.sources import source_line, trials_line
    from p2r.report.tables import Cell, Spread, aggregate, label_of, split_of, table
    from p2r.report.variants import (
        differences_of_variants,
        markdown_differences,
        markdown_variants,
        variants_picture,
        variants_table,
    )

__all__ = [
    "Cell",
    "Drawing",
    "ShownCase",
    "Spread",
    "aggregate",
    "corpus_report_is_current",
    "differences_of_variants",
    "embedding_pca",
    "few_shot_curve",
    "image_of",
    "label_of",
    "markdown_differences",
    "markdown_variants",
    "outlines",
    "pretraining_curves",
    "shown_cases",
    "source_line",
    "split_of",
    "table",
    "trials_line",
    "variants_picture",
    "variants_table",
    "view_pairs",
    "view_sheet",
    "write_corpus_report",
    "write_report",
]

_MODULES = {
    "Drawing": "p2r.report.canvas",
    "ShownCase": "p2r.report.cases",
    "shown_cases": "p2r.report.cases",
    "corpus_report_is_current": "p2r.report.corpus_report",
    "write_corpus_report": "p2r.report.corpus_report",
    "source_line": "p2r.report.sources",
    "trials_line": "p2r.report.sources",
    "write_report": "p2r.report.document",
    "few_shot_curve": "p2r.report.curve",
    "embedding_pca": "p2r.report.pictures",
    "outlines": "p2r.report.pictures",
    "pretraining_curves": "p2r.report.curves_of_pretraining",
    "view_pairs": "p2r.report.pictures",
    "Cell": "p2r.report.tables",
    "Spread": "p2r.report.tables",
    "aggregate": "p2r.report.tables",
    "label_of": "p2r.report.tables",
    "split_of": "p2r.report.tables",
    "table": "p2r.report.tables",
    "differences_of_variants": "p2r.report.variants",
    "markdown_differences": "p2r.report.variants",
    "markdown_variants": "p2r.report.variants",
    "variants_picture": "p2r.report.variants",
    "variants_table": "p2r.report.variants",
    "image_of": "p2r.report.sheet",
    "view_sheet": "p2r.report.sheet",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'p2r.report' has no attribute '{name}'")
