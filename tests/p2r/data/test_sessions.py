"""Scans of one session become one record of named contrasts on one grid; whatever does not fit is refused by name."""

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import webdataset
from numpy.typing import NDArray

from p2r.config import IngestConfig, SessionsConfig
from p2r.data.alignment import align
from p2r.data.corpus import ingest_locally, load_manifest, verify_corpus
from p2r.data.index import covered_box
from p2r.data.ledger import read_ledger
from p2r.data.manifest import Manifest, facts_of
from p2r.data.sessions import place_scans
from p2r.data.shards import decode_record, open_shard
from p2r.data.survey import survey
from p2r.data.volume import read_volume
from p2r.errors import DataError, RefusedScan
from p2r.storage import Storage

from .conftest import WriteSeries, some_voxels

pytestmark = pytest.mark.filterwarnings(
    "ignore:unclosed file:ResourceWarning",
    "ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning",
)

GRID = np.diag([1.5, 1.5, 8.0, 1.0])
CONTRASTS = {"t1": "T1w", "t1ce": "ce-*_T1w", "flair": "FLAIR"}
Corpus = tuple[Storage, Manifest, dict[str, dict[str, Any]]]


def save(
    folder: Path,
    name: str,
    seed: int = 0,
    *,
    shape: tuple[int, ...] = (20, 24, 5),
    affine: NDArray[np.float64] = GRID,
    has_position: bool = True,
) -> NDArray[Any]:
    voxels = some_voxels(seed, shape)
    image = nibabel.Nifti1Image(voxels, affine)
    if not has_position:
        image.set_sform(affine, code=0)
        image.set_qform(affine, code=0)
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)
    return voxels


def ingested(
    folder: Path, *, sources: Path | None = None, sessions: dict[str, Any] | None = None, **fields: Any
) -> Corpus:
    """Return the corpus of a folder, its manifest, and its ledger by key."""
    rules = (
        SessionsConfig(contrasts=CONTRASTS, reference="flair", **(sessions or {}))
        if "contrasts" not in (sessions or {})
        else (SessionsConfig(**(sessions or {})))
    )
    storage = Storage(str(folder / "corpus"))
    config = IngestConfig(
        sources=(str(sources or folder / "bids"),),
        licence="CC0-1.0",
        sessions=rules,
        max_refused_fraction=1.0,
        **fields,
    )
    list(ingest_locally(config, storage))
    manifest = load_manifest(storage)
    return storage, manifest, {row.key: row.to_json() for row in read_ledger(storage, manifest)}


def records(storage: Storage, manifest: Manifest) -> dict[str, dict[str, NDArray[Any]]]:
    """Return all voxels (X, Y, Z, T) by record and contrast, as stock webdataset reads them."""
    found: dict[str, dict[str, NDArray[Any]]] = {}
    for shard in manifest["shards"]:
        for sample in webdataset.WebDataset(str(storage.local(shard["name"])), shardshuffle=False):
            found[sample["__key__"]] = {
                name.removesuffix(".planes"): decode_record(voxels, json.loads(sample[name.replace("planes", "json")]))
                for name, voxels in sample.items()
                if name.endswith(".planes")
            }
    return found


def reason(ledger: dict[str, dict[str, Any]], key: str) -> str:
    return str(ledger[key]["reason"])


