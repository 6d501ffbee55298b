"""Rounding methods that see a whole weight matrix: what they are given, what they give back, and the list of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    import torch

    from ..formats.format import Format, Scales
    from .statistics import Moments


@dataclass(frozen=True)
class Problem:
    """One weight matrix that is to be rounded. Its tensors are on one device and are never written to."""

    name: str
    """Name of the layer; randomness is keyed by it."""
    weight: torch.Tensor
    """Float32 (m, n), zero in columns that pad it to whole groups."""
    format: Format
    scales: Scales
    """Where the method starts: scales of least squared error."""
    whole: torch.Tensor | None = None
    """Float32 (): NVFP4's scale of the tensor, which stays as it is; for scaling ``tensor`` the scale itself."""
    moments: Moments | None = None
    """Statistics of the layer's inputs, padded to n, in the basis of ``weight``."""


@dataclass(frozen=True)
class Rounded:
    """What a method found."""

    values: torch.Tensor
    """Float32 (m, n): weights that codes under ``scales`` express exactly."""
    scales: Scales


class Solver(Protocol):
    """A method applied to one matrix."""

    def loss(self, values: torch.Tensor) -> float:
        """The method's own objective for stored weights ``values`` (m, n); comparable within one solver."""

    def solve(self, start: torch.Tensor) -> Rounded:
        """The best rounding that the method finds from ``start`` (m, n), the nearest one under the problem's scales."""


class Method(Protocol):
    """A frozen, JSON-able dataclass; its fields are the options of the method."""

    name: ClassVar[str]
    needs_moments: ClassVar[bool]
    """Whether it cannot work without statistics."""

    def solver(self, problem: Problem) -> Solver:
        """Prepares: subspaces, factorisations."""

    def memory(self, shape: tuple[int, int]) -> int:
        """Bytes that solver and solution of an (m, n) matrix take at most, beside weight and scales."""
