"""Which GPUs a run uses, found out without a CUDA context: worker processes make theirs, this one must not.

``torch.cuda.device_count`` asks NVML, which makes none; everything else about a GPU is asked in the process that works
on it.
"""

from __future__ import annotations

import os
import re

from ..formats.errors import UsageError, shown
from .recipe import Run

_DEVICE = re.compile(r"cuda:([0-9]+)")


def listed_devices(device: str) -> tuple[int, ...]:
    """Indices that a ``--device`` names; none for ``cpu`` and ``cuda``."""
    return tuple(int(found) for found in _DEVICE.findall(device))


def gpu_workers(run: Run) -> tuple[int, ...]:
    """Indices of the GPUs that get a worker process each on this machine; none where other processes do no work.

    One GPU is served by threads of this process, unless the scheduler is one of processes.
    """
    if run.device == "cpu" or run.scheduler == "sync" or "://" in run.scheduler:
        return ()
    found = listed_devices(run.device) or tuple(range(count_devices()))
    return found if len(found) > 1 or run.scheduler != "threads" else ()


def count_devices() -> int:
    """GPUs that this process may use, by NVML: no CUDA context comes to be."""
    import torch

    return torch.cuda.device_count()


def check_devices(run: Run) -> None:
    """UsageError for GPUs that this machine does not have, or more of them than the scheduler can use."""
    if run.device == "cpu":
        if run.scheduler == "dask-cuda":
            raise UsageError("the scheduler dask-cuda starts a worker for each GPU: add --device cuda")
        return
    named = listed_devices(run.device)
    if "://" in run.scheduler:
        if len(named) > 1:
            raise UsageError(
                f"device {run.device!r}: workers of a Dask cluster use the GPU that they were started with; give "
                "--device cuda, and start one worker for each GPU"
            )
        return
    if len(named) > 1 and run.scheduler == "sync":
        raise UsageError(f"device {run.device!r}: the scheduler sync uses one GPU; name one, or leave out --scheduler")
    count = count_devices()
    for index in named or (0,):
        if index >= count:
            import torch

            device = run.device if len(named) < 2 else f"cuda:{index}"
            raise UsageError(f"device {device!r} is not there: torch {torch.__version__} finds {count} CUDA devices")


def visible_devices(indices: tuple[int, ...]) -> list[str]:
    """What CUDA_VISIBLE_DEVICES must say for each of these GPUs: a worker process with one of them sees that alone.

    Indices count what this process sees, as torch does: its own CUDA_VISIBLE_DEVICES may name GPUs by number or UUID.
    """
    outer = os.environ.get("CUDA_VISIBLE_DEVICES")
    if outer is None:
        return [str(index) for index in indices]
    names = [name.strip() for name in outer.split(",")]
    if wrong := [index for index in indices if index >= len(names) or not names[index]]:
        raise UsageError(f"device cuda:{wrong[0]} is not there: CUDA_VISIBLE_DEVICES is {shown(outer)}")
    return [names[index] for index in indices]
