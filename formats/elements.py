"""Element grids: the numbers that one stored code can mean, and rounding to the nearest of them.

Sources: OCP 8-bit Floating Point Specification (E4M3, E5M2), OCP Microscaling Formats (E2M1, E8M0).
Rounding is to nearest, ties to even, saturating, in exact integer or IEEE arithmetic: a CPU and a GPU give equal codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from .scratch import scratch

# Operands of integer operations on chunks: as tensors they save torch a conversion at each call.
_EXPONENT, _TWELVE_BITS, _EVEN, _22, _28 = (
    torch.tensor(value, dtype=torch.int32) for value in (0x7F800000, -(1 << 12), -2, 22, 28)
)


@dataclass(frozen=True)
class Element:
    """An element grid."""

    name: str
    """Standard name, for example ``E4M3``."""
    dtype: str
    """safetensors dtype of the codes."""
    largest: float
    """Largest finite magnitude; an amax is scaled onto it."""
    mantissa: int = 0
    """Mantissa bits after the leading one (floating-point grids)."""
    smallest_normal: float = 0.0
    """Below this the grid is uniform (floating-point grids)."""

    @cached_property
    def values(self) -> torch.Tensor:
        """Float32 value of each code."""
        if self.dtype == "F4":
            values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
            return torch.cat((values, -values))
        codes = torch.arange(256, dtype=torch.uint8)
        types = {"I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
        return codes.view(types[self.dtype]).float()

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Float32 values of ``codes`` (one byte each), looked up: torch's own cast from E4M3 is six times slower."""
        indices = codes.view(torch.uint8).int().reshape(-1)
        return torch.index_select(self.values.to(codes.device), 0, indices).view(codes.shape)

    def encode_(self, x: torch.Tensor) -> torch.Tensor:
        """One-byte codes nearest to ``x`` (float32, any shape, already divided by its scale). Destroys ``x``."""
        x.clamp_(-self.largest, self.largest)
        if self.dtype == "I8":
            return x.round_().to(torch.int8)
        return x.to(torch.float8_e4m3fn if self.dtype == "F8_E4M3" else torch.float8_e5m2)

    def round_(self, x: torch.Tensor, spare: torch.Tensor | None = None) -> torch.Tensor:
        """Grid values nearest to float32 ``x`` of either sign, saturating, in place: ties to even.

        Half as much again as in ``nearest_`` is added, so that the sum of a negative number stays in the binade where
        a last place is one grid step; that even multiple of the step leaves ties to even as they are.
        """
        x.clamp_(-self.largest, self.largest)
        if self.dtype == "I8":
            return x.round_()
        binade = self.binade(x, spare)
        alpha = 1.5 * 2.0 ** (23 - self.mantissa)
        return x.add_(binade, alpha=alpha).sub_(binade, alpha=alpha)

    def nearest_(self, x: torch.Tensor) -> torch.Tensor:
        """Grid values nearest to ``x`` >= 0 (float32, contiguous), in place; beyond ``largest`` the grid goes on.

        Adding 2**(23 - mantissa) times a number's own power of two leaves just the bits of its grid step, rounded
        to nearest even. ``alpha`` is a power of two, so a fused and an unfused multiply-add give the same sum.
        """
        binade = self.binade(x)
        alpha = 2.0 ** (23 - self.mantissa)
        return x.add_(binade, alpha=alpha).sub_(binade, alpha=alpha)

    def binade(self, x: torch.Tensor, spare: torch.Tensor | None = None) -> torch.Tensor:
        """Per element of ``x`` the power of two in it, at least ``smallest_normal``, in ``spare`` or scratch memory."""
        binade = scratch("binade", x.shape, x.dtype, x.device) if spare is None else spare
        torch.bitwise_and(x.view(torch.int32), _EXPONENT, out=binade.view(torch.int32))
        return binade.clamp_(min=self.smallest_normal)

    def squared_error(self, x: torch.Tensor, out: torch.Tensor, spare: torch.Tensor) -> torch.Tensor:
        """Squared distances of ``x`` >= 0 to the grid, which goes on beyond ``largest``, into ``out``.

        Here the number itself serves where ``nearest_`` takes its power of two. That needs the last mantissa bit of
        ``x`` to be 0: should the sum reach the next power of two, where its last place is worth twice as much, then
        what was added is a multiple of that, too. (A number just below a power of two whose last bit is 1 would seem
        half a step off. Candidate scales are cut to 12 bits, so that no common kind of weights leads there.)
        """
        alpha = 2.0 ** (23 - self.mantissa)
        torch.clamp(x, min=self.smallest_normal, out=spare)
        return torch.add(x, spare, alpha=alpha, out=out).sub_(spare, alpha=alpha).sub_(x).square_()


