"""`p2r inspect` with two corpora or revisions shows the drift between them."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from cluster import cli
from p2r.config import IngestConfig
from p2r.data.corpus import ingest_locally, load_manifest
from p2r.storage import Storage


@pytest.fixture(scope="module")
def revisions(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """URL of a corpus of two revisions, whose later scans have other voxels; and the digest of the first."""
    folder = tmp_path_factory.mktemp("inspect")
    storage, digests = Storage(str(folder / "corpus")), []
    (folder / "scans").mkdir()
    for first in range(2):
        for number in range(12):
            voxels = np.random.default_rng(number + 12 * first).normal(400, 40, (18, 20, 4)).astype(np.int16)
            affine = np.diag([1.0 + first, 1.0 + first, 5.0, 1.0])
            nibabel.save(nibabel.Nifti1Image(voxels, affine), folder / f"scans/sub-{first}{number:02d}.nii")
        list(ingest_locally(IngestConfig(sources=(str(folder / "scans"),), licence="CC0-1.0"), storage))
        digests.append(load_manifest(storage).sha256)
    return storage.url, digests[0]


def test_the_drift_from_one_revision_to_the_next_is_shown(
    revisions: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    url, first = revisions
    assert cli.main(["inspect", f"{url}@sha256:{first}", url]) == 0
    shown = capsys.readouterr().out
    assert "12, then 24; 12 in both" in shown and "the new scans of the second" in shown
    (line,) = [line for line in shown.splitlines() if "spacing R, mm" in line]
    assert "1.00" in line and "changed" in line
    assert not [line for line in shown.splitlines() if "extent R, voxels" in line]  # it is equal in both
    assert "further quantities are equal" in " ".join(shown.split())
    assert cli.main(["inspect", f"{url}@sha256:{first}", url, "--json"]) == 0
    drift = json.loads(capsys.readouterr().out)
    changed = {shift["quantity"] for shift in drift["shifts"] if shift["is_change"]}
    assert changed == {"spacing R, mm", "spacing A, mm"}


def test_a_second_url_without_a_corpus_is_refused(
    revisions: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", revisions[0], str(tmp_path)]) == 2
    assert "no corpus at" in capsys.readouterr().err
    assert cli.main(["inspect", revisions[0], f"{revisions[0]}@sha256:{'0' * 64}"]) == 2
    assert "has no revision" in capsys.readouterr().err
