"""The command ``quantloom dequantize``."""

from __future__ import annotations

from typing import Any

import click

from ..formats.tensors import PLAIN_DTYPES
from .options import DRY_RUN, TALKING, WRITING, add_options
from .running import run_stage

_EPILOG = """\b
Examples:
  quantloom dequantize flux-nvfp4.safetensors flux-bf16.safetensors
  quantloom dequantize deepseek-fp8/ deepseek-f32/ --dtype f32
"""


@click.command(epilog=_EPILOG, short_help="Turn a quantized checkpoint into plain weights.")
@click.argument("model")
@click.argument("output")
@click.option("--dtype", metavar="DTYPE", help=f"Of the decoded weights: {', '.join(PLAIN_DTYPES)}. Default: bf16.")
@click.option("--nonfinite", metavar="refuse|keep",
              help="A weight that decodes to NaN or Inf: refuse (default), or write it as it is.")
@add_options(WRITING, [DRY_RUN], TALKING)
def dequantize(model: str, output: str, dtype: str | None, nonfinite: str | None, **options: Any) -> int:
    """Decode every quantized layer of MODEL, in any format and dialect that quantloom reads, and copy the rest to
    OUTPUT: one file if it ends in .safetensors, otherwise a folder."""
    return run_stage("dequantize", {"dtype": dtype, "nonfinite": nonfinite}, model, output, options)