E4M3 = Element("E4M3", "F8_E4M3", 448.0, 3, 2.0**-6)
E5M2 = Element("E5M2", "F8_E5M2", 57344.0, 2, 2.0**-14)
E2M1 = Element("E2M1", "F4", 6.0, 1, 1.0)
INT8 = Element("INT8", "I8", 127.0)


def shorten_(scale: torch.Tensor) -> torch.Tensor:
    """``scale`` > 0 cut to 12 significant bits, in place: its products with half-precision weights are exact."""
    scale.view(torch.int32).bitwise_and_(_TWELVE_BITS)
    return scale


def clear_last_bit_(x: torch.Tensor) -> torch.Tensor:
    """``x`` with its last mantissa bit 0, in place."""
    x.view(torch.int32).bitwise_and_(_EVEN)
    return x


def e2m1_encode_(x: torch.Tensor) -> torch.Tensor:
    """Packed E2M1 codes (uint8, (r, n / 2), the first of two in the low nibble) nearest to float32 ``x`` (r, n).

    Destroys ``x``. The sign of a zero is kept: -0.0 gives code 8.
    """
    bits = x.view(torch.int32)
    high = scratch("binade", x.shape, torch.int32, x.device)
    codes, sign = scratch("e2m1", (2, *x.shape), torch.uint8, x.device)
    sign.copy_(torch.bitwise_right_shift(bits, _28, out=high)).bitwise_and_(8)
    x.abs_().clamp_(max=E2M1.largest)
    # As in ``nearest_``, but the power of two stays: the lowest bits of the sum count grid steps inside the binade,
    # and each binade (its exponent starts at 127 + 22) stands for two codes.
    x.add_(E2M1.binade(x), alpha=2.0**22)
    codes.copy_(bits.add_(torch.bitwise_right_shift(bits, _22, out=high)))
    pairs = codes.sub_(2 * (127 + 22) % 256).bitwise_or_(sign).view(torch.int16)
    packed: torch.Tensor = torch.bitwise_right_shift(pairs, 4).bitwise_or_(pairs)
    return packed.to(torch.uint8)


def e8m0_ceil(amax: torch.Tensor, largest: float) -> torch.Tensor:
    """Biased E8M0 exponents (int32): the smallest power of two that brings ``amax`` down to ``largest`` = m * 2**k.

    Integer arithmetic on the float32 bits: ``exponent(amax) - k + (mantissa(amax) > mantissa(m))``. A floating-point
    logarithm loses the last ulps above a power of two and then saturates the block. A zero block gets 0. Clients
    decode byte 0 as 0.0, so every other block gets at least 1 (2**-126).
    """
    reference = torch.tensor(largest, dtype=torch.float32).view(torch.int32).item()
    bits = amax.view(torch.int32)
    exponent = (bits >> 23) - ((int(reference) >> 23) - 127) + ((bits & 0x7FFFFF) > (int(reference) & 0x7FFFFF)).int()
    return torch.where(amax > 0, exponent.clamp_(1, 254), 0)


def e8m0_decode(exponent: torch.Tensor) -> torch.Tensor:
    """Float32 multipliers 2**(e - 127) of biased exponents (uint8 or int32); byte 0 is 0.0, as in comfy-kitchen."""
    return (exponent.to(torch.int32) << 23).view(torch.float32)


def e8m0_inverse(exponent: torch.Tensor) -> torch.Tensor:
    """Float32 2**(127 - e), exact for 1 <= e <= 253; for e = 254 the subnormal 2**-127; 0 for byte 0."""
    inverse = ((254 - exponent).clamp_(min=0) << 23).view(torch.float32)
    inverse = torch.where(exponent == 254, torch.full((), 2.0**-127, device=inverse.device), inverse)
    return torch.where(exponent > 0, inverse, 0.0)
