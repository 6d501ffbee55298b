"""A layer's input statistics as its steps use them: padded, rotated, perhaps centred, and loaded once for those that
share an input."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace

import torch

from ..formats.rotation import rotate_
from .statistics import Moments, Statistics

_local = threading.local()


@dataclass(frozen=True)
class Inputs:
    """Names the statistics of one layer. Small: it travels with the plan."""

    store: Statistics
    """An opened store; pickled it is path and digest, and another content is refused when it is opened again."""
    layer: str
    shared: str
    """Which of the store's inputs the layer has; equal for layers that read the same tensor."""
    rotation: int | None = None
    """Order of the Hadamard rotation that the weight's rows have gone through."""
    centred: bool = False
    """Whether the mean is taken out of the second moments, because the bias will make up for it."""

    def moments(self, columns: int, device: torch.device) -> Moments:
        """The statistics in the basis of the weight, padded with zeros to ``columns``.

        This thread keeps the last ones until others are asked for, or ``release`` is called.
        """
        key = (self.store.path, self.store.digest, self.shared, self.rotation, self.centred, columns, device)
        held: tuple[object, Moments] | None = _local.__dict__.get("held")
        if held is None or held[0] != key:
            release()  # before the next are read: two of them need not fit
            _local.held = held = (key, self._load(columns, device))
        return held[1]

    def mean(self, device: torch.device) -> torch.Tensor:
        """Float32 (n,): E[x], in the layer's own basis."""
        return self.store.mean(self.layer, device)

    def turned_mean(self, columns: int, device: torch.device) -> torch.Tensor:
        """Float32 (columns,): E[x] in the basis of the weight, padded as it is."""
        return self._turned(self.mean(device), columns)

    def _turned(self, mean: torch.Tensor, columns: int) -> torch.Tensor:
        if self.rotation:
            mean = rotate_(mean[None], self.rotation)[0]
        return torch.nn.functional.pad(mean, (0, columns - mean.numel()))

    def _load(self, columns: int, device: torch.device) -> Moments:
        found = self.store.moments(self.layer, str(device))
        hessian, mean = found.hessian, found.mean
        if self.centred:
            hessian = hessian.sub_(mean.square() if hessian.dim() == 1 else torch.outer(mean, mean))
        if self.rotation:
            if hessian.dim() == 1:
                hessian = torch.diag(hessian)
            hessian = rotate_(rotate_(hessian, self.rotation).T.contiguous(), self.rotation)
        if (missing := columns - mean.numel()) > 0:
            hessian = torch.nn.functional.pad(hessian, (0, missing) * hessian.dim())
        return replace(found, hessian=hessian, mean=self._turned(mean, columns))


def release() -> None:
    """Forgets what this thread holds."""
    _local.__dict__.pop("held", None)

