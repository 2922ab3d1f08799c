import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from p2r.data.phantom import REGIONS, resolve_source, virtual_subjects
from p2r.data.volume import read_labels, read_volume
from p2r.errors import DataError


@pytest.fixture(scope="module")
def two_subjects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return virtual_subjects(tmp_path_factory.mktemp("templates"), num_subjects=2, seed=0)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_subject_is_an_image_and_its_labels_on_one_grid(two_subjects: Path) -> None:
    names = [path.name for path in sorted((two_subjects / "images").iterdir())]
    assert names == ["sub-001_T1w.nii.gz", "sub-002_T1w.nii.gz"]
    for name in names:
        image, labels = read_volume(two_subjects / "images" / name), read_labels(two_subjects / "labels" / name)
        assert image.data.dtype == np.int16 and image.data.shape == labels.data.shape
        assert image.spacing_mm == pytest.approx((2.0, 2.0, 2.0))
        np.testing.assert_array_equal(image.affine, labels.affine)
        assert set(np.unique(labels.data)) == {0, 1, 2}


def test_labels_match_the_tissues(two_subjects: Path) -> None:
    for path in (two_subjects / "images").iterdir():
        image, label = read_volume(path).data, read_labels(two_subjects / "labels" / path.name).data
        air, grey, white = (np.median(image[label == value]) for value in (0, 1, 2))
        assert white > 1.15 * grey > 3 * air  # a T1: white matter is brightest
        volumes_ml = [np.count_nonzero(label == value) * 8 / 1000 for value in (1, 2)]
        assert 700 < volumes_ml[0] < 1500 and 350 < volumes_ml[1] < 900


def test_regions_are_all_of_grey_and_white_matter_at_their_place_in_the_brain(two_subjects: Path) -> None:
    for path in (two_subjects / "regions").iterdir():
        regions, tissues = read_labels(path), read_labels(two_subjects / "labels" / path.name).data[..., 0]
        values = regions.data[..., 0]
        assert np.array_equal(values > 0, tissues > 0)
        shares = np.bincount(values.ravel())[1:] / np.count_nonzero(values)
        assert len(shares) == len(REGIONS) and shares.min() > 0.08
        centres = {name: np.argwhere(values == value).mean(axis=0) for value, name in REGIONS.items()}  # RAS voxels
        assert centres["frontal"][1] > centres["parietal"][1] > centres["occipital"][1]
        assert centres["parietal"][2] > centres["temporal"][2] > centres["hindbrain"][2]


def test_regions_cannot_be_told_by_brightness(two_subjects: Path) -> None:
    for path in (two_subjects / "images").iterdir():
        image, regions = read_volume(path).data, read_labels(two_subjects / "regions" / path.name).data
        white = image > np.percentile(image[regions > 0], 60)
        medians = [np.median(image[white & (regions == value)]) for value in REGIONS]
        assert max(medians) < 1.25 * min(medians)


def test_regions_are_symmetric_so_mirrored_images_keep_their_labels(two_subjects: Path) -> None:
    from p2r.data.phantom import _Template

    template = _Template()
    undeformed = np.stack(np.meshgrid(*(np.arange(n) for n in template._t1.shape), indexing="ij"))
    regions = template._find_regions(undeformed)
    middle = -template.affine[0, 3] / template.affine[0, 0]  # x = 0 mm
    half = min(int(middle), regions.shape[0] - 1 - int(middle))
    part = regions[int(middle) - half : int(middle) + half + 1]
    assert middle == int(middle) and np.array_equal(part, part[::-1])


def test_subjects_differ_in_anatomy_and_in_contrast(two_subjects: Path) -> None:
    paths = sorted((two_subjects / "images").iterdir())
    images = [read_volume(path).data for path in paths]
    labels = [read_labels(two_subjects / "labels" / path.name).data for path in paths]
    white = [label == 2 for label in labels]
    overlap = 2 * np.count_nonzero(white[0] & white[1]) / sum(map(np.count_nonzero, white))
    assert 0.3 < overlap < 0.85
    ratios = [
        np.median(image[label == 1]) / np.median(image[label == 2]) for image, label in zip(images, labels, strict=True)
    ]
    assert abs(ratios[0] - ratios[1]) > 0.01


def test_the_same_seed_gives_the_same_bytes_and_a_larger_group_begins_with_the_smaller(
    two_subjects: Path, tmp_path: Path
) -> None:
    alone = digests(virtual_subjects(tmp_path, num_subjects=1, seed=0))
    both = digests(two_subjects)
    assert {name: both[name] for name in alone if "sub-" in name} == {
        name: digest for name, digest in alone.items() if "sub-" in name
    }
    assert len(alone) == 6


def test_another_seed_gives_other_subjects(two_subjects: Path, tmp_path: Path) -> None:
    other = digests(virtual_subjects(tmp_path, num_subjects=1, seed=1))
    assert other["images/sub-001_T1w.nii.gz"] != digests(two_subjects)["images/sub-001_T1w.nii.gz"]


def test_a_complete_folder_is_left_as_it_is(two_subjects: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in two_subjects.rglob("*")}
    assert virtual_subjects(two_subjects.parent, num_subjects=2, seed=0) == two_subjects
    assert {path: path.stat().st_mtime_ns for path in two_subjects.rglob("*")} == before


def test_a_failure_leaves_no_folder_under_the_final_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("p2r.data.phantom.write_nifti", fail)
    with pytest.raises(OSError, match="no space left"):
        virtual_subjects(tmp_path, num_subjects=1, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_its_description_names_origin_and_licence(two_subjects: Path) -> None:
    text = (two_subjects / "README").read_text()
    assert "not scans of people" in text and "McGill" in text
    assert json.loads((two_subjects / "complete.json").read_text())["seed"] == 0


def test_a_url_names_the_folder_or_its_images_or_labels(two_subjects: Path) -> None:
    cache = two_subjects.parent.parent / "cache"
    (cache / "templates").mkdir(parents=True)
    (cache / "templates" / two_subjects.name).symlink_to(two_subjects)
    root = resolve_source("template://icbm152?subjects=2&seed=0", cache)
    assert root.name == two_subjects.name
    assert resolve_source("template://icbm152?subjects=2", cache) == root
    assert resolve_source("template://icbm152/images?subjects=2", cache) == root / "images"
    assert resolve_source("template://icbm152/labels/?subjects=2", cache) == root / "labels"
    assert resolve_source("template://icbm152/regions?subjects=2", cache) == root / "regions"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("template://mni305?subjects=2", "the only template is icbm152"),
        ("template://icbm152/masks", "the folders images, labels, regions"),
        ("template://icbm152?subject=2", "unknown parameter 'subject'"),
        ("template://icbm152?subjects=0", "subjects must be 1 to 10000"),
        ("template://icbm152?subjects=many", "subjects must be 1 to 10000"),
        ("template://icbm152?seed=-1", "seed a whole number"),
    ],
)
def test_a_wrong_url_is_refused_with_a_right_one(tmp_path: Path, url: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        resolve_source(url, tmp_path)
    assert "template://icbm152/images?subjects=24&seed=0" in str(caught.value)
