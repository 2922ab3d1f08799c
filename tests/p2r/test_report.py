"""The report says what the rows say, names where they come from, and its pictures are drawn from any sensible input."""

import json
import re
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from rich.console import Console

from p2r.config import ImageConfig, ViewsConfig
from p2r.data.volume import Volume
from p2r.evaluate.rows import rows_of
from p2r.report import (
    aggregate,
    embedding_pca,
    few_shot_curve,
    image_of,
    outlines,
    table,
    view_pairs,
    view_sheet,
    write_report,
)
from p2r.report.canvas import Drawing, apart
from p2r.report.context import context_of
from p2r.storage import Storage
from p2r.views.pair import make_views

CLASSES = ["RV", "LV"]


def row(mode: str = "scratch", dice: float | None = 0.5, **changes: Any) -> dict[str, Any]:
    return {
        "task": "acdc",
        "protocol": "leak-free",
        "mode": mode,
        "num_labelled": 1,
        "draw": 0,
        "subjects": ["patient001"],
        "dice": {"RV": None if dice is None else dice - 0.1, "LV": None if dice is None else dice + 0.1},
        "dice_mean": dice,
        "hd95_mm": 12.0,
        "nsd": 0.4,
        "backbone_sha256": None if mode == "scratch" else "ab" * 32,
        "seed": 3,
        "split": "test",
        "num_test_subjects": 20,
        "absent": {"RV": {"both": 0, "prediction": 2, "reference": 0}},
        **changes,
    }


def rows_of_a_job() -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    return [
        row(mode, float(base + 0.05 * np.log(n) + generator.normal() * 0.02), num_labelled=n, draw=draw)
        for n in (1, 5, 20)
        for draw in range(3)
        for mode, base in (("scratch", 0.5), ("linear_probe", 0.6), ("fine_tune", 0.62))
    ]


def pixels(picture: Drawing | bytes) -> np.ndarray[Any, Any]:
    png = picture.png if isinstance(picture, Drawing) else picture
    assert png.startswith(b"\x89PNG")
    return np.asarray(imread(BytesIO(png)))


def test_a_cell_is_the_mean_and_standard_deviation_over_draws() -> None:
    (cell,) = aggregate(rows_of([row(dice=0.4, draw=0), row(dice=0.5, draw=1), row(dice=0.6, draw=2)]))
    assert cell.num_draws == 3
    assert cell.dice_mean.mean == pytest.approx(0.5)
    assert cell.dice_mean.sd == pytest.approx(0.1)
    assert cell.dice["RV"].mean == pytest.approx(0.4)
    assert cell.dice_mean.text(3) == "0.500 ± 0.100"


def test_one_draw_has_no_spread_and_a_missing_figure_is_a_dash() -> None:
    (cell,) = aggregate(rows_of([row(dice=0.4)]))
    assert cell.dice_mean.text(2) == "0.40"
    (cell,) = aggregate(rows_of([row(dice=None)]))
    assert cell.dice_mean.text(2) == "–"


def test_cells_come_by_task_then_patients_then_mode() -> None:
    rows = [row("fine_tune", num_labelled=10), row("scratch", num_labelled=10), row("linear_probe"), row(task="a")]
    found = [(cell.task, cell.num_labelled, cell.mode) for cell in aggregate(rows_of(rows))]
    assert found == [
        ("a", 1, "scratch"),
        ("acdc", 1, "linear_probe"),
        ("acdc", 10, "scratch"),
        ("acdc", 10, "fine_tune"),
    ]


def test_the_gain_over_scratch_compares_equal_draws_only() -> None:
    rows = [row("scratch", 0.4, draw=0), row("fine_tune", 0.5, draw=0), row("fine_tune", 0.9, draw=1)]
    assert aggregate(rows_of(rows))[1].gain == pytest.approx(0.1)
    assert aggregate(rows_of(rows[1:]))[0].gain is None


def test_a_draw_reported_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="two rows"):
        aggregate(rows_of([row(), row(dice=0.6)]))


def test_figures_of_two_protocols_are_never_averaged() -> None:
    cells = aggregate(rows_of([row(dice=0.4), row(dice=0.8, protocol="paper-compat")]))
    assert [cell.dice_mean.mean for cell in cells] == [0.4, 0.8]


def test_the_terminal_shows_every_figure() -> None:
    console = Console(width=140, file=StringIO())
    console.print(table(rows_of([row("scratch", 0.4), row("fine_tune", 0.5)])))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for expected in ("acdc", "from scratch", "fine-tuned", "0.400", "0.500", "+0.100", "RV 0.40", "12.0"):
        assert expected in text


