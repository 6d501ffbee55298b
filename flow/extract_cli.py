"""The command ``quantloom extract-lora``."""

from __future__ import annotations

from typing import Any

import click

from . import console
from .entry import STOPPED
from .options import EXTRACTING, RUNNING, TALKING, add_options, build_extraction

_EPILOG = """\b
Examples:
  quantloom extract-lora flux-dev/ flux-dev-nvfp4.safetensors flux-dev-nvfp4_lora.safetensors --target attn
  quantloom extract-lora llama/ llama-nvfp4/ adapter/ --target . --dialect peft --statistics stats.zarr
"""


@click.command("extract-lora", epilog=_EPILOG, short_help="Make an error-correction LoRA for a quantized model.")
@click.argument("original")
@click.argument("quantized")
@click.argument("adapter")
@add_options(EXTRACTING)
@click.option("--dry-run", is_flag=True, help="Show layers, ranks and bytes, and write nothing.")
@add_options(RUNNING, TALKING)
def extract_lora(
    original: str, quantized: str, adapter: str, dry_run: bool, quiet: bool, verbose: int, as_json: bool, **options: Any
) -> int:
    """Write a LoRA with what QUANTIZED lost of ORIGINAL, in ADAPTER: a .safetensors file, or a folder for PEFT.

    QUANTIZED may be of any program, in any format that is read, and is not changed. ComfyUI merges a LoRA into
    quantized weights by rounding the sum again, which was measured to be worse than no adapter: apply it beside the
    matmul.
    """

    def action() -> int:
        from .budget import make_budget
        from .pipeline import Flow

        console.setup_logging(-1 if quiet else verbose)
        flow = Flow(build_extraction(original, quantized, adapter, options))
        if not dry_run:
            console.run_flow(flow, quiet or as_json, as_json)
            return 0
        budget = make_budget(flow.plan.layers, flow.recipe.run, "")
        if as_json:
            console.print_json(flow.plan.to_dict(budget))
        elif not quiet:
            console.print_plan(flow.plan, budget, verbose > 0)
        return 0

    return console.guarded(action, STOPPED)
