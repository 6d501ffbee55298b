"""Quantized layers built from random codes by their formats' definitions: nothing of the package makes or decodes them.

A case is what a checkpoint stores for one layer, and the float32 weights that it means. Arithmetic is numpy's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from quantloom import Pipeline
from quantloom.formats.layers import Layer, group_layers
from quantloom.formats.source import open_source
from quantloom.stages.reading import Decode
from quantloom.stages.work import Environment, LayerPlan, Work

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Array = np.ndarray[Any, Any]
Shape = tuple[int, int]
LAYER = "blocks.0.lin"


@dataclass
class Case:
    """One stored layer."""

    tensors: dict[str, torch.Tensor]
    """By suffix, ``.weight`` and so on."""
    weight: Array
    """What it means: float32, without padding."""
    format: str
    """``name scaling`` and, for blocks, their edge."""
    dialect: str
    marker: dict[str, Any] | None = None
    config: dict[str, Any] | None = None
    extra: dict[str, torch.Tensor] = field(default_factory=dict)
    """Tensors of the file that belong to no single layer."""
    passes: bool = False
    """Whether it stays as it is when it is kept in a file for ComfyUI."""
    tolerance: float = 0.0
    """Relative; 0: every bit."""

    def stored(self, layer: str = LAYER) -> dict[str, torch.Tensor]:
        """The layer's tensors under full names, the marker among them."""
        named = {layer + suffix: tensor for suffix, tensor in self.tensors.items()}
        if self.marker is not None:
            named[layer + ".comfy_quant"] = marker_tensor(self.marker)
        return named | self.extra


def marker_tensor(entry: dict[str, Any]) -> torch.Tensor:
    return torch.tensor(list(json.dumps(entry).encode()), dtype=torch.uint8)


def save(folder: Path, tensors: dict[str, torch.Tensor], config: Any = None, header: Any = None) -> Path:
    """A checkpoint of one file, written by the safetensors library, with config.json beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.safetensors"
    text = header if header is None or isinstance(header, str) else json.dumps(header)
    save_file(tensors, path, None if text is None else {"_quantization_metadata": text})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return path


def layer_of(path: Path, name: str = LAYER) -> Layer:
    """What the package sees in a checkpoint."""
    return next(layer for layer in group_layers(open_source(path)) if layer.name == name)


def decode(layer: Layer, ranges: list[Shape], chunk_bytes: int = 1 << 20) -> torch.Tensor:
    """The layer's weights through the Decode step, one range of rows after the other."""
    plan = LayerPlan(layer, (), ())
    work = Decode().run(Work(plan, (0, plan.rows), Environment(chunk_bytes=chunk_bytes)))
    assert work.stream is not None
    return torch.cat([chunk.x.clone() for start, stop in ranges for chunk in work.stream(start, stop)])


def convert(source: Path, output: Path, format: str = "int8", exclude: str | None = None, **options: Any) -> Path:
    """Quantizes what ``exclude`` does not keep."""
    pipeline = Pipeline(scheduler="sync").read(source).target(preset="none", exclude=exclude)
    pipeline.quantize(format, **options).write(output)
    return output


def header_of(path: Path) -> dict[str, Any]:
    """Layers of the header entry."""
    with safe_open(path, "pt") as file:
        layers: dict[str, Any] = json.loads(file.metadata()["_quantization_metadata"])["layers"]
        return layers


def marker_of(tensors: dict[str, torch.Tensor], layer: str = LAYER) -> Any:
    """A layer's marker, read as JSON."""
    return json.loads(bytes(tensors[layer + ".comfy_quant"].tolist()))


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    flat = [tensor.reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*flat)


# Element grids from their bits.


