"""The pack step: canonical codes and scales to the bytes and offsets that a dialect stores."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..formats.comfy import Storage
from ..formats.format import Format
from ..formats.registry import make_format
from ..formats.scratch import download
from ..formats.swizzle import TILE_ROWS, swizzle
from .reading import chunk_elements
from .work import Chunk, Environment, LayerPlan, Work


@dataclass(frozen=True)
class Pack:
    """Lays codes and scales out as ``storage`` says."""

    format: tuple[str, str, int | None]
    storage: Storage
    """Names in it follow the layer's: layers of one shape share the step."""
    name: str = "pack"

    def run(self, work: Work) -> Work:
        fmt, layer = make_format(*self.format), work.plan.layer.name
        upstream = work.stream
        assert upstream is not None

        def stream(start: int, stop: int) -> Iterator[Chunk]:
            scales: _Tiles | _Rows
            name = layer + self.storage.scales.name
            scales = _Tiles(name, start) if self.storage.layout.swizzled else _Rows(name, fmt)
            for chunk in upstream(start, stop):
                assert chunk.codes is not None
                codes = chunk.codes
                if self.storage.layout.high_nibble_first:
                    codes = (codes << 4) | (codes >> 4)
                stored = self.storage.codes
                place = chunk.start * stored.row_bytes
                chunk.writes = [(layer + stored.name, place, download("codes out", codes))]
                if chunk.start + codes.shape[0] == work.plan.rows:
                    chunk.writes += self._padding(layer, work.plan.rows)
                chunk.writes += scales.add(chunk, last=chunk.start + codes.shape[0] == stop)
                if chunk.start == 0 and self.storage.whole is not None and work.whole is not None:
                    value = torch.frombuffer(bytearray(struct.pack("<f", work.whole)), dtype=torch.float32)
                    chunk.writes.append((layer + self.storage.whole.name, 0, value))
                yield chunk

        work.stream = stream
        return work

    def memory(self, plan: LayerPlan, environment: Environment) -> int:
        """Codes in their stored order, rows that fill them up, and up to a tile of scales twice."""
        padding = self.storage.codes.nbytes - plan.rows * self.storage.codes.row_bytes
        return chunk_elements(plan, environment) * 2 + padding + 4 * TILE_ROWS * (self.storage.scales.row_bytes or 1)

    def _padding(self, layer: str, rows: int) -> list[tuple[str, int, torch.Tensor]]:
        """Zeros behind the last row: written, so that a checksum has seen every byte."""
        codes = self.storage.codes
        missing = codes.nbytes - rows * codes.row_bytes
        zeros = torch.zeros(missing, dtype=torch.uint8)
        return [(layer + codes.name, codes.nbytes - missing, zeros)] if missing else []


class _Rows:
    """Row-major scales: each chunk's lie behind those before it."""

    def __init__(self, name: str, fmt: Format) -> None:
        self.name, self.fmt = name, fmt

    def add(self, chunk: Chunk, last: bool) -> list[tuple[str, int, torch.Tensor]]:
        assert chunk.scales is not None
        stored = chunk.scales.stored.contiguous()
        if self.fmt.scaling == "tensor":
            return [(self.name, 0, download("scales out", stored))] if chunk.start == 0 else []
        row = chunk.start // self.fmt.rows_multiple
        place = row * stored[0].numel() * stored.element_size()
        return [(self.name, place, download("scales out", stored))]


class _Tiles:
    """Swizzled scales: collected until whole tiles of 128 rows are there. Tasks start at multiples of 128 rows."""

    def __init__(self, name: str, start: int) -> None:
        self.name, self.start = name, start
        self.pending: list[torch.Tensor] = []

    def add(self, chunk: Chunk, last: bool) -> list[tuple[str, int, torch.Tensor]]:
        assert chunk.scales is not None
        self.pending.append(chunk.scales.stored.view(torch.uint8))
        rows = sum(piece.shape[0] for piece in self.pending)
        ready = rows if last else rows // TILE_ROWS * TILE_ROWS
        if not ready:
            return []
        gathered = torch.cat(self.pending)
        tiles = swizzle(gathered[:ready])
        write = (self.name, self.start * tiles.shape[1], download("scales out", tiles))
        self.start += ready
        self.pending = [gathered[ready:].clone()]
        return [write]