def test_the_scans_of_a_bids_session_become_one_record_and_missing_contrasts_stay_missing(tmp_path: Path) -> None:
    written = {
        (subject, name): save(tmp_path / "bids", f"sub-{subject}/anat/sub-{subject}_{name}.nii.gz", seed)
        for seed, (subject, name) in enumerate(
            [("1", "T1w"), ("1", "ce-GADO_T1w"), ("1", "FLAIR"), ("2", "FLAIR"), ("2", "T1w"), ("3", "FLAIR")]
        )
    }
    save(tmp_path / "bids", "sub-3/anat/sub-3_PDw.nii.gz", 9)
    storage, manifest, ledger = ingested(tmp_path)
    assert manifest["contrasts"] == {"flair": 3, "t1": 2, "t1ce": 1}
    assert (manifest["num_records"], manifest["num_samples"], manifest["num_volumes"]) == (3, 15, 3)
    found = records(storage, manifest)
    assert {key: set(volumes) for key, volumes in found.items()} == {
        "sub-1": {"t1", "t1ce", "flair"},
        "sub-2": {"t1", "flair"},
        "sub-3": {"flair"},
    }
    names = {"T1w": "t1", "ce-GADO_T1w": "t1ce", "FLAIR": "flair"}
    for (subject, name), voxels in written.items():
        np.testing.assert_array_equal(found[f"sub-{subject}"][names[name]][..., 0], voxels)
    assert ledger["sub-1_T1w"]["record"] == "sub-1" and ledger["sub-1_T1w"]["contrast"] == "t1"
    assert "resampled_to" not in ledger["sub-1_T1w"]
    assert (ledger["sub-3_PDw"]["status"], reason(ledger, "sub-3_PDw")) == ("not_selected", "no_contrast")
    assert "('PDw') matches none of ingest.sessions.contrasts (t1, t1ce, flair)" in ledger["sub-3_PDw"]["message"]
    assert verify_corpus(storage) == []
    assert ("contrasts, by number of sessions", "flair 3, t1 2, t1ce 1") in facts_of(manifest)


def test_sessions_of_a_subject_and_a_second_run_stay_apart(tmp_path: Path) -> None:
    for number, name in enumerate(["ses-1_FLAIR", "ses-1_T1w", "ses-2_run-1_T1w", "ses-2_run-2_T1w", "ses-2_FLAIR"]):
        save(tmp_path / "bids", f"sub-1_{name}.nii.gz", number)
    storage, manifest, ledger = ingested(tmp_path, one_subject=True)
    assert {key: set(found) for key, found in records(storage, manifest).items()} == {
        "sub-1_ses-1": {"t1", "flair"},
        "sub-1_ses-2": {"flair"},
    }
    for run in (1, 2):
        row = ledger[f"sub-1_ses-2_run-{run}_T1w"]
        assert row["reason"] == "contrast_twice" and "its session has 2 scans of contrast t1" in row["message"]
    storage, manifest, _ = ingested(
        tmp_path / "last", sources=tmp_path / "bids", sessions={"repeats": "last"}, one_subject=True
    )
    np.testing.assert_array_equal(records(storage, manifest)["sub-1_ses-2"]["t1"][..., 0], some_voxels(3))


def test_a_list_names_groups_and_contrasts(tmp_path: Path) -> None:
    for number, name in enumerate("abcd"):
        save(tmp_path, f"{name}.nii.gz", number)
    rows = ["a.nii.gz,p_1,x,T1", "b.nii.gz,p_1,x,Flair", "c.nii.gz,p_1,y,Flair", "d.nii.gz,p_2,x,Flair"]
    (tmp_path / "scans.csv").write_text("\n".join(["path,subject,Group,Contrast", *rows]))
    storage, manifest, _ = ingested(
        tmp_path, sources=tmp_path / "scans.csv", sessions={"contrasts": {"t1": "t1", "flair": "flair"}}
    )
    found = records(storage, manifest)
    assert sorted((key[:5], *sorted(volumes)) for key, volumes in found.items()) == [
        ("p_1_x", "flair", "t1"),
        ("p_1_y", "flair"),
        ("p_2_x", "flair"),
    ]


def test_a_list_may_name_the_group_session(tmp_path: Path) -> None:
    for number, name in enumerate("ab"):
        save(tmp_path, f"{name}.nii.gz", number)
    (tmp_path / "scans.csv").write_text("path,subject,Session,contrast\na.nii.gz,P1,v1,t1\nb.nii.gz,P1,v2,flair\n")
    storage, manifest, _ = ingested(
        tmp_path, sources=tmp_path / "scans.csv", sessions={"contrasts": {"t1": "t1", "flair": "flair"}}
    )
    assert {key: set(found) for key, found in records(storage, manifest).items()} == {
        "P1_v1": {"t1"},
        "P1_v2": {"flair"},
    }


