"""How one quantized layer lies in a file: which tensors, in which layout; and decoding ranges of its rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .format import Format, ceil_to
from .record import Record
from .registry import make_format
from .rotation import rotate_
from .swizzle import TILE_ROWS, unswizzle
from .tensors import TensorRef, torch_dtype


@dataclass(frozen=True, slots=True)
class Layout(Record):
    """What a dialect decides about canonical codes and scales."""

    swizzled: bool = False
    """Scales in cuBLAS tile order, padded, instead of row-major."""
    high_nibble_first: bool = False
    """NVFP4: the first of two weights in the high half of the byte."""
    divisor: bool = False
    """NVFP4: the stored tensor scale divides instead of multiplying."""
    zero_exponent: float = 0.0
    """MXFP8: what exponent byte 0 means. ComfyUI decodes 0, the OCP specification 2**-127."""


@dataclass(frozen=True, slots=True)
class Encoding(Record):
    """A quantized layer of an input."""

    dialect: str
    """comfy, legacy, fp8-block, compressed-tensors, scaled (nothing says whose), plain-fp8."""
    format: tuple[str, str, int | None]
    """Arguments of ``make_format``."""
    shape: tuple[int, int]
    """Logical shape of the weight, without padding."""
    codes: TensorRef
    scales: TensorRef | None = None
    """None: the codes are the numbers."""
    whole: TensorRef | None = None
    """The scale of the tensor that NVFP4 and hybrid MXFP8 have."""
    layout: Layout = Layout()
    rotation: int | None = None
    """Order of the Hadamard matrix that the rows are rotated by."""

    def build(self) -> Format:
        """The Format that decodes this layer."""
        return make_format(*self.format)

    def scale_range(self, start: int, stop: int) -> tuple[int, int]:
        """Rows of the stored scales that weight rows ``start`` to ``stop`` need."""
        assert self.scales is not None
        if self.scales.numel == 1:
            return 0, self.scales.shape[0] if self.scales.shape else 1
        step = 1
        if self.layout.swizzled:
            step = TILE_ROWS
            return start // step * step, min(ceil_to(stop, step), self.scales.shape[0])
        if self.format[1] == "block" and self.format[2]:
            step = self.format[2]
        return start // step, -(-stop // step)

    def decode(self, rows: tuple[int, int], codes: torch.Tensor, scales: torch.Tensor | None,
               whole: torch.Tensor | None) -> torch.Tensor:  # fmt: skip
        """Float32 weights of ``rows``, exact to the format's definition, from their stored codes and scales.

        ``scales`` holds the rows that ``scale_range`` names, ``whole`` the stored tensor scale.
        """
        if scales is None:
            return codes.float()
        built = self.build()
        x = built.decode(self._canonical_codes(built, codes), self.multiplier(rows, scales, whole))[:, : self.shape[1]]
        return rotate_(x.contiguous(), self.rotation) if self.rotation else x

    def multiplier(self, rows: tuple[int, int], scales: torch.Tensor, whole: torch.Tensor | None) -> torch.Tensor:
        """Float32: what codes of ``rows`` are multiplied by, as ``Format.decode`` takes it; arguments of ``decode``."""
        built = self.build()
        scales = self._canonical_scales(built, rows, scales)
        if whole is None:
            multiplier = built.multiplier(scales, None)
            if self.layout.zero_exponent:
                multiplier = torch.where(scales == 0, self.layout.zero_exponent, multiplier)
            return multiplier
        number = whole.float().reshape(())
        if self.layout.divisor:
            return built.multiplier(scales, torch.ones_like(number)).div_(number)
        return built.multiplier(scales, number)

    def _canonical_codes(self, built: Format, codes: torch.Tensor) -> torch.Tensor:
        if self.layout.high_nibble_first:
            codes = (codes << 4) | (codes >> 4)
        if built.scaling == "block" and built.block_size:
            padding = -codes.shape[1] % built.block_size
            codes = torch.nn.functional.pad(codes.view(torch.uint8), (0, padding)).view(codes.dtype)
        return codes

    def _canonical_scales(self, built: Format, rows: tuple[int, int], scales: torch.Tensor) -> torch.Tensor:
        start, stop = rows
        if built.scaling == "group":
            if self.layout.swizzled:
                groups = built.columns(self.shape[1]) // (built.block_size or 1)
                first = self.scale_range(start, stop)[0]
                scales = unswizzle(scales)[start - first : stop - first, :groups].contiguous()
            return scales.view(torch_dtype(built.scale_dtype))
        scales = scales.float()
        if scales.numel() == 1:
            return scales.reshape(())
        if built.scaling == "row":
            return scales.reshape(-1)
        size = built.block_size or 1
        return scales[torch.arange(start, stop, device=scales.device) // size - start // size]
