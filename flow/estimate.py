"""How long a plan will take, from measured processor seconds per source gigabyte (benchmarks/README.md)."""

from __future__ import annotations

from collections.abc import Sequence

from ..stages.extract import Extract
from ..stages.matrix import Solve
from ..stages.work import LayerPlan
from .budget import cores
from .recipe import Run

_CPU_SECONDS_PER_GB = {"copy": 0.9, "fp8": 1.6, "fp8_e5m2": 1.6, "int8": 1.4, "mxfp8": 2.1, "nvfp4": 7.0}
"""Two virtual cores, warm page cache, reading and writing included, default rounding."""

_CUDA_SECONDS_PER_GB = 0.5
"""Bound by reading and writing."""

_CPU_OPERATIONS, _CUDA_OPERATIONS = 2.5e10, 3e13
"""Floating-point operations a second of methods that see whole matrices: of one core, and of a data-centre GPU."""


def estimate_seconds(layers: Sequence[LayerPlan], run: Run, workers: int | None = None) -> float:
    """Wall seconds, roughly: right within a factor of two on common machines."""
    tasks = workers or run.workers or cores()
    seconds = 0.0
    for plan in layers:
        kind = plan.format.partition(" ")[0] if plan.format and plan.outputs else "copy"
        rate = _CPU_SECONDS_PER_GB.get(kind, 3.0)
        cuda = run.device.startswith("cuda")
        if cuda:
            rate = _CUDA_SECONDS_PER_GB * tasks
        seconds += plan.layer.nbytes / 1e9 * rate
        for step in plan.steps:
            if isinstance(step, Solve | Extract):
                seconds += step.operations(plan) / (_CUDA_OPERATIONS / tasks if cuda else _CPU_OPERATIONS)
    return seconds / tasks