def test_the_page_holds_tables_pictures_caveats_and_provenance(tmp_path: Path) -> None:
    context = {
        "title": "Few-shot figures",
        "caveats": ["Only two frames of each patient were seen."],
        "captions": {"view-pairs": "Two views"},
        "tasks": {
            "acdc": {"title": "Heart chambers", "licence": "CC-BY-NC-SA-4.0", "splits": {"test": ["patient017"]}}
        },
        "backbone": {"sha256": "cd" * 32, "licence": "CC-BY-NC-SA-4.0"},
        "corpus": {"sha256": "ef" * 32, "planes": list(range(99))},
    }
    rows = rows_of_a_job()
    given = {"view-pairs": few_shot_curve(rows_of(rows), "acdc").png}
    report = write_report(Storage(str(tmp_path)), rows=rows_of(rows), context=context_of(context), pictures=given)
    text = (tmp_path / "report.md").read_text()
    assert (
        text.index("Only two frames") < text.index("| labelled patients |") < text.index("![") < text.index("## Prov")
    )
    lines = [line for line in text.splitlines() if re.match(r"\| \d+ \| (from|linear|fine)", line)]
    assert len(lines) == 9
    for expected in ("Heart chambers", "20 patients of the test split", "cd" * 32, "ef" * 32, "ab" * 32, "patient017"):
        assert expected in text
    assert "| corpus.planes | 99 entries, in report.json |" in text
    assert "RV in prediction 54 times" in text
    assert "| 5 | 2 | 3 | patient001 |" in text, "number of patients, draw, seed, subjects"
    links = re.findall(r"!\[.*\]\((.*)\)", text)
    assert links == report["pictures"] == ["pictures/few-shot-acdc.png", "pictures/view-pairs.png"]
    assert (tmp_path / links[0]).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / links[0].replace(".png", ".svg")).read_bytes().startswith(b"<?xml")
    assert (tmp_path / links[1]).read_bytes() == given["view-pairs"]
    page = (tmp_path / "report.html").read_text()
    assert page.count("<img") == len(links)
    assert "Two views" in page and "data:image/svg+xml;base64," in page and "data:image/png;base64," in page
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert report["rows"] == rows


def test_text_from_outside_cannot_break_the_page(tmp_path: Path) -> None:
    context = {"caveats": ["<script>alert(1)</script>"], "job": "a|b"}
    write_report(Storage(str(tmp_path)), rows=rows_of([row()]), context=context_of(context), pictures={})
    assert "<script>" not in (tmp_path / "report.html").read_text()
    assert "| job | a\\|b |" in (tmp_path / "report.md").read_text()


def test_a_report_without_rows_says_so(tmp_path: Path) -> None:
    write_report(Storage(str(tmp_path)), rows=rows_of([]), context=context_of({}), pictures={})
    assert "There are no results." in (tmp_path / "report.md").read_text()


def test_no_json_is_written_when_a_figure_is_not_a_number(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_report(
            Storage(str(tmp_path)), rows=rows_of([row(dice=float("nan"))]), context=context_of({}), pictures={}
        )
    assert not (tmp_path / "report.json").exists()


@pytest.mark.parametrize("num_labelled", [(1,), (1, 5, 20)])
def test_the_curve_is_drawn_for_one_number_of_patients_and_for_many(num_labelled: tuple[int, ...]) -> None:
    rows = [one for one in rows_of_a_job() if one["num_labelled"] in num_labelled]
    assert pixels(few_shot_curve(rows_of(rows), "acdc")).shape[1] > 800


def test_the_same_rows_give_the_same_bytes() -> None:
    rows = rows_of_a_job()
    assert few_shot_curve(rows_of(rows), "acdc") == few_shot_curve(rows_of(rows), "acdc")


def test_the_curve_of_an_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match="no row of task brain"):
        few_shot_curve(rows_of([row()]), "brain")


def test_labels_of_close_curves_do_not_overlap() -> None:
    placed = apart([0.50, 0.51, 0.90, 0.505], 0.05)
    assert min(np.diff(sorted(placed))) >= 0.05 - 1e-9
    assert placed[0] < placed[3] < placed[1] < placed[2] == 0.90


