"""The command ``quantloom calibrate-activations``."""

from __future__ import annotations

from typing import Any

import click

from .options import DRY_RUN, TALKING, WRITING, Options, add_options
from .running import run_stage

_EPILOG = """\b
Examples:
  quantloom calibrate-activations flux-fp8.safetensors out.safetensors --statistics stats.zarr
  quantloom calibrate-activations flux-fp8.safetensors out.safetensors --input-scales scales.json --only-missing
  quantloom calibrate-activations flux-nvfp4.safetensors out.safetensors --remove
"""

_SOURCES: Options = [
    click.option("--statistics", metavar="STORE",
                 help="Statistics of the layers' inputs, from `quantloom calibrate` on the original model."),
    click.option("--input-scale", metavar="amax|p99.9",
                 help="What of an input meets the largest code: the largest one (default with --statistics) or a "
                 "percentile, which clips (p99.9 is the default with --lora)."),
    click.option("--input-scales", "file", metavar="FILE",
                 help="Scales by layer: JSON {layer: number}, or a checkpoint with .input_scale tensors. They win over "
                 "the others."),
    click.option("--lora", metavar="FILE",
                 help="A LoRA, for layers without statistics: inputs are supposed to point where its down factors do. "
                 "Their size is an assumption (--lora-rms), and 16 times the percentile has room."),
    click.option("--lora-rms", type=float, metavar="X",
                 help="Root mean square of inputs that --lora goes by. Default: 1, as behind a norm without weights."),
    click.option("--filter", metavar="REGEX", help="Only layers that match."),
    click.option("--only-missing", is_flag=True, default=None,
                 help="Leave layers alone that have an activation scale."),
    click.option("--remove", is_flag=True, default=None,
                 help="Take activation scales away: NVFP4 layers then look at each batch, FP8 layers assume 1.0."),
]  # fmt: skip
_NAMES = ("statistics", "input_scale", "file", "lora", "lora_rms", "filter", "only_missing", "remove")


@click.command("calibrate-activations", epilog=_EPILOG,
               short_help="Store activation scales in a quantized checkpoint.")  # fmt: skip
@click.argument("model")
@click.argument("output")
@add_options(_SOURCES, WRITING, [DRY_RUN], TALKING)
def calibrate_activations(model: str, output: str, **options: Any) -> int:
    """Set the static activation scale (.input_scale) of the FP8 and NVFP4 layers of MODEL, a checkpoint with ComfyUI's
    markers, and copy everything else byte for byte to OUTPUT.

    A client that multiplies in FP8 divides inputs by this number before it rounds them to FP8, and clips what is then
    too large. It helps where the client would otherwise assume 1.0 (ComfyUI's FP8 layers) and inputs are far from 1 in
    size, or where looking at each batch costs time (NVFP4). It hurts where it is too small: what it clips is lost, so
    that statistics of other inputs than those to come are worse than none. Text encoders multiply in full precision in
    ComfyUI and never read it. Layers without any source of a scale are named and stay as they are.
    """
    return run_stage("input_scales", {name: options[name] for name in _NAMES}, model, output, options)
