"""What ComfyUI is told about further formats: entries in QUANT_ALGOS, and a linear layer that loads them.

An entry alone does not do: ComfyUI's linear layer knows by name which scales a format has, and refuses other names.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection
from typing import Any

import torch

from .formats import FORMATS, NAMES, marker_of, read_weight, register_layouts


def install(ops: Any, quant_ops: Any) -> list[str]:
    """Adds the formats that this ComfyUI lacks to its modules ``comfy.ops`` and ``comfy.quant_ops``.

    Returns their names: none where another extension, or ComfyUI itself, has them all. Raises RuntimeError for a
    ComfyUI that cannot leave activations to the layout.
    """
    if "quantize_input" not in quant_ops.QUANT_ALGOS.get("int8_tensorwise", {}):
        raise RuntimeError("this ComfyUI is too old for quantloom's formats: it does not know int8_tensorwise")
    register_layouts()
    new = {
        name: {
            "storage_t": own.codes,
            "parameters": {"weight_scale", "weight_scalar", "input_scale"},
            "comfy_tensor_layout": own.layout,
            "quantize_input": False,
        }
        for name, own in FORMATS.items()
        if name not in quant_ops.QUANT_ALGOS
    }
    if new:
        quant_ops.QUANT_ALGOS.update(new)
        ops.mixed_precision_ops = _extended(ops.mixed_precision_ops, frozenset(new))
    return sorted(new)


def _extended(factory: Callable[..., Any], formats: Collection[str]) -> Callable[..., Any]:
    """ComfyUI's maker of layer classes, whose linear layer loads ``formats`` too."""

    @functools.wraps(factory)
    def mixed_precision_ops(*args: Any, **kwargs: Any) -> Any:
        operations = factory(*args, **kwargs)

        class Linear(operations.Linear):
            def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
                entry = marker_of(state_dict.get(prefix + "comfy_quant"))
                if entry.get("format") in formats and prefix + "weight" in state_dict:
                    _load(self, state_dict, prefix, *rest)
                else:
                    super()._load_from_state_dict(state_dict, prefix, *rest)

        operations.Linear = Linear
        return operations

    return mixed_precision_ops


@functools.cache
def _say_once(text: str) -> None:
    logging.warning(text)


def _load(module: Any, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Loads one linear layer, and leaves it with the attributes that ComfyUI's own loader sets."""
    device, dtype = module.factory_kwargs["device"], module.factory_kwargs["dtype"]
    tensors = {name: state_dict.pop(prefix + name) for name in NAMES if prefix + name in state_dict}
    entry, layer = marker_of(tensors["comfy_quant"]), prefix.rstrip(".")
    weight = read_weight(layer, tensors, (module.out_features, module.in_features), dtype)
    module.quant_format = entry["format"]
    module.layout_type = FORMATS[entry["format"]].layout
    module._full_precision_mm_config = entry.get("full_precision_matrix_mult", False)
    module._full_precision_mm = module._full_precision_mm or module._full_precision_mm_config
    module.weight = torch.nn.Parameter(weight.to(device=device), requires_grad=False)
    loaded = [prefix + "weight"]
    input_scale = state_dict.pop(prefix + "input_scale", None)
    if input_scale is not None:  # not used here, but saved again with the model
        module.register_parameter("input_scale", torch.nn.Parameter(input_scale.to(device), requires_grad=False))
        loaded.append(prefix + "input_scale")
    if getattr(weight.params, "exact", True) is False:
        _say_once(
            "quantloom: weight_scalar does not fit all blocks; GPUs without MXFP8 decode by blocks, which is slower"
        )
    torch.nn.Module._load_from_state_dict(module, state_dict, prefix, *rest)
    missing = rest[2]
    for key in loaded:
        if key in missing:
            missing.remove(key)
