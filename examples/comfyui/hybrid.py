"""Hybrid MXFP8: codes that are read by the scales of their blocks or, on GPUs without MXFP8, by one scale.

Both readings are the same numbers only where every block has the scale ``weight_scalar``, or holds nothing but zeros.
So whether they are is found out when a file is loaded, and the one scale is used nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from comfy_kitchen import dequantize_mxfp8, from_blocked, to_blocked
from comfy_kitchen.tensor import (
    BaseLayoutParams,
    QuantizedLayout,
    QuantizedTensor,
    get_layout_class,
    register_layout_op,
)

from .tiles import linear_decoded

BLOCK = 32
E4M3_MAX = 448.0
MXFP8_PRODUCT = hasattr(torch.nn.functional, "scaled_mm")
"""Whether this torch multiplies MXFP8 (2.10 and later)."""


class Path(Enum):
    """How a product is made."""

    BLOCKS = "MXFP8, by the scales of blocks"
    SCALAR = "FP8, by weight_scalar"
    DECODED = "weights decoded by the scales of blocks"


def select_path(capability: tuple[int, int] | None, exact: bool) -> Path:
    """The path for an NVIDIA GPU of compute capability ``(major, minor)``; None stands for every other device.

    ``exact``: the scales of blocks and ``weight_scalar`` decode to the same weights.
    """
    if capability is None or capability < (8, 9):
        return Path.DECODED
    if capability >= (10, 0) and MXFP8_PRODUCT:
        return Path.BLOCKS
    return Path.SCALAR if exact else Path.DECODED


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of an NVIDIA GPU. AMD's FP8 is another one on some GPUs, so these count as none."""
    if device.type != "cuda" or torch.version.hip:
        return None
    return torch.cuda.get_device_capability(device)


def block_scales(stored: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Float32 (rows, columns / 32) from stored E8M0 bytes in tiles: 2**(byte - 127), and 0 for byte 0."""
    exponents = from_blocked(stored.view(torch.uint8), num_rows=rows, num_cols=columns // BLOCK)
    return (exponents.to(torch.int32) << 23).view(torch.float32)


def is_exact(codes: torch.Tensor, stored: torch.Tensor, scalar: torch.Tensor) -> bool:
    """Whether code * scalar is, for every code (N, K), what the scale of its block makes of it."""
    scales = block_scales(stored, *codes.shape)
    other = scales != scalar.to(scales)
    magnitudes = codes.view(torch.uint8).view(len(codes), -1, BLOCK)[other] & 0x7F
    return not bool(magnitudes.any())


class HybridMXFP8Layout(QuantizedLayout):
    """Codes padded to multiples of 32, E8M0 scales in cuBLAS tiles, and one float32 scale."""

    MIN_SM_VERSION = (8, 9)

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        """``scale``: E8M0 scales of blocks; ``scalar``: float32 (); ``exact``: both decode to the same weights."""

        scalar: torch.Tensor
        exact: bool

        def _tensor_fields(self) -> list[str]:
            return ["scale", "scalar"]

    @classmethod
    def quantize(cls, tensor: torch.Tensor, **_: Any) -> tuple[torch.Tensor, HybridMXFP8Layout.Params]:
        """The exact form: one power of two for all blocks, the smallest under which no weight saturates.

        ComfyUI asks for this when it merges a LoRA. Its other arguments (scale, seed) have no meaning here.
        """
        rows, columns = tensor.shape
        padding = (0, -columns % BLOCK, 0, -rows % BLOCK)
        x = torch.nn.functional.pad(tensor.float(), padding)
        mantissa, exponent = torch.frexp(x.abs().amax().double() / E4M3_MAX)
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp_(-126, 127)
        byte = (exponent + 127).to(torch.uint8)
        scalar = torch.ldexp(x.new_ones(()), exponent)
        codes = (x / scalar).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        stored = to_blocked(byte.expand(len(x), x.shape[1] // BLOCK).contiguous(), flatten=False)
        params = cls.Params(stored.view(torch.float8_e8m0fnu), tensor.dtype, (rows, columns), scalar, True)
        return codes, params

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params: HybridMXFP8Layout.Params) -> torch.Tensor:
        return dequantize_mxfp8(qdata, params.scale, params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[torch.Tensor, ...]:
        return qtensor._qdata, qtensor._params.scale, qtensor._params.scalar

    @classmethod
    def state_dict_tensors(cls, qdata: torch.Tensor, params: HybridMXFP8Layout.Params) -> dict[str, torch.Tensor]:
        return {"": qdata, "_scale": params.scale.view(torch.uint8), "_scalar": params.scalar}


def _as_blocks(x: torch.Tensor, weight: QuantizedTensor) -> tuple[QuantizedTensor, QuantizedTensor]:
    """Activations and weight for comfy-kitchen's MXFP8 product; the weight as large as it is stored."""
    name, codes = "TensorCoreMXFP8Layout", weight._qdata
    params = get_layout_class(name).Params(weight._params.scale, x.dtype, tuple(codes.shape))
    return QuantizedTensor.from_float(x, name), QuantizedTensor(codes, name, params)


def _as_scalar(x: torch.Tensor, weight: QuantizedTensor) -> tuple[QuantizedTensor, QuantizedTensor]:
    """The same for its FP8 product, with activations scaled by their largest magnitude."""
    name, codes = "TensorCoreFP8Layout", weight._qdata
    scale = x.abs().amax().float().div_(E4M3_MAX).clamp_(min=torch.finfo(torch.float32).tiny)
    params = get_layout_class(name).Params(weight._params.scalar, x.dtype, tuple(codes.shape))
    return QuantizedTensor.from_float(x, name, scale=scale), QuantizedTensor(codes, name, params)


@register_layout_op(torch.ops.aten.linear.default, HybridMXFP8Layout)
def _linear(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """x (..., K) times the weight (N, K) on the best path of the device; bias (N,)."""
    x, weight, *more = args
    bias = more[0] if more else None
    path = select_path(capability_of(weight._qdata.device), weight._params.exact)
    if path is Path.DECODED or isinstance(x, QuantizedTensor) or not x.numel():
        return linear_decoded(x, weight, bias)
    (rows, columns), (stored_rows, stored_columns) = weight.shape, weight._qdata.shape
    flat = torch.nn.functional.pad(x.reshape(-1, columns), (0, stored_columns - columns))
    if bias is not None:
        bias = torch.nn.functional.pad(bias, (0, stored_rows - rows))
    operands = _as_blocks(flat, weight) if path is Path.BLOCKS else _as_scalar(flat, weight)
    return torch.nn.functional.linear(*operands, bias)[:, :rows].reshape(*x.shape[:-1], rows)
