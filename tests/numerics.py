"""Quantizing whole tensors in one call, and exact definitions to check it against."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from quantloom.formats.format import Format, Scales, Stats


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For modules that import it. Small tensors gain nothing from more, and on a busy machine lose much."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Quantized:
    """Canonical codes and scales of some rows."""

    codes: torch.Tensor
    scales: Scales
    whole: torch.Tensor | None

    def bits(self) -> list[torch.Tensor]:
        """Everything that is stored or decoded with, as bytes."""
        tensors = [self.codes, self.scales.stored, self.scales.multiplier]
        tensors += [self.whole] if self.whole is not None else []
        return [tensor.contiguous().reshape(-1).view(torch.uint8).cpu() for tensor in tensors]


def padded(fmt: Format, weight: torch.Tensor) -> torch.Tensor:
    """Float32 rows as a format takes them, in fresh memory."""
    x = torch.zeros(weight.shape[0], fmt.columns(weight.shape[1]), device=weight.device)
    x[:, : weight.shape[1]] = weight
    return x


def whole_of(fmt: Format, weight: torch.Tensor, search: bool) -> torch.Tensor | None:
    """What all rows of a tensor share."""
    if not fmt.needs_stats:
        return None
    x = weight.float()
    return fmt.whole(Stats(x.abs().max(), x.flatten() if search else x.flatten()[:0]), search)


def quantize(fmt: Format, weight: torch.Tensor, search: bool = False, whole: torch.Tensor | None = None) -> Quantized:
    """Quantizes rows; ``whole`` None is taken from these rows alone."""
    x = padded(fmt, weight)
    if whole is None:
        whole = whole_of(fmt, weight, search)
    amax = fmt.amax(x)
    if fmt.scaling == "tensor":
        amax = torch.zeros(())
    scales = fmt.search(x, amax, whole) if search else fmt.scales(amax, whole)
    return Quantized(fmt.encode_(x, scales), scales, whole)


def row_multiplier(fmt: Format, quantized: Quantized) -> torch.Tensor:
    """Decode multipliers as ``decode`` wants them."""
    multiplier = quantized.scales.multiplier
    if fmt.scaling == "block":
        return multiplier.repeat_interleave(fmt.block_size or 1, 0)
    return multiplier


def spread(fmt: Format, per_group: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Per-group values for every weight of (padded) ``shape``."""
    size = fmt.block_size or 1
    if fmt.scaling == "row":
        per_group = per_group[:, None]
    elif fmt.scaling == "block":
        per_group = per_group.repeat_interleave(size, 0).repeat_interleave(size, 1)
    elif fmt.scaling == "group":
        per_group = per_group.repeat_interleave(size, 1)
    return per_group.expand(shape)


def decode(fmt: Format, quantized: Quantized) -> torch.Tensor:
    """Float32 weights, padding included."""
    return fmt.decode(quantized.codes, row_multiplier(fmt, quantized))


def squared_errors(fmt: Format, weight: torch.Tensor, search: bool) -> torch.Tensor:
    """Float64 squared error of each weight."""
    quantized = quantize(fmt, weight, search)
    return (decode(fmt, quantized)[:, : weight.shape[1]].double() - weight.double()).square()
