"""Reading features at points, and the networks for pretraining and segmentation."""

import pytest
import torch
from torch import Tensor, nn

from p2r.config import ModelConfig
from p2r.model import Pix2Rep, ProjectionHead, SegmentationHead, Segmenter, build_backbone, read_at, read_pixels

SMALL = ModelConfig(channels=(4, 4, 8, 8, 8), feature_channels=6, head_channels=10, embedding_channels=5)


def test_reading_at_whole_pixels_is_direct_indexing() -> None:
    features = torch.randn(3, 7, 20, 33)
    rows, columns = torch.randint(0, 20, (3, 50)), torch.randint(0, 33, (3, 50))
    rows[:, 0], columns[:, 0] = 19, 32  # the last pixel has no neighbours beyond it
    result = read_at(features, torch.stack([rows, columns], -1).float())
    expected = torch.stack([features[image, :, rows[image], columns[image]].T for image in range(3)])
    assert torch.equal(result, expected)
    assert torch.equal(read_pixels(features, torch.stack([rows, columns], -1).float()), expected)


def test_reading_between_pixels_is_bilinear() -> None:
    rows, columns = torch.meshgrid(torch.arange(9.0), torch.arange(12.0), indexing="ij")
    bilinear = (2 + 3 * rows - columns + 0.5 * rows * columns)[None, None].double()
    points = torch.rand(1, 40, 2, dtype=torch.float64) * torch.tensor([8.0, 11.0])
    row, column = points[0].unbind(-1)
    expected = 2 + 3 * row - column + 0.5 * row * column
    # A product of row and column is bilinear within every cell, so interpolation is exact.
    torch.testing.assert_close(read_at(bilinear, points)[0, :, 0], expected)


def test_reading_between_voxels_is_trilinear() -> None:
    z, y, x = torch.meshgrid(torch.arange(5.0), torch.arange(6.0), torch.arange(7.0), indexing="ij")
    maps = torch.stack([2 + 3 * z - x + 0.5 * z * y * x, y - z * x])[None].double()
    points = torch.rand(1, 40, 3, dtype=torch.float64) * torch.tensor([4.0, 5.0, 6.0])
    z, y, x = points[0].unbind(-1)
    expected = torch.stack([2 + 3 * z - x + 0.5 * z * y * x, y - z * x], -1)
    torch.testing.assert_close(read_at(maps, points)[0], expected)
    whole = points.round()
    assert torch.equal(read_pixels(maps, whole), read_at(maps, whole))


def test_reading_beyond_the_border_gives_the_borders_value() -> None:
    features = torch.randn(1, 2, 4, 5)
    points = torch.tensor([[[-3.0, 1.0], [9.0, 9.0]]])
    assert torch.equal(read_at(features, points)[0, 0], features[0, :, 0, 1])
    assert torch.equal(read_at(features, points)[0, 1], features[0, :, 3, 4])


def test_half_precision_features_are_interpolated_in_float32() -> None:
    features = torch.randn(2, 3, 8, 8).bfloat16()
    points = torch.rand(2, 6, 2) * 7
    result = read_at(features, points)
    assert result.dtype == torch.float32
    assert torch.equal(result, read_at(features.float(), points))


def test_the_gradient_of_reading_is_right() -> None:
    features = torch.randn(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    points = torch.rand(2, 6, 2, dtype=torch.float64) * 3
    assert torch.autograd.gradcheck(lambda maps: read_at(maps, points), features)


def test_points_that_do_not_fit_the_maps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(B, n, 2\)"):
        read_at(torch.randn(2, 3, 8, 8), torch.rand(1, 6, 2))


def test_queries_come_from_a_and_keys_from_b_in_the_order_of_images_and_points() -> None:
    torch.manual_seed(0)
    model = Pix2Rep(SMALL)
    a, b = torch.rand(2, 1, 32, 48), torch.rand(2, 1, 32, 48)
    points_a, points_b = torch.rand(2, 7, 2) * 31, torch.randint(0, 32, (2, 7, 2)).float()
    queries, keys = model(a, b, points_a, points_b)
    assert queries.shape == keys.shape == (14, 5)
    expected = model.head(read_at(model.backbone(b[1:]), points_b[1:]))[0]
    torch.testing.assert_close(keys[7:], expected, rtol=1e-4, atol=1e-5)
    expected = model.head(read_at(model.backbone(a[:1]), points_a[:1]))[0]
    torch.testing.assert_close(queries[:7], expected, rtol=1e-4, atol=1e-5)


def test_a_loss_on_the_embeddings_reaches_every_weight() -> None:
    model = Pix2Rep(SMALL)
    views = torch.rand(2, 2, 1, 32, 32)
    points = torch.rand(2, 2, 9, 2) * 31
    queries, keys = model(*views, *points)
    (queries * keys).square().sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())
    norms = {name: float(weight.grad.norm()) for name, weight in model.named_parameters() if weight.grad is not None}
    # The instance normalisation after a convolution cancels its bias.
    assert all(norm > 0 for name, norm in norms.items() if not name.endswith("conv.bias"))


