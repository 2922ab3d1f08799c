"""Exchanged label maps are found, and true pairs are accepted."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import p2r.evaluate.mix_ups as mix_ups
from p2r.data.preprocess import Preparation
from p2r.data.volume import write_nifti
from p2r.errors import DataError
from p2r.evaluate.mix_ups import MixUps
from p2r.evaluate.tasks import LabelledScan, load_scan, load_task

PREPARATION = Preparation(spacing_mm=2.0, image_size=32)


def write_task(
    folder: Path, *, places: Sequence[int], shapes: Sequence[int] = (24,) * 4, labelled: bool = True
) -> Path:
    """Write scans with a bright box each, which begins at row `places[i]`, and the label maps of these boxes."""
    generator = np.random.default_rng(0)
    for number, (place, side) in enumerate(zip(places, shapes, strict=True), start=1):
        label = np.zeros((side, 24, 6), np.uint8)
        label[place : place + 6, 8:16, 1:5] = labelled
        image = (generator.normal(300, 40, label.shape) + 120 * label).clip(1).astype(np.int16)
        for kind, array in (("images", image), ("labels", label)):
            write_nifti(folder / f"{kind}/sub-{number:02d}.nii.gz", array, np.diag([1.0, 1.0, 4.0, 1.0]))
    path = folder / "task.yaml"
    path.write_text(
        "{name: toy, title: Toy, images: images, labels: labels, licence: CC0-1.0, classes: {1: box}, "
        "splits: {train: ['sub-[01-02]'], validation: [sub-03], test: [sub-04]}}"
    )
    return path


def scans_of(path: Path) -> list[LabelledScan]:
    task = load_task(path)
    return [load_scan(scan, task, PREPARATION) for scan in task.scans]


def exchanged(scans: Sequence[LabelledScan], a: int, b: int) -> list[LabelledScan]:
    """Return the same images, with the label maps of two of them exchanged."""
    theirs = {a: scans[b], b: scans[a]}
    return [
        replace(scan, labels=theirs[number].labels, scan=replace(scan.scan, label=theirs[number].scan.label))
        if number in theirs
        else scan
        for number, scan in enumerate(scans)
    ]


def see_all(scans: Sequence[LabelledScan]) -> None:
    found = MixUps("toy")
    for scan in scans:
        found.see(scan)
    found.check()


@pytest.mark.parametrize(("a", "b"), list(combinations(range(4), 2)))
def test_two_exchanged_label_maps_are_refused_with_both_names(tmp_path: Path, a: int, b: int) -> None:
    scans = scans_of(write_task(tmp_path, places=[2, 5, 9, 14]))
    names = f"sub-{b + 1:02d}.nii.gz and sub-{a + 1:02d}.nii.gz"
    with pytest.raises(DataError, match=rf"task toy: {names} fit each other's images better .* restore the pairs"):
        see_all(exchanged(scans, a, b))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Collect all explained fractions: one per scan, and two per compared pair of scans."""
    shares: list[float] = []
    explained = mix_ups._explained_fraction

    def recorded(*arguments: Any) -> float:
        shares.append(explained(*arguments))
        return shares[-1]

    monkeypatch.setattr(mix_ups, "_explained_fraction", recorded)
    return shares


@pytest.mark.parametrize("places", [[2, 5, 9, 14], [8, 8, 8, 8], [8, 9, 8, 9]])
def test_true_pairs_are_accepted_even_if_their_organs_have_the_same_position(
    tmp_path: Path, places: list[int], measured: list[float]
) -> None:
    see_all(scans_of(write_task(tmp_path, places=places)))
    assert len(measured) == 4 + 2 * 6, "every pair was compared"
    assert max(measured) > 0.4


def test_scans_of_other_shapes_are_not_compared(tmp_path: Path, measured: list[float]) -> None:
    see_all(scans_of(write_task(tmp_path, places=[2, 5, 9, 14], shapes=[24, 25, 26, 24])))
    assert len(measured) == 4 + 2, "only the two of one shape were compared"


def test_empty_label_maps_are_not_compared(tmp_path: Path, measured: list[float]) -> None:
    scans = scans_of(write_task(tmp_path, places=[2, 5, 9, 14], labelled=False))
    see_all(exchanged(scans, 0, 1))
    assert measured == []


def test_the_memory_for_comparisons_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scans = scans_of(write_task(tmp_path, places=[2, 5, 9, 14]))
    of_one = scans[0].volume.data.nbytes + scans[0].labels.data.nbytes
    monkeypatch.setattr(mix_ups, "_MAX_BYTES", 2 * of_one)
    with pytest.raises(DataError):
        see_all(exchanged(scans, 1, 3))
    see_all(exchanged(scans, 0, 3))  # two other scans came in between


def test_hearts_that_were_exchanged_are_found_and_no_true_pair_is_refused(mri: Path) -> None:
    task = load_task(Path(__file__).parents[3] / "jobs/tasks/acdc.yaml")
    patients = tuple(f"patient{number:03d}" for number in range(21, 41))
    scans = [load_scan(scan, task, Preparation(spacing_mm=4.0, image_size=64)) for scan in task.scans_of(patients)]
    see_all(scans)
    numbers = range(len(scans))
    alike = [(a, b) for a, b in combinations(numbers, 2) if scans[a].labels.data.shape == scans[b].labels.data.shape]
    assert len(alike) > 20  # frames of one patient among them
    a, b = next((a, b) for a, b in alike if scans[a].scan.subject != scans[b].scan.subject)
    with pytest.raises(
        DataError
    ) as refusal:  # among all scans, although the other frames of both patients fit better, too
        see_all(exchanged(scans, a, b))
    assert all(scans[number].scan.label.name in str(refusal.value) for number in (a, b))
    for a, b in alike:
        with pytest.raises(DataError, match="mixed up"):
            see_all([exchanged(scans, a, b)[number] for number in (a, b)])
