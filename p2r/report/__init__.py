"""Rows of few-shot figures -> what people read: a table on the terminal, a page, pictures.

`write_report` makes the page; `table` prints; a picture is a `Drawing`, or the bytes of a PNG.
"""

from p2r.report.canvas import Drawing
from p2r.report.cases import ShownCase, shown_cases
from p2r.report.corpus_report import corpus_report_is_current, write_corpus_report
from p2r.report.document import source_line, trials_line, write_report
from p2r.report.few_shot_curve import few_shot_curve
from p2r.report.pictures import embedding_pca, outlines, view_pairs
from p2r.report.tables import Cell, Spread, aggregate, label_of, split_of, table
from p2r.report.variants import markdown_variants, variants_picture, variants_table
from p2r.report.view_sheet import image_of, view_sheet

__all__ = [
    "Cell",
    "Drawing",
    "ShownCase",
    "Spread",
    "aggregate",
    "corpus_report_is_current",
    "embedding_pca",
    "few_shot_curve",
    "image_of",
    "label_of",
    "markdown_variants",
    "outlines",
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
