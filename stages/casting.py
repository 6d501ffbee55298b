"""Steps that store plain numbers, and refuse what a dtype would swallow in silence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

import torch

from ..formats.errors import NonFiniteError
from ..formats.fileio import Reader
from ..formats.scratch import scratch
from ..formats.tensors import TensorRef, TensorSpec, torch_dtype
from .reading import chunk_elements, row_chunks
from .work import Chunk, Environment, LayerPlan, Work

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Recast:
    """Stores tensors of the layer in another dtype, beside what the step before copies as it is."""

    moves: tuple[tuple[TensorRef, TensorSpec], ...]
    """What is stored, and what it becomes: as many numbers."""
    name: str = "recast"

    def run(self, work: Work) -> Work:
        upstream = work.stream
        assert upstream is not None

        def stream(start: int, stop: int) -> Iterator[Chunk]:
            yield from upstream(start, stop)
            for ref, spec in self.moves:
                yield from _recast(ref, spec, work.environment)

        work.stream = stream
        return work

    def memory(self, plan: LayerPlan, environment: Environment) -> int:
        """One buffer as stored, its numbers in the new dtype (at most four times the bytes), and a mask."""
        largest = max((ref.nbytes for ref, _ in self.moves), default=0)
        return min(environment.chunk_bytes, largest) * 6


def _recast(ref: TensorRef, spec: TensorSpec, environment: Environment) -> Iterator[Chunk]:
    stored, made = torch_dtype(ref.dtype), torch_dtype(spec.dtype)
    with Reader(ref.path) as reader:
        for first, last in row_chunks((0, ref.numel), stored.itemsize, environment, 1):
            buffer = scratch("recast", (last - first,), stored, _CPU)
            reader.read_into(buffer.view(torch.uint8).numpy().data, ref.start + first * stored.itemsize)
            values = narrowed(buffer, made, ref, first)
            yield Chunk(first, values, writes=[(spec.name, first * made.itemsize, values)])


@dataclass(frozen=True)
class Finite:
    """Refuses decoded weights that are NaN or Inf: codes of a broken layer."""

    name: str = "finite"

    def run(self, work: Work) -> Work:
        upstream, ref = work.stream, work.plan.layer.tensors[0]
        assert upstream is not None

        def stream(start: int, stop: int) -> Iterator[Chunk]:
            for chunk in upstream(start, stop):
                if not _all_finite(chunk.x):
                    _refuse(ref, work.plan.layer.weight.name, chunk.start, ~chunk.x.isfinite())
                yield chunk

        work.stream = stream
        return work

    def memory(self, plan: LayerPlan, environment: Environment) -> int:
        """Nothing; where it refuses, a mask and its opposite."""
        return chunk_elements(plan, environment) * 2


def _refuse(ref: TensorRef, name: str, start: int, wrong: torch.Tensor) -> NoReturn:
    row, column = (int(index) for index in wrong.nonzero()[0])
    raise NonFiniteError(
        f"{ref.path}: {name}: weight [{start + row}, {column}] decodes to NaN or Inf; repair the checkpoint, or pass "
        "--nonfinite keep to write it as it is"
    )


@dataclass(frozen=True)
class Cast:
    """Float32 rows to the dtype of a plain weight."""

    output: str
    """Name of the output tensor."""
    dtype: str
    """safetensors dtype."""
    name: str = "cast"

    def run(self, work: Work) -> Work:
        upstream = work.stream
        assert upstream is not None
        dtype, ref = torch_dtype(self.dtype), work.plan.layer.tensors[0]

        def stream(start: int, stop: int) -> Iterator[Chunk]:
            for chunk in upstream(start, stop):
                columns = chunk.x.shape[1]
                rows = narrowed(chunk.x, dtype, ref, chunk.start * columns).contiguous().cpu()
                chunk.writes = [(self.output, chunk.start * columns * rows.element_size(), rows)]
                yield chunk

        work.stream = stream
        return work

    def memory(self, plan: LayerPlan, environment: Environment) -> int:
        """The rows in their new dtype, and a mask."""
        return chunk_elements(plan, environment) * 5


def _all_finite(x: torch.Tensor) -> bool:
    """By the extremes, which NaN takes over: thirty times as fast as a mask."""
    return not x.numel() or bool(torch.stack(torch.aminmax(x)).isfinite().all())


def narrowed(x: torch.Tensor, dtype: torch.dtype, ref: TensorRef, first: int) -> torch.Tensor:
    """``x`` in another dtype; NaN and Inf stay what they are.

    Raises NonFiniteError for a finite number that would become Inf; ``first`` is the index of ``x[0]`` in the tensor.
    """
    made = x.to(dtype)
    if _all_finite(made):
        return made
    wrong = (x.double().isfinite() & ~made.isfinite()).reshape(-1)
    if wrong.any():
        index = int(wrong.nonzero()[0])
        value, largest = float(x.reshape(-1)[index]), torch.finfo(dtype).max
        raise NonFiniteError(
            f"{ref.path}: {ref.name}: number {first + index} is {value:.6g}, but the largest that "
            f"{str(dtype).removeprefix('torch.')} holds is {largest:.6g}: write bf16 or f32 instead"
        )
    return made
