"""Layers that are not quantized: copied byte for byte, or decoded where the output could not say how they are coded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..formats.comfy import MARKER, marker_tensor
from ..formats.layers import Layer
from ..formats.tensors import TensorSpec
from .reading import Copy, Decode
from .work import LayerPlan
from .writing import Cast, Write

_LEGACY_NAMES = {".scale_weight": ".weight_scale", ".scale_input": ".input_scale"}


def keep(layer: Layer, reason: str) -> LayerPlan:
    """The plan of a layer that stays as it is.

    Quantized layers that ComfyUI's markers can describe are passed through, others are decoded to the dtype that their
    weight had: passed through without a description, their codes would be taken for numbers.
    """
    encoding = layer.encoding
    if encoding is None or encoding.dialect in ("comfy", "plain-fp8"):
        return _copy(layer, reason, {}, layer.marker)
    if encoding.dialect == "legacy":
        formats = {"fp8": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
        if encoding.format[0] in formats and encoding.format[1] == "tensor":
            return _copy(layer, reason, _LEGACY_NAMES, {"format": formats[encoding.format[0]]})
    spec = layer.weight
    why = f"{reason}; decoded from {encoding.dialect} {encoding.format[0]} to {spec.dtype}"
    return LayerPlan(layer, (Decode(), Cast(spec.name, spec.dtype), Write()), (spec,), reason=why)


def _copy(layer: Layer, reason: str, renames: Mapping[str, str], entry: Mapping[str, Any] | None) -> LayerPlan:
    """Copies every tensor; a marker is written anew so that it and the header always say the same."""
    names, outputs = [], []
    for ref in layer.tensors:
        if entry is not None and ref.name.endswith(MARKER):
            continue
        output = ref.name
        for old, new in renames.items():
            if output.endswith(old):
                output = output.removesuffix(old) + new
        names.append((ref.name, output))
        outputs.append(TensorSpec(output, ref.dtype, ref.shape))
    plan = LayerPlan(layer, (Copy(tuple(names)), Write()), tuple(outputs), reason=reason, entry=entry)
    if entry is None:
        return plan
    spec, content = marker_tensor(layer.name, entry)
    return replace(plan, outputs=(*plan.outputs, spec), constants=((spec, content),))
