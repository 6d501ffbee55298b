"""FP8 and INT8: one-byte codes with a float32 scale per tensor, row or square block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .elements import E4M3, E5M2, INT8, Element, clear_last_bit_, shorten_
from .format import TINY, Format, Scales, Stats
from .reduce import absmax, divide, halvings, least, tree_sum_
from .scratch import scratch, tiles

_PHASES = 8
"""Scales that a search tries."""

_PARTIAL = 128
"""Sums per row that are left for all candidates together: short additions cost their calls."""

_ZERO_AMAX = 1e-12
"""The amax that a group of zeros is given, so that its scale is a valid number."""


def _safe(amax: torch.Tensor) -> torch.Tensor:
    return torch.where(amax > 0, amax.clamp(min=TINY), _ZERO_AMAX)


@dataclass(frozen=True)
class ScaledFormat(Format):
    """Codes of one element grid times a float32 scale."""

    scale_dtype: ClassVar[str] = "F32"

    def amax(self, x: torch.Tensor) -> torch.Tensor:
        if self.scaling == "tensor":
            low, high = torch.aminmax(x)
            return torch.maximum(-low, high)
        if self.scaling == "row":
            return absmax(x)
        return absmax(self.shaped(x)).amax(1)

    def encode_(self, x: torch.Tensor, scales: Scales) -> torch.Tensor:
        shaped = self.shaped(x)
        if scales.inverse is None:
            shaped.div_(self.spread(scales.multiplier))
        else:
            shaped.mul_(self.spread(scales.inverse))
        return self.element.encode_(x)

    def multiplier(self, stored: torch.Tensor, whole: torch.Tensor | None) -> torch.Tensor:
        return stored.float()

    def decode(self, codes: torch.Tensor, multiplier: torch.Tensor) -> torch.Tensor:
        x = self.element.decode(codes)
        if multiplier.dim() < 2:
            return x.mul_(multiplier[:, None] if multiplier.dim() else multiplier)
        x.view(x.shape[0], multiplier.shape[1], -1).mul_(multiplier[:, :, None])
        return x


@dataclass(frozen=True)
class Fp8(ScaledFormat):
    """FP8 E4M3, scaled so that amax meets 448. The stored scale is the reciprocal of the rounded 448 / amax."""

    element: ClassVar[Element] = E4M3
    code_dtype: ClassVar[str] = "F8_E4M3"
    ratios: ClassVar[tuple[float, ...]] = tuple(2.0 ** (step / 16) for step in range(16))

    @property
    def searches(self) -> bool:
        return True

    def whole(self, stats: Stats, search: bool) -> torch.Tensor:
        inverse = self.element.largest / _safe(stats.amax)
        return self._phase(stats.sample[None], inverse[None])[0] if search else inverse

    def scales(self, amax: torch.Tensor, whole: torch.Tensor | None) -> Scales:
        inverse = self.element.largest / _safe(amax) if whole is None else whole
        stored = 1.0 / inverse
        return Scales(stored, stored, inverse)

    def search(self, x: torch.Tensor, amax: torch.Tensor, whole: torch.Tensor | None) -> Scales:
        if whole is not None:
            return self.scales(amax, whole)
        groups = x
        if self.scaling == "block":
            tiled = self.shaped(x).transpose(1, 2)
            groups = scratch("fp8_groups", tiled.shape, x.dtype, x.device).copy_(tiled).view(amax.numel(), -1)
        inverse = self._phase(groups, self.element.largest / _safe(amax).view(-1)).view(amax.shape)
        stored = 1.0 / inverse
        return Scales(stored, stored, inverse)

    def _phase(self, groups: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        """Of the scales amax / 448 * 2**(i / 8), i = 0..7, the inverse of the one with the least squared error.

        Larger scales never clip; a fraction of an octave moves the mantissa grid under the weights, and a whole
        octave brings it back. ``inverse`` holds one value per row of ``groups``.
        """
        phases = torch.tensor([2.0 ** (-step / _PHASES) for step in range(_PHASES)], device=inverse.device)
        candidates = shorten_(inverse * phases[:, None])
        candidates[0] = inverse
        relative = candidates / inverse
        error = self._errors(groups, candidates).div_(relative).div_(relative)
        return least(error, candidates)

    def _errors(self, groups: torch.Tensor, inverses: torch.Tensor) -> torch.Tensor:
        """Squared errors (candidates, rows), in units of the scale."""
        error = torch.empty_like(inverses)
        for part in tiles(groups):
            shape = groups[part].shape
            x, scaled, delta, spare = scratch("fp8", (4, *shape), groups.dtype, groups.device)
            torch.abs(groups[part], out=x)
            steps, sums = halvings(delta, _PARTIAL)
            partial = scratch("fp8_partial", (len(inverses), *sums.shape), x.dtype, x.device)
            for step, (inverse, total) in enumerate(zip(inverses[:, part, None], partial, strict=True)):
                torch.mul(x, inverse, out=scaled)
                if step == 0:  # this one is not cut: its products with weights that were FP8 before are 2**k - 1 ulp
                    clear_last_bit_(scaled)
                self.element.squared_error(scaled, delta, spare)
                for left, right in steps:
                    left.add_(right)
                total.copy_(sums)
            error[:, part] = tree_sum_(partial)
        return error


@dataclass(frozen=True)
class Fp8E5M2(Fp8):
    """FP8 E5M2, scaled so that amax meets 57344."""

    element: ClassVar[Element] = E5M2
    code_dtype: ClassVar[str] = "F8_E5M2"


_ZERO_BLOCK = 1e-8
"""The scale that an INT8 block of zeros is given."""


@dataclass(frozen=True)
class Int8(ScaledFormat):
    """INT8, symmetric, amax at 127; -128 is never written.

    Without activations a scale below amax clips the few large weights that sit on strong channels, so ``mse`` keeps
    amax. Row scales are stored as 1 / (127 / amax), tensor and block scales as amax / 127.
    """

    element: ClassVar[Element] = INT8
    code_dtype: ClassVar[str] = "I8"
    clips: ClassVar[tuple[float, ...]] = tuple(step / 100 for step in (*range(98, 88, -2), *range(88, 30, -3)))

    def whole(self, stats: Stats, search: bool) -> torch.Tensor:
        return divide(_safe(stats.amax), self.element.largest)

    def scales(self, amax: torch.Tensor, whole: torch.Tensor | None) -> Scales:
        if whole is not None:
            return Scales(whole, whole, 1.0 / whole)
        if self.scaling == "row":
            inverse = self.element.largest / _safe(amax)
            stored = 1.0 / inverse
            return Scales(stored, stored, inverse)
        stored = torch.where(amax > 0, divide(amax.clamp(min=TINY), self.element.largest), _ZERO_BLOCK)
        return Scales(stored, stored)