def test_a_subject_and_a_session_of_another_subject_never_share_a_record(tmp_path: Path) -> None:
    for number, name in enumerate("ab"):
        save(tmp_path, f"{name}.nii.gz", number)
    (tmp_path / "scans.csv").write_text("path,subject,group,contrast\na.nii.gz,A,x,t1\nb.nii.gz,A_x,,flair\n")
    storage, manifest, ledger = ingested(
        tmp_path, sources=tmp_path / "scans.csv", sessions={"contrasts": {"t1": "t1", "flair": "flair"}}
    )
    assert manifest["num_records"] == len(records(storage, manifest)) == 2
    assert ledger["a"]["record"] != ledger["b"]["record"]


@pytest.mark.parametrize(
    ("t1", "flair"),
    [
        ("sub-1/ses-1/anat/T1w.nii.gz", "sub-1/ses-2/anat/FLAIR.nii.gz"),
        ("sub-1/ses-1/sub-1_T1w.nii.gz", "sub-1/ses-2/sub-1_FLAIR.nii.gz"),
        ("sub-1_ses-1_T1w_brain.nii.gz", "sub-1_ses-2_FLAIR_brain.nii.gz"),
    ],
)
def test_visits_are_told_apart_by_the_path_where_names_are_not_bids(tmp_path: Path, t1: str, flair: str) -> None:
    save(tmp_path / "bids", t1, 1)
    save(tmp_path / "bids", flair, 2)
    storage, manifest, _ = ingested(
        tmp_path,
        sessions={"contrasts": {"t1": "*T1w*", "flair": "*FLAIR*"}},
        subject_pattern=r"^(sub-[0-9]+)[/_]",
        one_subject=True,
    )
    found = {key: set(volumes) for key, volumes in records(storage, manifest).items()}
    assert found == {"sub-1_ses-1": {"t1"}, "sub-1_ses-2": {"flair"}}


