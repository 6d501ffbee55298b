"""The command line: ``quantloom convert`` and its siblings. Commands that are one stage have a module each.

Heavy modules are imported where they are needed: help is quick.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import click

from .. import __version__
from ..formats.registry import FORMATS
from . import console
from .activations_cli import calibrate_activations
from .assemble_cli import assemble
from .calibrate_cli import calibrate
from .dequantize_cli import dequantize
from .edit_cli import edit
from .entry import run_command
from .extract_cli import extract_lora
from .help import CommandsByHeading, OptionsByHeading
from .hybrid_cli import hybrid
from .migrate_cli import migrate
from .options import ADAPTING, DIALECT, JSON, RECIPE, TALKING, TARGETING, WRITING, add_options, build_recipe
from .running import run_recipe, show_plan

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}

_EPILOG = """\b
Examples:
  quantloom plan    flux-dev/ --format mxfp8
  quantloom convert flux-dev/ flux-dev-mxfp8.safetensors --format mxfp8
  quantloom verify  flux-dev-mxfp8.safetensors --against flux-dev/
  quantloom inspect flux-dev-mxfp8.safetensors

`quantloom COMMAND --help` has the options of each, and more examples.
"""

_CONVERT_EPILOG = """\b
Examples:
  quantloom convert flux-dev/ flux-dev-mxfp8.safetensors --format mxfp8
  quantloom convert model.safetensors out/ --format fp8 --scaling row --exclude 'final_layer'
  quantloom convert model.safetensors out.safetensors --format int8 --rotate hadamard:256
  quantloom convert llama/ out/ --format nvfp4 --rounding calibrated --statistics stats.zarr
  quantloom convert flux-dev/ out.safetensors --format nvfp4 --lora-rank 32 --lora-target attn
"""

_PLAN_EPILOG = """\b
Examples:
  quantloom plan flux-dev/ --format nvfp4
  quantloom plan flux-dev/ out.safetensors --format fp8 --exclude 'final_layer' --verbose
  quantloom plan flux-dev/ out/ --format nvfp4 --lora-rank auto --lora-budget 2% --json
  quantloom plan flux-dev/ --format nvfp4 --rounding learned --simulate gpus=8,read=6GB/s
"""

_INSPECT_EPILOG = """\b
Examples:
  quantloom inspect flux-dev-mxfp8.safetensors
  quantloom inspect flux-dev/ --layers
"""

_VERIFY_EPILOG = """\b
Examples:
  quantloom verify flux-dev-mxfp8.safetensors
  quantloom verify flux-dev-mxfp8.safetensors --against flux-dev/
  quantloom verify llama-nvfp4/ --against llama/ --statistics stats.zarr
  quantloom verify llama-nvfp4/ --against llama/ --adapter llama-adapter/
