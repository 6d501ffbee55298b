"""Values that describe stored tensors without holding data, and the table of safetensors dtypes."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .record import Record

if TYPE_CHECKING:
    import torch

DTYPE_BITS: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits per element of every dtype that safetensors 0.8 knows."""

_TORCH_NAMES: dict[str, str] = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F16": "float16", "BF16": "bfloat16",
    "F32": "float32", "F64": "float64", "C64": "complex64",
}  # fmt: skip

FLOAT_DTYPES = frozenset({"F16", "BF16", "F32", "F64"})
"""Dtypes whose stored numbers are the weights themselves (every narrower float needs a scale to mean anything)."""

PLAIN_DTYPES = {"bf16": "BF16", "f16": "F16", "f32": "F32"}
"""Dtypes that plain weights are written in: names as options give them -> as safetensors does."""


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name; sub-byte dtypes have none and raise KeyError."""
    import torch

    dtype = getattr(torch, _TORCH_NAMES[name])
    assert isinstance(dtype, torch.dtype)
    return dtype


@dataclass(frozen=True, slots=True)
class TensorSpec(Record):
    """What a tensor will be: name, dtype and shape, before it has a place."""

    name: str
    """Full key in the checkpoint."""
    dtype: str
    """safetensors dtype name, for example ``BF16``."""
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensor (sub-byte dtypes are packed without gaps)."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first dimension; 0 for a tensor without elements."""
        return self.nbytes // self.shape[0] if self.shape and self.shape[0] else self.nbytes


@dataclass(frozen=True, slots=True)
class TensorRef(TensorSpec):
    """One stored tensor of an input: where its bytes lie. Never holds data."""

    path: str
    """File that holds the bytes."""
    start: int
    """Absolute offset of the first byte in ``path``."""


@dataclass(frozen=True, slots=True)
class Slot(TensorSpec):
    """The place of one output tensor, known before any weight is read."""

    path: str
    """Final path of the shard; bytes are written to its ``.part`` file until the commit."""
    start: int
    """Absolute offset of the first byte in the shard."""


def number_tensor(name: str, value: float) -> tuple[TensorSpec, bytes]:
    """One float32 number, such as an activation scale, as a tensor without dimensions: what it is, and its bytes."""
    return TensorSpec(name, "F32", ()), struct.pack("<f", value)
