"""Comparing a decoded layer with its source, weight by weight, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..formats.layers import Layer
from ..formats.reduce import absmax
from ..stages.reading import read_whole, reader
from ..stages.work import Environment, LayerPlan, Work

ERROR_BOUNDS = {"": 0.01, "fp8": 0.06, "fp8_e5m2": 0.12, "int8": 0.25, "mxfp8": 0.06, "nvfp4": 0.18}
"""Relative errors that no sound layer reaches; a wrong layout, nibble order or scale gives 0.6 and more.

An INT8 layer with outliers may exceed it, by as much as a step of amax / 127 explains."""

WEIGHT_BOUNDS = {
    "": (2.0**-7, 2.0**-15), "fp8": (0.13, 2.0**-15), "fp8_e5m2": (0.26, 2.0**-15), "int8": (0.0, 1 / 120),
    "mxfp8": (0.13, 2.0**-15), "nvfp4": (0.4, 2.0**-12),
}  # fmt: skip
"""How far a single weight may be off: a share of itself (NVFP4: of the largest of its block) plus a share of the
largest weight of the layer. That is a whole step of the format's grid and its smallest step, so that one flipped
exponent is found among millions of weights."""


_RANGE_WEIGHTS = 1 << 18
"""Weights that are compared at a time: their float32 forms stay in a core's cache."""

FEEDBACK = 2.0
"""Methods that compensate a weight's error in others move weights away from the nearest code, for less error in
outputs: their layers' error may be this many times the bound ..."""

FEEDBACK_WEIGHT = {"": 0.0, "fp8": 0.6, "fp8_e5m2": 0.7, "int8": 0.6, "mxfp8": 0.6, "nvfp4": 1.0}
"""... and a weight may be off by this share of the largest of its row: several steps of the grid, and what is clipped.
A weight whose sign was flipped is found when it is large, and what is small hardly matters."""

FEEDBACK_ROW = 0.8
"""... and a row by this share of its norm, beside the smallest steps: one of zeros is off by 1, one of flipped signs by
2, one of another's weights by 1.4."""


@dataclass
class Comparison:
    """Sums over the weights of a layer."""

    difference: float = 0.0
    """Squared distance from the source."""
    weight: float = 0.0
    """Squared weights of the source."""
    amax: float = 0.0
    """Largest weight of the source."""
    numel: int = 0
    excess: float = -math.inf
    """Largest distance of one weight, beyond its own share of ``WEIGHT_BOUNDS`` ..."""
    where: str = ""
    """... and which one that is."""
    row_excess: float = -math.inf
    """Largest distance of a row, or of one weight in it, beyond what compensation explains ..."""
    row: str = ""
    """... and which row that is."""

    @property
    def error(self) -> float:
        """||made - source|| / ||source||; infinite where a decoded weight is not finite."""
        if not math.isfinite(self.difference):
            return math.inf
        if not self.weight:
            return 0.0 if self.difference == 0 else math.inf
        return math.sqrt(self.difference / self.weight)

    def problem(self, name: str, rotation: int | None, feedback: bool) -> str:
        """What no sound layer of this format shows; empty when there is nothing. ``feedback``: see ``FEEDBACK``."""
        bound = ERROR_BOUNDS[name] * (FEEDBACK if feedback else 1.0)
        if name == "int8" and self.weight:
            bound = max(bound, self.amax / 254 * math.sqrt(self.numel / self.weight))
        if not self.error <= bound:
            return f"relative error {self.error:.4f} is above {bound:.3g}, which no sound {name or 'copy'} reaches"
        if feedback and self.row_excess > 0:
            return f"{self.row}: further off than {name} can be"
        if not feedback and self.excess > WEIGHT_BOUNDS[name][1] * (rotation or 1) * self.amax:
            return f"{self.where}: further off than {name or 'a copy'} can be"
        return ""


@dataclass(frozen=True)
class Factors:
    """An adapter of low rank."""

    up: torch.Tensor
    """Float32 (m, r)."""
    down: torch.Tensor
    """Float32 (r, n)."""

    def rows(self, first: int, number: int) -> torch.Tensor:
        """Float32 (number, n): rows of their product."""
        return self.up[first : first + number] @ self.down


