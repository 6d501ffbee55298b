"""The command ``quantloom extract-lora``."""

from __future__ import annotations

from typing import Any

import click

from .options import DRY_RUN, EXTRACTING, RECIPE, RUNNING, TALKING, add_options, build_extraction
from .running import run_recipe

_EPILOG = """\b
Examples:
  quantloom extract-lora flux-dev/ flux-dev-nvfp4.safetensors flux-dev-nvfp4_lora.safetensors --target attn
  quantloom extract-lora llama/ llama-nvfp4/ adapter/ --target . --dialect peft --statistics stats.zarr
"""


@click.command("extract-lora", epilog=_EPILOG, short_help="Make an error-correction LoRA for a quantized model.")
@click.argument("original")
@click.argument("quantized")
@click.argument("adapter")
@add_options(EXTRACTING, [DRY_RUN], RUNNING, [RECIPE], TALKING)
def extract_lora(original: str, quantized: str, adapter: str, **options: Any) -> int:
    """Write a LoRA with what QUANTIZED lost of ORIGINAL, in ADAPTER: a .safetensors file, or a folder for PEFT.

    QUANTIZED may be of any program, in any format that is read, and is not changed. ComfyUI merges a LoRA into
    quantized weights by rounding the sum again, which was measured to be worse than no adapter: apply it beside the
    matmul.
    """
    return run_recipe(lambda: build_extraction(original, quantized, adapter, options), options)