def test_the_patterns_that_a_survey_suggests_match_its_scans(tmp_path: Path) -> None:
    for number in (1, 2):
        for seed, name in enumerate(["acq-mprage_T1w", "FLAIR"]):
            save(tmp_path, f"sub-{number}/anat/sub-{number}_{name}.nii.gz", 10 * number + seed)
        save(tmp_path, f"derivatives/labels/sub-{number}.nii.gz")
    (tmp_path / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.8.0"}')
    found = survey(tmp_path, cache=tmp_path)
    assert found.pairing is not None
    patterns = {name: words for name, (_, words) in found.pairing.contrasts.items()}
    subjects = {scan: subject for subject, scans in found.subjects.items() for scan in scans}
    places = place_scans(subjects, SessionsConfig(contrasts=patterns), is_hidden=False)
    assert len(places) == 4 and {getattr(place, "contrast", None) for place in places.values()} == {"t1", "flair"}


def test_run_10_is_later_than_run_2(tmp_path: Path) -> None:
    for run in (1, 2, 10):
        save(tmp_path / "bids", f"sub-1_run-{run}_FLAIR.nii.gz", run)
    _, _, ledger = ingested(tmp_path, sessions={"repeats": "last"}, one_subject=True)
    assert [key for key, row in ledger.items() if row["status"] == "accepted"] == ["sub-1_run-10_FLAIR"]


def test_scans_refused_because_of_others_are_read_when_these_come_or_go(tmp_path: Path) -> None:
    """Repeats after one of them is excluded; a session whose reference arrives; nothing while nothing has changed."""
    for number, name in enumerate(["1_run-1_FLAIR", "1_run-2_FLAIR", "2_T1w", "3_FLAIR", "3_run-1_T1w", "3_run-2_T1w"]):
        save(tmp_path / "bids", f"sub-{name}.nii.gz", number)
    rules = {"without_reference": "refuse"}
    _, first, ledger = ingested(tmp_path, sessions=rules)
    assert first["num_records"] == 1 and reason(ledger, "sub-2_T1w") == "no_reference"
    _, again, _ = ingested(tmp_path, sessions=rules)
    assert again["revision"] == first["revision"]
    save(tmp_path / "bids", "sub-2_FLAIR.nii.gz", 9)
    for _ in range(2):
        storage, manifest, ledger = ingested(tmp_path, sessions=rules, exclude=("*run-2*",))
        assert manifest["revision"] == 2
        assert {key: set(found) for key, found in records(storage, manifest).items()} == {
            "sub-1": {"flair"},
            "sub-2": {"t1", "flair"},
            "sub-3": {"flair"},
        }
        assert reason(ledger, "sub-3_run-1_T1w") == "late_contrast", "the way out is another corpus"
    assert len(ledger) == 7 and verify_corpus(storage) == []


def test_contrasts_on_other_grids_are_resampled_to_the_reference_by_their_headers(tmp_path: Path) -> None:
    """A linear function of position is known at every point, whatever the grid and orientation."""

    def ramp(shape: tuple[int, ...], affine: NDArray[np.float64], slopes: tuple[float, ...]) -> NDArray[np.float32]:
        index = np.stack([*np.meshgrid(*map(np.arange, shape), indexing="ij"), np.ones(shape)], axis=-1)
        return np.asarray(1000 + (index @ affine.T)[..., :3] @ slopes, dtype=np.float32)

    flair = np.diag([1.5, 1.5, 6.0, 1.0])
    sagittal = np.array([[0, 0, 2.0, -3], [-1.2, 0, 0, 36.5], [0, 1.1, 0, -4], [0, 0, 0, 1]])
    slopes = (2.0, -3.0, 5.0)
    for name, voxels, affine in (
        ("FLAIR", ramp((20, 24, 5), flair, (1, 1, 1)), flair),
        ("T1w", ramp((34, 34, 18), sagittal, slopes), sagittal),
    ):
        path = tmp_path / "bids" / f"sub-1_{name}.nii.gz"
        path.parent.mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    storage, manifest, ledger = ingested(tmp_path, one_subject=True)
    found = records(storage, manifest)["sub-1"]
    assert found["t1"].shape == found["flair"].shape == (20, 24, 5, 1)
    inner = (slice(2, -2), slice(2, -2), slice(1, -1))
    np.testing.assert_allclose(found["t1"][..., 0][inner], ramp((20, 24, 5), flair, slopes)[inner], rtol=1e-4)
    assert ledger["sub-1_T1w"]["resampled_to"] == "flair" and ledger["sub-1_T1w"]["shape"] == [20, 24, 5, 1]
    assert "resampled_to" not in ledger["sub-1_FLAIR"] and verify_corpus(storage) == []


def test_partial_coverage_is_stored_and_less_than_the_tolerance_is_refused(tmp_path: Path) -> None:
    """A scan that covers the first 18 of 20 rows covers nine tenths of the reference."""
    shorter = GRID.copy()
    save(tmp_path / "bids", "sub-1_FLAIR.nii.gz")
    save(tmp_path / "bids", "sub-1_T1w.nii.gz", 1, shape=(18, 24, 5), affine=shorter)
    storage, manifest, ledger = ingested(tmp_path, one_subject=True, sessions={"min_coverage": 0.85})
    assert ledger["sub-1_T1w"]["covered_fraction"] == 0.9
    reader = open_shard(storage.local(manifest["shards"][0]["name"]))
    volumes = {one.contrast: one for one in reader.volumes(reader.locate(0)[0])}
    assert volumes["flair"].coverage is None and volumes["t1"].coverage is not None
    covered = covered_box(volumes["t1"], volumes["t1"].whole)  # slices, rows, columns
    assert covered[:, :18].all() and not covered[:, 18:].any()
    stored = records(storage, manifest)["sub-1"]["t1"][..., 0]
    np.testing.assert_array_equal(stored[:18], some_voxels(1, (18, 24, 5)))
    assert np.unique(stored[18:]).size == 1

    with pytest.raises(
        RefusedScan, match=r"covers 90% of the voxels of flair .*min_coverage is 95%; nothing is registered"
    ):
        align(
            read_volume(tmp_path / "bids/sub-1_T1w.nii.gz"),
            read_volume(tmp_path / "bids/sub-1_FLAIR.nii.gz"),
            min_coverage=0.95,
            contrast="flair",
        )


def test_headers_without_positions_are_not_resampled(tmp_path: Path) -> None:
    save(tmp_path / "bids", "sub-1_FLAIR.nii.gz", has_position=False)
    save(tmp_path / "bids", "sub-1_T1w.nii.gz", 1, has_position=False)
    save(tmp_path / "bids", "sub-2_FLAIR.nii.gz", 2)
    save(tmp_path / "bids", "sub-2_T1w.nii.gz", 3, shape=(20, 24, 6), has_position=False)
    save(tmp_path / "bids", "sub-3_FLAIR.nii.gz", 4)
    save(tmp_path / "bids", "sub-3_T1w.nii.gz", 5, has_position=False)
    _, manifest, ledger = ingested(tmp_path)
    assert manifest["contrasts"] == {"flair": 3, "t1": 1, "t1ce": 0}
    assert reason(ledger, "sub-3_T1w") == "other_extent", (
        "without a position its first axis leads left, the reference's right"
    )
    assert reason(ledger, "sub-2_T1w") == "other_extent"
    assert "state no positions" in ledger["sub-2_T1w"]["message"]


def test_a_session_without_the_reference_uses_the_next_contrast_or_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "bids", "sub-1_T1w.nii.gz")
    save(tmp_path / "bids", "sub-1_ce-G_T1w.nii.gz", 1)
    save(tmp_path / "bids", "sub-2_FLAIR.nii.gz", 2)
    storage, manifest, ledger = ingested(tmp_path)
    assert set(records(storage, manifest)["sub-1"]) == {"t1", "t1ce"}
    assert ledger["sub-1_T1w"]["notes"] == ["other_reference"]
    _, manifest, ledger = ingested(
        tmp_path / "strict", sources=tmp_path / "bids", sessions={"without_reference": "refuse"}
    )
    assert manifest["num_records"] == 1 and reason(ledger, "sub-1_T1w") == "no_reference"
    assert "its session has no usable scan of contrast flair, the reference" in ledger["sub-1_ce-G_T1w"]["message"]
    save(tmp_path / "small", "sub-3_FLAIR.nii.gz", 3, shape=(12, 12, 5))
    save(tmp_path / "small", "sub-3_T1w.nii.gz", 4)
    save(tmp_path / "small", "sub-4_FLAIR.nii.gz", 5)
    _, _, ledger = ingested(tmp_path / "s", sources=tmp_path / "small", sessions={"without_reference": "refuse"})
    assert reason(ledger, "sub-3_FLAIR") == "too_small" and reason(ledger, "sub-3_T1w") == "no_reference"


