"""Statistics of layers' inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Moments:
    """What is known of the inputs x of one layer, estimated over ``tokens`` of them."""

    hessian: torch.Tensor
    """Float32 (n, n): E[x x^T]."""
    mean: torch.Tensor
    """Float32 (n,): E[x]."""
    tokens: int
