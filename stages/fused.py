"""Fused kernels, where there are any: on CUDA devices for which Triton is installed."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

import torch


def kernels_for(x: torch.Tensor) -> ModuleType | None:
    """The module of kernels that serves the tensor's device, or None: then eager operations do the work."""
    return _kernels() if x.is_cuda else None


@cache
def _kernels() -> ModuleType | None:
    try:
        return import_module(".kernels", __package__)
    except ImportError:  # no Triton: torch for Windows comes without it
        return None
