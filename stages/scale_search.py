"""Scales for weights whose errors count differently: a format's candidates, tried one after another.

Weights lie on their side here, as error feedback wants them: (n, r), one row of the matrix in each column. A scale is
spoken of by its peak, the magnitude that the largest code stands for: ``peak`` (G, r) belongs to G = n / g groups of g
consecutive columns (row and tensor scaling: one group), and where rows share scales, they hold equal peaks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..formats.format import Format, Scales, Stats, inverse_of
from ..formats.reduce import sums_
from .fused import kernels_for


@dataclass(frozen=True)
class Scaling:
    """How a format scales the columns of one problem."""

    format: Format
    whole: torch.Tensor | None
    """What groups have of the tensors that rows belong to: Float32 (r,), or () for one; tensor scaling has a peak
    instead."""

    @property
    def grouped(self) -> int:
        """Columns that are kept together, because they share a scale that others do not: 1 for row and tensor."""
        return self.format.block_size or 1

    @property
    def local(self) -> bool:
        """Whether scales belong to a group of one row, so that each can be chosen when its group is reached."""
        return self.format.scaling == "group" and not self.format.one_scale

    def scales(self, peak: torch.Tensor) -> Scales:
        """Scales of the same shape as ``peak``, element by element."""
        whole = self.whole
        if self.format.scaling == "tensor":
            whole = self.format.whole(Stats(peak, peak.flatten()[:0]), False)
        return self.format.scales(peak, whole)

    def steps(self, peak: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What a weight is multiplied by, and what its code is, as in ``Format.snap_``."""
        multiplier = self.scales(peak).multiplier
        return inverse_of(multiplier), multiplier

    def groups(self, x: torch.Tensor) -> torch.Tensor:
        """A view (G, g, r) of contiguous ``x`` (n, r)."""
        return x.view(-1, self.format.block_size or x.shape[0], x.shape[1])

    def amax(self, x: torch.Tensor) -> torch.Tensor:
        """(G, r) largest magnitudes of (n, r) weights, of whole tiles of rows."""
        amax = self.groups(x).abs().amax(1)
        tiles = amax.view(amax.shape[0], -1, self.format.rows_multiple)
        return tiles.amax(-1, keepdim=True).expand_as(tiles).reshape(amax.shape)

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """(G, r) sums over the rows that share a scale, given to each of them. Destroys ``x`` (G, r)."""
        tiles = x.view(x.shape[0], -1, self.format.rows_multiple)
        return sums_(tiles)[..., None].expand_as(tiles).reshape(x.shape)

    def round(self, x: torch.Tensor, peak: torch.Tensor) -> torch.Tensor:
        """(n, r) weights nearest to ``x`` under scales of ``peak``."""
        inverse, multiplier = self.steps(peak)
        rounded = self.groups(x) * inverse[:, None]
        self.format.element.round_(rounded)
        return rounded.mul_(multiplier[:, None]).view(x.shape)

    def errors(self, x: torch.Tensor, peaks: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
        """(K, G, r) squared errors of (n, r) weights under each of K candidate ``peaks`` (K, G, r), times the
        ``importance`` (n,) of columns."""
        if (fused := kernels_for(x)) is not None:
            measured: torch.Tensor = fused.errors(x, self.steps(peaks), importance, self.format.element)
            return measured
        found = []
        for peak in peaks.unbind():
            squares = self.round(x, peak).sub_(x).square_().mul_(importance[:, None])
            found.append(sums_(self.groups(squares).transpose(1, 2)).clone())  # lets go of the squares
        return torch.stack(found)

    def search(self, x: torch.Tensor, importance: torch.Tensor, ratios: tuple[float, ...]) -> torch.Tensor:
        """(G, r) peaks, among ``ratios`` of the largest magnitudes, of the least weighted error; the first of equals.

        For scales that belong to whole tiles of rows: all but those of a tensor.
        """
        amax = self.amax(x)
        if len(ratios) == 1:
            return amax * ratios[0]
        peaks = amax * torch.tensor(ratios, device=x.device)[:, None, None]
        found = torch.stack([self.total(error) for error in self.errors(x, peaks, importance).unbind()])
        return peaks.gather(0, found.argmin(0, keepdim=True))[0]

    def stored(self, peak: torch.Tensor) -> Scales:
        """Scales as they are stored, of the peaks (G, m) of all rows, groups in the order of the weight's columns."""
        if self.format.scaling == "tensor":
            return self.scales(peak[0, 0])
        if self.format.scaling == "row":
            return self.scales(peak[0])
        return self.scales(peak[:, :: self.format.rows_multiple].T.contiguous())