def float8_table(exponent_bits: int, mantissa_bits: int) -> Array:
    """Values of all 256 codes of a float8 with sign, exponent and mantissa; NaN and infinity come out as NaN."""
    bias, values = 2 ** (exponent_bits - 1) - 1, np.full(256, np.nan)
    for code in range(256):
        sign, exponent = code >> 7, (code >> mantissa_bits) & (2**exponent_bits - 1)
        fraction = (code & (2**mantissa_bits - 1)) / 2**mantissa_bits
        magnitude = fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias)
        values[code] = -magnitude if sign else magnitude
    if exponent_bits == 4:
        values[[0x7F, 0xFF]] = np.nan
    else:
        values[[code for code in range(256) if code & 0x7C == 0x7C]] = np.nan
    return values.astype(np.float32)


E4M3, E5M2 = float8_table(4, 3), float8_table(5, 2)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def codes(table: Array, shape: Shape, seed: int = 0) -> Array:
    """Random finite codes (uint8)."""
    finite = np.flatnonzero(np.isfinite(table)).astype(np.uint8)
    return np.random.default_rng(seed).choice(finite, shape)


def positive(shape: tuple[int, ...], seed: int = 1) -> Array:
    """Random float32 scales around 0.01."""
    values = np.exp(np.random.default_rng(seed).normal(-4.6, 1.0, shape))
    return np.asarray(values, np.float32)


