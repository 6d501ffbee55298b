"""How large a layer's inputs are where an adapter points: an estimate from the adapter's down factor alone.

An adapter multiplies inputs x by its down factor A (r, n): what it learned of them lies along A's rows. Let x be
Gaussian along these, x = A^T z with z ~ N(0, I), scaled to a root mean square of ``rms`` over its n channels. Channels
that A does not look at are left out: nothing is known of them. Then channel j is N(0, sigma_j^2) with

    sigma_j^2 = rms^2 * n * sum_i A_ij^2 / ||A||_F^2

and the share of |x| over all channels that does not exceed t is mean_j erf(t / (sigma_j sqrt 2)), which grows with t:
a percentile is where it is q / 100. Nothing is drawn at random. Only the directions come from the adapter; how long
inputs are is assumed, and real ones have far heavier tails than a Gaussian, so that scales leave room for inputs of
``HEADROOM`` times the percentile: FP8 and the block scales of NVFP4 have range to spare, while what is clipped is lost.
"""

from __future__ import annotations

import math

import torch

from ..formats.errors import CheckpointError
from ..formats.tensors import TensorRef
from .reading import read_whole

HEADROOM = 16.0
"""Room above the percentile. benchmarks/activation_scales.py shows what less and more of it does."""
_HALVINGS = 64
"""Of the interval in which the percentile lies: float64 tells no more apart."""


def channel_energy(down: TensorRef) -> torch.Tensor:
    """Float64 (n,): sum_i A_ij^2 of a down factor A (r, n). CheckpointError for NaN or Inf."""
    energy = read_whole(down).view(down.shape).double().square_().sum(0)
    if not bool(energy.isfinite().all()):
        raise CheckpointError(f"{down.path}: {down.name} holds NaN or Inf")
    return energy


def percentile(energy: torch.Tensor, rms: float, q: float) -> float:
    """The |x| that ``q`` percent (0 < q < 100) of all channels' inputs do not exceed; ``energy`` (n,) as
    `channel_energy` gives it, not all zero. Inputs have a root mean square of ``rms``."""
    energy = energy[energy > 0]
    spread = energy.div(energy.mean()).sqrt_().mul_(rms * math.sqrt(2))
    wanted = torch.tensor(q / 100, dtype=torch.float64)
    low, high = 0.0, float(spread.max() * torch.erfinv(wanted))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if torch.erf(middle / spread).mean() < wanted else (low, middle)
    return high
