"""The command line: ``quantloom convert``, ``plan``, ``inspect``, ``verify``, ``formats``.

Options build the same recipe as the Python pipeline. Heavy modules are imported where they are needed: help must be quick.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click

from .. import __version__
from ..formats.registry import FORMATS
from ..stages.stage import make_stage
from . import console
from .recipe import DIALECTS, Output, Recipe, Run
from .sizes import parse_size

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}

_EPILOG = """\b
Examples:
  quantloom convert flux-dev/ flux-dev-mxfp8.safetensors --format mxfp8
  quantloom convert model.safetensors out/ --format fp8 --scaling row --exclude 'final_layer'
  quantloom convert model.safetensors out.safetensors --format int8 --rotate hadamard:256
  quantloom plan flux-dev/ --format nvfp4
"""

_TARGETING: list[Callable[[Any], Any]] = [
    click.option("--format", "format_", metavar="FORMAT", help=f"One of {', '.join(FORMATS)}."),
    click.option("--scaling", metavar="SCALING", help="Where one scale holds: tensor, row or block. Default: the format's own."),
    click.option("--block-size", type=int, metavar="N", help="Edge of the square blocks of --scaling block. Default: 128."),
    click.option("--rotate", metavar="hadamard[:N]", help="Rotate rows by a Hadamard matrix first (int8 row); N is 4, 16, 64, 256 ... "
                 "Without N: the largest that divides."),
    click.option("--rounding", metavar="ROUNDING", help="mse: scales of least squared error (default); nearest: scales from the largest weight."),
    click.option("--preset", metavar="NAME|auto|none", help="Which layers this model must keep. auto (default): found by key names."),
    click.option("--include", metavar="REGEX", help="Quantize only layers that match."),
    click.option("--exclude", metavar="REGEX", help="Keep layers that match."),
    click.option("--fallback", metavar="FORMAT", help="Format for layers that --exclude or the preset would keep."),
    click.option("--layers", "rules", metavar="FILE", help="JSON, YAML or TOML: pattern -> format, scaling, block_size, rotate, rounding, skip."),
    click.option("--heuristics", is_flag=True, help="Also keep layers that are too small or too long to gain."),
    click.option("--input-scale", type=float, metavar="X", help="Store this static activation scale with FP8 layers."),
    click.option("--full-precision-matmul", is_flag=True, help="Mark layers so that the client multiplies in full precision."),
    click.option("--nonfinite", metavar="refuse|keep", help="A layer with NaN or Inf: refuse the conversion (default), or keep the layer."),
]  # fmt: skip

_RUNNING: list[Callable[[Any], Any]] = [
    click.option("--dialect", default=None, metavar="NAME", help=f"Names and layouts of the output: {', '.join(DIALECTS)}."),
    click.option("--shard-size", metavar="SIZE", help="Largest output file, such as 5GB (the default for a folder)."),
    click.option("--memory", metavar="SIZE", help="What the process may use, such as 8GB. Default: half of what is free."),
    click.option("--workers", type=int, metavar="N", help="Tasks at a time. Default: as many as cores and memory allow."),
    click.option("--device", metavar="DEVICE", help="cpu (default), cuda or cuda:0."),
    click.option("--scheduler", metavar="NAME|ADDRESS", help="threads (default), sync, distributed, or a Dask scheduler such as tcp://host:8786."),
    click.option("--recipe", "recipe_file", metavar="FILE", help="Start from a JSON recipe; options given here win."),
    click.option("--overwrite", is_flag=True, help="Replace an existing output, once the new one is complete."),
]  # fmt: skip

_TALKING: list[Callable[[Any], Any]] = [
    click.option("-q", "--quiet", is_flag=True, help="Print errors only."),
    click.option("-v", "--verbose", count=True, help="Log what is done; twice: everything."),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout."),
]


def _options(*groups: list[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    def add(command: Any) -> Any:
        for option in reversed([option for group in groups for option in group]):
            command = option(command)
        return command

    return add


def build_recipe(source: tuple[str, ...], destination: str, options: dict[str, Any]) -> Recipe:
    """The recipe that the options describe, on top of ``--recipe`` when that is given."""
    base = Recipe.load(options["recipe_file"]) if options.get("recipe_file") else Recipe()
    stages = {stage.verb: stage.to_dict() for stage in base.stages}
    quantize = _given(options, {"format_": "format", "scaling": "scaling", "block_size": "block_size", "rotate": "rotate",
                                "rounding": "rounding", "input_scale": "input_scale",
                                "full_precision_matmul": "full_precision_matmul", "nonfinite": "nonfinite"})  # fmt: skip
    target = _given(options, {name: name for name in ("preset", "include", "exclude", "fallback", "rules", "heuristics")})
    if quantize or "quantize" in stages:
        merged = {**stages.get("quantize", {}), **quantize}
        if "format" not in merged:
            raise click.UsageError(f"--format is missing; known: {', '.join(FORMATS)}")
        stages["quantize"] = merged
    else:
        raise click.UsageError(f"--format is missing; known: {', '.join(FORMATS)}")
    stages["target"] = {**stages.get("target", {}), **target}
    run = {**vars(base.run), **_given(options, {name: name for name in ("workers", "device", "scheduler")})}
    if options.get("memory"):
        run["memory"] = parse_size(options["memory"], "--memory")
    output = vars(base.output) if base.output else {}
    given = _given(options, {"dialect": "dialect", "overwrite": "overwrite"})
    if options.get("shard_size"):
        given["shard_bytes"] = parse_size(options["shard_size"], "--shard-size")
    recipe = Recipe(source or base.source, (), Output(**{**output, **given, "path": destination}), Run(**run))
    for verb, values in stages.items():
        recipe = recipe.with_stage(make_stage(verb, values))
    return recipe


def _given(options: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Options that were given on the command line, under the names that recipes use."""
    return {name: options[option] for option, name in names.items() if options.get(option) not in (None, False)}


