"""Small checkpoints with the names of real models, so that every example runs anywhere in seconds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

WIDTH = 128


def working_folder(name: str) -> Path:
    """Where an example writes: the folder on its command line, or ``example-output/NAME``."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else f"example-output/{name}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def flux_tensors(width: int = WIDTH) -> dict[str, torch.Tensor]:
    """Weights of one double and two single blocks under Flux's names, in BF16."""
    random = torch.Generator().manual_seed(0)
    shapes = {
        "img_in": (width, 64), "txt_in": (width, 64), "time_in.in_layer": (width, 64),
        "final_layer.linear": (64, width), "double_blocks.0.img_mod.lin": (6 * width, width),
        "double_blocks.0.img_attn.qkv": (3 * width, width), "double_blocks.0.img_attn.proj": (width, width),
        "double_blocks.0.img_mlp.0": (4 * width, width), "double_blocks.0.img_mlp.2": (width, 4 * width),
        "double_blocks.0.txt_attn.qkv": (3 * width, width), "double_blocks.0.txt_mlp.0": (4 * width, width),
    }  # fmt: skip
    for block in range(2):
        shapes[f"single_blocks.{block}.linear1"] = (7 * width, width)
        shapes[f"single_blocks.{block}.linear2"] = (width, 5 * width)
    tensors = {}
    for name, (rows, columns) in shapes.items():
        weight = torch.randn(rows, columns, generator=random) / columns**0.5
        tensors[f"{name}.weight"] = weight.bfloat16()
        tensors[f"{name}.bias"] = torch.randn(rows, generator=random).mul_(0.02).bfloat16()
    return tensors


def save_flux(path: Path) -> Path:
    """``flux_tensors`` in one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(flux_tensors(), path)
    return path


def save_flux_shards(folder: Path, count: int = 3) -> Path:
    """``flux_tensors`` as shards with an index, as large models are published."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = flux_tensors()
    names, weight_map = sorted(tensors), {}
    for number in range(count):
        file = f"diffusion_pytorch_model-{number + 1:05d}-of-{count:05d}.safetensors"
        own = names[number::count]
        save_file({name: tensors[name] for name in own}, folder / file)
        weight_map |= dict.fromkeys(own, file)
    index = {"metadata": {"total_size": sum(each.nbytes for each in tensors.values())}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}\n')
    return folder


def save_llama(folder: Path) -> LlamaForCausalLM:
    """A Llama of two layers with random weights, saved as transformers does it."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model