def test_a_contrast_that_copies_another_is_found_and_named(tmp_path: Path) -> None:
    """A copy of the reference is refused; of two equal others, neither is known to be what its name says."""
    save(tmp_path / "bids", "sub-1_FLAIR.nii.gz")
    save(tmp_path / "bids", "sub-1_T1w.nii.gz")  # the same voxels
    scaled = nibabel.Nifti1Image((3 * some_voxels(5)).astype(np.float32) + 7, GRID)
    save(tmp_path / "bids", "sub-2_FLAIR.nii.gz", 4)
    save(tmp_path / "bids", "sub-2_T1w.nii.gz", 5)
    nibabel.save(scaled, tmp_path / "bids/sub-2_ce-G_T1w.nii.gz")
    storage, manifest, ledger = ingested(tmp_path)
    assert {key: set(found) for key, found in records(storage, manifest).items()} == {
        "sub-1": {"flair"},
        "sub-2": {"flair"},
    }
    assert ledger["sub-1_T1w"]["copy_of"] == "sub-1_FLAIR" and reason(ledger, "sub-1_T1w") == "duplicate"
    assert "has the same voxels as sub-1_FLAIR, the flair of its session" in ledger["sub-1_T1w"]["message"]
    assert {ledger[f"sub-2_{name}"]["copy_of"] for name in ("T1w", "ce-G_T1w")} == {"sub-2_T1w", "sub-2_ce-G_T1w"}
    assert "up to a linear change of intensities, sub-2_T1w" in ledger["sub-2_ce-G_T1w"]["message"]


def test_equal_voxels_at_another_position_are_a_copy(tmp_path: Path) -> None:
    shifted = GRID.copy()
    shifted[0, 3] = 1.0
    save(tmp_path / "bids", "sub-1_FLAIR.nii.gz")
    save(tmp_path / "bids", "sub-1_T1w.nii.gz", affine=shifted)
    _, manifest, ledger = ingested(tmp_path)
    assert manifest["contrasts"]["t1"] == 0 and reason(ledger, "sub-1_T1w") == "duplicate"


