"""Every form in which people hold a scan gives the same images, and a scan without a voxel size is refused."""

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.data.meta_tensor import MetaTensor

from p2r.data.accepted import volume_from
from p2r.data.volume import read_volume
from p2r.errors import InputError, RefusedScan
from tests.dicom_cases import COLUMNS, ROWS, SLICES, Series, voxels


class TorchIOImage:
    """The interface of `torchio.ScalarImage`, which is not installed everywhere."""

    def __init__(self, data: torch.Tensor, affine: np.ndarray[Any, Any]) -> None:
        self.data, self.affine = data, affine


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scan in LPS voxel order with an oblique axis."""
    rng = np.random.default_rng(0)
    affine = np.array([[-1.5, 0.1, 0, 20], [0.1, -1.5, 0, 30], [0, 0, 4.0, -10], [0, 0, 0, 1]])
    image = nibabel.Nifti1Image(rng.integers(0, 900, (12, 14, 6)).astype(np.int16), affine)
    path = tmp_path_factory.mktemp("accepted") / "scan.nii.gz"
    image.to_filename(path)
    return path


def test_all_forms_give_the_volume_of_the_file(scan: Path) -> None:
    expected, image = read_volume(scan), nibabel.load(scan)
    array, affine = np.asarray(image.dataobj), image.affine
    tensor, flip = torch.from_numpy(array.astype(np.float32)), np.diag([-1.0, -1.0, 1.0, 1.0])
    forms: list[tuple[Any, dict[str, Any]]] = [
        (scan, {}),
        (str(scan), {}),
        (f"file://{scan}", {}),
        (expected, {}),
        (image, {}),
        (array, {"affine": affine}),
        (array.astype(np.int64), {"affine": torch.from_numpy(affine)}),
        (tensor, {"affine": affine.tolist()}),
        (tensor.requires_grad_(), {"affine": affine}),
        (MetaTensor(tensor.detach()[None], affine=torch.from_numpy(affine)), {}),
        (MetaTensor(tensor.detach()[None], affine=torch.from_numpy(flip @ affine), meta={"space": "LPS"}), {}),
        (TorchIOImage(tensor.detach()[None], affine), {}),
    ]
    for form, place in forms:
        found = volume_from(form, **place)
        assert np.array_equal(found.data, expected.data), type(form)
        np.testing.assert_allclose(found.affine, expected.affine, atol=1e-5, err_msg=str(type(form)))
        np.testing.assert_allclose(found.spacing_mm, expected.spacing_mm, rtol=1e-5)


def test_an_array_with_a_spacing_has_axes_to_the_right_anterior_and_superior() -> None:
    array = np.arange(4 * 5 * 6 * 2, dtype=np.float32).reshape(4, 5, 6, 2)
    found = volume_from(array, spacing_mm=(1, 2, 3))
    assert found.data.shape == (4, 5, 6, 2) and found.spacing_mm == (1.0, 2.0, 3.0)
    assert np.array_equal(found.data, array) and np.array_equal(found.affine, np.diag([1.0, 2.0, 3.0, 1.0]))
    assert volume_from(torch.from_numpy(array[..., 0]).bfloat16(), spacing_mm=2).spacing_mm == (2.0, 2.0, 2.0)
    assert volume_from(array[..., 0] > 7, spacing_mm=2).data.max() == 1


BOX = np.random.default_rng(1).random((4, 5, 6))


@pytest.mark.parametrize(
    ("form", "place", "rule"),
    [
        (BOX, {}, r"ndarray \(4, 5, 6\) has no voxel size, which is never guessed: give spacing_mm"),
        (torch.from_numpy(BOX), {}, "Tensor .* has no voxel size"),
        (nibabel.Nifti1Image(BOX, None), {}, "Nifti1Image has no affine, so no voxel size"),
        (BOX, {"spacing_mm": (1, 0, 1)}, "spacing_mm must be above 0"),
        (BOX, {"spacing_mm": (1, 1)}, "spacing_mm must be one number or three"),
        (BOX, {"spacing_mm": 1, "affine": np.eye(4)}, "both give the voxel size"),
        (BOX, {"affine": np.eye(3)}, r"affine must be \(4, 4\)"),
        (BOX, {"affine": np.full((4, 4), np.nan)}, r"affine must be \(4, 4\), finite"),
        (BOX, {"affine": np.zeros((4, 4)) + np.diag([0, 0, 0, 1])}, "affine has voxels without volume"),
        (BOX[0], {"spacing_mm": 1}, r"an array must be \(X, Y, Z\).*a single slice is array"),
        (BOX + 1j, {"spacing_mm": 1}, "complex128; a scan holds real numbers"),
        (BOX * np.inf, {"spacing_mm": 1}, "NaN or infinite"),
        (MetaTensor(torch.rand(2, 4, 5, 6)), {}, r"the MetaTensor is \(2, 4, 5, 6\); expected \(1, X, Y, Z\)"),
        (MetaTensor(torch.rand(1, 4, 5, 6)), {"spacing_mm": 1}, "MetaTensor has an affine of its own"),
        (nibabel.Nifti1Image(BOX, np.eye(4)), {"spacing_mm": 1}, "Nifti1Image has a position of its own"),
        (TorchIOImage(torch.rand(3, 4, 5, 6), np.eye(4)), {}, r"the TorchIOImage is \(3, 4, 5, 6\)"),
        (object(), {}, "object is no scan that p2r reads; give a path or URL"),
        ([1, 2], {}, "list is no scan"),
    ],
)
def test_what_has_no_voxel_size_or_no_form_is_refused_with_the_way_out(
    form: Any, place: dict[str, Any], rule: str
) -> None:
    with pytest.raises(InputError, match=rule):
        volume_from(form, **place)


def test_a_folder_of_dicom_is_read_and_one_of_several_scans_is_refused(scan: Path, tmp_path: Path) -> None:
    Series().write(tmp_path / "one")
    found = volume_from(tmp_path / "one")
    assert found.data.shape == (COLUMNS, ROWS, SLICES, 1) and found.spacing_mm[2] == pytest.approx(3.0)
    assert np.array_equal(np.sort(found.data.ravel()), np.sort(voxels().ravel()))
    (tmp_path / "one" / "scan.nii.gz").write_bytes(scan.read_bytes())
    with pytest.raises(RefusedScan, match=r"holds 2 scans .*name one of them \[several\]"):
        volume_from(tmp_path / "one")
    (tmp_path / "none").mkdir()
    with pytest.raises(RefusedScan, match="holds no"):  # so that other patients of a call are not lost with it
        volume_from(tmp_path / "none")
