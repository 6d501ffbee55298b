"""MXFP8: E4M3 codes, one E8M0 (power of two) scale per 32 consecutive weights of a row (OCP MX specification)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .elements import E4M3, Element, e8m0_ceil, e8m0_decode, e8m0_inverse
from .format import Format, Scales, Stats
from .reduce import absmax


@dataclass(frozen=True)
class Mxfp8(Format):
    """The exponent is rounded up, so no weight saturates; searching others does not lower the error."""

    element: ClassVar[Element] = E4M3
    code_dtype: ClassVar[str] = "F8_E4M3"
    scale_dtype: ClassVar[str] = "U8"

    def amax(self, x: torch.Tensor) -> torch.Tensor:
        return absmax(x.view(x.shape[0], -1, 32))

    def whole(self, stats: Stats, search: bool) -> torch.Tensor:
        raise NotImplementedError("MXFP8 has no scale of the whole tensor")

    def scales(self, amax: torch.Tensor, whole: torch.Tensor | None) -> Scales:
        exponent = e8m0_ceil(amax, E4M3.largest)
        return Scales(exponent.to(torch.uint8), e8m0_decode(exponent), e8m0_inverse(exponent))

    def encode_(self, x: torch.Tensor, scales: Scales) -> torch.Tensor:
        assert scales.inverse is not None
        x.view(x.shape[0], -1, 32).mul_(scales.inverse[:, :, None])
        return E4M3.encode_(x)

    def multiplier(self, stored: torch.Tensor, whole: torch.Tensor | None) -> torch.Tensor:
        return e8m0_decode(stored)

    def decode(self, codes: torch.Tensor, multiplier: torch.Tensor) -> torch.Tensor:
        x = E4M3.decode(codes)
        x.view(x.shape[0], -1, 32).mul_(multiplier[:, :, None])
        return x
