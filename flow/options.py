"""The options of ``convert`` and ``plan``, and the recipe that they make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from ..formats.registry import FORMATS
from ..stages.stage import make_stage
from .recipe import DIALECTS, Output, Recipe, Run
from .sizes import parse_size

Options = list[Callable[[Any], Any]]

TARGETING: Options = [
    click.option("--format", "format_", metavar="FORMAT", help=f"One of {', '.join(FORMATS)}."),
    click.option("--scaling", metavar="SCALING",
                 help="Where one scale holds: tensor, row or block. Default: the format's own."),
    click.option("--block-size", type=int, metavar="N",
                 help="Edge of the square blocks of --scaling block. Default: 128."),
    click.option("--rotate", metavar="hadamard[:N]",
                 help="Rotate rows by a Hadamard matrix first (int8 row); N is 4, 16, 64, 256 ... Without N: the "
                 "largest that divides."),
    click.option("--rounding", metavar="ROUNDING",
                 help="mse: scales of least squared error (default); nearest: scales from the largest weight."),
    click.option("--preset", metavar="NAME|auto|none",
                 help="Which layers this model must keep. auto (default): found by key names."),
    click.option("--include", metavar="REGEX", multiple=True, help="Quantize only layers that match. Repeatable."),
    click.option("--exclude", metavar="REGEX", multiple=True, help="Keep layers that match. Repeatable."),
    click.option("--fallback", metavar="FORMAT", help="Format for layers that --exclude or the preset would keep."),
    click.option("--layers", "rules", metavar="FILE",
                 help="JSON, YAML or TOML: pattern -> format, scaling, block_size, rotate, rounding, skip."),
    click.option("--heuristics/--no-heuristics", default=None,
                 help="Also keep layers that are too small or too long to gain."),
    click.option("--input-scale", type=float, metavar="X",
                 help="Store this static activation scale with FP8 layers."),
    click.option("--full-precision-matmul/--no-full-precision-matmul", default=None,
                 help="Mark layers so that the client multiplies in full precision."),
    click.option("--nonfinite", metavar="refuse|keep",
                 help="A layer with NaN or Inf: refuse the conversion (default), or keep the layer."),
]  # fmt: skip

RUNNING: Options = [
    click.option("--dialect", default=None, metavar="NAME",
                 help=f"Names and layouts of the output: {', '.join(DIALECTS)}."),
    click.option("--shard-size", metavar="SIZE", help="Largest output file, such as 5GB (the default for a folder)."),
    click.option("--memory", metavar="SIZE",
                 help="What the process may use, such as 8GB. Default: half of what is free."),
    click.option("--workers", type=int, metavar="N",
                 help="Tasks at a time. Default: as many as cores and memory allow."),
    click.option("--device", metavar="DEVICE", help="cpu (default), cuda or cuda:0."),
    click.option("--scheduler", metavar="NAME|ADDRESS",
                 help="threads (default), sync, distributed, or a Dask scheduler such as tcp://host:8786."),
    click.option("--recipe", "recipe_file", metavar="FILE", help="Start from a JSON recipe; options given here win."),
    click.option("--overwrite/--no-overwrite", default=None,
                 help="Replace an existing output, once the new one is complete."),
]  # fmt: skip

JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")

TALKING: Options = [
    click.option("-q", "--quiet", is_flag=True, help="Print errors only."),
    click.option("-v", "--verbose", count=True, help="Log what is done; twice: everything."),
    JSON,
]

_QUANTIZE = ("scaling", "block_size", "rotate", "rounding", "input_scale", "full_precision_matmul", "nonfinite")
_OF_ONE_FORMAT = ("scaling", "block_size", "rotate", "input_scale")
"""Settings of a recipe that mean nothing once ``--format`` names another format."""
_OF_ONE_SCALING = ("block_size", "rotate")
_TARGET = ("preset", "include", "exclude", "fallback", "rules", "heuristics")


def add_options(*groups: Options) -> Callable[[Any], Any]:
    def add(command: Any) -> Any:
        for option in reversed([option for group in groups for option in group]):
            command = option(command)
        return command

    return add


def build_recipe(source: tuple[str, ...], destination: str, options: dict[str, Any]) -> Recipe:
    """The recipe that the options describe, on top of ``--recipe`` when that is given."""
    base = Recipe.load(options["recipe_file"]) if options.get("recipe_file") else Recipe()
    stages = {stage.verb: stage.to_dict() for stage in base.stages}
    quantize = _given(options, {"format_": "format", **{name: name for name in _QUANTIZE}})
    before = stages.get("quantize", {})
    if quantize.get("format", before.get("format")) != before.get("format"):
        before = {name: value for name, value in before.items() if name not in _OF_ONE_FORMAT}
    elif quantize.get("scaling", before.get("scaling")) != before.get("scaling"):
        before = {name: value for name, value in before.items() if name not in _OF_ONE_SCALING}
    stages["quantize"] = {**before, **quantize}
    if "format" not in stages["quantize"]:
        raise click.UsageError(f"--format is missing; known: {', '.join(FORMATS)}")
    stages["target"] = {**stages.get("target", {}), **_given(options, {name: name for name in _TARGET})}
    run = {**vars(base.run), **_given(options, {name: name for name in ("workers", "device", "scheduler")})}
    if options.get("memory") is not None:
        run["memory"] = parse_size(options["memory"], "--memory")
    output = vars(base.output) if base.output else {}
    given = _given(options, {"dialect": "dialect", "overwrite": "overwrite"})
    if options.get("shard_size") is not None:
        given["shard_bytes"] = parse_size(options["shard_size"], "--shard-size")
    recipe = Recipe(source or base.source, (), Output(**{**output, **given, "path": destination}), Run(**run))
    for verb, values in stages.items():
        recipe = recipe.with_stage(make_stage(verb, values))
    return recipe


def _given(options: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Options that were given on the command line, under the names that recipes use."""
    values = {name: options.get(option) for option, name in names.items()}
    joined = {name: "|".join(f"(?:{part})" for part in value) if len(value) > 1 else value[0]
              for name, value in values.items() if isinstance(value, tuple) and value}  # fmt: skip
    return {name: value for name, value in values.items() if value is not None and value != ()} | joined
