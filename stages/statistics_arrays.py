"""Reading the arrays of a statistics store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..formats.errors import CheckpointError
from ..formats.fileio import Reader


def open_array(path: Path, shape: tuple[int, ...] | None) -> Any:
    """A Zarr array; CheckpointError when it is missing, broken, or of another shape than the store's table says."""
    import zarr

    try:
        array = zarr.open_array(path, mode="r")
        found = array.shape
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken(path, error) from error
    if shape is not None and found != shape:
        raise CheckpointError(f"{path}: has shape {found}, the store's table says {shape}; calibrate again")
    return array


class RowBlocks:
    """H of one input, (n, n) float32, read by ranges of rows.

    Zarr reads through one thread for the whole process, for which GPUs would wait. A chunk that is not compressed is
    its numbers, little endian (Zarr v3, bytes codec): whole chunks are read by the thread that wants them.
    """

    def __init__(self, path: Path, width: int) -> None:
        self.path, self.array = path, open_array(path, (width, width))
        self.buffer = np.empty((0, width), dtype="<f4")

    def rows(self, start: int, stop: int) -> Any:
        """Rows ``start`` to ``stop`` (numpy), until the next are asked for. CheckpointError when they are broken."""
        try:
            step, columns = self.array.chunks
            whole = start % step == 0 and stop == min(start + step, self.array.shape[0])
            if not whole or columns != self.array.shape[1] or self.array.compressors or self.array.dtype != np.float32:
                return np.ascontiguousarray(self.array[start:stop])
            if len(self.buffer) < step:
                self.buffer = np.empty((step, columns), dtype="<f4")
            values: Any = self.buffer[: stop - start]
            with Reader(self.path / self.array.metadata.encode_chunk_key((start // step, 0))) as reader:
                reader.read_into(memoryview(values.reshape(-1)).cast("B"), 0)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, CheckpointError) as error:
            raise _broken(self.path, error) from error
        return values


def _broken(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} is missing or broken ({error}); calibrate again")
