"""What statistics of inputs give to the layers of a plan: moments and activation scales; and whether they fit."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..formats.elements import E4M3
from ..formats.errors import PlanError, UsageError, listed, shown
from ..formats.format import TINY, Format
from .inputs import Inputs
from .rules import is_scale
from .statistics import Statistics
from .work import LayerPlan

NAMED = 12
"""So many names stand in one message."""

TAKE_INPUT_SCALES = ("fp8", "fp8_e5m2", "nvfp4")
"""Formats whose layers may have an activation scale."""
_PERCENTILE = re.compile(r"p([0-9]{1,2}(?:\.[0-9]+)?|100)")


def activation_scale(largest_input: float, fmt: Format) -> float:
    """The scale that brings an input of this magnitude onto the format's largest code: 448 in FP8, 57344 in E5M2,
    6 * 448 in NVFP4, whose blocks have an E4M3 scale of their own."""
    largest = fmt.element.largest * (E4M3.largest if fmt.name == "nvfp4" else 1.0)
    return max(largest_input, TINY) / largest


def percent(wanted: str) -> float | None:
    """99.9 for ``p99.9``, 100 for ``amax``; None for what is neither."""
    match = _PERCENTILE.fullmatch(wanted)
    return 100.0 if wanted == "amax" else float(match[1]) if match else None


class Evidence:
    """An opened store beside the layers of one checkpoint."""

    def __init__(self, statistics: Statistics) -> None:
        self.statistics = statistics

    @classmethod
    def open(cls, path: str) -> Evidence:
        """Raises what ``Statistics.open`` raises."""
        return cls(Statistics.open(path))

    @property
    def digest(self) -> str:
        """Tells stores of different content apart."""
        return self.statistics.digest

    def __contains__(self, name: str) -> bool:
        """Whether the layer has statistics that its steps can use: inputs run along the columns of its weight."""
        return name in self.statistics and not self.statistics.transposed(name)

    def check(self, layers: Sequence[LayerPlan]) -> None:
        """PlanError with the list of what does not fit: unknown names, other widths, no tokens."""
        shapes = {
            plan.layer.name: (plan.layer.weight.shape[0], plan.layer.weight.shape[1])
            for plan in layers if len(plan.layer.weight.shape) == 2
        }  # fmt: skip
        problems = self.statistics.check(shapes)
        if problems:
            raise PlanError(
                f"{self.statistics.path}: these statistics do not fit the checkpoint: {listed(problems, NAMED, '; ')}. "
                "Make them from this model with `quantloom calibrate`"
            )

    def inputs(self, name: str, rotation: int | None, centred: bool) -> Inputs | None:
        """The statistics of a layer as its steps use them, or None without any."""
        if name not in self:
            return None
        return Inputs(self.statistics, name, self.statistics.input_of(name), rotation, centred)

    def check_mean(self, name: str) -> None:
        """UsageError for a mean input that nobody has measured."""
        if not self.statistics.measured(name):
            raise UsageError(
                f"{self.statistics.path}: the mean input of {name!r} is what a norm's weights suggest, too little to "
                "correct a bias by; calibrate with --random-tokens or --text, or drop --bias-correction"
            )

    def input_scale(self, name: str, wanted: float | str | None, fmt: Format) -> float | None:
        """The activation scale that brings the layer's largest input, or a percentile of it, onto the largest code;
        None where nothing is known of the input, or that it was always zero."""
        if not isinstance(wanted, str):
            return wanted
        if name not in self.statistics:
            return None
        statistics = self.statistics
        amax = statistics.amax(name) if wanted == "amax" else statistics.percentile(name, float(wanted[1:]))
        return activation_scale(amax, fmt) if amax > 0 else None


def check_input_scale(value: float | str | None, fmt: Format, statistics: str | None) -> None:
    """UsageError for an activation scale that is none, or that nothing reads."""
    if value is None:
        return
    if fmt.name not in TAKE_INPUT_SCALES:
        raise UsageError(f"an input scale belongs to FP8 and NVFP4 layers, not to {fmt.name}; drop it")
    if isinstance(value, str) and percent(value) is not None:
        if statistics is None:
            raise UsageError(f"input scale {value!r} comes from statistics: name them, or give a number")
        return
    if isinstance(value, str) or not is_scale(value):
        raise UsageError(
            f"input scale {shown(value)} must be a positive number that float32 holds, amax, or a percentile like p99.9"
        )
