"""First steps of a chain: copy bytes, read rows as stored, or read and decode rows of a quantized layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from ..formats.encoding import Encoding
from ..formats.fileio import Reader
from ..formats.layers import Layer
from ..formats.remote import ahead_bytes
from ..formats.scratch import scratch, upload
from ..formats.tensors import TensorRef, torch_dtype
from ..formats.urls import is_url
from .cancelling import check_cancelled
from .work import Chunk, Environment, LayerPlan, Work

_CPU = torch.device("cpu")


def row_chunks(
    rows: tuple[int, int], row_bytes: int, environment: Environment, multiple: int
) -> Iterator[tuple[int, int]]:
    """Row ranges of about ``chunk_bytes``, starting at multiples of ``multiple``; stops when the run is cancelled."""
    start, stop = rows
    step = chunk_rows(row_bytes, environment.chunk_bytes, multiple)
    for first in range(start, stop, step):
        check_cancelled(environment.run_id)
        yield first, min(first + step, stop)


def chunk_rows(row_bytes: int, chunk_bytes: int, multiple: int) -> int:
    """Rows in a full chunk: as many as fit, but at least ``multiple``."""
    return max(1, chunk_bytes // max(1, row_bytes * multiple)) * multiple


def chunk_elements(plan: LayerPlan, environment: Environment) -> int:
    """Weights in one chunk of a layer."""
    (rows, columns), steps = plan.layer.weight.shape, plan.steps
    encoding = plan.layer.encoding
    row_bytes = decoded_row_bytes(encoding) if encoding else plan.layer.weight.row_bytes
    multiple = getattr(steps[0], "multiple", 1)
    return min(rows, chunk_rows(row_bytes, environment.chunk_bytes, multiple)) * columns


def decoded_row_bytes(encoding: Encoding) -> int:
    """Bytes that a row counts when chunks are cut: as 16-bit weights, since buffers grow with weights, not codes."""
    return 2 * encoding.shape[1]


def read_rows(
    reader: Reader, ref: TensorRef, rows: tuple[int, int], key: str, device: torch.device = _CPU
) -> torch.Tensor:
    """Rows of a stored two-dimensional tensor on ``device``; a CPU buffer is reused at the next call with this key."""
    start, stop = rows

    def fill(target: memoryview) -> None:
        reader.read_into(target, ref.start + start * ref.row_bytes)

    stored = upload(key, (stop - start) * ref.row_bytes, device, fill)
    return stored.view(torch_dtype(ref.dtype)).view(stop - start, math.prod(ref.shape[1:]))


def announce_rows(reader: Reader, ref: TensorRef, rows: tuple[int, int]) -> None:
    """These rows are going to be read in order."""
    reader.announce(ref.start + rows[0] * ref.row_bytes, ref.start + rows[1] * ref.row_bytes)


def ahead_of(refs: Iterable[TensorRef | None]) -> int:
    """Bytes that come in ahead of reading these tensors in order: none from local files."""
    return sum(ahead_bytes(ref.nbytes) for ref in refs if ref is not None and is_url(ref.path))


def read_whole(ref: TensorRef) -> torch.Tensor:
    """All numbers of a stored tensor, flat, in memory of their own: for those that are small."""
    content = bytearray(ref.nbytes)
    with Reader(ref.path) as reader:
        reader.read_into(memoryview(content), ref.start)
    return torch.frombuffer(content, dtype=torch_dtype(ref.dtype))


def as_float32(x: torch.Tensor, columns: int) -> torch.Tensor:
    """``x`` (r, n) as float32 (r, columns) in scratch memory, padded with zeros; float64 is rounded first."""
    width = x.shape[1]
    out = scratch("x", (x.shape[0], columns), torch.float32, x.device)
    out[:, :width].copy_(x)
    if columns > width:
        out[:, width:].zero_()
    return out


@dataclass(frozen=True)
class Copy:
    """Passes tensors through byte for byte."""

    names: tuple[tuple[str, str], ...] | None = None
    """(stored name, output name) of every tensor that is copied; None: all of the layer, under the names they have."""
    name: str = "copy"

    def pairs(self, layer: Layer) -> list[tuple[TensorRef, str]]:
        """What is copied, and its name in the output."""
        if self.names is None:
            return [(ref, ref.name) for ref in layer.tensors]
        refs = {ref.name: ref for ref in layer.tensors}
        return [(refs[stored], output) for stored, output in self.names]

    def run(self, work: Work) -> Work:
        pairs = self.pairs(work.plan.layer)

        def stream(_start: int, _stop: int) -> Iterator[Chunk]:
            for ref, output in pairs:
                whole = (0, ref.nbytes)
                with Reader(ref.path) as reader:
                    reader.announce(ref.start, ref.start + ref.nbytes)
                    for first, last in row_chunks(whole, 1, work.environment, 1):
                        buffer = scratch("copy", (last - first,), torch.uint8, torch.device("cpu"))
                        reader.read_into(buffer.numpy().data, ref.start + first)
                        yield Chunk(first, buffer, writes=[(output, first, buffer)])

        work.stream = stream
        return work

    def memory(self, plan: LayerPlan, environment: Environment) -> int:
        """One buffer, and what is read ahead of one tensor."""
        tensors = plan.layer.tensors
        ahead = max((ahead_of([ref]) for ref in tensors), default=0)
        return min(environment.chunk_bytes, max((ref.nbytes for ref in tensors), default=0)) + ahead


@dataclass(frozen=True)
class Read:
    """Reads rows of a weight as they are stored."""

    multiple: int = 1
    """Chunks start at multiples of this many rows."""
    name: str = "read"

    def run(self, work: Work) -> Work:
        ref = work.plan.layer.tensors[0]
        device = torch.device(work.environment.device)

        def stream(start: int, stop: int) -> Iterator[Chunk]:
            with Reader(ref.path) as reader:
                announce_rows(reader, ref, (start, stop))
                for rows in row_chunks((start, stop), ref.row_bytes, work.environment, self.multiple):
                    yield Chunk(rows[0], read_rows(reader, ref, rows, "read", device))

        work.stream = stream
        return work

    def memory(self, plan: LayerPlan, environment: Environment) -> int:
        """The rows as stored, on the CPU (twice for a GPU: one buffer is filled, one copied) and on the device; and
        what is read ahead."""
        weight = plan.layer.weight
        copies = 2 if environment.device == "cpu" else 3
        rows = chunk_elements(plan, environment) * copies * max(2, weight.row_bytes // max(1, weight.shape[1]))
        return rows + ahead_of(plan.layer.tensors[:1])


@dataclass(frozen=True)
class Decode:
    """Reads rows of a quantized layer as float32 weights."""

    multiple: int = 1
    name: str = "decode"

    def run(self, work: Work) -> Work:
        encoding = work.plan.layer.encoding
        assert encoding is not None
        device = torch.device(work.environment.device)

        def stream(start: int, stop: int) -> Iterator[Chunk]:
            with ExitStack() as stack:
                parts = (encoding.codes, encoding.scales, encoding.whole)
                readers = {path: stack.enter_context(Reader(path)) for path in {ref.path for ref in parts if ref}}
                announce_rows(readers[encoding.codes.path], encoding.codes, (start, stop))
                if (scales := encoding.scales) is not None:
                    announce_rows(readers[scales.path], _as_rows(scales), encoding.scale_range(start, stop))
                for rows in row_chunks((start, stop), decoded_row_bytes(encoding), work.environment, self.multiple):
                    yield Chunk(rows[0], decode_rows(encoding, readers, rows, device))

        work.stream = stream
        return work

    def memory(self, plan: LayerPlan, environment: Environment) -> int:
        """Codes, integer indices into the code table, and float32 rows twice; for a GPU codes in two host buffers; and
        what is read ahead."""
        encoding = plan.layer.encoding
        assert encoding is not None
        each = 18 if environment.device == "cpu" else 20
        return chunk_elements(plan, environment) * each + ahead_of((encoding.codes, encoding.scales))


def reader(layer: Layer, multiple: int = 1) -> Read | Decode:
    """The step that reads rows of a layer, plain or quantized."""
    return Read(multiple) if layer.encoding is None else Decode(multiple)


def decode_rows(
    encoding: Encoding, readers: dict[str, Reader], rows: tuple[int, int], device: torch.device
) -> torch.Tensor:
    """Float32 weights (r, n) of a range of rows of a quantized layer."""

    def part(ref: TensorRef | None, wanted: tuple[int, int], key: str) -> torch.Tensor | None:
        if ref is None:
            return None
        stored = read_rows(readers[ref.path], _as_rows(ref), wanted, key, device)
        return stored.view(stored.shape[0], *ref.shape[1:])

    codes = part(encoding.codes, rows, "codes")
    scales = None if encoding.scales is None else part(encoding.scales, encoding.scale_range(*rows), "scales")
    assert codes is not None
    return encoding.decode(rows, codes, scales, part(encoding.whole, (0, 1), "whole"))


def _as_rows(ref: TensorRef) -> TensorRef:
    """A scalar seen as one row."""
    return ref if ref.shape else TensorRef(ref.name, ref.dtype, (1,), ref.path, ref.start)
