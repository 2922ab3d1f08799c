"""The report of a corpus shows what was taken and what was not, from one revision alone."""

import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from matplotlib.image import imread
from scipy.ndimage import gaussian_filter

from p2r.config import IngestConfig
from p2r.data.corpus import ingest_locally, load_manifest, manifest_sha256
from p2r.data.ledger import is_accepted, read_ledger
from p2r.report import corpus_report_is_current, write_corpus_report
from p2r.report.corpus_report import sizes_of
from p2r.storage import Storage

Make = Callable[..., Storage]


def write(path: Path, array: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.Nifti1Image(array, np.diag([1.5, 1.5, 8.0, 1.0])).to_filename(path)


def some_voxels(seed: int, shape: tuple[int, ...] = (40, 30, 5)) -> Any:
    rng = np.random.default_rng(seed)
    grid = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    return (900 * np.exp(-4 * sum(axis**2 for axis in grid)) + rng.normal(0, 20, shape)).clip(0).astype(np.int16)


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scans")
    for number in range(7):
        write(folder / f"sub-{number}_T1w.nii.gz", some_voxels(number))
    write(folder / "sub-7_a_name_that_is_far_too_long_for_a_tile_T1w.nii.gz", some_voxels(7))
    write(folder / "sub-8_small.nii.gz", some_voxels(8, (12, 12, 5)))
    write(folder / "sub-0_copy.nii.gz", some_voxels(0))
    (folder / "sub-9_text.nii.gz").write_text("no image")
    return folder


def corpus_of(scans: Path, folder: Path, **changes: Any) -> Storage:
    storage = Storage(str(folder / "corpus"))
    fields = {"sources": (str(scans),), "licence": "CC0-1.0", "shard_size_mib": 0.05, **changes}
    for _ in ingest_locally(IngestConfig(**fields), storage):
        pass
    return storage


def test_the_page_and_its_pictures_are_those_of_the_revision(scans: Path, tmp_path: Path) -> None:
    corpus = corpus_of(scans, tmp_path)
    assert not corpus_report_is_current(corpus)
    assert write_corpus_report(corpus) == corpus.at("report/report.md")
    assert corpus_report_is_current(corpus)
    page = corpus.read_bytes("report/report.md").decode()
    assert manifest_sha256(load_manifest(corpus)) in page
    for line in (
        "| accepted | 8 |",
        "| too_small | 1 |",
        "| duplicate | 1 |",
        "| not_nifti | 1 |",
        "| licence | CC0-1.0 |",
    ):
        assert line in page
    assert "Faces can be recognised" in page
    for name in ("accepted", "refused", "histograms"):
        assert f"({name}.png)" in page
        picture = imread(BytesIO(corpus.read_bytes(f"report/{name}.png")))
        assert picture.shape[0] > 150 and picture.shape[1] > 900 and picture.std() > 0.05


@pytest.mark.parametrize(("rule", "across"), [("auto", 2), (0, 0)])
def test_sizes_are_split_along_the_axis_of_the_cut_also_on_ties(rule: Any, across: int, tmp_path: Path) -> None:
    path = tmp_path / "scans" / "sub-0_T1w.nii.gz"
    path.parent.mkdir()
    nibabel.Nifti1Image(some_voxels(0, (40, 30, 20)), np.diag([2.0, 2.0, 2.0, 1.0])).to_filename(path)
    corpus = corpus_of(path.parent, tmp_path, slice_axis=rule)
    manifest = load_manifest(corpus)
    accepted = [row for row in read_ledger(corpus, manifest) if is_accepted(row)]
    sizes = sizes_of(accepted, manifest.facts.preprocessing.slice_axis)
    assert sizes.num_slices.tolist() == [(40, 30, 20)[across]] == [manifest.facts.num_samples]
    assert sizes.in_plane == pytest.approx(np.sqrt(40 * 30 * 20 / sizes.num_slices))
    assert sizes.in_plane_mm == sizes.across_mm == [2.0]


def test_equal_revisions_give_equal_bytes(scans: Path, tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        corpus = corpus_of(scans, tmp_path / name)
        write_corpus_report(corpus)
        found.append({path: corpus.read_bytes(f"report/{path}") for path in corpus.child("report").list()})
    assert found[0] == found[1]


def test_a_corpus_that_refused_nothing_shows_no_refusals(scans: Path, tmp_path: Path) -> None:
    chosen = Path(shutil.copytree(scans, tmp_path / "scans"))
    corpus = corpus_of(chosen, tmp_path, include=("*_T1w*",))
    corpus.write_bytes("report/refused.png", b"of an earlier revision")
    write_corpus_report(corpus)
    assert corpus.child("report").list() == ["accepted.png", "histograms.png", "report.md"]
    assert "refused.png" not in corpus.read_bytes("report/report.md").decode()
    write(chosen / "sub-9_T1w.nii.gz", some_voxels(9))
    corpus_of(chosen, tmp_path, include=("*_T1w*",))
    assert not corpus_report_is_current(corpus)


def test_a_report_under_pseudonyms_shows_no_name(scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2R_PSEUDONYM_KEY", "the secret of this test")
    corpus = corpus_of(scans, tmp_path, pseudonyms=True)
    write_corpus_report(corpus)
    assert b"sub-" not in corpus.read_bytes("report/report.md")
    assert b"names | keyed hashes" in corpus.read_bytes("report/report.md")


def test_scans_without_negative_or_varied_values_can_be_drawn(tmp_path: Path) -> None:
    for number in range(2):
        write(tmp_path / f"scans/sub-{number}.nii", -some_voxels(number).astype(np.float32) / 7)
    corpus = corpus_of(tmp_path / "scans", tmp_path)
    write_corpus_report(corpus)
    assert corpus.exists("report/histograms.png")


def test_scans_of_different_subjects_that_look_alike_are_listed(tmp_path: Path) -> None:
    for number in range(13):
        write(tmp_path / f"scans/sub-{number:02d}.nii.gz", gaussian_filter(some_voxels(number).astype(np.float32), 2))
    copy = gaussian_filter(some_voxels(4).astype(np.float32), 2) * 3 + 10
    write(tmp_path / "scans/sub-13.nii.gz", copy)
    corpus = corpus_of(tmp_path / "scans", tmp_path)
    said: list[str] = []
    write_corpus_report(corpus, say=said.append)
    (line,) = said
    assert line.startswith(
        "1 pair of scans of different subjects look alike, such as sub-04 and sub-13 (similarity 1.00)"
    )
    assert corpus.at("report/alike.csv") in line
    page, table = (corpus.read_bytes(f"report/{name}").decode() for name in ("report.md", "alike.csv"))
    assert "| sub-04 | sub-04 | sub-13 | sub-13 | 1.00 |" in page
    assert table.splitlines() == [
        "first,first_subject,second,second_subject,contrast,similarity",
        f"sub-04,sub-04,sub-13,sub-13,,{table.rpartition(',')[2].strip()}",
    ]