@pytest.mark.parametrize(("dimensions", "level"), [(2, 1), (2, 2), (3, 1)])
def test_points_are_read_in_a_coarser_level_where_its_interpolation_shows_them(dimensions: int, level: int) -> None:
    torch.manual_seed(0)
    size = (32, 16, 16)[:dimensions]
    model = Pix2Rep(SMALL.model_copy(update={"level": level}), dimensions=dimensions)
    a, b = torch.rand(2, 1, 1, *size)
    points = torch.stack([torch.randint(0, side, (1, 40)) for side in size], -1).float()
    queries, keys = model(a, b, points, points)
    for view, found in ((a, queries), (b, keys)):
        mode = "bilinear" if dimensions == 2 else "trilinear"
        maps = nn.functional.interpolate(model.backbone(view), size=size, mode=mode, align_corners=False)
        torch.testing.assert_close(found, model.head(read_pixels(maps, points))[0], rtol=1e-4, atol=1e-5)


def test_mirrored_points_of_a_mirrored_coarse_map_are_the_same() -> None:
    maps = torch.randn(1, 3, 8, 8)
    points = torch.rand(1, 30, 2) * 31

    def coarse(points: Tensor) -> Tensor:
        return (points + 0.5) / 4 - 0.5

    torch.testing.assert_close(read_at(maps, coarse(points)), read_at(maps.flip(2, 3), coarse(31 - points)))


def test_three_dimensional_views_give_embeddings_of_their_points() -> None:
    model = Pix2Rep(SMALL, dimensions=3)
    a, b = torch.rand(2, 2, 1, 32, 16, 16)
    points = torch.randint(0, 16, (2, 9, 3)).float()
    queries, keys = model(a, b, points + 0.25, points)
    assert queries.shape == keys.shape == (18, 5)
    torch.testing.assert_close(
        keys[9:], model.head(read_at(model.backbone(b[1:]), points[1:]))[0], rtol=1e-4, atol=1e-5
    )


def test_the_projection_head_computes_in_float32_and_rounds_once() -> None:
    torch.manual_seed(0)
    head = ProjectionHead(6, 10, 5).bfloat16()
    features = torch.randn(4, 9, 6)
    found = head(features)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, head.float()(features).bfloat16())


@pytest.mark.parametrize(("dimensions", "level"), [(2, 0), (2, 2), (3, 0), (3, 1)])
def test_a_segmenter_has_a_logit_for_every_pixel_whatever_level_it_reads(dimensions: int, level: int) -> None:
    backbone = build_backbone(SMALL.model_copy(update={"level": level}), dimensions=dimensions)
    segmenter = Segmenter(backbone, SegmentationHead(6, 4, dimensions=dimensions))
    image = torch.rand(1, 1, 32, *[16] * (dimensions - 1))
    assert segmenter(image).shape == (1, 4, *image.shape[2:])


def test_the_projection_head_does_not_mix_points() -> None:
    head = ProjectionHead(6, 10, 5)
    features = torch.randn(4, 9, 6)
    torch.testing.assert_close(head(features)[2, 3], head(features[2, 3]))


class Pointwise(nn.Module):
    """A pointwise backbone, which is equivariant to any warp onto whole pixels."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([image, image.sin(), image**2, image.cos(), image**3, image.exp()], dim=1)


def test_an_equivariant_backbone_gives_equal_queries_and_keys() -> None:
    model = Pix2Rep(SMALL)
    model.backbone = Pointwise()
    a = torch.rand(1, 1, 32, 32)
    b = a.rot90(1, (2, 3))
    points_b = torch.randint(0, 32, (1, 20, 2)).float()
    points_a = torch.stack([points_b[..., 1], 31 - points_b[..., 0]], -1)
    queries, keys = model(a, b, points_a, points_b)
    torch.testing.assert_close(queries, keys)


def test_only_a_frozen_backbone_keeps_the_statistics_of_its_batch_normalisation() -> None:
    backbone = nn.Sequential(nn.Conv2d(1, 6, 1), nn.BatchNorm2d(6), nn.Dropout(0.5))
    segmenter = Segmenter(backbone.requires_grad_(False), SegmentationHead(6, 4))
    image = torch.rand(2, 1, 8, 8)
    before = segmenter.eval()(image)
    segmenter.train()
    assert segmenter.head.training and torch.equal(segmenter(image), before)
    assert torch.equal(segmenter.eval()(image), before)
    backbone.requires_grad_(True)
    assert not torch.equal(segmenter.train()(image), before)


def test_a_frozen_backbone_stores_no_activations() -> None:
    backbone = build_backbone(SMALL)
    segmenter = Segmenter(backbone, SegmentationHead(6, 4))
    logits = segmenter(torch.rand(2, 1, 32, 32))
    assert logits.shape == (2, 4, 32, 32)
    backbone.requires_grad_(False)
    assert not backbone(torch.rand(2, 1, 32, 32)).requires_grad
    segmenter(torch.rand(2, 1, 32, 32)).sum().backward()
    assert all(weight.grad is None for weight in backbone.parameters())
    assert all(weight.grad is not None for weight in segmenter.head.parameters())
