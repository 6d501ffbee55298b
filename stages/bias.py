"""Bias correction: what rounding takes from a layer's mean output is added to its bias, b += (W - W') E[x].

With a real E[x] only: for random inputs the mean is zero and the correction noise (Banner et al., arXiv 1810.05723;
Nagel et al., arXiv 1906.04721). The product with the original rows is taken before they are rotated and rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..formats.fileio import Reader
from ..formats.format import Format
from ..formats.registry import make_format
from ..formats.tensors import TensorRef, torch_dtype
from .inputs import Inputs
from .reading import read_rows
from .work import Chunk, Environment, LayerPlan, Work


@dataclass(frozen=True)
class Project:
    """Notes W E[x] of the rows that pass."""

    inputs: Inputs
    name: str = "mean output"

    def run(self, work: Work) -> Work:
        upstream = work.stream
        assert upstream is not None
        device = torch.device(work.environment.device)
        work.projection = torch.zeros(work.plan.rows, dtype=torch.float32, device=device)

        def stream(start: int, stop: int) -> Iterator[Chunk]:
            mean = self.inputs.mean(device)
            for chunk in upstream(start, stop):
                assert work.projection is not None
                rows = slice(chunk.start, chunk.start + chunk.x.shape[0])
                work.projection[rows] = chunk.x.float() @ mean
                yield chunk

        work.stream = stream
        return work

    def memory(self, plan: LayerPlan, environment: Environment) -> int:
        """Means, products, and a float32 copy of the rows."""
        rows, columns = plan.layer.weight.shape
        return 4 * (rows + columns) + environment.chunk_bytes * 2


@dataclass(frozen=True)
class CorrectBias:
    """Writes the bias with (W - W') E[x] added, rows by rows."""

    format: tuple[str, str, int | None]
    """Arguments of ``make_format``."""
    bias: TensorRef
    """The stored bias (m,)."""
    inputs: Inputs
    name: str = "bias"

    def run(self, work: Work) -> Work:
        upstream = work.stream
        assert upstream is not None
        fmt, device = make_format(*self.format), torch.device(work.environment.device)

        def stream(start: int, stop: int) -> Iterator[Chunk]:
            mean = self.inputs.turned_mean(fmt.columns(work.plan.layer.weight.shape[1]), device)
            with Reader(self.bias.path) as reader:
                for chunk in upstream(start, stop):
                    assert work.projection is not None
                    lost = work.projection[chunk.start :][: chunk.x.shape[0]] - _decoded(fmt, chunk) @ mean
                    stored = read_rows(reader, self.bias, (chunk.start, chunk.start + len(lost)), "bias")[:, 0]
                    corrected = stored.to(device).float() + lost
                    data = corrected.to(torch_dtype(self.bias.dtype)).cpu()
                    chunk.writes.append((self.bias.name, chunk.start * data.element_size(), data))
                    yield chunk

        work.stream = stream
        return work

    def memory(self, plan: LayerPlan, environment: Environment) -> int:
        """The decoded rows and integer indices into the code table."""
        return environment.chunk_bytes * 6


def _decoded(fmt: Format, chunk: Chunk) -> torch.Tensor:
    """The stored weights of a chunk."""
    assert chunk.codes is not None
    assert chunk.scales is not None
    return fmt.decode(chunk.codes, fmt.row_multipliers(chunk.scales.multiplier, slice(None), len(chunk.codes)))
