"""NVFP4: E2M1 codes, an E4M3 scale per 16 consecutive weights of a row, one float32 scale for the tensor.

A weight is ``code * block scale * tensor scale``. Work is done on planes, (16, blocks): the i-th weight of every block
side by side, so that a block's scale meets its weights in long contiguous runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .elements import E2M1_LARGEST, E4M3, e2m1_decode, e2m1_encode_, e2m1_nearest_
from .format import TINY, Format, Scales, Stats
from .reduce import absmax
from .scratch import scratch

_SEARCH_TOP = 256.0
"""Where the largest block scale lands when scales are searched: room above it for candidates up to 1.5 amax."""

_CANDIDATES = (1.0, 0.84, 0.92, 1.08, 1.16, 1.25, 1.33, 1.42, 1.5)
"""Block scales tried, relative to amax / 6."""

_SMALLEST_E4M3 = 2.0**-9


@dataclass(frozen=True)
class Nvfp4(Format):
    """Block scales are divided by the tensor scale and rounded to E4M3; a block that rounds to scale 0 is all zeros."""

    code_dtype: ClassVar[str] = "U8"
    scale_dtype: ClassVar[str] = "F8_E4M3"
    two_pass: ClassVar[bool] = True

    @property
    def searches(self) -> bool:
        return True

    def code_columns(self, n: int) -> int:
        return n // 2

    def amax(self, x: torch.Tensor) -> torch.Tensor:
        return absmax(x.view(x.shape[0], -1, 16), dim=2)

    def whole(self, stats: Stats, search: bool) -> torch.Tensor:
        top = _SEARCH_TOP if search else E4M3.largest
        return torch.where(stats.amax > 0, stats.amax.clamp(min=TINY) / (top * E2M1_LARGEST), 1.0)

    def scales(self, amax: torch.Tensor, whole: torch.Tensor | None) -> Scales:
        assert whole is not None
        stored = (amax / E2M1_LARGEST / whole).clamp_(max=E4M3.largest).to(torch.float8_e4m3fn)
        return Scales(stored, stored.float() * whole)

    def search(self, x: torch.Tensor, amax: torch.Tensor, whole: torch.Tensor | None) -> Scales:
        assert whole is not None
        planes = _planes(x).abs_()
        buffer, delta = (scratch(key, planes.shape, planes.dtype, planes.device) for key in ("nv_y", "nv_delta"))
        base = (amax / E2M1_LARGEST / whole).view(-1)
        best_error = torch.full_like(base, torch.inf)
        best = torch.zeros_like(base)
        for ratio in _CANDIDATES:
            candidate = (base * ratio).clamp_(_SMALLEST_E4M3, E4M3.largest).to(torch.float8_e4m3fn).float()
            step = candidate * whole
            torch.mul(planes, 1.0 / step, out=buffer)
            e2m1_nearest_(delta.copy_(buffer)).sub_(buffer).square_()
            for half in (8, 4, 2, 1):
                delta[:half] += delta[half : 2 * half]
            error = delta[0] * step * step
            better = error < best_error
            best = torch.where(better, candidate, best)
            best_error = torch.where(better, error, best_error)
        best = torch.where(base > 0, best, 0.0).view(amax.shape)
        return Scales(best.to(torch.float8_e4m3fn), best * whole)

    def encode_(self, x: torch.Tensor, scales: Scales) -> torch.Tensor:
        step = scales.multiplier.view(-1)
        planes = _planes(x).div_(torch.where(step > 0, step, torch.inf))
        codes = e2m1_encode_(planes, (step > 0).int() * 8)
        pairs = codes[1::2].bitwise_left_shift_(4).bitwise_or_(codes[0::2])
        packed = torch.empty(pairs.shape[1], 8, dtype=torch.uint8, device=x.device)
        return packed.copy_(pairs.t()).view(x.shape[0], -1)

    def multiplier(self, stored: torch.Tensor, whole: torch.Tensor | None) -> torch.Tensor:
        assert whole is not None
        return stored.float() * whole

    def decode(self, codes: torch.Tensor, multiplier: torch.Tensor) -> torch.Tensor:
        x = e2m1_decode(torch.stack((codes & 15, codes >> 4), dim=-1)).view(codes.shape[0], -1)
        x.view(x.shape[0], -1, 16).mul_(multiplier[:, :, None])
        return x


def _planes(x: torch.Tensor) -> torch.Tensor:
    """(16, blocks) copy of the rows in scratch memory."""
    blocks = x.view(-1, 16)
    return scratch("nv_planes", (16, blocks.shape[0]), x.dtype, x.device).copy_(blocks.t())
