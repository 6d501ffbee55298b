"""Layouts of weights with a scale for each row or each square block, for comfy-kitchen's registry.

Rows and blocks are one thing: a matrix (N, K) cut into R x C equal tiles, each with a float32 scale that multiplies.
A row scale has tiles of 1 x K, a block scale of b x b. ComfyUI has no kernel for either, so weights are decoded to
the dtype of the activations before each product: memory is saved, time is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from comfy_kitchen.tensor import BaseLayoutParams, QuantizedLayout, QuantizedTensor, register_layout_op


def linear_decoded(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (..., K) times the decoded weight (N, K), in the dtype of x."""
    return torch.nn.functional.linear(x, weight.dequantize().to(x.dtype), bias)


class TiledLayout(QuantizedLayout):
    """Codes (N, K) in ``CODES`` and scales (R, C): weight = code * scale of its tile, in float32, rounded once."""

    CODES: ClassVar[torch.dtype]
    LARGEST: ClassVar[float]

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        """``scale`` is float32 (R, C), where R divides N and C divides K."""

    @classmethod
    def quantize(
        cls, tensor: torch.Tensor, tile: tuple[int, int] | None = None, **_: Any
    ) -> tuple[torch.Tensor, TiledLayout.Params]:
        """To nearest, with a scale from the largest weight of each ``tile``; by default of each row.

        ComfyUI asks for this when it merges a LoRA. Its other arguments (scale, seed) have no meaning here.
        """
        rows, columns = tensor.shape
        high, wide = tile or (1, columns)
        x = tensor.float().reshape(rows // high, high, columns // wide, wide)
        scale = x.abs().amax(dim=(1, 3)).div_(cls.LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
        codes = (x / scale[:, None, :, None]).reshape(rows, columns).clamp_(-cls.LARGEST, cls.LARGEST)
        codes = codes if cls.CODES.is_floating_point else codes.round_()
        return codes.to(cls.CODES), cls.Params(scale, tensor.dtype, (rows, columns))

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params: TiledLayout.Params) -> torch.Tensor:
        (rows, columns), (down, across) = qdata.shape, params.scale.shape
        x = qdata.to(torch.float32).view(down, rows // down, across, columns // across)
        return x.mul_(params.scale[:, None, :, None]).view(rows, columns).to(params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[torch.Tensor, ...]:
        return qtensor._qdata, qtensor._params.scale

    @classmethod
    def state_dict_tensors(cls, qdata: torch.Tensor, params: TiledLayout.Params) -> dict[str, torch.Tensor]:
        """A scale for each row is stored flat, as it was read."""
        by_row = params.scale.shape == (len(qdata), 1)
        return {"": qdata, "_scale": params.scale.flatten() if by_row else params.scale}

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, Any]:
        (rows, columns), (down, across) = qtensor._qdata.shape, qtensor._params.scale.shape
        return {"tile": (rows // down, columns // across)}


class TiledFP8Layout(TiledLayout):
    """E4M3 codes."""

    CODES = torch.float8_e4m3fn
    LARGEST = 448.0


class TiledINT8Layout(TiledLayout):
    """Integers from -127 to 127."""

    CODES = torch.int8
    LARGEST = 127.0


@register_layout_op(torch.ops.aten.linear.default, TiledLayout)
def _linear(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    x, weight, *bias = args
    return linear_decoded(x, weight, *(bias or [None]))
