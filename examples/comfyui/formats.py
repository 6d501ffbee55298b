"""From the tensors of a layer to the weight that comfy-kitchen multiplies, for formats unknown to stock ComfyUI."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from comfy_kitchen.tensor import QuantizedTensor, register_layout_class

from .hybrid import BLOCK, HybridMXFP8Layout, is_exact
from .tiles import TiledFP8Layout, TiledINT8Layout, TiledLayout

Tensors = Mapping[str, torch.Tensor]
"""By the names within a layer: ``weight``, ``weight_scale``, ``weight_scalar``, ``input_scale``, ``comfy_quant``."""
NAMES = ("weight", "weight_scale", "weight_scalar", "comfy_quant")
"""Those that a format of ``FORMATS`` consumes."""


@dataclass(frozen=True)
class FileFormat:
    """A format of ``.comfy_quant``."""

    codes: torch.dtype
    """Of ``weight``."""
    layout: str
    """Name in comfy-kitchen's registry."""
    read: Callable[[Tensors, tuple[int, int], torch.dtype], Any]
    """Parameters of the layout from the tensors, the shape (N, K) of the layer, and the dtype to decode to."""


def _need(tensors: Tensors, name: str) -> torch.Tensor:
    if name not in tensors:
        raise ValueError(f"{name} is missing")
    return tensors[name]


def _tile_grid(scale: torch.Tensor, rows: int, columns: int) -> tuple[int, int]:
    """(R, C) of a scale that is stored as one element, flat with one for each row, or as a matrix."""
    if scale.numel() == 1:
        return 1, 1
    if scale.dim() == 1 and len(scale) == rows:
        return rows, 1
    if scale.dim() == 2 and scale.numel() and not rows % scale.shape[0] and not columns % scale.shape[1]:
        return scale.shape[0], scale.shape[1]
    raise ValueError(f"weight_scale of shape {tuple(scale.shape)} does not divide a weight of {rows} x {columns}")


def _tiled(layout: type[TiledLayout]) -> Callable[[Tensors, tuple[int, int], torch.dtype], TiledLayout.Params]:
    def read(tensors: Tensors, shape: tuple[int, int], dtype: torch.dtype) -> TiledLayout.Params:
        codes, scale = tensors["weight"], _need(tensors, "weight_scale")
        if codes.shape != shape:
            raise ValueError(f"weight has shape {tuple(codes.shape)}, and the layer {shape}")
        return layout.Params(scale.float().reshape(_tile_grid(scale, *shape)), dtype, shape)

    return read


def _hybrid(tensors: Tensors, shape: tuple[int, int], dtype: torch.dtype) -> HybridMXFP8Layout.Params:
    codes, scale, scalar = tensors["weight"], _need(tensors, "weight_scale"), _need(tensors, "weight_scalar")
    padded = (shape[0] + -shape[0] % BLOCK, shape[1] + -shape[1] % BLOCK)
    if codes.shape != padded:
        raise ValueError(f"weight has shape {tuple(codes.shape)}, and the layer {shape}, which is {padded} when padded")
    tiled = (padded[0] + -padded[0] % 128, padded[1] // BLOCK + -(padded[1] // BLOCK) % 4)
    if scale.shape != tiled:
        raise ValueError(f"weight_scale has shape {tuple(scale.shape)} instead of {tiled}")
    if scalar.numel() != 1:
        raise ValueError(f"weight_scalar has {scalar.numel()} elements instead of one")
    scalar = scalar.float().reshape(())
    exact = is_exact(codes, scale, scalar)
    return HybridMXFP8Layout.Params(scale.view(torch.float8_e8m0fnu), dtype, shape, scalar, exact)


FORMATS = {
    "float8_e4m3fn_rowwise": FileFormat(torch.float8_e4m3fn, "QuantloomTiledFP8Layout", _tiled(TiledFP8Layout)),
    "float8_e4m3fn_blockwise": FileFormat(torch.float8_e4m3fn, "QuantloomTiledFP8Layout", _tiled(TiledFP8Layout)),
    "int8_blockwise": FileFormat(torch.int8, "QuantloomTiledINT8Layout", _tiled(TiledINT8Layout)),
    "hybrid_mxfp8": FileFormat(torch.float8_e4m3fn, "QuantloomHybridMXFP8Layout", _hybrid),
}
LAYOUTS = {
    "QuantloomTiledFP8Layout": TiledFP8Layout,
    "QuantloomTiledINT8Layout": TiledINT8Layout,
    "QuantloomHybridMXFP8Layout": HybridMXFP8Layout,
}


def register_layouts() -> None:
    """Enters the layouts in comfy-kitchen's registry."""
    for name, layout in LAYOUTS.items():
        register_layout_class(name, layout)


def marker_of(stored: torch.Tensor | None) -> dict[str, Any]:
    """What a ``.comfy_quant`` tensor says; nothing without one."""
    return {} if stored is None else json.loads(stored.cpu().numpy().tobytes())


def read_weight(layer: str, tensors: Tensors, shape: tuple[int, int], dtype: torch.dtype) -> QuantizedTensor:
    """The weight of a layer of ``shape`` (N, K), which decodes to ``dtype``.

    Raises ValueError that names the layer and what disagrees.
    """
    entry = marker_of(tensors["comfy_quant"])
    try:
        own = FORMATS[entry["format"]]
        if tensors["weight"].dtype != own.codes:
            raise ValueError(f"weight is {tensors['weight'].dtype} instead of {own.codes}")
        params = own.read(tensors, shape, dtype)
        _check_block(entry, own, params)
    except ValueError as error:
        raise ValueError(f"{layer}, {entry['format']}: {error}. Convert the model again.") from None
    return QuantizedTensor(tensors["weight"], own.layout, params)


def _check_block(entry: Mapping[str, Any], own: FileFormat, params: Any) -> None:
    """The block size is known from shapes. Where the marker says one too, they agree, or scales are those of rows."""
    if "group_size" not in entry or own.read is _hybrid or params.scale.numel() == 1:
        return
    rows, columns = params.orig_shape
    tile = (rows // params.scale.shape[0], columns // params.scale.shape[1])
    if tile not in ((entry["group_size"],) * 2, (1, columns)):
        raise ValueError(f"group_size is {entry['group_size']}, and weight_scale has blocks of {tile[0]} x {tile[1]}")
