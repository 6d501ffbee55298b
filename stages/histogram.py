"""Histograms of |x| over fixed logarithmic bins: those of two runs add up exactly.

The bin of a float32 is its exponent and the first four bits of its mantissa, read straight off its bits: sixteen bins
per octave, each at most 6.25 % wide, over the whole range of the type.
"""

from __future__ import annotations

import torch

_SHIFT = 19
BINS = 1 << (31 - _SHIFT)
"""Bins; the last ones would hold Inf and NaN."""


def count(x: torch.Tensor) -> torch.Tensor:
    """Int64 (BINS,): how many entries of float32 ``x`` fall into each bin of |x|."""
    bins = x.reshape(-1).view(torch.int32).bitwise_and(0x7FFFFFFF).bitwise_right_shift_(_SHIFT)
    return torch.bincount(bins, minlength=BINS)


def percentile(histogram: torch.Tensor, largest: float, q: float) -> float:
    """The |x| that ``q`` percent of all entries do not exceed, interpolated within its bin; at most ``largest``."""
    sums = histogram.to(torch.float64).cumsum(0)
    wanted = sums[-1] * (q / 100)
    found = int(torch.searchsorted(sums, wanted))
    before = float(sums[found - 1]) if found else 0.0
    edges = torch.tensor([found << _SHIFT, (found + 1) << _SHIFT], dtype=torch.int32).view(torch.float32)
    low, high = edges.tolist()
    share = (float(wanted) - before) / max(1.0, float(histogram[found]))
    return min(largest, low + (min(high, largest) - low) * share) if low < largest else largest