def test_images_along_the_fourth_axis_are_not_left_out_as_frames(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the fourth axis holds contrasts: leave max_frames out"):
        ingested(tmp_path, sessions={"fourth_axis": "contrasts"}, max_frames=2)


def test_a_fourth_axis_of_contrasts_is_split_only_if_the_job_says_so(tmp_path: Path) -> None:
    save(tmp_path / "bids", "sub-1_FLAIR.nii.gz", 1)
    save(tmp_path / "bids", "sub-1_T1w.nii.gz", 2, shape=(20, 24, 5, 3))
    save(tmp_path / "bids", "sub-2_FLAIR.nii.gz", 3)
    _, manifest, ledger = ingested(tmp_path)
    assert manifest["contrasts"]["t1"] == 0 and reason(ledger, "sub-1_T1w") == "other_frames"
    assert "set ingest.sessions.fourth_axis: contrasts" in ledger["sub-1_T1w"]["message"]

    voxels = np.stack([some_voxels(seed) for seed in range(3)], axis=-1)
    for number in (1, 2):
        path = tmp_path / "stacked" / f"P{number}.nii.gz"
        path.parent.mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(voxels + number, GRID), path)
    save(tmp_path / "stacked", "P3.nii.gz", shape=(20, 24, 5, 2))
    storage, manifest, ledger = ingested(
        tmp_path / "4d", sources=tmp_path / "stacked", sessions={"fourth_axis": "contrasts"}
    )
    assert manifest["contrasts"] == {"flair": 2, "t1": 2, "t1ce": 2} and manifest["num_volumes"] == 2
    for name, number in (("t1", 0), ("t1ce", 1), ("flair", 2)):
        np.testing.assert_array_equal(records(storage, manifest)["P2"][name][..., 0], voxels[..., number] + 2)
    assert reason(ledger, "P3") == "other_frames" and verify_corpus(storage) == []


def test_a_fourth_axis_of_contrasts_is_recognised_by_a_dataset_json(tmp_path: Path) -> None:
    for number in (1, 2):
        save(tmp_path, f"brats/imagesTr/BRATS_{number:03d}.nii.gz", number, shape=(20, 24, 5, 3))
    described = {"modality": {"0": "FLAIR", "1": "T1w", "2": "T1gd"}, "labels": {"0": "background", "1": "tumour"}}
    (tmp_path / "brats/dataset.json").write_text(json.dumps(described))
    with pytest.raises(DataError, match=r"no scan is usable \(2 other_frames\)"):
        ingested(tmp_path, sources=tmp_path / "brats")
    _, manifest, _ = ingested(
        tmp_path / "split",
        sources=tmp_path / "brats",
        sessions={"contrasts": {"flair": "*", "t1": "*", "t1gd": "*"}, "fourth_axis": "contrasts"},
    )
    assert manifest["contrasts"] == {"flair": 2, "t1": 2, "t1gd": 2}
    swapped = {"contrasts": {"t1": "T1w", "flair": "FLAIR", "t1gd": "*"}, "fourth_axis": "contrasts"}
    with pytest.raises(DataError, match="2 other_frames"):
        ingested(tmp_path / "swapped", sources=tmp_path / "brats", sessions=swapped)
    right = {**swapped, "contrasts": {"flair": "FLAIR", "t1": "T1w", "t1gd": "*"}, "reference": "t1"}
    _, manifest, _ = ingested(tmp_path / "right", sources=tmp_path / "brats", sessions=right)
    assert manifest["contrasts"] == {"flair": 2, "t1": 2, "t1gd": 2}


def test_contrasts_that_no_session_has_are_named_with_a_way_out(tmp_path: Path) -> None:
    """A cine and a stack of contrasts look the same, so the user is asked."""
    lines: list[str] = []
    for number in (1, 2):
        save(tmp_path / "bids", f"sub-{number}_FLAIR.nii.gz", number, shape=(20, 24, 5, 3))
    config = IngestConfig(
        sources=(str(tmp_path / "bids"),), licence="CC0-1.0", sessions=SessionsConfig(contrasts=CONTRASTS)
    )
    list(ingest_locally(config, Storage(str(tmp_path / "corpus")), say=lines.append))
    (line,) = [line for line in lines if "no session" in line]
    assert line.startswith("no session has a usable scan of t1, t1ce: see the ledger")
    assert line.endswith("set ingest.sessions.fourth_axis: contrasts")


