"""Element grids: the numbers that one stored code can mean, and rounding to the nearest of them.

Sources: OCP 8-bit Floating Point Specification (E4M3, E5M2), OCP Microscaling Formats (E2M1, E8M0).
Rounding is to nearest, ties to even, saturating, in exact integer or IEEE arithmetic: a CPU and a GPU give equal codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_EXPONENT = 0x7F800000
_ONE = 127 << 23


@dataclass(frozen=True)
class Element:
    """A one-byte element grid."""

    name: str
    """Standard name, for example ``E4M3``."""
    dtype: str
    """safetensors dtype of the codes."""
    largest: float
    """Largest finite magnitude; an amax is scaled onto it."""

    def encode_(self, x: torch.Tensor) -> torch.Tensor:
        """Codes nearest to ``x`` (float32, any shape, already divided by its scale). Destroys ``x``."""
        x.clamp_(-self.largest, self.largest)
        if self.dtype == "I8":
            return x.round_().to(torch.int8)
        return x.to(torch.float8_e4m3fn if self.dtype == "F8_E4M3" else torch.float8_e5m2)

    def nearest_(self, x: torch.Tensor) -> torch.Tensor:
        """Grid values nearest to ``x``, in place (float32)."""
        return x.copy_(self.encode_(x))


E4M3 = Element("E4M3", "F8_E4M3", 448.0)
E5M2 = Element("E5M2", "F8_E5M2", 57344.0)
INT8 = Element("INT8", "I8", 127.0)

E2M1_LARGEST = 6.0
_E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _magic(x: torch.Tensor) -> torch.Tensor:
    """Per element a power of two so large that adding it leaves just the bits of E2M1's step at ``x`` >= 0 (int32 view).

    The step is 0.5 below 2, 1 below 4, 2 above: one mantissa bit of the binade, and that of 1.0 for subnormals.
    """
    bits = torch.bitwise_and(x.view(torch.int32), _EXPONENT)
    return bits.clamp_(min=_ONE).add_(22 << 23)


def e2m1_nearest_(x: torch.Tensor) -> torch.Tensor:
    """Rounds non-negative float32 ``x`` to the E2M1 grid {0, .5, 1, 1.5, 2, 3, 4, 6}, in place."""
    magic = _magic(x).view(torch.float32)
    return x.add_(magic).sub_(magic).clamp_(max=E2M1_LARGEST)


def e2m1_encode_(x: torch.Tensor, sign_bit: torch.Tensor) -> torch.Tensor:
    """Four-bit E2M1 codes (int32, sign in bit 3) nearest to float32 ``x``, in its memory. Destroys ``x``.

    The sign of a zero is kept: -0.0 gives code 8. ``sign_bit`` (int32, broadcastable): 8, or 0 where all codes are 0.
    """
    sign = (x.view(torch.int32) >> 28).bitwise_and_(sign_bit)
    x.abs_().clamp_(max=E2M1_LARGEST)
    magic = _magic(x)
    steps = x.add_(magic.view(torch.float32)).view(torch.int32).sub_(magic)
    binade = magic.sub_((127 + 22) << 23).bitwise_right_shift_(22)
    return steps.add_(binade).bitwise_or_(sign)


def e2m1_decode(codes: torch.Tensor) -> torch.Tensor:
    """Float32 values of four-bit codes (uint8, one code a byte)."""
    table = torch.tensor([*_E2M1_VALUES, *(-value for value in _E2M1_VALUES)], device=codes.device)
    return table[codes.int()]


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
    """Float32 multipliers 2**(e - 127) of biased exponents (uint8 or int32); byte 0 decodes as 0.0, as in comfy-kitchen."""
    return (exponent.to(torch.int32) << 23).view(torch.float32)


def e8m0_inverse(exponent: torch.Tensor) -> torch.Tensor:
    """Float32 2**(127 - e), exact for 1 <= e <= 253; for e = 254 the subnormal 2**-127; 0 for byte 0."""
    inverse = ((254 - exponent).clamp_(min=0) << 23).view(torch.float32)
    inverse = torch.where(exponent == 254, torch.tensor(2.0**-127, device=inverse.device), inverse)
    return torch.where(exponent > 0, inverse, 0.0)
