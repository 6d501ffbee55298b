"""How one quantized layer lies in a file: which tensors, in which layout; and decoding ranges of its rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .format import Format, ceil_to
from .registry import make_format
from .rotation import rotate_
from .swizzle import TILE_ROWS, unswizzle
from .tensors import TensorRef


@dataclass(frozen=True)
class Layout:
    """What a dialect decides about canonical codes and scales."""

    swizzled: bool = False
    """Scales in cuBLAS tile order, padded, instead of row-major."""
    high_nibble_first: bool = False
    """NVFP4: the first of two weights in the high half of the byte."""
    divisor: bool = False
    """NVFP4: the stored tensor scale divides instead of multiplying."""


@dataclass(frozen=True)
class Encoding:
    """A quantized layer of an input."""

    dialect: str
    """comfy, legacy, fp8-block, compressed-tensors, plain-fp8."""
    format: tuple[str, str, int | None]
    """Arguments of ``make_format``."""
    shape: tuple[int, int]
    """Logical shape of the weight, without padding."""
    codes: TensorRef
    scales: TensorRef | None = None
    """None: the codes are the numbers."""
    whole: TensorRef | None = None
    """NVFP4's scale of the tensor."""
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
        if whole is not None:
            whole = (1.0 / whole if self.layout.divisor else whole).reshape(())
        codes = self._canonical_codes(built, codes)
        multiplier = built.multiplier(self._canonical_scales(built, rows, scales), whole)
        width = self.shape[1]
        x = built.decode(codes, multiplier)[:, :width]
        return rotate_(x.contiguous(), self.rotation) if self.rotation else x

    def _canonical_codes(self, built: Format, codes: torch.Tensor) -> torch.Tensor:
        if self.layout.high_nibble_first:
            codes = (codes << 4) | (codes >> 4)
        if built.scaling == "block" and built.block_size:
            padding = -codes.shape[1] % built.block_size
            codes = torch.nn.functional.pad(codes.view(torch.uint8), (0, padding)).view(codes.dtype)
        return codes

    def _canonical_scales(self, built: Format, rows: tuple[int, int], scales: torch.Tensor) -> torch.Tensor:
        start, stop = rows
        if scales.numel() == 1 and built.scaling != "group":
            return scales.reshape(())
        if self.layout.swizzled:
            groups = built.columns(self.shape[1]) // (built.block_size or 1)
            first = self.scale_range(start, stop)[0]
            plain = unswizzle(scales)[start - first : stop - first, :groups].contiguous()
            return plain.view(torch.float8_e4m3fn) if built.scale_dtype == "F8_E4M3" else plain
        if built.scaling == "row":
            return scales.reshape(-1)
        if built.scaling == "block" and built.block_size:
            index = torch.arange(start, stop, device=scales.device) // built.block_size - start // built.block_size
            return scales[index]
        return scales