def test_view_pairs_are_drawn_with_points_on_the_same_anatomy() -> None:
    image = torch.rand(2, 1, 48, 48)
    inside = torch.ones(2, 48, 48, dtype=torch.bool)
    places: dict[str, Any] = {"epochs": np.zeros(2, np.int64), "positions": np.arange(2)}
    views = make_views(image, inside, config=ViewsConfig(), spacing_mm=1.5, seed=0, **places)
    points = torch.randint(0, 48, (2, 30, 2)).float()
    picture = view_pairs(image, views, points, points)
    assert pixels(picture).ndim == 3
    # White and yellow lines cross white pixels and paper: below each is a wider, dark one.
    paths = re.findall(r"<path [^>]+>", picture.svg.decode())
    lines, under = ([path for path in paths if f"stroke-width: {width}" in path] for width in (0.9, 1.7))
    assert len(lines) == len(under) > 0 and all("#333333" in path for path in under)


@pytest.mark.parametrize(("size", "name"), [((48, 40), "p2r"), ((16, 20, 12), "pix2rep_v2")])
def test_every_transform_is_drawn_over_its_range(size: tuple[int, ...], name: str) -> None:
    inside = torch.ones(size, dtype=torch.bool)
    inside[:3] = False
    sheet = view_sheet(torch.rand(1, *size), inside, config=ViewsConfig.model_validate(name), spacing_mm=2.0)
    assert pixels(sheet).shape[0] > 1000


def test_transforms_without_any_range_are_drawn_too() -> None:
    none = ViewsConfig(
        geometry={"elastic_mm": 0, "scale": (1, 1)},
        intensity={"bias_field": 0, "ghosting": (0.5, 0.5), "num_ghosts": (3, 3)},
    )
    assert pixels(view_sheet(torch.rand(1, 32, 32), torch.ones(32, 32).bool(), config=none, spacing_mm=1.0)).size


@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_sheet_shows_the_middle_of_a_scan(dimensions: int) -> None:
    data = np.zeros((20, 24, 30, 1), np.float32)
    data[8:12, 8:16, 10:20] = 100.0
    data += np.random.default_rng(0).uniform(0, 1, data.shape).astype(np.float32)
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    volume = Volume(data, affine, affine, data.shape[:3], (1.0, 1.0, 2.0), "x")
    image, inside = image_of(volume, ImageConfig(dimensions=dimensions, size=32, spacing_mm=1.0))
    assert image.shape == (1, *[32] * dimensions)
    assert inside.shape == image.shape[1:]
    assert image[(0, *[16] * dimensions)] > 0.9
    assert not image[0][~inside].any()


def test_equal_features_get_equal_colours_in_every_slice() -> None:
    image = torch.ones(2, 1, 32, 32)
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(1, 5, 32, 32, generator=generator).repeat(2, 1, 1, 1)
    drawn = pixels(embedding_pca(image, features))[..., :3]
    lower = drawn[drawn.shape[0] // 2 :]  # the features' panels: the second is the first, shifted
    colourful = np.flatnonzero((np.ptp(lower, axis=2) > 0.2).any(axis=0))
    first, second = np.split(colourful, [int(np.argmax(np.diff(colourful))) + 1])
    width = min(len(first), len(second)) - 4
    difference = np.abs(lower[:, first[2] : first[2] + width] - lower[:, second[2] : second[2] + width])
    assert np.median(difference) < 0.05


def test_slices_without_tissue_or_with_few_features_do_not_break_the_embedding() -> None:
    pixels(embedding_pca(torch.zeros(1, 1, 16, 16), torch.rand(1, 4, 16, 16)))
    pixels(embedding_pca(torch.rand(1, 16, 16), torch.rand(1, 1, 16, 16)))
    pixels(embedding_pca(torch.rand(1, 16, 16), torch.ones(1, 4, 16, 16)))
    with pytest.raises(ValueError, match="do not fit"):
        embedding_pca(torch.zeros(1, 1, 16, 16), torch.rand(1, 4, 16, 17))


def test_outlines_show_one_line_of_pictures_per_prediction() -> None:
    slices = np.random.default_rng(0).random((3, 40, 50))
    reference = np.zeros((3, 40, 50), np.int16)
    reference[1:, 10:20, 10:30] = 1
    one = pixels(outlines(slices, reference, reference, CLASSES, spacing_mm=(1.5, 1.5)))
    two = pixels(outlines(slices, {"scratch": reference, "probe": reference * 0}, reference, CLASSES))
    assert two.shape[0] > one.shape[0]
    pixels(outlines(slices, reference * 0, reference * 0, CLASSES))


def test_outlines_of_another_grid_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="probe has the shape"):
        outlines(np.zeros((1, 4, 4)), {"probe": np.zeros((1, 4, 5))}, np.zeros((1, 4, 4)), CLASSES)