@click.group(context_settings=_CONTEXT, epilog=_EPILOG)
@click.version_option(__version__, prog_name="quantloom")
def cli() -> None:
    """Turn model checkpoints into quantized ones, in bounded memory, whatever their size."""


@cli.command(epilog=_EPILOG)
@click.argument("source")
@click.argument("destination")
@_options(_TARGETING, _RUNNING, _TALKING)
def convert(source: str, destination: str, quiet: bool, verbose: int, as_json: bool, **options: Any) -> int:
    """Quantize SOURCE (a .safetensors file, folder, index.json or glob) into DESTINATION.

    DESTINATION is one file if it ends in .safetensors, otherwise a folder with shards, index and configuration.
    """

    def action() -> int:
        from .pipeline import Flow

        console.setup_logging(-1 if quiet else verbose)
        flow = Flow(build_recipe((source,), destination, options))
        console.run_flow(flow, quiet or as_json, as_json)
        return 0

    return console.guarded(action)


@cli.command(epilog=_EPILOG)
@click.argument("source")
@_options(_TARGETING, _RUNNING, _TALKING)
def plan(source: str, quiet: bool, verbose: int, as_json: bool, **options: Any) -> int:
    """Show what convert would do: format of every layer, why others are kept, bytes, memory and time. Reads headers only."""

    def action() -> int:
        from .budget import make_budget
        from .plan import make_plan

        console.setup_logging(-1 if quiet else verbose)
        recipe = build_recipe((source,), "quantized.safetensors", options)
        made = make_plan(recipe)
        budget = make_budget(made.layers, recipe.run, "")
        if as_json:
            console.print_json(made.to_dict(budget))
        elif not quiet:
            console.print_plan(made, budget)
        return 0

    return console.guarded(action)


@cli.command()
@click.argument("path")
@click.option("--layers", "every_layer", is_flag=True, help="List every layer.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
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


@cli.command()
@click.argument("output")
@click.option("--against", required=True, metavar="SOURCE", help="The checkpoint that OUTPUT was made from.")
@click.option("--worst", "most", default=10, show_default=True, metavar="N", help="How many of the worst layers to show.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def verify(output: str, against: str, most: int, as_json: bool) -> int:
    """Decode OUTPUT and compare it with its source, weight by weight. Exit status 1 when it is broken."""

    def action() -> int:
        from .verify import verify as check

        result = check(output, against)
        if as_json:
            console.print_json(result.to_dict())
        else:
            console.print_verification(result, most)
        return 0 if result.ok else 1

    return console.guarded(action)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def formats(as_json: bool) -> int:
    """List the formats: scalings, bits per weight, hardware, who loads them."""

    def action() -> int:
        if as_json:
            console.print_json([vars(info) for info in FORMATS.values()])
            return 0
        from rich.table import Table

        table = Table("format", "scalings", "bits", "runs natively on", "loaded by", header_style="bold")
        for info in FORMATS.values():
            scalings = ", ".join(info.scalings) + (f" of {info.group_size}" if info.group_size else "")
            table.add_row(info.name, scalings, f"{info.bits:g}", info.hardware, info.loaded_by)
        console.stdout().print(table)
        return 0

    return console.guarded(action)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns through sys.exit with 0 done, 1 the work failed, 2 wrong usage."""
    try:
        status = cli.main(arguments, prog_name="quantloom", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        status = 2
    except click.Abort:
        status = 1
    sys.exit(status or 0)


if __name__ == "__main__":
    main()
