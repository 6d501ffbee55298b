"""The command ``quantloom migrate``."""

from __future__ import annotations

from typing import Any

import click

from ..formats.tensors import PLAIN_DTYPES
from .options import DRY_RUN, TALKING, WRITING, Options, add_options
from .running import run_stage

_EPILOG = """\b
Examples:
  quantloom migrate flux-scaled.safetensors flux-comfy.safetensors
  quantloom migrate flux-fp8.safetensors flux-scaled.safetensors --to legacy
  quantloom migrate old.safetensors clean.safetensors --to same --clean --input-scale 1.0
"""

_MIGRATING: Options = [
    click.option("--to", metavar="FORM",
                 help="comfy (default): comfy_quant markers; legacy: scaled_fp8, scale_weight, scale_input; same: each "
                 "layer as it is, for the options below."),
    click.option("--input-scale", type=float, metavar="X",
                 help="Give FP8 layers that lack an activation scale this one."),
    click.option("--clean/--no-clean", default=None,
                 help="Leave out scales and markers that belong to no quantized weight."),
    click.option("--cast", metavar="DTYPE",
                 help=f"Cast float tensors that are not quantized: {', '.join(PLAIN_DTYPES)}."),
    click.option("--cast-filter", metavar="REGEX", help="Cast only tensors whose name matches."),
    click.option("--high-precision", metavar="REGEX", help="Refuse when a layer that matches is quantized."),
    click.option("--full-precision-matmul/--no-full-precision-matmul", default=None,
                 help="Whether layers ask the client to multiply in full precision. Default: as they do."),
]  # fmt: skip


@click.command(epilog=_EPILOG, short_help="Turn legacy models into today's form, and back.")
@click.argument("model")
@click.argument("output")
@add_options(_MIGRATING, WRITING, [DRY_RUN], TALKING)
def migrate(model: str, output: str, **options: Any) -> int:
    """Write MODEL to OUTPUT with the same codes and scales, under the names and with the descriptions of another form.

    OUTPUT is one file if it ends in .safetensors, otherwise a folder. Nothing is decoded or rounded.
    """
    names = (
        "to", "input_scale", "clean", "cast", "cast_filter", "high_precision", "full_precision_matmul",
    )  # fmt: skip
    return run_stage("migrate", {name: options[name] for name in names}, model, output, options)
