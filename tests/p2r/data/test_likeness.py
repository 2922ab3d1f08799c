"""Scans of different subjects that look alike are found by what they show; other subjects' are not."""

import base64
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, zoom

from p2r.config import PERCENTILES
from p2r.data.ledger import AcceptedRow, accepted_row, parse_row
from p2r.data.likeness import MIN_SCANS, Alike, find_alike, outline
from p2r.data.volume import Volume

SHAPE = (40, 36, 20)
PERCENTILE_TABLE = [float(number) for number in range(len(PERCENTILES))]


def head(seed: int) -> NDArray[np.int16]:
    """Return a bright ellipsoid on zeros, as all subjects have, with smooth texture of one subject's own."""
    x, y, z = (
        np.linspace(-1, 1, n).reshape([-1 if axis == a else 1 for a in range(3)]) for axis, n in enumerate(SHAPE)
    )
    inside = x**2 + y**2 + z**2 < 0.9
    texture = gaussian_filter(np.random.default_rng(seed).normal(size=SHAPE), 3)
    return np.where(inside, 500 + 300 * texture / texture.std(), 0).clip(0).astype(np.int16)


def volume_of(data: NDArray[Any]) -> Volume:
    affine = np.eye(4)
    return Volume(data[..., None], affine, affine, data.shape, (1.0, 1.0, 1.0), "scan")


def row_of(data: NDArray[Any], *, key: str, subject: str, **changes: object) -> AcceptedRow:
    volume = volume_of(data)
    row = accepted_row(
        key=key,
        source=key,
        num_bytes=1,
        modified="",
        subject=subject,
        volume=volume,
        axis=2,
        percentiles=PERCENTILE_TABLE,
        voxels_sha256="0" * 64,
        outline=outline(volume),
        place=None,
        acquisition={},
    )
    return row.model_copy(update=changes)


@pytest.fixture(scope="module")
def others() -> list[AcceptedRow]:
    return [row_of(head(seed), key=f"scan-{seed}", subject=f"subject-{seed}") for seed in range(30)]


def noisy(data: NDArray[np.int16]) -> NDArray[np.float32]:
    return (data + np.random.default_rng(0).normal(0, 20, SHAPE) * (data > 0)).astype(np.float32)


CHANGES = {
    "the same voxels": lambda data: data,
    "other intensities": lambda data: data.astype(np.float32) ** 0.7 * 3 + 40,
    "half the voxels": lambda data: zoom(data, (0.5, 0.5, 1), order=1),
    "noise": noisy,
    "a narrow margin cut off": lambda data: data[1:-1, 1:-1],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_under_another_name_is_found(change: str, others: list[AcceptedRow]) -> None:
    copy = row_of(CHANGES[change](head(7)), key="x", subject="another")
    found = find_alike([*others, copy])
    assert [(pair.first, pair.first_subject, pair.second, pair.second_subject) for pair in found] == [
        ("scan-7", "subject-7", "x", "another")
    ]
    assert 0.9 <= found[0].similarity <= 1


def test_different_subjects_do_not_look_alike(others: list[AcceptedRow]) -> None:
    assert find_alike(others) == []
    assert find_alike(others, threshold=0.0)  # they were compared


def test_scans_of_one_subject_and_known_copies_are_not_listed(others: list[AcceptedRow]) -> None:
    own = row_of(head(7), key="x", subject="subject-7")
    known = row_of(head(8), key="y", subject="another", copy_of="scan-8")
    assert find_alike([*others, own, known]) == []


def test_only_scans_of_one_contrast_are_compared(others: list[AcceptedRow]) -> None:
    t1 = [row.model_copy(update={"contrast": "t1"}) for row in others]
    flair = row_of(head(7), key="x", subject="another", contrast="flair")
    assert find_alike([*t1, flair]) == []
    assert [pair.contrast for pair in find_alike([*t1, flair.model_copy(update={"contrast": "t1"})])] == ["t1"]


def test_rows_without_outline_and_small_corpora_are_not_compared(others: list[AcceptedRow]) -> None:
    copy = row_of(head(7), key="x", subject="another")
    old = copy.model_copy(update={"outline": None})
    assert find_alike([*others, old]) == []
    assert find_alike([*others[: MIN_SCANS - 2], row_of(head(1), key="x", subject="another")]) == []


def test_pairs_are_in_decreasing_order_of_similarity(others: list[AcceptedRow]) -> None:
    worse = row_of(CHANGES["a narrow margin cut off"](head(3)), key="a", subject="another")
    same = row_of(head(9), key="b", subject="another")
    found = find_alike([*others, worse, same])
    assert [{pair.first, pair.second} for pair in found] == [{"b", "scan-9"}, {"a", "scan-3"}]
    assert isinstance(found[0], Alike) and found[0].similarity == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("shape", [(3, 40, 17), (1, 1, 1), (16, 16, 16), (33, 2, 50)])
@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.float32])
def test_any_shape_and_type_has_a_valid_outline(shape: tuple[int, ...], dtype: Any) -> None:
    data = np.random.default_rng(1).integers(0, 100, shape).astype(dtype)
    row = row_of(data, key="x", subject="s")
    assert len(base64.b64decode(row.outline or "")) == 119
    assert parse_row(row.to_json(), where="here:") == row


def test_an_outline_is_the_same_on_every_machine() -> None:
    data = (np.arange(20 * 18 * 7).reshape(20, 18, 7) ** 2 % 251).astype(np.uint8)
    assert outline(volume_of(data)) == EXPECTED


EXPECTED = (
    "3SkeEObj9Gu8zBXuEAeBEiAq8Btiw9wZE6Do3hhozyaC2Mr51+AW0egZvePf2egTN+788CHMFdkY5CQf"
    "xejS4dQ8KxAP48zDJOHxxSokC7vQHhbp6Dc22OLjwjwmHSdH4dke+R7W8u/1MQsn8d8UCerbHenZHv0="
)
