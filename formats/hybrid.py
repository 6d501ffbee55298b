"""Hybrid MXFP8: MXFP8 whose groups all have one exponent, so that one number scales the whole tensor as well.

A reader that knows groups multiplies a code by its group's scale, one that does not by ``.weight_scalar``: both get the
same number, bit for bit, because both multiply by the same power of two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .elements import E4M3, e8m0_ceil, e8m0_decode, e8m0_inverse
from .format import Scales, Stats
from .mxfp8 import Mxfp8


@dataclass(frozen=True)
class HybridMxfp8(Mxfp8):
    """The exponent is that of the largest weight, as MXFP8 would choose it for one group of everything.

    Every group has it, groups of zeros too; a tensor of zeros has exponent 0, scale 1. Padding that holds no weights
    keeps the byte 0 of MXFP8: codes there are 0 under any scale.
    """

    two_pass: ClassVar[bool] = True
    one_scale: ClassVar[bool] = True

    def whole(self, stats: Stats, search: bool) -> torch.Tensor:
        """Float32 (): the scale of the tensor, from 2**-126 on."""
        return torch.where(stats.amax > 0, e8m0_decode(e8m0_ceil(stats.amax, E4M3.largest)), 1.0)

    def scales(self, amax: torch.Tensor, whole: torch.Tensor | None) -> Scales:
        assert whole is not None
        exponent = (whole.view(torch.int32) >> 23).expand(amax.shape).contiguous()
        return Scales(exponent.to(torch.uint8), e8m0_decode(exponent), e8m0_inverse(exponent))
