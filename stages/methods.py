"""Rounding methods that see a whole weight matrix: what they are given, what they give back, and the list of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from ..formats.errors import UsageError, did_you_mean
from .stage import build

if TYPE_CHECKING:
    import torch

    from ..formats.format import Format, Scales
    from .quality import Projection
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
    """Float32 (): the scale of the tensor, which stays as it is, where groups have theirs, too; for scaling ``tensor``
    the scale itself."""
    moments: Moments | None = None
    """Statistics of the layer's inputs, padded to n, in the basis of ``weight``."""
    split: int = 1
    """Methods that work on ranges of rows make them this many times smaller: a device ran out of memory."""


@dataclass(frozen=True)
class Rounded:
    """What a method found."""

    values: torch.Tensor
    """Float32 (m, n): weights that codes under ``scales`` express exactly."""
    scales: Scales


class Solver(Protocol):
    """A method applied to one matrix."""

    @property
    def projection(self) -> Projection | None:
        """U^T E V of an error, when the method knows the dominant subspaces of the weight."""

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

    def operations(self, shape: tuple[int, int]) -> float:
        """Floating-point operations for an (m, n) matrix, roughly: estimates of time are made of them."""

    def memory(self, shape: tuple[int, int], device: str) -> int:
        """Bytes that solver and solution of an (m, n) matrix take at most on a device, beside weight and scales."""


@runtime_checkable
class Stacking(Protocol):
    """A method that solves matrices in one when they have inputs and format in common."""

    def solve_together(self, solvers: Sequence[Any]) -> list[Rounded]:
        """What each of the method's own solvers would find, one after another."""


@dataclass(frozen=True)
class RoundingInfo:
    """One registered rounding."""

    name: str
    factory: str
    """``module:class`` of the Method, below this package; empty for a rounding that needs no more than a range of rows
    (its scales are the scale step's)."""
    help: str
    """When to use it."""


_ALL = (
    RoundingInfo("nearest", "", "Scales from the largest weight, codes to nearest. The fastest, and the most common."),
    RoundingInfo("mse", "",
                 "Scales of least squared error, codes to nearest. The default without data."),
    RoundingInfo("learned", "learned:Learned",
                 "Without data: moves the error out of the weight's dominant subspaces. A proxy for outputs."),
    RoundingInfo("calibrated", "calibrated:Calibrated",
                 "With statistics of the layers' inputs: by far the best outputs. The weight error rises, by design."),
    RoundingInfo("gradient", "gradient:Gradient",
                 "The objective of other programs by their gradient steps: slower than learned, for comparison."),
)  # fmt: skip

_INFO = {info.name: info for info in _ALL}

ROUNDINGS = tuple(_INFO)

BY_ROWS = tuple(info.name for info in _ALL if not info.factory)
"""Roundings that need no more than a range of rows."""


def rounding_info(name: str) -> RoundingInfo:
    """The registered rounding of this name."""
    return _INFO[name]


def method_class(name: str) -> type[Any]:
    """The class behind the name of a rounding that has one."""
    module, cls = _INFO[name].factory.split(":")
    found: type[Any] = getattr(import_module(f".{module}", __package__), cls)
    return found


def make_method(name: str, options: Mapping[str, Any]) -> Method | None:
    """A method from its name and options; None for a rounding by rows, which has none.

    Raises UsageError for an unknown name, and for options that the method lacks or cannot have.
    """
    if name not in ROUNDINGS:
        raise UsageError(f"unknown rounding {name!r}{did_you_mean(str(name), ROUNDINGS)}")
    if name in BY_ROWS:
        if options:
            raise UsageError(f"rounding {name} has no options; drop {', '.join(options)}, or name another rounding")
        return None
    method: Method = build(f"rounding {name}", method_class(name), options)
    return method
