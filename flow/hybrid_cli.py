"""The command ``quantloom hybrid``."""

from __future__ import annotations

from typing import Any

import click

from .options import DRY_RUN, TALKING, WRITING, add_options
from .running import run_stage

_EPILOG = """\b
Examples:
  quantloom hybrid flux-mxfp8.safetensors flux-hybrid.safetensors
  quantloom hybrid flux-mxfp8.safetensors flux-hybrid.safetensors --mode legacy --tensor-scales flux-fp8.safetensors
"""


@click.command(epilog=_EPILOG, short_help="Give an MXFP8 model scales for other GPUs too.")
@click.argument("model")
@click.argument("output")
@click.option("--tensor-scales", metavar="FP8_MODEL",
              help="Mode legacy: take the scalars from the .weight_scale of this FP8 model (of several the largest). "
              "Without it: the largest scale of each tensor's groups.")
@click.option("--mode", metavar="MODE",
              help="exact (default): encode the weights again with one exponent per tensor, so that both ways to "
              "decode give the same number. legacy (default with --tensor-scales): leave codes and scales as they are; "
              "the scalar then decodes wrongly, and the report says by how much.")
@add_options(WRITING, [DRY_RUN], TALKING)
def hybrid(model: str, output: str, tensor_scales: str | None, mode: str | None, **options: Any) -> int:
    """Turn the MXFP8 layers of MODEL into hybrid MXFP8 and copy the rest to OUTPUT: one file if it ends in
    .safetensors, otherwise a folder. Hybrid layers have a .weight_scalar beside the scales of their groups, for GPUs
    that multiply FP8 but not MXFP8 (Ada).

    From original weights, `quantloom convert MODEL OUT --format hybrid_mxfp8` gives the exact form at once."""
    return run_stage("hybrid", {"mode": mode, "tensor_scales": tensor_scales}, model, output, options)