def tensor(values: Array, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A torch tensor of the same bytes, seen as ``dtype``."""
    plain = torch.from_numpy(np.array(values, copy=True))
    return plain if dtype is None else plain.view(dtype)


def spread(scales: Array, shape: Shape, block: Shape) -> Array:
    """A grid of block scales, one for every weight."""
    return scales.repeat(block[0], 0).repeat(block[1], 1)[: shape[0], : shape[1]]


def swizzle(scales: Array) -> Array:
    """One-byte scales in the tile order of cuBLAS, element by element."""
    rows, columns = -(-scales.shape[0] // 128) * 128, -(-scales.shape[1] // 4) * 4
    flat = np.zeros(rows * columns, np.uint8)
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            tile = (row // 128) * (columns // 4) + column // 4
            flat[tile * 512 + (row % 32) * 16 + (row % 128 // 32) * 4 + column % 4] = scales[row, column]
    return flat.reshape(rows, columns)


def hadamard(order: int) -> Array:
    """The regular Hadamard matrix of a power of four, normalised (float64)."""
    four = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], np.float64) / 2
    matrix: Array = np.ones((1, 1))
    while len(matrix) < order:
        matrix = np.kron(matrix, four)
    return matrix


# Cases.


def _fp8(
    scales: Any,
    wide: Any,
    suffix: str = ".weight_scale",
    shape: Shape = (130, 70),
    table: Array = E4M3,
    scale_dtype: torch.dtype = torch.float32,
    **case: Any,
) -> Case:
    """Random codes; ``wide`` is what multiplies them, ``scales`` what is stored of that (None: nothing)."""
    stored = codes(table, shape)
    dtype = torch.float8_e4m3fn if table is E4M3 else torch.float8_e5m2
    tensors = {".weight": tensor(stored, dtype)}
    if scales is not None:
        tensors[suffix] = tensor(scales).to(scale_dtype)
    return Case(tensors, table[stored] * wide, **case)


def _scalar(scale_dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (), **case: Any) -> Case:
    scales = np.asarray(positive(shape))
    rounded = tensor(scales).to(scale_dtype).float().numpy()
    return _fp8(scales, np.float32(rounded.reshape(())), scale_dtype=scale_dtype, format="fp8 tensor", **case)


def _rows(shape: Shape, flat: bool, **case: Any) -> Case:
    scales = positive((shape[0], 1))
    return _fp8(scales.reshape(-1) if flat else scales, scales, shape=shape, format="fp8 row", **case)


def _blocks(shape: Shape, edge: int, scale_dtype: torch.dtype = torch.float32, **case: Any) -> Case:
    grid = positive((-(-shape[0] // edge), -(-shape[1] // edge)))
    rounded = tensor(grid).to(scale_dtype).float().numpy()
    wide = spread(rounded, shape, (edge, edge))
    return _fp8(grid, wide, shape=shape, scale_dtype=scale_dtype, format=f"fp8 block {edge}", **case)


def _int8(scales: Any, wide: Any, shape: Shape, **case: Any) -> Case:
    stored = np.random.default_rng(2).integers(-127, 128, shape).astype(np.int8)
    tensors = {".weight": tensor(stored), ".weight_scale": tensor(scales)}
    return Case(tensors, stored.astype(np.float32) * wide, **case)


def _int8_tensor(shape: Shape, **case: Any) -> Case:
    return _int8(np.float32(0.01), np.float32(0.01), shape, format="int8 tensor", **case)


def _int8_rows(shape: Shape, flat: bool = False, **case: Any) -> Case:
    scales = positive((shape[0], 1))
    return _int8(scales.reshape(-1) if flat else scales, scales, shape, format="int8 row", **case)


def _int8_blocks(shape: Shape, edge: int, **case: Any) -> Case:
    grid = positive((shape[0] // edge, shape[1] // edge))
    return _int8(grid, spread(grid, shape, (edge, edge)), shape, format=f"int8 block {edge}", **case)


def rotated(shape: Shape, group: int, entry: dict[str, Any]) -> Case:
    case = _int8_rows(shape, dialect="comfy", marker={"format": "int8_tensorwise", **entry}, passes=True)
    groups = case.weight.astype(np.float64).reshape(shape[0], -1, group)
    case.weight = (groups @ hadamard(group)).reshape(shape).astype(np.float32)
    case.format, case.tolerance = f"int8 row rotated {group}", 1e-6
    return case


def _padded(stored: Array, shape: Shape, multiple: int) -> Array:
    rows, columns = (-(-size // multiple) * multiple for size in shape)
    return np.pad(stored, ((0, rows - shape[0]), (0, columns - shape[1])))


def mxfp8(shape: Shape, name: str = "mxfp8", described: bool = True, scale_dtype: torch.dtype = torch.uint8) -> Case:
    """ComfyUI's: padded to 32s, swizzled. One block has exponent byte 0, which means 0 there."""
    stored = _padded(codes(E4M3, shape), shape, 32)
    exponents = np.random.default_rng(3).integers(110, 130, (stored.shape[0], stored.shape[1] // 32)).astype(np.uint8)
    exponents[1, 0] = 0
    scales = np.where(exponents == 0, 0.0, np.exp2(exponents.astype(np.float64) - 127))
    tensors = {
        ".weight": tensor(stored, torch.float8_e4m3fn),
        ".weight_scale": tensor(swizzle(exponents), scale_dtype),
    }
    weight = (E4M3[stored] * scales.repeat(32, 1)).astype(np.float32)[: shape[0], : shape[1]]
    entry: dict[str, Any] = {"format": name}
    if described:
        entry |= {"group_size": 32, "orig_dtype": "torch.bfloat16", "orig_shape": list(shape)}
    if name == "hybrid_mxfp8":
        tensors[".weight_scalar"] = torch.tensor(0.125)
    return Case(tensors, weight, f"{name} group 32", "comfy", entry, passes=True)


def nvfp4(shape: Shape, described: bool = True, scale_dtype: torch.dtype = torch.float8_e4m3fn) -> Case:
    """ComfyUI's: padded to 16s, swizzled, first weight in the high nibble, the tensor scale multiplies."""
    four = _padded(np.random.default_rng(4).integers(0, 16, shape).astype(np.uint8), shape, 16)
    blocks = codes(E4M3[:0x7F], (four.shape[0], four.shape[1] // 16), seed=5)
    whole = np.float32(0.00037)
    tensors = {
        ".weight": tensor(four[:, 0::2] << 4 | four[:, 1::2]),
        ".weight_scale": tensor(swizzle(blocks), scale_dtype),
        ".weight_scale_2": torch.tensor(float(whole)),
    }
    weight = (E2M1[four] * (E4M3[blocks] * whole).repeat(16, 1))[: shape[0], : shape[1]]
    entry: dict[str, Any] = {"format": "nvfp4"}
    if described:
        entry |= {"group_size": 16, "orig_dtype": "torch.float16", "orig_shape": list(shape)}
    return Case(tensors, weight, "nvfp4 group 16", "comfy", entry, passes=True)


def row_major_mxfp8(shape: Shape, scale_dtype: torch.dtype, **case: Any) -> Case:
    """compressed-tensors': unpadded, row-major; exponent byte 0 means 2**-127."""
    stored = codes(E4M3, shape)
    exponents = np.random.default_rng(3).integers(110, 130, (shape[0], shape[1] // 32)).astype(np.uint8)
    exponents[1, 0] = 0
    scales = np.exp2(exponents.astype(np.float64) - 127)
    tensors = {".weight": tensor(stored, torch.float8_e4m3fn), ".weight_scale": tensor(exponents, scale_dtype)}
    return Case(tensors, (E4M3[stored] * scales.repeat(32, 1)).astype(np.float32), "mxfp8 group 32", **case)


def packed_nvfp4(shape: Shape) -> Case:
    """compressed-tensors': row-major, first weight in the low nibble, the global scale divides."""
    four = np.random.default_rng(4).integers(0, 16, shape).astype(np.uint8)
    blocks = codes(E4M3[:0x7F], (shape[0], shape[1] // 16), seed=5)
    divisor = np.float32(2689.37)
    tensors = {
        ".weight_packed": tensor(four[:, 1::2] << 4 | four[:, 0::2]),
        ".weight_scale": tensor(blocks, torch.float8_e4m3fn),
        ".weight_global_scale": torch.tensor([float(divisor)]),
        ".input_global_scale": torch.tensor([7.0]),
    }
    weight = E2M1[four] * (E4M3[blocks] / divisor).repeat(16, 1)
    return Case(tensors, weight, "nvfp4 group 16", "compressed-tensors", config=CT)


CT: dict[str, Any] = {"quantization_config": {"quant_method": "compressed-tensors"}}
CT_BLOCKS: dict[str, Any] = {
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": {"strategy": "block", "block_structure": [128, 128]}}},
    }
}


def deepseek(edge: int) -> dict[str, Any]:
    return {"torch_dtype": "float16", "quantization_config": {"quant_method": "fp8", "weight_block_size": [edge, edge]}}


def _comfy(name: str, **more: Any) -> dict[str, Any]:
    return {"dialect": "comfy", "marker": {"format": name, **more}, "passes": True}


def _legacy(prefix: str = "", elements: int = 0) -> dict[str, Any]:
    mark = {prefix + "scaled_fp8": torch.zeros(elements).to(torch.float8_e4m3fn)}
    return {"dialect": "legacy", "suffix": ".scale_weight", "extra": mark, "passes": True}


def _deepseek(shape: Shape, edge: int, config: Any, scale_dtype: torch.dtype = torch.float32) -> Case:
    return _blocks(shape, edge, scale_dtype, suffix=".weight_scale_inv", dialect="fp8-block", config=config)


def _e5m2(**case: Any) -> Case:
    return _fp8(np.float32(0.02), np.float32(0.02), table=E5M2, format="fp8_e5m2 tensor", **case)


def _plain(table: Array, format: str) -> Case:
    return _fp8(None, np.float32(1), table=table, format=format, dialect="plain-fp8", passes=True)


SCALED: dict[str, Any] = {"dialect": "scaled"}
CTD: dict[str, Any] = {"dialect": "compressed-tensors", "config": CT}

CASES: dict[str, Callable[[], Case]] = {
    "comfy fp8": lambda: _scalar(**_comfy("float8_e4m3fn")),
    "comfy fp8, scale (1, 1)": lambda: _scalar(shape=(1, 1), **_comfy("float8_e4m3fn")),
    "comfy fp8, bf16 scale": lambda: _scalar(torch.bfloat16, (1,), **_comfy("float8_e4m3fn")),
    "comfy fp8, fp16 scale": lambda: _scalar(torch.float16, **_comfy("float8_e4m3fn")),
    "comfy fp8_e5m2": lambda: _e5m2(**_comfy("float8_e5m2")),
    "comfy fp8 row": lambda: _rows((130, 70), flat=True, **_comfy("float8_e4m3fn_rowwise")),
    "comfy fp8 block": lambda: _blocks((128, 192), 64, **_comfy("float8_e4m3fn_blockwise", group_size=64)),
    "comfy fp8 block without group_size": lambda: _blocks((128, 192), 64, **_comfy("float8_e4m3fn_blockwise")),
    "comfy int8": lambda: _int8_tensor((33, 50), **_comfy("int8_tensorwise")),
    "comfy int8 row": lambda: _int8_rows((33, 50), **_comfy("int8_tensorwise", per_row=True)),
    "comfy int8 row, flat scale": lambda: _int8_rows((50, 50), flat=True, **_comfy("int8_tensorwise")),
    "comfy int8 rotated": lambda: rotated((33, 128), 16, {"convrot": True, "convrot_groupsize": 16}),
    "comfy int8 rotated by the default group": lambda: rotated((33, 512), 256, {"convrot": True}),
    "comfy int8 rotated, nested": lambda: rotated(
        (33, 128), 64, {"params": {"convrot": True, "convrot_groupsize": 64}}
    ),
    "comfy int8 block": lambda: _int8_blocks((64, 96), 32, **_comfy("int8_blockwise", group_size=32)),
    "comfy mxfp8": lambda: mxfp8((130, 70)),
    "comfy mxfp8, unpadded": lambda: mxfp8((96, 160), described=False, scale_dtype=torch.float8_e8m0fnu),
    "comfy hybrid mxfp8": lambda: mxfp8((130, 70), "hybrid_mxfp8"),
    "comfy nvfp4": lambda: nvfp4((130, 70)),
    "comfy nvfp4, unpadded": lambda: nvfp4((96, 160), described=False, scale_dtype=torch.uint8),
    "legacy fp8": lambda: _scalar(**_legacy()),
    "legacy fp8 with prefix": lambda: _scalar(shape=(1,), **_legacy("blocks.", 2)),
    "legacy fp8 row": lambda: _rows((130, 70), flat=True, **{**_legacy(), "passes": False}),
    "legacy fp8_e5m2": lambda: _e5m2(**_legacy()),
    "deepseek blocks": lambda: _deepseek((130, 300), 128, deepseek(128)),
    "deepseek blocks of 64": lambda: _deepseek((130, 130), 64, deepseek(64)),
    "deepseek blocks, bf16 scales": lambda: _deepseek((130, 300), 128, deepseek(128), torch.bfloat16),
    "deepseek blocks, e8m0 scales": lambda: _deepseek((130, 300), 128, deepseek(128), torch.float8_e8m0fnu),
    "deepseek blocks without config": lambda: _deepseek((130, 130), 128, None),
    "compressed-tensors fp8 tensor": lambda: _scalar(shape=(1,), **CTD),
    "compressed-tensors fp8 channel": lambda: _rows((130, 70), flat=False, **CTD),
    "compressed-tensors fp8 block": lambda: _blocks((130, 300), 128, dialect="compressed-tensors", config=CT_BLOCKS),
    "compressed-tensors int8 channel": lambda: _int8_rows((33, 50), **CTD),
    "compressed-tensors mxfp8": lambda: row_major_mxfp8((33, 64), torch.uint8, **CTD),
    "row-major mxfp8, e8m0 scales": lambda: row_major_mxfp8((33, 64), torch.float8_e8m0fnu, **SCALED),
    "compressed-tensors nvfp4": lambda: packed_nvfp4((33, 48)),
    "scaled fp8 without a marker": lambda: _scalar(**SCALED),
    "plain fp8": lambda: _plain(E4M3, "fp8 tensor"),
    "plain fp8_e5m2": lambda: _plain(E5M2, "fp8_e5m2 tensor"),
}
"""Every dialect and format that is decoded."""
