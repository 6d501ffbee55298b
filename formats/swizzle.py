"""The blocked scale layout of cuBLAS: (128, 4) tiles of 512 bytes, row-major over (row tile, column tile).

Inside a tile, element (r, c) lies at (r % 32) * 16 + (r // 32) * 4 + c.
Source: NVIDIA cuBLAS, block scaling factors layout.
"""

from __future__ import annotations

import torch

from .format import ceil_to

TILE_ROWS = 128
TILE_COLUMNS = 4


def swizzled_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """Shape of the padded scale matrix: rows up to 128s, columns up to 4s."""
    return ceil_to(shape[0], TILE_ROWS), ceil_to(shape[1], TILE_COLUMNS)


def swizzle(scales: torch.Tensor) -> torch.Tensor:
    """One-byte scales (R, C), row-major -> the same zero-padded, in tile order, as (R up to 128s, C up to 4s)."""
    rows, columns = swizzled_shape((scales.shape[0], scales.shape[1]))
    padded = torch.zeros(rows, columns, dtype=torch.uint8, device=scales.device)
    padded[: scales.shape[0], : scales.shape[1]] = scales.view(torch.uint8)
    tiles = padded.view(rows // 128, 4, 32, columns // 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(rows, columns)


def unswizzle(stored: torch.Tensor) -> torch.Tensor:
    """Inverse of ``swizzle``; the padding stays."""
    rows, columns = stored.shape
    tiles = stored.view(torch.uint8).view(rows // 128, columns // 4, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(rows, columns)
