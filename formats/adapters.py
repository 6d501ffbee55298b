"""Adapter files: names and layout of low-rank factors in each dialect (ComfyUI/kohya, PEFT, diffusers).

An adapter adds up @ down to a weight (m, n); up is (m, r) and down (r, n).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .shards import SUFFIX
from .tensors import TensorSpec, number_tensor

ADAPTER_DIALECTS = ("comfy", "peft", "peft-ranks", "diffusers")
"""``peft`` pads every layer to the largest rank, because vLLM reads only one; ``peft-ranks`` has a rank per layer."""

PREFIXES = {
    "comfy": "diffusion_model.", "peft": "base_model.model.", "peft-ranks": "base_model.model.",
    "diffusers": "transformer.",
}  # fmt: skip
"""What keys begin with in each dialect."""

_CHECKPOINT_PREFIX = "model.diffusion_model."
"""Of a diffusion model within a combined checkpoint, however few layers it has."""
_TEXT_ENCODERS = "text_encoders."
"""ComfyUI takes the layers of text encoders by this prefix, beside those of the diffusion model."""
_FOLDERS = ("peft", "peft-ranks")
_FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class AdapterTensors:
    """What is stored for one layer."""

    up: TensorSpec
    """(m, stored rank)."""
    down: TensorSpec
    """(stored rank, n)."""
    constants: tuple[tuple[TensorSpec, bytes], ...] = ()
    """Tensors whose bytes are known: ``.alpha``, equal to the rank, so that clients scale by 1."""


def adapter_tensors(dialect: str, base: str, shape: tuple[int, int], rank: int, dtype: str) -> AdapterTensors:
    """Names, dtypes and shapes of the adapter of a layer with a weight of ``shape``, which is called ``base`` there."""
    names = ("lora_up", "lora_down") if dialect == "comfy" else ("lora_B", "lora_A")
    up = TensorSpec(f"{base}.{names[0]}.weight", dtype, (shape[0], rank))
    down = TensorSpec(f"{base}.{names[1]}.weight", dtype, (rank, shape[1]))
    if dialect != "comfy":
        return AdapterTensors(up, down)
    return AdapterTensors(up, down, (number_tensor(f"{base}.alpha", rank),))


def adapter_layer(dialect: str, layer: str, model: str = "") -> str:
    """What a layer (name without ``.weight``) is called in an adapter: the prefix of the dialect stands there once.

    ``model`` is what ComfyUI strips from the names of the whole checkpoint (``comfy.model_prefix``). PEFT finds layers
    by the names that torch modules have, which nothing is stripped from.
    """
    prefix = PREFIXES[dialect]
    if layer.startswith(prefix) or (dialect == "comfy" and layer.startswith(_TEXT_ENCODERS)):
        return layer
    return prefix + (layer if dialect in _FOLDERS else layer.removeprefix(model).removeprefix(_CHECKPOINT_PREFIX))


def stored_rank(dialect: str, rank: int, largest: int) -> int:
    """The rank that is stored for a layer when ``largest`` is the largest of the adapter; zeros fill it up."""
    return largest if dialect == "peft" else rank


def adapter_path(dialect: str, output: str) -> str:
    """Where the adapter of an output goes by default: ``model.safetensors`` -> ``model_lora.safetensors``."""
    path = Path(output)
    base = str(path.with_name(path.name.removesuffix(SUFFIX) + "_lora"))
    return base if dialect in _FOLDERS else base + SUFFIX


def adapter_file(dialect: str, path: str) -> str:
    """The safetensors file of an adapter at ``path``."""
    return str(Path(path) / _FILE) if dialect in _FOLDERS else path


def adapter_config(dialect: str, ranks: Mapping[str, int]) -> bytes | None:
    """``adapter_config.json`` for the layers with their ranks; None for a dialect without one.

    PEFT scales by alpha / r: both are the rank. vLLM needs r, lora_alpha and target_modules.
    """
    if dialect not in _FOLDERS:
        return None
    largest = max(ranks.values())
    names = {adapter_layer(dialect, layer).removeprefix(PREFIXES[dialect]): rank for layer, rank in ranks.items()}
    others = {} if dialect == "peft" else {name: rank for name, rank in names.items() if rank != largest}
    other = {f"^{re.escape(name)}": rank for name, rank in others.items()}  # patterns, which would fit endings of names
    config = {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "inference_mode": True,
        "r": largest, "lora_alpha": largest, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "use_rslora": False, "use_dora": False, "modules_to_save": None, "target_modules": sorted(names),
        "rank_pattern": other, "alpha_pattern": other,
    }  # fmt: skip
    return (json.dumps(config, indent=2) + "\n").encode()
