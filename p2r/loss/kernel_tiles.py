"""Sizes of the tiles of the loss kernels: which fit a GPU, and which is best.

Shape letters: E channels.
"""

from dataclasses import dataclass

import torch
import triton

from p2r.loss.tiles import Rows

CHANNELS = {torch.bfloat16: (16, 32, 64, 128, 256, 512), torch.float16: (16, 32, 64, 128), torch.float32: (32, 64, 128)}
"""Values of E for which the tests compile the kernels, by dtype; others use the torch tiles."""
_INTERPRETER_SHARED_BYTES = 232_448  # shared memory of an H100


@dataclass(frozen=True)
class Tile:
    """Size of a tile, and its compile options."""

    block_anchors: int
    block_candidates: int
    num_warps: int
    num_stages: int
    by_descriptor: bool = False
    """In `push`, load candidates by descriptor, so that their addresses take no registers. Not on all GPUs."""

    def options(self, channels: int) -> dict[str, int]:
        """Return the constants of a launch."""
        return {
            "BLOCK_A": self.block_anchors,
            "BLOCK_C": self.block_candidates,
            "E": channels,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }

    def shared_bytes(self, dtype: torch.dtype, channels: int) -> int:
        """Estimate the shared memory of a program: the block of anchors, and a candidate tile per stage."""
        rows = self.block_anchors + self.num_stages * self.block_candidates
        # Weights of more than two bytes go through shared memory.
        weights = 0 if dtype == torch.bfloat16 else 4 * self.block_anchors * self.block_candidates
        return rows * channels * dtype.itemsize + weights + 2048


SUMS_TILES: dict[int, tuple[Tile, ...]] = {
    256: (Tile(128, 64, 4, 3), Tile(128, 64, 8, 2)),
    512: (Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
    1024: (Tile(64, 64, 8, 2),),
}
PUSH_TILES: dict[int, tuple[Tile, ...]] = {
    128: (Tile(128, 64, 4, 3), Tile(128, 64, 8, 2)),
    256: (Tile(128, 128, 8, 3), Tile(128, 64, 8, 2)),
    512: (Tile(128, 64, 8, 2, by_descriptor=True), Tile(64, 64, 8, 2), Tile(64, 32, 8, 2)),
    1024: (Tile(64, 32, 8, 2, by_descriptor=True),),
}
"""Tiles by the maximum bytes of a row, in order of preference: a GPU uses the first tile that it supports. With 128
anchors instead of 64, half as much is read from the L2 cache."""


def fitting_tiles(
    table: dict[int, tuple[Tile, ...]],
    dtype: torch.dtype,
    channels: int,
    limit: int,
    *,
    has_image: bool,
    descriptors: bool,
) -> tuple[Tile, ...]:
    """Return the tiles of a table that a GPU supports, best first.

    Args:
        table: Tiles by bytes of a row.
        dtype: Type of the rows.
        channels: E.
        limit: Shared memory of a program, bytes.
        has_image: True if rows of an image are masked.
        descriptors: True if the GPU can load by descriptor.
    """
    tiles = table[min(most for most in table if most >= channels * dtype.itemsize)]
    if has_image or dtype != torch.bfloat16:  # masks, and weights of four bytes, need the registers of larger tiles
        tiles = tuple(tile for tile in tiles if tile.num_warps == 8 and tile.block_candidates <= 64)
    return tuple(
        tile
        for tile in tiles
        if tile.shared_bytes(dtype, channels) <= limit and (descriptors or not tile.by_descriptor)
    )


def choose_tile(table: dict[int, tuple[Tile, ...]], anchors: Rows) -> Tile:
    """Return the best tile of a table for these rows on their device."""
    values = anchors.values
    return fitting_tiles(
        table,
        values.dtype,
        values.shape[1],
        shared_limit(values.device),
        has_image=anchors.image is not None,
        descriptors=has_descriptors(values.device),
    )[0]


def shared_limit(device: torch.device) -> int:
    """Return the limit of shared memory per program, in bytes."""
    if device.type != "cuda":
        return _INTERPRETER_SHARED_BYTES
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
    return int(properties["max_shared_mem"])


def has_descriptors(device: torch.device) -> bool:
    """Return whether programs can load a tile by its descriptor (TMA); the interpreter can."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)
