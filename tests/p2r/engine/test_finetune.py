import numpy as np
import torch

from p2r.data.preprocess import Preparation
from p2r.engine.finetune import _windows
from p2r.randomness import keyed_generator


def _centres(planes: str, height: int, width: int) -> set[tuple[int, int]]:
    """Row and column, in the plane, of what lies at the centre of many windows."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    labels = (1 + rows * width + columns)[None]
    generators = [keyed_generator(0, "test", number) for number in range(200)]
    preparation = Preparation(spacing_mm=1.0, image_size=32, planes=planes)
    _, inside, cut = _windows(
        torch.zeros(1, 1, height, width),
        torch.ones(1, height, width, dtype=torch.bool),
        labels,
        np.zeros(200, np.int64),
        generators,
        preparation,
    )
    assert torch.equal(inside, cut > 0)
    middle = cut[:, cut.shape[1] // 2, cut.shape[2] // 2] - 1
    return {(int(value) // width, int(value) % width) for value in middle}


def test_training_windows_of_whole_planes_lie_anywhere_in_them() -> None:
    centres = _centres("whole", 64, 96)
    rows, columns = ({centre[axis] for centre in centres} for axis in (0, 1))
    assert (min(rows), max(rows)) == (16, 48)
    assert (min(columns), max(columns)) == (16, 80)


def test_a_plane_that_fits_is_always_seen_whole() -> None:
    assert _centres("whole", 20, 32) == {(10, 16)}


def test_a_model_of_the_centre_trains_on_the_centre() -> None:
    assert _centres("centre", 64, 96) == {(32, 48)}
