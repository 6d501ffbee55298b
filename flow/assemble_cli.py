"""The command ``quantloom assemble``."""

from __future__ import annotations

import click

from . import console
from .options import JSON

_EPILOG = """\b
Examples:
  quantloom assemble out.zarr flux-dev-nvfp4.safetensors
  quantloom assemble s3://bucket/llama.zarr llama-nvfp4/
  quantloom assemble s3://bucket/llama.zarr s3://bucket/llama-nvfp4
"""


@click.command(epilog=_EPILOG, short_help="Make files of a store that convert wrote.")
@click.argument("store")
@click.argument("output")
@click.option("--overwrite", is_flag=True, help="Replace an existing output, once the new one is complete.")
@click.option("--workers", type=int, metavar="N", help="Chunks that are read at a time. Default: 8.")
@JSON
def assemble(store: str, output: str, overwrite: bool, workers: int | None, as_json: bool) -> int:
    """Make files of STORE, a .zarr folder or URL that convert wrote: OUTPUT is a .safetensors file, a folder, or the
    prefix of a URL. They are what convert would have written there itself; every chunk is checked on the way."""

    def action() -> int:
        from .assemble import WORKERS
        from .assemble import assemble as make

        made = make(store, output, overwrite=overwrite, workers=WORKERS if workers is None else workers)
        if as_json:
            console.print_json(made.to_dict())
        else:
            console.stdout().print(made.summary(), markup=False, highlight=False, soft_wrap=True)
        return 0

    return console.guarded(action)
