"""One quantized layer as it is stored, and the checks that dialects share; from headers, before any byte is read."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .encoding import Encoding
from .markers import Entry
from .registry import FORMATS
from .tensors import FLOAT_DTYPES, TensorRef

Shape = tuple[int, int]
"""Rows and columns."""

ONE_BYTE = {"F8_E4M3": "fp8", "F8_E5M2": "fp8_e5m2", "I8": "int8"}
"""dtype of the codes -> format whose scale multiplies them."""
_SCALE_DTYPES = FLOAT_DTYPES | {"F8_E8M0"}
_LARGEST_EDGE = 1 << 14


class Undecodable(ValueError):
    """Why a layer cannot be decoded."""


@dataclass(frozen=True)
class Declared:
    """What config.json says of every layer."""

    method: str | None = None
    """``quant_method``; None: the checkpoint does not declare itself quantized."""
    block: Shape | None = None
    """Rows and columns of weights that share a scale, when all layers have the same."""
    dtype: str = "BF16"
    """safetensors dtype of the model before it was quantized."""

    @classmethod
    def of(cls, config: Mapping[str, Any] | None) -> Declared:
        """Reads both spellings: transformers' ``weight_block_size`` and the groups of compressed-tensors."""
        values = config or {}
        known = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
        dtype = known.get(str(values.get("dtype") or values.get("torch_dtype")).removeprefix("torch."), "BF16")
        quantization = values.get("quantization_config")
        if not isinstance(quantization, dict):
            return cls(dtype=dtype)
        groups = quantization.get("config_groups")
        found = [quantization.get("weight_block_size")]
        for group in groups.values() if isinstance(groups, dict) else ():
            weights = group.get("weights") if isinstance(group, dict) else None
            found.append(weights.get("block_structure") if isinstance(weights, dict) else None)
        blocks = {pair for pair in map(as_pair, found) if pair}
        return cls(str(quantization.get("quant_method")), blocks.pop() if len(blocks) == 1 else None, dtype)


@dataclass(frozen=True, slots=True)
class Stored:
    """The tensors of one quantized layer."""

    parts: Mapping[str, TensorRef]
    """By suffix: ``.weight`` or ``.weight_packed``, and its companions."""
    marker: Entry | None = None
    """ComfyUI's description."""
    bias_rows: int | None = None
    """Length of the layer's bias: the true number of rows of a padded weight."""
    declared: Declared = Declared()

    @property
    def codes(self) -> TensorRef:
        return self.parts.get(".weight") or self.parts[".weight_packed"]

    @property
    def shape(self) -> Shape:
        """Rows and columns as stored."""
        return self.codes.shape[0], self.codes.shape[1]


def as_count(value: object) -> int | None:
    """``value`` if it is a positive whole number."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def as_pair(value: object) -> Shape | None:
    """``value`` if it is a list of two positive whole numbers."""
    if not isinstance(value, list) or len(value) != 2:
        return None
    first, second = as_count(value[0]), as_count(value[1])
    return (first, second) if first and second else None


def expect_dtype(scale: TensorRef, dtypes: Collection[str]) -> None:
    """Raises Undecodable for a scale of another dtype."""
    if scale.dtype not in dtypes:
        raise Undecodable(f"{_part(scale)} is {scale.dtype}, needs {' or '.join(sorted(dtypes))}")


def expect_shape(scale: TensorRef, wanted: Shape, what: str) -> None:
    """Raises Undecodable for a scale of another shape."""
    if scale.shape != wanted:
        raise Undecodable(f"{_part(scale)} has shape {list(scale.shape)}, {what} needs {list(wanted)}")


def tensor_scale(stored: Stored, part: str) -> TensorRef:
    """The one number that scales a whole tensor; NVFP4 cannot be read without it."""
    scale = stored.parts.get(part)
    if scale is None:
        raise Undecodable(f"NVFP4 without {part}")
    expect_dtype(scale, FLOAT_DTYPES)
    if scale.numel != 1:
        raise Undecodable(f"{_part(scale)} has shape {list(scale.shape)}, needs one number")
    return scale


def scaled(dialect: str, stored: Stored, scale: TensorRef, block: Shape | None = None) -> Encoding:
    """One-byte codes with multiplying scales, whose shape tells the scaling: tensor, row (N) or (N, 1), or blocks."""
    name = ONE_BYTE.get(stored.codes.dtype)
    if name is None or ".weight" not in stored.parts:
        raise Undecodable(f"{stored.codes.dtype} weight with {_part(scale)}")
    expect_dtype(scale, _SCALE_DTYPES)
    rows = stored.shape[0]
    if scale.numel == 1:
        scaling: tuple[str, int | None] = ("tensor", None)
    elif scale.shape in ((rows,), (rows, 1)):
        scaling = ("row", None)
    else:
        scaling = ("block", _block_edge(stored.shape, scale, block))
    if scaling[0] not in FORMATS[name].scalings:
        raise Undecodable(f"{stored.codes.dtype} weight with {scaling[0]} scales")
    return Encoding(dialect, (name, *scaling), stored.shape, stored.codes, scale)


def as_grid(shape: Shape, scale: TensorRef) -> tuple[TensorRef, Shape | None]:
    """Block scales that are stored flat, row by row, as the grid that they are, and their blocks: there is one edge
    that gives so many square blocks. Any other scale as it is: of a row each, or, if of a column each, unreadable."""
    rows, columns = shape
    count = scale.numel
    if len(scale.shape) != 1 or count in (0, 1, *shape):
        return scale, None
    edge = math.isqrt(rows * columns // count)
    if edge < 2 or rows % edge or columns % edge or (rows // edge) * (columns // edge) != count:
        return scale, None
    return replace(scale, shape=(rows // edge, columns // edge)), (edge, edge)


def fits(shape: Shape, grid: tuple[int, ...], block: Shape) -> bool:
    """Whether a grid of scales covers a weight in such blocks, the last ones cut off."""
    return grid == (-(-shape[0] // block[0]), -(-shape[1] // block[1]))


def _block_edge(shape: Shape, scale: TensorRef, declared: Shape | None) -> int:
    """Edge of the square blocks: the declared one, else the only likely one that fits (a power of two, or no rest)."""
    grid = scale.shape
    what = f"{_part(scale)} of shape {list(grid)} for a {shape[0]} x {shape[1]} weight"
    if len(grid) != 2 or 0 in grid or 0 in shape:
        raise Undecodable(what)
    if declared is not None:
        if not fits(shape, grid, declared):
            raise Undecodable(f"{what}: does not fit blocks of {declared[0]} x {declared[1]}")
        if declared[0] != declared[1]:
            raise Undecodable(f"{what}: blocks of {declared[0]} x {declared[1]} are not square")
        return declared[0]
    likely = {1 << power for power in range(1, _LARGEST_EDGE.bit_length())}
    if shape[0] % grid[0] == 0:
        likely.add(shape[0] // grid[0])
    edges = sorted(edge for edge in likely if edge > 1 and fits(shape, grid, (edge, edge)))
    if not edges:
        raise Undecodable(f"{what}: fits no square blocks")
    if len(edges) > 1:
        raise Undecodable(f"{what}: blocks of {' or '.join(map(str, edges))}, and nothing says which")
    return edges[0]


def _part(scale: TensorRef) -> str:
    """``.weight_scale`` and the like."""
    return "." + scale.name.rpartition(".")[2]
