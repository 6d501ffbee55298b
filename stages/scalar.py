"""The scalar step: an MXFP8 layer as it is stored, one scale for its whole tensor beside it, and how wrong that is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from ..formats.elements import E4M3, e8m0_decode
from ..formats.errors import CheckpointError
from ..formats.fileio import Reader
from ..formats.tensors import TensorRef
from .reading import Copy, chunk_elements, decoded_row_bytes, read_rows, row_chunks
from .work import Chunk, Environment, LayerPlan, Work

_NAN = 255
"""The exponent byte that means NaN."""


@dataclass(frozen=True)
class AddScalar:
    """Copies codes and scales byte for byte and adds ``.weight_scalar``.

    Codes are relative to the scales of their groups. How far the scalar takes them off is measured as they pass: the
    squared error is that of ``code * scalar`` against ``code * scale``, over all weights.
    """

    output: str
    """Name of the scalar's tensor."""
    scalar: float | None = None
    """None: the largest scale of a group; 1 when all are 0."""
    name: str = "scalar"

    def run(self, work: Work) -> Work:
        encoding = work.plan.layer.encoding
        assert encoding is not None

        def stream(_start: int, _stop: int) -> Iterator[Chunk]:
            assert encoding.scales is not None
            with ExitStack() as stack:
                paths = {ref.path for ref in (encoding.codes, encoding.scales)}
                readers = {path: stack.enter_context(Reader(path)) for path in paths}
                names, largest = ((encoding.scales.name, encoding.scales.name),), 0
                for chunk in Copy(names).run(Work(work.plan, work.rows, work.environment)).chunks():
                    largest = max(largest, int(chunk.x.amax()))
                    yield chunk
                scalar = torch.tensor(self._scalar(largest, encoding.scales), dtype=torch.float32)
                yield Chunk(0, scalar, writes=[(self.output, 0, scalar)])
                for rows in row_chunks((0, encoding.codes.shape[0]), decoded_row_bytes(encoding), work.environment, 1):
                    codes = read_rows(readers[encoding.codes.path], encoding.codes, rows, "codes")
                    wanted = encoding.scale_range(*rows)
                    scales = read_rows(readers[encoding.scales.path], encoding.scales, wanted, "scales")
                    _measure(work, codes, encoding.multiplier(rows, scales, None), scalar)
                    place = encoding.codes.name, rows[0] * encoding.codes.row_bytes
                    yield Chunk(rows[0], codes, writes=[(*place, codes)])

        work.stream = stream
        return work

    def memory(self, plan: LayerPlan, environment: Environment) -> int:
        """Codes, integer indices into the code table, and their values."""
        return chunk_elements(plan, environment) * 10 + environment.chunk_bytes

    def _scalar(self, largest: int, scales: TensorRef) -> float:
        if largest == _NAN:
            raise CheckpointError(
                f"{scales.path}: {scales.name}: holds the exponent byte 255, which is NaN; make the MXFP8 model anew"
            )
        if self.scalar is not None:
            return self.scalar
        return float(e8m0_decode(torch.tensor(largest))) or 1.0


def _measure(work: Work, codes: torch.Tensor, multiplier: torch.Tensor, scalar: torch.Tensor) -> None:
    """Adds the squared distances between both decodes of some rows, and the squared weights."""
    groups = E4M3.decode(codes).view(*multiplier.shape, -1)
    energy = groups.square_().nan_to_num_(0.0).sum(-1).double()  # a NaN code is NaN under any scale
    work.squared_error += float((energy * (multiplier.double() - scalar.double()).square()).sum())
    work.squared_weight += float((energy * multiplier.double().square()).sum())