def compare(made: Layer, source: Layer, environment: Environment, beside: Factors | None = None) -> Comparison:
    """The sums over all weights of a stored layer, with the adapter ``beside`` it where there is one."""
    found, first = Comparison(numel=source.weight.numel), 0
    name = made.encoding.format[0] if made.encoding else ""
    if len(made.weight.shape) != 2:
        pairs = iter([(whole(made), whole(source))])
    else:
        rows = max(1, _RANGE_WEIGHTS // made.weight.shape[1])
        pairs = zip(rows_of(made, rows, environment), rows_of(source, rows, environment), strict=True)
    for ours, theirs in pairs:
        if beside is not None:
            ours = ours + beside.rows(first, len(ours))
        distance, magnitude = (ours - theirs).abs_(), theirs.abs()
        unit = max(float(magnitude.max()), float(distance.max())) or 1.0
        found.difference += _sum((distance / unit).square_()) * unit**2  # squares of float32 leave its range
        found.weight += _sum((magnitude / unit).square_()) * unit**2
        found.amax = max(found.amax, float(magnitude.max()))
        _compare_rows(found, distance, magnitude, name, first)
        share = _block_amax(theirs) if name == "nvfp4" else magnitude
        distance.sub_(share, alpha=WEIGHT_BOUNDS[name][0])
        if float(distance.max()) > found.excess:
            worst = int(distance.argmax())
            found.excess = float(distance[worst // theirs.shape[1], worst % theirs.shape[1]])
            values = float(ours.reshape(-1)[worst]), float(theirs.reshape(-1)[worst])
            place = f"[{first + worst // theirs.shape[1]}, {worst % theirs.shape[1]}]"
            found.where = f"weight {place} is {values[0]:.6g}, the source has {values[1]:.6g}"
        first += theirs.shape[0]
    return found


def _compare_rows(
    found: Comparison, distance: torch.Tensor, magnitude: torch.Tensor, name: str, first: int
) -> None:
    """Notes the row that lies furthest off beyond ``FEEDBACK_ROW`` and ``FEEDBACK_WEIGHT``."""
    step = 4.0 * WEIGHT_BOUNDS[name][1] * found.amax
    rows = distance.norm(dim=1) - FEEDBACK_ROW * magnitude.norm(dim=1) - step * math.sqrt(distance.shape[1])
    weights = distance.amax(1) - FEEDBACK_WEIGHT[name] * magnitude.amax(1) - 2 * step
    worst = torch.maximum(rows, weights)
    if float(worst.max()) > found.row_excess:
        found.row_excess, found.row = float(worst.max()), f"row {first + int(worst.argmax())}"


def _sum(x: torch.Tensor) -> float:
    """Sum in float64 of float32 rows, added up row by row first: several times as fast as float64 throughout."""
    return float(x.sum(dim=1).sum(dtype=torch.float64))


def _block_amax(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each 16 consecutive weights of a row, in the place of all of them."""
    rows, columns = x.shape
    padded = torch.nn.functional.pad(x, (0, -columns % 16)) if columns % 16 else x
    blocks = absmax(padded.view(rows, -1, 16))
    return blocks[:, :, None].expand(-1, -1, 16).reshape(rows, -1)[:, :columns]


def rows_of(layer: Layer, rows: int, environment: Environment) -> Iterator[torch.Tensor]:
    """Float32 rows of a layer, ``rows`` at a time whatever the storage, so that two layers can be walked together."""
    environment = replace(environment, chunk_bytes=1)  # a chunk is then ``multiple`` rows
    plan = LayerPlan(layer, (), ())
    for chunk in reader(layer, rows).run(Work(plan, (0, plan.rows), environment)).chunks():
        yield chunk.x.to(torch.float32, copy=True)  # the buffers below are the thread's, and the other layer's too


def whole(layer: Layer) -> torch.Tensor:
    """A tensor that is no matrix, as one row."""
    return read_whole(layer.tensors[0]).float()[None]
