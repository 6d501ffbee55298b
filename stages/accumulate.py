"""Sums over one layer's inputs: H, mean, histogram and largest value, on the device where the inputs are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .estimates import Estimate, nothing
from .histogram import BINS, count

_CHUNK_ELEMENTS = 2 << 20
"""Inputs are widened and counted in pieces of this many numbers."""


class Sums:
    """Sums over the tokens of one input x (n,). Float32 for x x^T; the rest adds up in float64 where there is one."""

    def __init__(self, width: int, hessian: bool) -> None:
        self.width = width
        self.hessian = hessian
        self.tokens = 0
        self._device: torch.device | None = None

    def add(self, x: torch.Tensor) -> None:
        """Counts tokens ``x`` (t, n) of any float dtype. NaN and Inf show in `largest`, not here: asking costs time."""
        if x.shape[0] == 0:
            return
        self._place(x.device)
        with exact_products():
            for part in x.detach().split(max(1, _CHUNK_ELEMENTS // self.width)):
                self._add(part.to(torch.float32))
        self.tokens += x.shape[0]

    def largest(self) -> float:
        """Largest |x| so far; NaN or Inf when an input held one."""
        return float(self._amax) if self.tokens else 0.0

    def estimate(self) -> Estimate:
        """What these tokens say. Its rows are read from these sums, which must not change any more."""
        if not self.tokens:
            return nothing(self.width, self.hessian)
        matrix, share = self._products, 1 / self.tokens
        diagonal = matrix.diagonal() if self.hessian else matrix

        def rows(start: int, stop: int) -> torch.Tensor:
            return (matrix[start:stop] * share).cpu()

        return Estimate(
            self.tokens,
            self._sum.cpu().double() * share,
            diagonal.cpu().double() * share,
            rows if self.hessian else None,
            self._histogram.cpu(),
            self.largest(),
        )

    def finite(self) -> bool:
        """Whether every sum is a number: inputs that are may still have squares beyond float32."""
        if not self.tokens:
            return True
        diagonal = self._products.diagonal() if self.hessian else self._products
        return math.isfinite(self.largest()) and bool(diagonal.isfinite().all())

    def _place(self, device: torch.device) -> None:
        """Makes the sums where the first inputs are."""
        if self._device == device:
            return
        if self._device is not None:  # a model that is spread over devices keeps each layer on one
            raise RuntimeError(f"inputs moved from {self._device} to {device} between two calls of one layer")
        exact = torch.float32 if device.type == "mps" else torch.float64
        shape = (self.width, self.width) if self.hessian else (self.width,)
        self._device = device
        self._products = torch.zeros(shape, dtype=torch.float32 if self.hessian else exact, device=device)
        self._sum = torch.zeros(self.width, dtype=exact, device=device)
        self._histogram = torch.zeros(BINS, dtype=torch.int64, device=device)
        self._amax = torch.zeros((), device=device)

    def _add(self, x: torch.Tensor) -> None:
        if self.hessian:
            self._products.addmm_(x.T, x)
        else:
            self._products += x.square().sum(0, dtype=self._products.dtype)
        self._sum += x.sum(0)  # of few enough tokens that float32 does
        self._histogram += count(x)
        self._amax = torch.maximum(self._amax, torch.stack(torch.aminmax(x)).abs().amax())


@contextmanager
def exact_products() -> Iterator[None]:
    """Float32 products in float32: no TF32 on a GPU, no bfloat16 on a CPU, whatever the user has set; restored after.

    In rounded arithmetic H loses its small eigenvalues, which are what rounding with H lives on (ROUNDING.md, 4c).
    """
    backends = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    if all(hasattr(backend, "fp32_precision") for backend in backends):
        before = [backend.fp32_precision for backend in backends]
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision
    else:  # torch 2.8
        setting = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("highest")
            yield
        finally:
            torch.set_float32_matmul_precision(setting)
