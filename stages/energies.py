"""Squared norms of matrices, plain and weighted by second moments of inputs, in sums whose order is fixed."""

from __future__ import annotations

import torch

_BLOCK = {"cpu": (256, 512), "cuda": (1024, 2048)}
"""Rows and columns that are summed at a time."""


class Energies:
    """Squared norms of the rows that are added: ||X||^2, and with second moments H tr(X H X^T), in float64.

    H is symmetric: blocks of columns meet those before them and count twice, which saves almost half of the work.
    """

    def __init__(self, columns: int, hessian: torch.Tensor | None, device: torch.device) -> None:
        self.hessian, self.held = hessian, 0
        rows, self.width = _BLOCK[device.type]
        self.block = torch.empty(rows, columns, dtype=torch.float32, device=device)
        self.plain = torch.zeros((), dtype=torch.float64, device=device)
        self.weighted = torch.zeros_like(self.plain)

    def add(self, x: torch.Tensor) -> None:
        """Takes float32 (r, n)."""
        rows = len(self.block)
        while len(x):
            part = x[: rows - self.held]
            self.block[self.held : self.held + len(part)] = part
            self.held, x = self.held + len(part), x[len(part) :]
            if self.held == rows:
                self._sum()

    def _sum(self) -> None:
        x, h, self.held = self.block[: self.held], self.hessian, 0
        self.plain += torch.linalg.vector_norm(x, dtype=torch.float64).square()
        if h is None:
            return
        for start in range(0, x.shape[1], self.width):
            part = slice(start, start + self.width)
            here = x[:, part]
            if h.dim() == 1:
                weighted = here * h[part]
            else:  # H is symmetric: what lies right of the diagonal counts twice
                weighted = (here @ h[part, part]).addmm_(x[:, :start], h[:start, part], alpha=2)
            self.weighted += weighted.double().mul_(here).sum()

    def total(self) -> tuple[float, float | None]:
        """||X||^2, and tr(X H X^T) where H is known."""
        self._sum()
        return float(self.plain), None if self.hessian is None else max(0.0, float(self.weighted))


def memory_of_energies(columns: int, device: str) -> int:
    """Bytes: rows that are held, and their products in float32 and float64."""
    rows, width = _BLOCK[device.partition(":")[0]]
    return rows * (4 * columns + 16 * width)
