"""The Format protocol: what a numeric format must say from shapes alone, and do on a range of rows.

Canonical values, before a dialect lays them out: codes are row-major (NVFP4: two a byte, first element in the low
nibble), scales are row-major, one per scaling group. A range of rows gives the same bits as the whole tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from .elements import Element

TINY = 2.0**-100
"""An amax below this is scaled as this: smaller groups would overflow float32 reciprocals."""


def ceil_to(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def inverse_of(multiplier: torch.Tensor) -> torch.Tensor:
    """What weights are multiplied by to be in units of their scales; 0 where the scale is."""
    return torch.where(multiplier > 0, multiplier.reciprocal(), 0.0)


@dataclass
class Scales:
    """Scales of a range of rows."""

    stored: torch.Tensor
    """Canonical stored values: float32, E4M3 or E8M0 bytes (uint8); shape ``Format.scale_shape``."""
    multiplier: torch.Tensor
    """Float32, same shape: a code times this is the weight."""
    inverse: torch.Tensor | None = None
    """Float32, same shape: what a weight is multiplied by; None: it is divided by ``multiplier``."""


@dataclass
class Stats:
    """What a first pass over a whole tensor knows."""

    amax: torch.Tensor
    """Float32 (): largest magnitude."""
    sample: torch.Tensor
    """Float32 (n,): values at evenly spaced positions of the flat tensor (empty unless scales are searched)."""


SAMPLE_SIZE = 1 << 17
"""Values that a scale search for one whole tensor looks at."""


@dataclass(frozen=True)
class Format(ABC):
    """One numeric format with its scaling. Rows are ``x``: float32 (r, columns(n)), zero in padded columns."""

    name: str
    """Registry name, such as fp8 or nvfp4."""
    scaling: str
    """tensor, row, block (a square tile of weights) or group (consecutive weights of a row)."""
    block_size: int | None = None
    """Edge of a tile, or length of a group; None for tensor and row."""

    element: ClassVar[Element]
    """Grid of the codes."""
    code_dtype: ClassVar[str]
    """safetensors dtype of the stored codes."""
    scale_dtype: ClassVar[str]
    """safetensors dtype of the stored scales."""
    two_pass: ClassVar[bool] = False
    """Whether every instance needs a scale of the whole tensor first (see ``needs_stats``)."""
    one_scale: ClassVar[bool] = False
    """Whether all groups have the scale of the whole tensor."""
    ratios: ClassVar[tuple[float, ...]] = (1.0,)
    """Scales that are tried when errors are weighted by statistics, relative to the one from amax."""
    clips: ClassVar[tuple[float, ...]] = ()
    """Scales that clip: safe only where the error of the outputs decides."""

    @property
    def needs_stats(self) -> bool:
        """Whether the amax of the whole tensor must be known before any row can be encoded."""
        return self.two_pass or self.scaling == "tensor"

    @property
    def rows_multiple(self) -> int:
        """Row ranges start at multiples of this."""
        return self.block_size if self.scaling == "block" and self.block_size else 1

    def refuse(self, shape: tuple[int, int]) -> str | None:
        """Why a weight of this shape cannot have this format, or None."""
        size = self.block_size
        if self.scaling == "block" and size and (shape[0] % size or shape[1] % size):
            return f"block size {size} does not divide {shape[0]} x {shape[1]}"
        return None

    def columns(self, n: int) -> int:
        """Width after padding to whole groups."""
        return ceil_to(n, self.block_size) if self.scaling == "group" and self.block_size else n

    def code_columns(self, n: int) -> int:
        """Stored codes per row of a weight with ``n`` (padded) columns."""
        return n

    def scale_shape(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """Shape of the canonical scales of a weight of ``shape``."""
        rows, columns = shape[0], self.columns(shape[1])
        if self.scaling == "tensor":
            return ()
        if self.scaling == "row":
            return (rows,)
        size = self.block_size or 1
        return (rows // size, columns // size) if self.scaling == "block" else (rows, columns // size)

    def shaped(self, x: torch.Tensor) -> torch.Tensor:
        """A view of contiguous rows ``x`` over which ``spread`` values broadcast."""
        size = self.block_size or 1
        if self.scaling == "block":
            return x.view(x.shape[0] // size, size, x.shape[1] // size, size)
        return x.view(x.shape[0], -1, size) if self.scaling == "group" else x

    def spread(self, per_group: torch.Tensor) -> torch.Tensor:
        """Values per scaling group (shape ``scale_shape``) in a shape that broadcasts over ``shaped(x)``."""
        if self.scaling == "tensor":
            return per_group
        if self.scaling == "block":
            return per_group[:, None, :, None]
        return per_group[..., None]

    def rows(self, scales: Scales, start: int, stop: int) -> Scales:
        """The scales of rows ``start`` to ``stop`` (whole tiles) of those that ``scales`` hold."""
        if self.scaling == "tensor":
            return scales
        part = slice(start // self.rows_multiple, -(-stop // self.rows_multiple))
        inverse = None if scales.inverse is None else scales.inverse[part]
        return Scales(scales.stored[part], scales.multiplier[part], inverse)

    def row_multipliers(self, multiplier: torch.Tensor, rows: slice, count: int) -> torch.Tensor:
        """What ``decode`` takes for some of a range of ``count`` rows, whose ``multiplier`` is as ``scale_shape``."""
        if self.scaling == "tensor":
            return multiplier
        if self.scaling == "block":
            return multiplier[torch.arange(count, device=multiplier.device)[rows] // self.rows_multiple]
        return multiplier[rows]

    def snap_(self, x: torch.Tensor, scales: Scales) -> torch.Tensor:
        """Replaces weights by the nearest ones that codes under ``scales`` can express, in place.

        ``decode(encode_(x))`` but for the last bit of ties; encoding the result gives codes that decode to it.
        """
        multiplier = self.spread(scales.multiplier)
        shaped = self.shaped(x)
        shaped.mul_(inverse_of(multiplier))
        self.element.round_(x)
        shaped.mul_(multiplier)
        return x

    @property
    def searches(self) -> bool:
        """Whether scale search (rounding ``mse``) can differ from amax scales."""
        return False

    @abstractmethod
    def amax(self, x: torch.Tensor) -> torch.Tensor:
        """Float32 largest magnitude per group, shape ``scale_shape``; NaN where the group holds one."""

    @abstractmethod
    def whole(self, stats: Stats, search: bool) -> torch.Tensor:
        """The float32 () value that all row ranges share, when ``needs_stats``; its meaning is the format's own."""

    @abstractmethod
    def scales(self, amax: torch.Tensor, whole: torch.Tensor | None) -> Scales:
        """Scales that bring every group's amax onto the largest code."""

    def search(self, x: torch.Tensor, amax: torch.Tensor, whole: torch.Tensor | None) -> Scales:
        """Scales of least squared error among the format's candidates. Leaves ``x`` as it is."""
        return self.scales(amax, whole)

    @abstractmethod
    def encode_(self, x: torch.Tensor, scales: Scales) -> torch.Tensor:
        """Codes (r, code_columns) nearest to ``x``. Destroys ``x``."""

    @abstractmethod
    def multiplier(self, stored: torch.Tensor, whole: torch.Tensor | None) -> torch.Tensor:
        """Float32 decode multipliers of stored canonical scales."""

    @abstractmethod
    def decode(self, codes: torch.Tensor, multiplier: torch.Tensor) -> torch.Tensor:
        """Float32 (r, columns) weights of canonical codes; ``multiplier`` as ``scale_shape``, or a row of it a row."""
