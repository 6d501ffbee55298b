"""Fused kernels, where there are any: on CUDA devices for which Triton is installed."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

import torch


def kernels_for(x: torch.Tensor, module: str = "kernels") -> ModuleType | None:
    """The module of kernels, when the tensor's device has them, or None: then eager operations do the work."""
    return _kernels(module) if x.is_cuda else None


@cache
def _kernels(module: str) -> ModuleType | None:
    try:
        return import_module(f".{module}", __package__)
    except ImportError:  # no Triton: torch for Windows comes without it
        return None
