"""The ComfyUI dialect: names, markers and layouts of quantized layers (ComfyUI ops.py and quant_ops.py; comfy-kitchen).

A layer is marked by ``<layer>.comfy_quant``, UTF-8 JSON in a one-dimensional uint8 tensor; the header entry
``_quantization_metadata`` repeats the markers with names relative to the model prefix.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .encoding import Layout
from .swizzle import swizzled_shape
from .tensors import TensorSpec, number_tensor

if TYPE_CHECKING:
    from .format import Format

MARKER = ".comfy_quant"
HEADER_KEY = "_quantization_metadata"
WHOLE = {"nvfp4": ".weight_scale_2", "hybrid_mxfp8": ".weight_scalar"}
"""Formats with a scale of the whole tensor beside those of its groups -> the tensor that holds it."""
PREFIXES = ("model.diffusion_model.", "model.model.", "net.")
"""Prefixes that ComfyUI strips from a diffusion model's keys when more than five keys carry one."""


@dataclass(frozen=True)
class Storage:
    """Where and how a dialect stores one quantized layer."""

    codes: TensorSpec
    scales: TensorSpec
    whole: TensorSpec | None
    """The tensor scale of NVFP4 and hybrid MXFP8."""
    constants: tuple[tuple[TensorSpec, bytes], ...]
    """Tensors whose bytes are known before any weight is read."""
    layout: Layout
    marker: Mapping[str, object]
    """Content of the layer's entry in marker and header."""

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """Every tensor that is stored for the layer."""
        whole = () if self.whole is None else (self.whole,)
        return (self.codes, self.scales, *whole, *(spec for spec, _ in self.constants))


@dataclass(frozen=True)
class LayerOptions:
    """What a marker says beside the format."""

    rotation: int | None = None
    """Order of the Hadamard rotation (``convrot_groupsize``)."""
    full_precision_matmul: bool = False
    """Ask the client to dequantize and multiply in full precision."""
    input_scale: float | None = None
    """A static scale for FP8 or NVFP4 activations."""
    source_dtype: str = "BF16"
    """safetensors dtype of the original weight."""


def format_string(fmt: Format) -> str:
    """The client's name for a format with its scaling."""
    if fmt.scaling == "group":
        return fmt.name
    if fmt.name == "int8":
        return "int8_blockwise" if fmt.scaling == "block" else "int8_tensorwise"
    base = "float8_e5m2" if fmt.name == "fp8_e5m2" else "float8_e4m3fn"
    return base + {"tensor": "", "row": "_rowwise", "block": "_blockwise"}[fmt.scaling]


def marker(fmt: Format, shape: tuple[int, int], options: LayerOptions) -> dict[str, object]:
    """The JSON of a layer's marker, keys in the order that existing files have them."""
    entry: dict[str, object] = {"format": format_string(fmt)}
    if fmt.block_size:
        entry["group_size"] = fmt.block_size
    if fmt.scaling == "group":
        names = {"BF16": "bfloat16", "F16": "float16", "F64": "float64"}
        entry["orig_dtype"] = f"torch.{names.get(options.source_dtype, 'float32')}"
        entry["orig_shape"] = list(shape)
    if options.full_precision_matmul:
        entry["full_precision_matrix_mult"] = True
    if options.rotation:
        entry["convrot"] = True
        entry["convrot_groupsize"] = options.rotation
    if fmt.name == "int8" and fmt.scaling == "row":
        entry["per_row"] = True
    return entry


def marker_tensor(layer: str, entry: Mapping[str, object]) -> tuple[TensorSpec, bytes]:
    """The marker tensor of a layer: ``json.dumps`` with default separators, no trailing NUL."""
    content = json.dumps(entry).encode()
    return TensorSpec(layer + MARKER, "U8", (len(content),)), content


def storage(layer: str, shape: tuple[int, int], fmt: Format, options: LayerOptions) -> Storage:
    """How ComfyUI expects ``layer`` with a weight of ``shape`` in ``fmt``.

    MXFP8 and hybrid weights are padded with zeros to multiples of 32 in both dimensions, NVFP4's to multiples of 16;
    block scales lie in cuBLAS tile order. Row scales of INT8 are (M, 1): one-dimensional ones would be applied to
    columns. A scale of one element is stored without dimensions.
    """
    rows, columns = shape
    if fmt.scaling == "group" and fmt.block_size:
        stored_rows = -(-rows // fmt.block_size) * fmt.block_size
        width = fmt.columns(columns)
        codes = TensorSpec(f"{layer}.weight", fmt.code_dtype, (stored_rows, fmt.code_columns(width)))
        scale_shape: tuple[int, ...] = swizzled_shape((stored_rows, width // fmt.block_size))
    else:
        codes = TensorSpec(f"{layer}.weight", fmt.code_dtype, shape)
        scale_shape = fmt.scale_shape(shape)
        if fmt.name == "int8" and fmt.scaling == "row":
            scale_shape = (rows, 1)
    scales = TensorSpec(f"{layer}.weight_scale", fmt.scale_dtype, scale_shape)
    if scales.numel == 1:
        scales = TensorSpec(scales.name, scales.dtype, ())
    entry = marker(fmt, shape, options)
    constants = [marker_tensor(layer, entry)]
    input_scale = 1.0 if fmt.name == "int8" and fmt.scaling == "block" else options.input_scale
    if input_scale is not None and (fmt.name.startswith("fp8") or fmt.name == "nvfp4" or fmt.scaling == "block"):
        constants.append(number_tensor(f"{layer}.input_scale", input_scale))
    whole = TensorSpec(layer + WHOLE[fmt.name], "F32", ()) if fmt.name in WHOLE else None
    grouped = fmt.scaling == "group"
    layout = Layout(swizzled=grouped, high_nibble_first=fmt.name == "nvfp4")
    return Storage(codes, scales, whole, tuple(constants), layout, entry)


def model_prefix(names: Iterable[str]) -> str:
    """The prefix that ComfyUI strips from these tensor names, or an empty string."""
    counts = dict.fromkeys(PREFIXES, 0)
    for name in names:
        if not name.startswith(PREFIXES):
            continue
        for prefix in PREFIXES:
            if name.startswith(prefix):
                counts[prefix] += 1
                break
    top = max(counts, key=lambda prefix: counts[prefix])
    return top if counts[top] > 5 else ""


def header_entry(markers: Mapping[str, Mapping[str, object]], names: Iterable[str]) -> str:
    """Content of the ``_quantization_metadata`` header entry: every marker, layers named without the model prefix."""
    prefix = model_prefix(names)
    words: dict[int, str] = {}  # layers of one shape share their entry
    layers = {}
    for name, entry in markers.items():
        if id(entry) not in words:
            words[id(entry)] = json.dumps(dict(entry))
        layers[name.removeprefix(prefix)] = words[id(entry)]
    listed = ", ".join(f"{json.dumps(name)}: {said}" for name, said in layers.items())
    return f'{{"format_version": "1.0", "layers": {{{listed}}}}}'
