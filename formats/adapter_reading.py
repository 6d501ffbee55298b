"""Adapters of other programs: the down factor of every layer, under the name that the file has for the layer."""

from __future__ import annotations

from .errors import CheckpointError
from .source import Source
from .tensors import FLOAT_DTYPES, TensorRef

_DOWN = (
    ".lora_down.weight", ".lora_A.weight", ".lora_A.default.weight", ".lora_linear_layer.down.weight",
    "_lora.down.weight", ".lora.down.weight", ".lora_A",
)  # fmt: skip
"""Ends of the names of a down factor, (r, n): kohya, PEFT, diffusers (ComfyUI ``weight_adapter/lora.py``)."""


def down_factors(source: Source) -> dict[str, TensorRef]:
    """The down factors (r, n) of linear layers, by the adapter's names of the layers; those of convolutions are left
    out. CheckpointError when a layer has two of them, or codes instead of numbers."""
    found: dict[str, TensorRef] = {}
    for key, ref in source.refs.items():
        end = next((end for end in _DOWN if key.endswith(end)), None)
        if end is None or len(ref.shape) != 2 or not ref.numel:
            continue
        if ref.dtype not in FLOAT_DTYPES:
            raise CheckpointError(f"{ref.path}: {key} is {ref.dtype}: the factors of an adapter must be floats")
        layer = key.removesuffix(end)
        if layer in found:
            raise CheckpointError(f"{ref.path}: {layer} has two down factors, {found[layer].name} and {key}")
        found[layer] = ref
    return found
