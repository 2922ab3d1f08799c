"""InfoNCE within images against `info_nce` of one image at a time, which is tested against its definition."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from p2r.errors import EmbeddingError
from p2r.loss import SameImage, info_nce, info_nce_within_images
from p2r.loss.within_image import images_at_once

B, N, E = 3, 7, 5
IMAGES_AT_ONCE = images_at_once  # before the fixture replaces it


@pytest.fixture(autouse=True, params=[1, 2], ids=["one at a time", "two at once"])
def _at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch images as on a CPU, and several at once as on a GPU."""
    monkeypatch.setattr("p2r.loss.within_image.images_at_once", lambda num_pairs, is_gpu: request.param)


def rows(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(B * N, E, generator=generator, dtype=torch.float64)
    b = a + 0.7 * torch.randn(B * N, E, generator=generator, dtype=torch.float64)
    return a.requires_grad_(), b.requires_grad_()


def image_by_image(a: Tensor, b: Tensor, **options: Any) -> Tensor:
    """Return the mean over images of `info_nce` of each, equal to the mean over pairs if all have equal weight."""
    return torch.stack([info_nce(x, y, **options) for x, y in zip(a.split(N), b.split(N), strict=True)]).mean()


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("form", ["cross_view", "nt_xent"])
def test_loss_and_gradient_are_the_mean_over_images(form: Any, decoupled: bool) -> None:
    a, b = rows()
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    options = {"temperature": temperature, "form": form, "decoupled": decoupled}
    parts: dict[str, Tensor] = {}
    found = info_nce_within_images(a, b, num_images=B, parts=parts, **options)
    of_images: list[dict[str, Tensor]] = [{} for _ in range(B)]
    for x, y, of_image in zip(a.split(N), b.split(N), of_images, strict=True):
        info_nce(x, y, parts=of_image, **options)
    for name, part in parts.items():
        torch.testing.assert_close(
            part.double(), torch.stack([of_image[name] for of_image in of_images]).sum(0).double()
        )
    expected = image_by_image(a, b, **options)
    torch.testing.assert_close(found, expected)
    inputs = (a, b, temperature)
    for ours, theirs in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_other_images_do_not_matter() -> None:
    (a, b), (c, d) = rows(), rows(seed=1)
    mixed = [torch.cat([x[:N], y[N:]]) for x, y in ((a, c), (b, d))]
    (ours,), (others,) = (
        torch.autograd.grad(info_nce_within_images(*pair, num_images=B, temperature=0.2), start)
        for pair, start in (((a, b), [a]), (mixed, [a]))
    )
    torch.testing.assert_close(ours[:N], others[:N])


def test_near_pixels_are_excluded_and_a_pixel_without_negatives_has_no_loss() -> None:
    a, b = rows()
    position_mm = torch.arange(B * N, dtype=torch.float64)[:, None].expand(-1, 2) % N
    within = SameImage(torch.zeros(N, dtype=torch.int64), position_mm[:N], radius_mm=3.0)
    found = info_nce_within_images(
        a, b, num_images=B, temperature=0.2, form="nt_xent", position_mm=position_mm, radius_mm=3.0
    )
    torch.testing.assert_close(found, image_by_image(a, b, temperature=0.2, form="nt_xent", exclude=within))
    alone = info_nce_within_images(a, b, num_images=B, temperature=0.2, position_mm=position_mm, radius_mm=99.0)
    assert alone == 0
    assert not torch.autograd.grad(alone, a)[0].any()


def test_a_pair_of_weight_zero_is_ignored() -> None:
    a, b = rows()
    weights = torch.ones(B * N, dtype=torch.float64)
    weights[-N:] = 0
    with torch.no_grad():
        b[-1] = math.nan
    found = info_nce_within_images(a, b, num_images=B, temperature=0.2, weights=weights)
    expected = image_by_image(a[:-N], b[:-N], temperature=0.2)
    torch.testing.assert_close(found, expected)
    gradient = torch.autograd.grad(found, b)[0]
    assert torch.isfinite(gradient).all()
    assert not gradient[-N:].any()


def test_only_the_ratios_of_weights_matter() -> None:
    a, b = rows()
    weights = torch.rand(B * N, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    large, small = (
        info_nce_within_images(a, b, num_images=B, temperature=0.2, weights=scale * weights) for scale in (1.0, 1e-3)
    )
    torch.testing.assert_close(small, large)


def test_without_any_pair_loss_and_gradient_are_zero() -> None:
    a, b = rows()
    loss = info_nce_within_images(a, b, num_images=B, temperature=0.2, weights=torch.zeros(B * N))
    assert loss == 0 and not any(gradient.any() for gradient in torch.autograd.grad(loss, (a, b)))


def test_inconsistent_arguments_are_refused() -> None:
    a, b = rows()
    for weights, words in ((-torch.ones(B * N), "finite and not negative"), (torch.ones(B), r"weights \(21,\)")):
        with pytest.raises(ValueError, match=words):
            info_nce_within_images(a, b, num_images=B, temperature=0.2, weights=weights)
    with pytest.raises(ValueError, match="21 pixel pairs do not divide into 4 images"):
        info_nce_within_images(a, b, num_images=4, temperature=0.2)
    with pytest.raises(ValueError, match="radius_mm needs position_mm"):
        info_nce_within_images(a, b, num_images=B, temperature=0.2, radius_mm=2.0)
    for temperature, words in ((-0.2, "positive and finite, got -0.2"), (torch.tensor([0.1, 0.2]), "one number")):
        with pytest.raises(ValueError, match=f"temperature must be {words}"):
            info_nce_within_images(a, b, num_images=B, temperature=temperature)
    with pytest.raises(ValueError, match="form must be 'cross_view' or 'nt_xent', got 'simclr'"):
        info_nce_within_images(a, b, num_images=B, temperature=0.2, form="simclr")  # type: ignore[arg-type]
    with pytest.raises(EmbeddingError, match="1 of 21 embeddings are not finite"):
        info_nce_within_images(
            a, torch.where(torch.arange(B * N)[:, None] == 4, math.inf, b), num_images=B, temperature=0.2
        )


def test_one_image_is_the_loss_of_all_its_pairs() -> None:
    a, b = rows()
    expected = info_nce(a, b, temperature=0.2)
    torch.testing.assert_close(info_nce_within_images(a, b, num_images=1, temperature=0.2), expected)


def test_towers_of_two_shapes_are_refused_by_name() -> None:
    a, b = rows()
    with pytest.raises(ValueError, match="queries and keys of one shape"):
        info_nce_within_images(a, b[:, 1:], num_images=B, temperature=0.2)


def test_pairs_without_negatives_add_nothing_to_the_parts() -> None:
    a, b = rows()
    parts: dict[str, Tensor] = {}
    places = torch.zeros(B * N, 2)
    options: dict[str, Any] = {"position_mm": places, "radius_mm": 1.0}
    info_nce_within_images(a, b, num_images=B, temperature=0.2, parts=parts, **options)
    assert parts["negatives"][0] == 0
    assert parts["negatives"][1] == B * N


def test_pixels_exactly_at_the_radius_are_excluded() -> None:
    a, b = rows()
    places = torch.arange(float(B * N))[:, None] * torch.tensor([3.0, 0.0])
    near, at, beyond = (
        info_nce_within_images(a, b, num_images=B, temperature=0.2, position_mm=places, radius_mm=radius)
        for radius in (2.9, 3.0, 3.1)
    )
    assert at == beyond != near


@pytest.mark.parametrize(
    ("num_pairs", "is_gpu", "expected"), [(64, True, 4096), (2**13, True, 1), (0, True, 2**24), (64, False, 1)]
)
def test_as_many_images_at_once_as_fit(num_pairs: int, is_gpu: bool, expected: int) -> None:
    assert IMAGES_AT_ONCE(num_pairs, is_gpu=is_gpu) == expected
