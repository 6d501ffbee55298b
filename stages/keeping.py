"""Layers that are not quantized: copied byte for byte, or decoded where the output could not say how they are coded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..formats.comfy import MARKER, format_string, marker_tensor
from ..formats.encoding import Encoding
from ..formats.layers import Layer
from ..formats.markers import flat
from ..formats.tensors import TensorRef, TensorSpec
from .casting import Cast
from .forms import COMFY, INPUT_SCALES, LEGACY, SCALES
from .reading import Copy, Decode, read_whole
from .work import LayerPlan
from .writing import Write

_AS_IT_IS = (Copy(), Write())
_LEGACY_NAMES = {names[LEGACY]: names[COMFY] for names in (SCALES, INPUT_SCALES)}


def keep(layer: Layer, reason: str) -> LayerPlan:
    """The plan of a layer that stays as it is.

    Quantized layers that ComfyUI's markers describe are passed through, others are decoded to the dtype that their
    weight had: passed through without a description, their codes would be taken for numbers. What cannot be decoded can
    only be passed through.
    """
    encoding = layer.encoding
    if encoding is None or encoding.dialect == "plain-fp8":
        return renamed(layer, reason)
    if layer.marker is not None and _describes(layer.marker, encoding) and _legacy_input_scale(layer) is not None:
        return renamed(layer, reason)
    why = f"{reason}; decoded from {encoding.dialect} {encoding.format[0]} to {layer.weight.dtype}"
    steps = (Decode(), Cast(layer.weight.name, layer.weight.dtype), Write())
    return LayerPlan(layer, steps, (layer.weight,), reason=why)


def _describes(marker: Mapping[str, Any], encoding: Encoding) -> bool:
    """Whether a client that believes the marker reads what the scales really are; one scale fits every label."""
    label = flat(marker).get("format")
    return label == format_string(encoding.build()) or (encoding.scales is not None and encoding.scales.numel == 1)


def verbatim(layer: Layer, reason: str = "") -> LayerPlan:
    """The plan of a layer that is copied byte for byte, whatever it holds: for stages that only edit."""
    return LayerPlan(layer, _AS_IT_IS, layer.tensors, reason=reason, entry=layer.marker)


def renamed(layer: Layer, reason: str = "") -> LayerPlan:
    """Copies every tensor, legacy ones under their new names; the marker is written anew, equal to the header's."""
    if layer.encoding is None and layer.marker is None and len(layer.tensors) == 1:
        (ref,) = layer.tensors
        if ref.name.removeprefix(layer.name) in ("", ".weight"):
            return LayerPlan(layer, _AS_IT_IS, layer.tensors, reason=reason)
    legacy = layer.encoding is not None and layer.encoding.dialect == LEGACY
    names = []
    for ref in layer.tensors:
        part = ref.name.removeprefix(layer.name)
        if part in _LEGACY_NAMES and layer.problem is None:
            if not legacy or (part == INPUT_SCALES[LEGACY] and _legacy_input_scale(layer) == 1.0):
                continue
            names.append((ref, layer.name + _LEGACY_NAMES[part]))
        elif part != MARKER or layer.marker is None:
            names.append((ref, ref.name))
    outputs = [TensorSpec(output, ref.dtype, ref.shape) for ref, output in names]
    copy = Copy(tuple((ref.name, output) for ref, output in names))
    plan = LayerPlan(layer, (copy, Write()), tuple(outputs), reason=reason, entry=layer.marker)
    return plan if layer.marker is None else with_tensor(plan, marker_tensor(layer.name, layer.marker))


def with_tensor(plan: LayerPlan, constant: tuple[TensorSpec, bytes]) -> LayerPlan:
    """The plan of a copied layer with one more tensor, whose bytes are known; in place of one of that name."""
    plan = without_tensor(plan, constant[0].name)
    return replace(plan, outputs=(*plan.outputs, constant[0]), constants=(*plan.constants, constant))


def without_tensor(plan: LayerPlan, name: str) -> LayerPlan:
    """The plan of a copied layer that leaves out one output, if it has it."""
    copy = plan.steps[0]
    assert isinstance(copy, Copy)
    pairs = tuple((ref.name, output) for ref, output in copy.pairs(plan.layer) if output != name)
    steps = (Copy(pairs), *plan.steps[1:])
    outputs = tuple(spec for spec in plan.outputs if spec.name != name)
    return replace(plan, steps=steps, outputs=outputs)


def _legacy_input_scale(layer: Layer) -> float | None:
    """A legacy layer's activation scale; 1.0 without one, None when it is not the one number that clients read."""
    ref = next((ref for ref in layer.tensors if ref.name == layer.name + INPUT_SCALES[LEGACY]), None)
    if ref is None:
        return 1.0
    return _number(ref) if ref.numel == 1 else None


def _number(ref: TensorRef) -> float | None:
    """The stored number; None when it is no scale."""
    value = float(read_whole(ref)[0])
    return value if math.isfinite(value) and value > 0 else None