def test_a_vector_image_is_no_contrast(tmp_path: Path) -> None:
    save(tmp_path / "bids", "sub-1_FLAIR.nii.gz", 1)
    save(tmp_path / "bids", "sub-1_T1w.nii.gz", 2, shape=(20, 24, 5, 1, 3))
    _, manifest, ledger = ingested(tmp_path, one_subject=True)
    assert manifest["contrasts"] == {"flair": 1, "t1": 0, "t1ce": 0} and reason(ledger, "sub-1_T1w") == "not_3d"
    assert "components of vectors" in ledger["sub-1_T1w"]["message"]


def test_an_rgb_image_is_no_contrast(tmp_path: Path) -> None:
    save(tmp_path / "bids", "sub-1_FLAIR.nii.gz")
    colours = np.zeros((20, 24, 5), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(colours, GRID), tmp_path / "bids/sub-1_T1w.nii.gz")
    _, manifest, ledger = ingested(tmp_path, one_subject=True)
    assert manifest["contrasts"] == {"flair": 1, "t1": 0, "t1ce": 0} and reason(ledger, "sub-1_T1w") == "dtype"


def test_a_dicom_study_becomes_a_record_by_its_series_descriptions(tmp_path: Path, write_series: WriteSeries) -> None:
    for number, description in ((3, "AX T1 Secret^Name"), (4, "ax FLAIR fs"), (5, "localizer")):
        write_series(tmp_path / "dicom" / "P1" / str(number), number=number, SeriesDescription=description)
    storage, manifest, ledger = ingested(
        tmp_path,
        sources=tmp_path / "dicom",
        one_subject=True,
        sessions={"contrasts": {"t1": "*t1*", "flair": "*flair*"}},
    )
    assert manifest["contrasts"] == {"flair": 1, "t1": 1}
    ((key, volumes),) = records(storage, manifest).items()
    assert set(volumes) == {"t1", "flair"} and key.startswith("P1_")
    assert sum(row["reason"] == "no_contrast" for row in ledger.values()) == 1
    assert "Secret" not in json.dumps(ledger)


def test_a_contrast_that_arrives_later_is_refused_and_a_new_session_is_added(tmp_path: Path) -> None:
    save(tmp_path / "bids", "sub-1_FLAIR.nii.gz")
    ingested(tmp_path)
    save(tmp_path / "bids", "sub-1_T1w.nii.gz", 1)
    save(tmp_path / "bids", "sub-2_T1w.nii.gz", 2)
    storage, manifest, ledger = ingested(tmp_path)
    assert manifest["revision"] == 2 and manifest["contrasts"] == {"flair": 1, "t1": 1, "t1ce": 0}
    assert reason(ledger, "sub-1_T1w") == "late_contrast" and "make another corpus" in ledger["sub-1_T1w"]["message"]
    assert verify_corpus(storage) == []
    with pytest.raises(DataError, match=r"made with other settings .*sessions"):
        ingested(tmp_path, sessions={"min_coverage": 0.5})


def test_pseudonyms_hide_sessions_and_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2R_PSEUDONYM_KEY", "a secret of enough letters")
    save(tmp_path, "a.nii.gz")
    save(tmp_path, "b.nii.gz", 1)
    rows = ["path,subject,group,contrast", "a.nii.gz,Miller,visit Miller,FLAIR", "b.nii.gz,Miller,visit Miller,T1w"]
    (tmp_path / "scans.csv").write_text("\n".join(rows))
    storage, manifest, _ = ingested(tmp_path, sources=tmp_path / "scans.csv", pseudonyms=True, one_subject=True)
    assert manifest["contrasts"] == {"flair": 1, "t1": 1, "t1ce": 0}
    for path in Path(storage.url.removeprefix("file://")).rglob("*"):
        assert not path.is_file() or b"Miller" not in path.read_bytes()
