"""Cholesky factors, and whether there are any."""

from __future__ import annotations

import torch


def cholesky(x: torch.Tensor) -> torch.Tensor | None:
    """The lower factor of a symmetric (n, n) matrix; None where it is not positive definite in its dtype.

    Waits for the device. cuSOLVER says of some failures that all is well, and leaves NaN in the factor.
    """
    factor, failed = torch.linalg.cholesky_ex(x)
    sound = (failed == 0) & factor.diagonal().sum().isfinite()
    return factor if bool(sound) else None
