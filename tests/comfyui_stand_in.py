"""The parts of ComfyUI that its custom nodes meet, written anew from what its sources do.

| here | there |
|---|---|
| ``QUANT_ALGOS`` | ``comfy/quant_ops.py``: dtype of codes, layout, whether the layout sees activations quantized |
| ``mixed_precision_ops`` | ``comfy/ops.py``: a linear layer that pops marker and scales, and how it multiplies |
| ``linear_input_act`` | ``comfy/ops.py``: an INT8 weight is read without calling the layer |
| ``ModelPatcher`` | ``comfy/model_patcher.py``: clones share a model; injections come and go with loading |
| ``load_custom_node`` | ``nodes.py``: a folder is imported by the path of its ``__init__.py`` |
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import QuantizedTensor, get_layout_class
from safetensors.torch import load_file

EMULATED = {"mxfp8", "nvfp4"}
"""Formats that the device cannot multiply (``get_disabled_quant_formats``): decoded before each product."""


def stock_formats() -> dict[str, dict[str, Any]]:
    """A new table, as ComfyUI has it after its start."""
    return {
        "float8_e4m3fn": {"storage_t": torch.float8_e4m3fn, "comfy_tensor_layout": "TensorCoreFP8Layout"},
        "nvfp4": {"storage_t": torch.uint8, "comfy_tensor_layout": "TensorCoreNVFP4Layout"},
        "mxfp8": {"storage_t": torch.float8_e4m3fn, "comfy_tensor_layout": "TensorCoreMXFP8Layout"},
        "int8_tensorwise": {
            "storage_t": torch.int8, "comfy_tensor_layout": "TensorWiseINT8Layout", "quantize_input": False,
        },
    }  # fmt: skip


def stock_scales(name: str, pop: Callable[..., Any]) -> dict[str, Any]:
    """Parameters of a layout. The branches end in an error for names that they do not know."""
    if name == "float8_e4m3fn" or name == "int8_tensorwise":
        return {"scale": pop("weight_scale")}
    if name == "mxfp8":
        return {"scale": pop("weight_scale").view(torch.float8_e8m0fnu)}
    if name == "nvfp4":
        return {"scale": pop("weight_scale_2"), "block_scale": pop("weight_scale").view(torch.float8_e4m3fn)}
    raise ValueError(f"Unsupported quantization format: {name}")


def mixed_precision_ops_of(algorithms: dict[str, Any]) -> Callable[..., Any]:
    def mixed_precision_ops(config: Any = None, compute_dtype: Any = torch.bfloat16, full: bool = False) -> Any:
        class MixedPrecisionOps:
            class Linear(torch.nn.Module):
                def __init__(self, columns: int, rows: int, bias: bool = True, device: Any = None) -> None:
                    super().__init__()
                    self.factory_kwargs = {"device": device, "dtype": compute_dtype}
                    self.in_features, self.out_features = columns, rows
                    self.bias = torch.nn.Parameter(torch.empty(rows, dtype=compute_dtype)) if bias else None
                    self._full_precision_mm, self._full_precision_mm_config = full, False

                def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
                    taken = []

                    def pop(name: str) -> torch.Tensor:
                        taken.append(prefix + name)
                        return state_dict.pop(prefix + name)

                    weight, marker = pop("weight"), state_dict.pop(prefix + "comfy_quant", None)
                    if marker is None:
                        self.weight = torch.nn.Parameter(weight.to(compute_dtype), requires_grad=False)
                    else:
                        self.quant_format = json.loads(marker.numpy().tobytes())["format"]
                        self._full_precision_mm |= self.quant_format in EMULATED
                        own = algorithms[self.quant_format]
                        self.layout_type = own["comfy_tensor_layout"]
                        scales = stock_scales(self.quant_format, pop)
                        shape = (self.out_features, self.in_features)
                        params = get_layout_class(self.layout_type).Params(
                            **scales, orig_dtype=compute_dtype, orig_shape=shape
                        )
                        quantized = QuantizedTensor(weight.to(own["storage_t"]), self.layout_type, params)
                        self.weight = torch.nn.Parameter(quantized, requires_grad=False)
                    super()._load_from_state_dict(state_dict, prefix, *rest)
                    rest[2][:] = [key for key in rest[2] if key not in taken]

                def state_dict(self, *_: Any, destination: Any = None, prefix: str = "", **__: Any) -> Any:
                    stored = {} if destination is None else destination
                    stored[prefix + "bias"] = self.bias
                    stored |= self.weight.state_dict(prefix + "weight")
                    entry = json.dumps({"format": self.quant_format}).encode()
                    stored[prefix + "comfy_quant"] = torch.tensor(list(entry), dtype=torch.uint8)
                    if hasattr(self, "input_scale"):
                        stored[prefix + "input_scale"] = self.input_scale
                    return stored

                def forward(self, x: torch.Tensor) -> torch.Tensor:
                    weight, bias = self.weight, None if self.bias is None else self.bias.to(x.dtype)
                    quantized = getattr(self, "layout_type", None) is not None and not self._full_precision_mm
                    if quantized and algorithms[self.quant_format].get("quantize_input", True):
                        inputs = QuantizedTensor.from_float(x.reshape(-1, x.shape[-1]), self.layout_type)
                        return F.linear(inputs, weight, bias).reshape(*x.shape[:-1], self.out_features)
                    weight = weight.to(dtype=x.dtype)
                    if self._full_precision_mm and isinstance(weight, QuantizedTensor):
                        weight = weight.dequantize()
                    return F.linear(x, weight, bias)

        return MixedPrecisionOps

    return mixed_precision_ops


def linear_input_act(linear: Any, x: torch.Tensor, activation: str) -> torch.Tensor:
    """linear(gelu(x)); for INT8 without a call of ``linear``, unless it multiplies in full precision."""
    assert activation == "gelu_tanh"
    x, weight = F.gelu(x, approximate="tanh"), linear.weight
    int8 = isinstance(weight, QuantizedTensor) and weight._layout_cls == "TensorWiseINT8Layout"
    if not int8 or linear._full_precision_mm:
        return linear(x)
    return F.linear(x, weight, linear.bias)


@dataclass
class PatcherInjection:
    inject: Callable[[Any], None]
    eject: Callable[[Any], None]


class ModelPatcher:
    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.injections, self.is_injected = model, {}, False

    def clone(self) -> ModelPatcher:
        other = ModelPatcher(self.model)
        other.injections = {key: list(each) for key, each in self.injections.items()}
        other.is_injected = self.is_injected  # copied as it is, also while the model is loaded
        return other

    def set_injections(self, key: str, injections: list[PatcherInjection]) -> None:
        self.injections[key] = injections

    def inject_model(self) -> None:
        if not self.is_injected:
            for each in (each for group in self.injections.values() for each in group):
                each.inject(self)
                self.is_injected = True

    def eject_model(self) -> None:
        """In the order in which they were put in, not the reverse."""
        if self.is_injected:
            for each in (each for group in self.injections.values() for each in group):
                each.eject(self)
            self.is_injected = False

    def load(self) -> torch.nn.Module:
        """What ``partially_load`` does to injections."""
        self.eject_model()
        self.inject_model()
        return self.model

    def detach(self) -> None:
        """What happens to a patcher before a clone of it is loaded."""
        self.eject_model()

    def __del__(self) -> None:
        self.detach()


def clip_of(encoder: torch.nn.Module) -> Any:
    """``comfy/sd.py``, CLIP: a patcher of its own, cloned with it."""

    def around(patcher: ModelPatcher) -> Any:
        return SimpleNamespace(patcher=patcher, cond_stage_model=encoder, clone=lambda: around(patcher.clone()))

    return around(ModelPatcher(encoder))


def modules(loras: Path) -> dict[str, ModuleType]:
    """ComfyUI's modules by name, new and in their first state; adapters lie in the folder ``loras``."""
    found = {name: ModuleType(name) for name in (
        "comfy", "comfy.ops", "comfy.quant_ops", "comfy.utils", "comfy.patcher_extension", "folder_paths")}  # fmt: skip
    found["comfy"].__path__ = []  # type: ignore[attr-defined]
    algorithms = stock_formats()
    contents: dict[str, dict[str, Any]] = {
        "comfy.quant_ops": {"QUANT_ALGOS": algorithms},
        "comfy.ops": {
            "mixed_precision_ops": mixed_precision_ops_of(algorithms),
            "linear_input_act": linear_input_act,
        },
        "comfy.utils": {"load_torch_file": lambda path, safe_load: load_file(path)},
        "comfy.patcher_extension": {"PatcherInjection": PatcherInjection},
        "folder_paths": {
            "get_filename_list": lambda kind: sorted(path.name for path in loras.glob("*.safetensors")),
            "get_full_path_or_raise": lambda kind, name: str(loras / name),
        },
    }
    for name, members in contents.items():
        vars(found[name]).update(members)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(found[parent], child, found[name])
    return found


def load_custom_node(folder: Path) -> ModuleType:
    """Imports a folder under the name of its path, as ComfyUI does."""
    name = str(folder).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[name] = package
    spec.loader.exec_module(package)
    return package
