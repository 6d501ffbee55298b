"""How long a plan will take on this machine, from measured costs."""

from __future__ import annotations

from collections.abc import Sequence

from ..stages.work import LayerPlan
from .budget import cores
from .costs import CPU, CUDA_STORAGE_SECONDS_PER_GB, H100, work_seconds
from .recipe import Run


def estimate_seconds(layers: Sequence[LayerPlan], run: Run, workers: int | None = None) -> float:
    """Wall seconds, roughly: right within a factor of two on common machines."""
    if run.device.startswith("cuda"):
        moved = sum(plan.layer.nbytes for plan in layers) / 1e9 * CUDA_STORAGE_SECONDS_PER_GB
        return moved + sum(work_seconds(plan, H100) for plan in layers)
    return sum(work_seconds(plan, CPU) for plan in layers) / (workers or run.workers or cores())