"""

SIMULATE = click.option("--simulate", metavar="gpus=N,read=RATE",
                        help="Also say how long it would take elsewhere, and why: gpus or workers (of each host), "
                        "hosts, read, write (such as 6GB/s, of all together), device (cpu, h100, h200).")  # fmt: skip


@click.group(cls=CommandsByHeading, context_settings=_CONTEXT, epilog=_EPILOG)
@click.version_option(__version__, prog_name="quantloom")
def cli() -> None:
    """Turn model checkpoints into quantized ones, in bounded memory, whatever their size."""


@cli.command(cls=OptionsByHeading, epilog=_CONVERT_EPILOG, short_help="Quantize a checkpoint into a file or folder.")
@click.argument("source")
@click.argument("destination")
@add_options(TARGETING, ADAPTING, [DIALECT], WRITING, [RECIPE], TALKING)
def convert(source: str, destination: str, **options: Any) -> int:
    """Quantize SOURCE (a .safetensors file, folder, index.json or glob, here or behind a URL) into DESTINATION.

    DESTINATION is one file if it ends in .safetensors, a store for workers without a shared disk if it ends in .zarr
    (also s3://bucket/out.zarr; then `quantloom assemble`), otherwise a folder with shards, index and configuration.
    """
    return run_recipe(lambda: build_recipe((source,), destination, options), options)


@cli.command(cls=OptionsByHeading, epilog=_PLAN_EPILOG, short_help="Show what convert would do, from headers alone.")
@click.argument("source")
@click.argument("destination", required=False)
@add_options(TARGETING, ADAPTING, [DIALECT], WRITING, [SIMULATE, RECIPE], TALKING)
def plan(source: str, destination: str | None, **options: Any) -> int:
    """Show what convert would do: every layer's format, why others are kept, bytes, memory, time. Reads headers only,
    unless --lora-rank auto or --lora-budget ask for a survey: that quantizes the candidate layers once.

    DESTINATION decides how the output is split into files. Without it: one file.
    """

    def action() -> int:
        console.setup_logging(-1 if options["quiet"] else options["verbose"])
        recipe = build_recipe((source,), destination or _unused_name(), options)
        show_plan(recipe, options, named=destination is not None)
        return 0

    return console.guarded(action)


def _unused_name() -> str:
    """A file name for a plan that is given none; a file that exists might be the source."""
    name = "quantized.safetensors"
    while Path(name).exists():
        name = f"new-{name}"
    return name


for command in (assemble, extract_lora, calibrate, calibrate_activations, dequantize, edit, hybrid, migrate):
    cli.add_command(command)


@cli.command(epilog=_INSPECT_EPILOG, short_help="Show what a checkpoint holds.")
@click.argument("path")
@click.option("--layers", "every_layer", is_flag=True, help="List every layer.")
@JSON
def inspect(path: str, every_layer: bool, as_json: bool) -> int:
    """Show what the checkpoint at PATH holds: layers, formats, dialect, sizes, metadata. Reads headers only."""

    def action() -> int:
        from .inspect import inspect as look

        found = look(path)
        if as_json:
            console.print_json(found.to_dict())
        else:
            console.print_inspection(found, every_layer)
        return 0

    return console.guarded(action)


@cli.command(epilog=_VERIFY_EPILOG, short_help="Check an output by checksums, or against its source.")
@click.argument("output")
@click.option("--against", multiple=True, metavar="SOURCE",
              help="The checkpoint that OUTPUT was made from: decode every weight and compare; once for each file of a "
                   "list.")
@click.option("--statistics", metavar="STORE",
              help="Also measure the output error of every layer, beside plain rounding; holds whole matrices.")
@click.option("--adapter", metavar="PATH",
              help="Also check that this adapter belongs to OUTPUT, and measure errors with it beside each layer.")
@click.option("--worst", "most", default=10, show_default=True, metavar="N", help="How many layers to show.")
@JSON
def verify(
    output: str, against: tuple[str, ...], statistics: str | None, adapter: str | None, most: int, as_json: bool
) -> int:
    """Check that every byte of OUTPUT is what was written, by the checksums that its files carry. With --against also
    decode it and compare it with its source, weight by weight. Exit status 1 when it is broken."""

    def action() -> int:
        if not against:
            return _verify_checksums(output, statistics or adapter, as_json)
        from .console_verify import print_verification
        from .verify import verify as check

        sources = against[0] if len(against) == 1 else list(against)
        result = check(output, sources, statistics=statistics, adapter=adapter)
        if as_json:
            console.print_json(result.to_dict())
        else:
            print_verification(result, most)
        return 0 if result.ok else 1

    return console.guarded(action)


def _verify_checksums(output: str, beside: str | None, as_json: bool) -> int:
    from ..formats.errors import UsageError
    from .console_verify import print_checksums
    from .progress import Reading
    from .verify_checksums import verify_checksums

    if beside is not None:
        raise UsageError("--statistics and --adapter measure errors, which needs the source: name it with --against")
    with Reading(console.stderr()) as progress:
        found = verify_checksums(output, progress.advance)
    if as_json:
        console.print_json(found.to_dict())
    else:
        print_checksums(found)
    return 0 if found.ok else 1


@cli.command(short_help="List the roundings, and when to use which.")
@JSON
def roundings(as_json: bool) -> int:
    """List the roundings: when to use which, and their options (-O NAME=VALUE)."""

    def action() -> int:
        from .roundings import describe_roundings

        found = describe_roundings()
        if as_json:
            console.print_json([asdict(rounding) for rounding in found])
            return 0
        console.print_roundings(found)
        return 0

    return console.guarded(action)


@cli.command(short_help="List the formats, and what runs them.")
@JSON
def formats(as_json: bool) -> int:
    """List the formats: scalings, bits, hardware, clients."""

    def action() -> int:
        if as_json:
            console.print_json([vars(info) for info in FORMATS.values()])
            return 0
        console.print_formats(FORMATS.values())
        return 0

    return console.guarded(action)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry point; returns through sys.exit with 0 done, 1 the work failed, 2 wrong usage."""
    run_command(cli, "quantloom", arguments)


if __name__ == "__main__":
    main()
