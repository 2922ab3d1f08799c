"""Operators for which CUDA has no deterministic implementation, as PyTorch documents them."""

import re
from collections.abc import Iterable

NOT_DETERMINISTIC = {
    "torch.nn.AvgPool3d": "avg_pool3d_backward",
    "torch.nn.AdaptiveAvgPool2d": "_adaptive_avg_pool2d_backward",
    "torch.nn.AdaptiveAvgPool3d": "_adaptive_avg_pool3d_backward",
    "torch.nn.AdaptiveMaxPool2d": "adaptive_max_pool2d_backward",
    "torch.nn.FractionalMaxPool2d": "fractional_max_pool2d_backward",
    "torch.nn.FractionalMaxPool3d": "fractional_max_pool3d_backward",
    "torch.nn.MaxUnpool1d": "max_unpool2d",
    "torch.nn.MaxUnpool2d": "max_unpool2d",
    "torch.nn.MaxUnpool3d": "max_unpool3d",
    "torch.nn.functional.interpolate": r"upsample_(linear1d|bilinear2d|bicubic2d|trilinear3d)_backward",
    "torch.nn.ReflectionPad1d": "reflection_pad1d_backward",
    "torch.nn.ReflectionPad2d": "reflection_pad2d_backward",
    "torch.nn.ReflectionPad3d": "reflection_pad3d_backward",
    "torch.nn.NLLLoss": r"nll_loss\w*",
    "torch.nn.CTCLoss": r"_ctc_loss_backward",
    "torch.nn.EmbeddingBag": r"_embedding_bag\w*",
    "torch.Tensor.put_": "put_",
    "torch.histc": "histc",
    "torch.bincount": "bincount",
    "torch.median": "median",
    "torch.nn.functional.grid_sample": r"grid_sampler_[23]d_backward",
    "torch.cumsum": r"cumsum_? of floating point",
    "torch.Tensor.scatter_reduce": r"scatter_reduce_?",
    "torch.Tensor.resize_": "resize_ of quantized",
}
"""Names in the documentation of `torch.use_deterministic_algorithms`, and patterns of their ATen operators."""


def not_deterministic(operators: Iterable[str]) -> list[str]:
    """Return the ATen operators that raise on CUDA if algorithms must be deterministic."""
    raising = re.compile("|".join(NOT_DETERMINISTIC.values()))
    return sorted(name for name in operators if raising.fullmatch(name))
