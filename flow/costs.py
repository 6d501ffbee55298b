"""What work costs, measured: seconds of one worker by format, rounding and device. Estimates and simulations use it.

The figures are of benchmarks/README.md ("Whole conversions on two cores", "Rounding: on a GPU", "Scheduling") and of
`python benchmarks/simulated.py --costs`. GB are of weights in 16 bits, whatever they are stored as.
Not measured yet but set by judgement: copies, FP8 by row and block under a search, formats not listed, and times of
start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..stages.extract import Extract
from ..stages.matrix import Solve
from ..stages.work import LayerPlan

COPY = "copy"


@dataclass(frozen=True)
class Device:
    """What one worker does its work on."""

    name: str
    per_gb: Mapping[str, tuple[float, float]]
    """Seconds a GB by format, with its scaling where that matters: rounded to nearest, and by a search for scales."""
    other: tuple[float, float]
    """The same for formats that are not listed."""
    operations: float
    """Floating-point operations a second of methods that see whole matrices."""
    overlaps: bool
    """Whether a worker has several tasks at a time: reading and writing then go on beside the computing of another."""
    start: float
    """Seconds until a worker begins: imports, and the start of the device."""


CPU = Device(
    "cpu",
    {
        COPY: (0.5, 0.5), "fp8": (1.5, 1.6), "fp8 row": (1.6, 8.0), "fp8 block": (1.9, 8.0), "fp8_e5m2": (1.5, 1.6),
        "int8": (1.4, 1.4), "mxfp8": (2.1, 2.1), "hybrid_mxfp8": (2.4, 2.4), "nvfp4": (3.7, 7.0),
    },
    (3.0, 8.0), 2.5e10, False, 2.0,
)  # fmt: skip
"""One virtual core, warm page cache: copies out of the cache and into it are included."""

H100 = Device("h100", {COPY: (0.0, 0.0), "nvfp4": (0.073, 0.136)}, (0.08, 0.15), 3e13, True, 8.0)
"""The GPU's own seconds: its busy share of whole conversions. Reading and writing are the storage's."""

H200 = Device("h200", H100.per_gb, H100.other, 4.5e13, True, 8.0)
"""What was measured of it (``benchmarks/simulated.py --device h200``): its operations, and that the H100's other costs
fit."""

DEVICES = {device.name: device for device in (CPU, H100, H200)}

CUDA_STORAGE_SECONDS_PER_GB = 0.5
"""What reading and writing take beside a GPU whose storage nobody described (7 GB/s in, 1.2 GB/s out)."""

TASK_SECONDS = {"sync": 60e-6, "threads": 100e-6, "distributed": 2.2e-3}
"""What Dask takes for a task, by scheduler: nothing else is scheduled in that time ..."""
LAYER_SECONDS = {"sync": 0.0, "threads": 0.0, "distributed": 20e-6}
"""... and what it takes to pack, send and unpack the plan of each of its layers."""


def weight_gb(plan: LayerPlan) -> float:
    """GB of the layer's weight in 16 bits; of what is copied, as it is stored."""
    if plan.format or plan.layer.encoding is not None:
        return plan.layer.weight.numel * 2 / 1e9
    return plan.layer.nbytes / 1e9


def work_seconds(plan: LayerPlan, device: Device) -> float:
    """Seconds that one worker computes for a layer."""
    kind = _kind(plan)
    rates = device.per_gb.get(kind) or device.per_gb.get(kind.partition(" ")[0], device.other)
    seconds = weight_gb(plan) * rates[plan.rounding != "nearest"]
    for step in plan.steps:
        if isinstance(step, Solve | Extract):
            seconds += step.operations(plan) / device.operations
    return seconds


def _kind(plan: LayerPlan) -> str:
    """``fp8 row``, ``nvfp4``, or ``copy`` for what is kept."""
    if not plan.format or not plan.outputs:
        return COPY
    words = plan.format.split()
    return " ".join(words[:2]) if len(words) > 1 and words[1] in ("row", "block") else words[0]
