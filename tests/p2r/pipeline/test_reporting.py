"""A report of a job shows cases as their trials left them, and is made without those that cannot be read."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from p2r.errors import DataError
from p2r.evaluate.rows import TrialRow
from p2r.fewshot.scoring import npz_bytes
from p2r.pipeline.finetuning import _describe_ensemble
from p2r.pipeline.report_pictures import _UNREADABLE, _draw_embedding_of_contrasts, _read_prediction, _shared_planes
from p2r.pipeline.reporting import _list_splits, _warnings
from p2r.report import embedding_pca, view_pairs
from p2r.report.pictures import _list_panels
from p2r.storage import Storage
from p2r.views.pair import ViewPair


def test_the_report_of_a_job_shows_its_best_and_worst_case(published: dict[str, str]) -> None:
    storage = Storage(published["storage"]).child("report")
    report = storage.read_json("report.json")
    row = next(row for row in report["rows"] if (row["mode"], row["num_labelled"]) == ("scratch", 1))
    for rank in ("best", "worst"):
        assert f"pictures/case-{rank}-disc.png" in report["pictures"]
        picture = ET.fromstring(storage.read_bytes(f"pictures/case-{rank}-disc.svg"))
        text = " ".join(" ".join(picture.itertext()).split())
        assert "1 labelled" in text and "task disc" in text and "leak_free" in text
        assert any(subject in text for subject in row["dice_by_subject"])
    assert "left_out" not in report["context"]
    assert report["statistics"]["intervals"]
    page = storage.read_bytes("report.html").decode()
    for part in ("At a glance", "Single patients", "No trial failed.", "Test-set evaluations", "Cost"):
        assert part in page


def test_the_report_of_a_job_says_what_its_pretraining_and_its_sweep_took(published: dict[str, str]) -> None:
    report = Path(published["report"].removeprefix("file://"))
    context = json.loads(report.with_suffix(".json").read_text())["context"]
    rows = [json.loads(line) for line in (report.parents[1] / "pretrain/history.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows]
    assert steps == [2, 4, 6]
    assert context["spent"]["pretraining_s"] == pytest.approx(2 * sum(row["step_s"] for row in rows))
    assert context["spent"]["num_pretraining_workers"] == 1 and context["overhead"]["num_trials"] > 0
    page = report.read_text()
    assert "pretraining of the backbone, each worker" in page and "overhead" in page


def test_a_report_lists_the_subjects_without_label_maps_if_the_task_uses_them() -> None:
    scans = [SimpleNamespace(subject=name) for name in ("b", "a", "b")]
    task: Any = SimpleNamespace(subjects={"train": ("c",)}, unlabelled=scans)
    assert _list_splits(task) == {"train": ["c"], "without label maps": ["a", "b"]}
    task.unlabelled = ()
    assert _list_splits(task) == {"train": ["c"]}


def test_a_warning_of_several_trials_is_one_note() -> None:
    rows: Any = [
        SimpleNamespace(
            id=f"trial-{number}", all_warnings=["all were labelled", f"alone {number}"][: 1 + (number == 2)]
        )
        for number in range(7)
    ]
    assert _warnings(rows) == [
        "trial-0, trial-1, trial-2, trial-3, trial-4 and 2 more: all were labelled.",
        "trial-2: alone 2.",
    ]


@pytest.mark.parametrize(
    ("single", "said"),
    [
        (False, "ensemble of disc: p2r predict 'file:///a b' SCAN -o OUT.nii.gz --ensemble file:///c"),
        (True, "no ensemble of disc: fine_tune with 1 labelled patient has one draw (finetune.draws)"),
    ],
)
def test_the_command_of_an_ensemble_is_printed_if_there_is_one(single: bool, said: str) -> None:
    models = {"disc": "file:///a b", "disc/draw-1": "file:///c"}
    best: Any = SimpleNamespace(trial=SimpleNamespace(mode="fine_tune", num_labelled=1))
    assert _describe_ensemble("disc", {"disc": "file:///a b"} if single else models, best) == said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "No data left|EOF"),
        (b"PK\x03\x04 damaged", "not a zip|pickled"),
        (npz_bytes({"other": np.zeros((4, 4, 2, 1), np.uint8)}), "no prediction of scan"),
        (npz_bytes({"scan": np.zeros((4, 4, 3, 1), np.uint8)}), r"the grid \(4, 4, 3, 1\), its scan \(4, 4, 2, 1\)"),
    ],
)
def test_a_prediction_that_cannot_be_read_is_left_out_by_name(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    setup: Any = SimpleNamespace(storage=str(tmp_path))
    scan: Any = SimpleNamespace(labels=SimpleNamespace(data=np.zeros((4, 4, 2, 1), np.int16)))
    if content is not None:
        (tmp_path / "a.npz").write_bytes(content)
    row = TrialRow(task="t", mode="scratch", num_labelled=1, draw=0, subjects=["a"], predictions="a.npz")
    with pytest.raises(_UNREADABLE, match=message):
        _read_prediction(row, "scan", setup, scan)


def test_points_of_volumes_lie_in_both_planes_that_are_shown() -> None:
    shift, size = torch.tensor([2.0, 1.0, 3.0]), (12, 10, 12)
    grid = torch.stack(torch.meshgrid(*map(torch.arange, size), indexing="ij"), -1)  # (X, Y, Z, 3)
    warp = (grid + shift).expand(2, *size, 3)
    images = (grid * torch.tensor([1, 100, 10_000])).sum(-1).float().expand(2, 1, *size)  # every voxel its own value
    valid = (warp <= torch.tensor(size) - 1).all(-1)
    valid[1, ..., 6] = False  # of this one the middle plane shows nothing
    moved = images.roll((-2, -1, -3), (2, 3, 4))
    views = ViewPair(a=images, b=moved, warp=warp, valid=valid)

    planes, shown, points_a, points_b = _shared_planes(images, views, [np.random.default_rng(seed) for seed in (0, 1)])
    assert planes.shape == shown.a.shape == shown.b.shape == (1, 1, 12, 10)
    assert torch.equal(planes[0], images[0, ..., 9]) and torch.equal(shown.b[0], moved[0, ..., 6])
    of_a, of_b = (at[0].long() for at in (points_a, points_b))
    assert torch.equal(shown.a[0, 0, of_a[:, 0], of_a[:, 1]], shown.b[0, 0, of_b[:, 0], of_b[:, 1]])
    assert len(of_b.unique(dim=0)) > 20

    with pytest.raises(DataError, match="no volume shows any"):
        later = ViewPair(a=views.a[1:], b=views.b[1:], warp=warp[1:], valid=valid[1:])
        _shared_planes(images[1:], later, [np.random.default_rng()])


def test_a_picture_of_views_names_the_contrasts_that_they_show() -> None:
    images = torch.rand(2, 3, 24, 24)
    shown_a = np.array([[1, 0, 0], [0, 1, 1]], dtype=np.bool_)
    shown_b = np.array([[0, 0, 1], [0, 1, 1]], dtype=np.bool_)
    views = ViewPair(
        a=torch.rand(2, 3, 24, 24),
        b=torch.rand(2, 3, 24, 24),
        warp=torch.zeros(2, 24, 24, 2),
        valid=torch.ones(2, 24, 24, dtype=torch.bool),
        shown_a=shown_a,
        shown_b=shown_b,
    )
    names = ("flair", "t1", "t1ce")
    first, second = _list_panels(images, views, names)
    assert [[name for name, _ in panel] for panel in first] == [["flair"], ["flair"], ["t1ce"]]
    assert [[name for name, _ in panel] for panel in second] == [["t1", "t1ce"]] * 3
    for panel, of in zip(second[:2], (images, views.a), strict=True):
        for number, (_, plane) in enumerate(panel, start=1):
            np.testing.assert_array_equal(plane, of[1, number].numpy())
    np.testing.assert_array_equal(second[2][1][1][..., 0], views.b[1, 2].numpy())  # grey, as no pixel is outside
    points = torch.randint(0, 24, (2, 30, 2)).float()
    picture = view_pairs(images, views, points, points, contrasts=names).svg.decode()
    assert picture.count(">t1ce<") == 4 and picture.count(">t1<") == 3 and "view b: appearance and geometry" in picture
    plain = view_pairs(images[:, :1], ViewPair(views.a, views.b, views.warp, views.valid), points, points).svg.decode()
    assert "view a: contrast" in plain and "small: the other contrasts" not in plain


def test_features_of_contrasts_share_their_colours() -> None:
    """Equal features of two contrasts have equal colours, and others have others."""
    rng = np.random.default_rng(0)
    image = {"flair": rng.uniform(0.3, 1, (2, 24, 24)), "t1": rng.uniform(0.3, 1, (2, 24, 24))}
    maps = rng.normal(size=(2, 6, 24, 24))
    same, other = (embedding_pca(image, {"flair": maps, "t1": of}).svg.decode() for of in (maps, maps + 3))
    assert "contrast by contrast" in same and ">features of t1<" in same
    pictures = [[part.partition('"')[0] for part in svg.split("data:image/png;base64,")[1:]] for svg in (same, other)]
    flair, t1 = slice(2, 4), slice(6, 8)  # after the slices of each, in pairs of two planes
    assert len(pictures[0]) == 8 and pictures[0][flair] == pictures[0][t1]
    assert pictures[1][flair] != pictures[1][t1]


def test_a_backbone_of_several_contrasts_shows_each_by_itself() -> None:
    class Sums(torch.nn.Module):
        preparation = SimpleNamespace(contrasts=("flair", "t1", "t2"), num_contrasts=3)
        seen: ClassVar[list[torch.Tensor]] = []

        def prepare(self, scans: object) -> SimpleNamespace:
            images = torch.rand(5, 3, 24, 24)
            images[:, 1] = 0  # this patient has no T1
            return SimpleNamespace(images=images)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.seen.append(images)
            return torch.cat([images.sum(1, keepdim=True), images.amax(1, keepdim=True) ** 2], 1)

    scan: Any = SimpleNamespace(scans_for=lambda preparation: {}, label_planes=torch.ones(5, 24, 24))
    backbone: Any = Sums()
    drawn = _draw_embedding_of_contrasts(backbone, scan, source="here")
    assert (
        drawn is not None
        and ">features of flair<" in drawn.svg.decode()
        and "features of t1<" not in drawn.svg.decode()
    )
    assert [sorted(set(np.flatnonzero(images.flatten(2).any((0, 2))))) for images in backbone.seen] == [[0], [2]]
