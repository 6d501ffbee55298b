"""The options of ``convert``, ``plan`` and ``extract-lora``, and the recipes that they make."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import click

from ..formats.adapters import ADAPTER_DIALECTS
from ..formats.registry import FORMATS
from ..stages.adapter_targeting import METHODS
from ..stages.stage import make_stage
from .recipe import DIALECTS, Output, Recipe, Run
from .sizes import parse_size

Options = list[Callable[[Any], Any]]

STATISTICS = click.option(
    "--statistics", metavar="STORE",
    help="Statistics of the layers' inputs, from `quantloom calibrate MODEL --random-tokens`.",
)  # fmt: skip

TARGETING: Options = [
    click.option("--format", "format_", metavar="FORMAT",
                 help=f"One of {', '.join(FORMATS)}. Needed, unless --recipe has it."),
    click.option("--scaling", metavar="SCALING",
                 help="Where one scale holds: tensor, row or block. Default: the format's own."),
    click.option("--block-size", type=int, metavar="N",
                 help="Edge of the square blocks of --scaling block. Default: 128."),
    click.option("--rotate", metavar="hadamard[:N]",
                 help="Rotate rows by a Hadamard matrix first (int8 row); N is 4, 16, 64, 256 ... Without N: the "
                 "largest that divides."),
    click.option("--rounding", metavar="ROUNDING",
                 help="nearest: scales from the largest weight; mse: scales of least squared error (default); learned; "
                 "calibrated (needs --statistics); gradient. `quantloom roundings` tells when to use which."),
    click.option("-O", "--rounding-option", "rounding_options", metavar="NAME=VALUE", multiple=True,
                 help="An option of the rounding, such as damping=0.1. Repeatable; `quantloom roundings` lists them."),
    STATISTICS,
    click.option("--without-statistics", metavar="ROUNDING|keep",
                 help="What layers that the statistics lack get instead of calibrated. Default: mse."),
    click.option("--bias-correction/--no-bias-correction", default=None,
                 help="Add to biases what rounding takes from the mean output; needs --statistics."),
    click.option("--preset", metavar="NAME|auto|none",
                 help="Which layers this model must keep. auto (default): found by key names."),
    click.option("--include", metavar="REGEX", multiple=True, help="Quantize only layers that match. Repeatable."),
    click.option("--exclude", metavar="REGEX", multiple=True, help="Keep layers that match. Repeatable."),
    click.option("--fallback", metavar="FORMAT", help="Format for layers that --exclude or the preset would keep."),
    click.option("--layers", "rules", metavar="FILE",
                 help="JSON, YAML or TOML: pattern -> format, scaling, block_size, rotate, rounding, skip."),
    click.option("--heuristics/--no-heuristics", default=None,
                 help="Also keep layers that are too small or too long to gain."),
    click.option("--input-scale", metavar="X|amax|p99.9",
                 help="Store a static activation scale with FP8 and NVFP4 layers: a number, or the largest input (or a "
                 "percentile) of the statistics."),
    click.option("--input-scales", metavar="FILE",
                 help="Activation scales of single layers, which win: JSON {layer: number}, or a checkpoint with "
                 ".input_scale tensors."),
    click.option("--full-precision-matmul/--no-full-precision-matmul", default=None,
                 help="Mark layers so that the client multiplies in full precision."),
    click.option("--nonfinite", metavar="refuse|keep",
                 help="A layer with NaN or Inf: refuse the conversion (default), or keep the layer."),
]  # fmt: skip


def _adapting(prefix: str, rank: str, methods: Sequence[str]) -> Options:
    """How adapters are made, under names that begin with ``prefix``."""

    def option(name: str, **given: Any) -> Callable[[Any], Any]:
        return click.option(f"--{prefix}{name}", f"lora_{name.replace('-', '_')}", **given)

    return [
        option("rank", metavar="N|auto", help=f"{rank}; auto: per layer, from its error."),
        option("target", metavar="REGEX",
               help="Layers that get one. Default: the first blocks' layers that are about square, or attention."),
        option("depth", type=int, metavar="N", help="Layers of so many first blocks. Default: 1."),
        option("ar-threshold", type=float, metavar="X",
               help="Layers of any name with an aspect ratio below this. Default 0: rules decide."),
        option("method", metavar="METHOD",
               help=f"One of {', '.join(methods)}. auto (default): weighted with --statistics, else svd."),
        option("budget", metavar="SIZE|N%",
               help="What all adapters may take, such as 50MB or 2% of the source; they go where they help most."),
        option("dtype", metavar="DTYPE", help="F32 (default), BF16 or F16."),
        option("dialect", metavar="NAME",
               help=f"Names and layout of the adapter: {', '.join(ADAPTER_DIALECTS)}. Default: comfy."),
    ]  # fmt: skip


ADAPTING: Options = [
    *_adapting("lora-", "Write an error-correction LoRA of this rank beside the output (default 32 with any other "
               "--lora option)", METHODS),
    click.option("--lora-output", "--lora-save-path", "lora_output", metavar="PATH",
                 help="Where the adapter goes. Default: beside the output, *_lora.safetensors."),
]  # fmt: skip

EXTRACTING: Options = [
    *_adapting("", "Rank of the adapter of every layer (default 32)",
               [method for method in METHODS if method != "svdquant"]),
    STATISTICS,
]  # fmt: skip

DIALECT = click.option("--dialect", default=None, metavar="NAME",
                       help=f"Names and layouts of the output: {', '.join(DIALECTS)}.")  # fmt: skip
RECIPE = click.option("--recipe", "recipe_file", metavar="FILE",
                      help="Start from a JSON recipe; options given here win.")  # fmt: skip

RUNNING: Options = [
    click.option("--memory", metavar="SIZE",
                 help="What the process may use, such as 8GB. Default: half of what is free."),
    click.option("--workers", type=int, metavar="N",
                 help="Tasks at a time; on several GPUs: of each. Default: as many as cores and memory allow."),
    click.option("--device", metavar="DEVICE",
                 help="cpu (default), cuda (every visible GPU), cuda:0, or several: cuda:0,cuda:1."),
    click.option("--scheduler", metavar="NAME|ADDRESS",
                 help="threads (default), sync, distributed, dask-cuda, or a Dask scheduler such as tcp://host:8786."),
    click.option("--writes", metavar="shared|exclusive",
                 help="exclusive: each output file is written by workers of one machine only, for file systems that do "
                 "not keep the writes of several apart. Default: shared."),
    click.option("--resume", metavar="auto|never|require",
                 help="What an earlier run of the same conversion finished: auto (default) continues it, never starts "
                 "over, require fails when there is none."),
    click.option("--verify/--no-verify", default=None,
                 help="Before continuing, read what is finished again and compare it with its checksums."),
    click.option("--on-error", metavar="stop|keep",
                 help="A layer that fails, after retries: stop (default), or keep it as it is and say so."),
    click.option("--overwrite/--no-overwrite", default=None,
                 help="Replace an existing output, once the new one is complete."),
]  # fmt: skip

WRITING: Options = [
    click.option("--shard-size", metavar="SIZE", help="Largest output file, such as 5GB (the default for a folder)."),
    *RUNNING,
]

DRY_RUN = click.option("--dry-run", is_flag=True, help="Show what would be done, and write nothing.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
TALKING: Options = [
    click.option("-q", "--quiet", is_flag=True, help="Print errors only."),
    click.option("-v", "--verbose", count=True, help="Log what is done; twice: everything."),
    JSON,
]

_QUANTIZE = (
    "scaling", "block_size", "rotate", "rounding", "statistics", "without_statistics", "bias_correction", "input_scale",
    "input_scales", "full_precision_matmul", "nonfinite",
)  # fmt: skip
_OF_ONE_FORMAT = ("scaling", "block_size", "rotate", "input_scale")
"""Settings of a recipe that mean nothing once ``--format`` names another format."""
_OF_ONE_SCALING = ("block_size", "rotate")
_LORA = ("rank", "target", "depth", "ar_threshold", "method", "budget", "dtype", "dialect", "output")
_RUN = ("workers", "device", "scheduler", "writes", "resume", "verify", "on_error")
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
    if options.get("input_scale") is not None:
        quantize["input_scale"] = _value(options["input_scale"])
    if options.get("rounding_options"):
        quantize["rounding_options"] = _rounding_options(options["rounding_options"])
    before = stages.get("quantize", {})
    if quantize.get("rounding", before.get("rounding")) != before.get("rounding"):
        before.pop("rounding_options", None)
    if quantize.get("format", before.get("format")) != before.get("format"):
        before = {name: value for name, value in before.items() if name not in _OF_ONE_FORMAT}
    elif quantize.get("scaling", before.get("scaling")) != before.get("scaling"):
        before = {name: value for name, value in before.items() if name not in _OF_ONE_SCALING}
    stages["quantize"] = {**before, **quantize}
    if alone := [stage.verb for stage in base.stages if getattr(stage, "alone", False)]:
        words = "which has a command of its own: see quantloom --help"
        raise click.UsageError(f"--recipe holds the stage {alone[0]}, {words}")
    if "format" not in stages["quantize"]:
        raise click.UsageError(f"--format is missing; known: {', '.join(FORMATS)}")
    stages["target"] = {**stages.get("target", {}), **_given(options, {name: name for name in _TARGET})}
    if adapter := _adapter(options):
        stages["lora"] = {**stages.get("lora", {}), **adapter}
    return _recipe(base, stages, source or base.source, destination, options)


def build_extraction(original: str, quantized: str, adapter: str, options: dict[str, Any]) -> Recipe:
    """The recipe of an adapter for a model that is quantized already, on top of ``--recipe`` when that is given."""
    base = Recipe.load(options["recipe_file"]) if options.get("recipe_file") else Recipe()
    stages = {stage.verb: stage.to_dict() for stage in base.stages}
    stages["quantized_as"] = {
        **stages.get("quantized_as", {}), "model": quantized, **_given(options, {"statistics": "statistics"}),
    }  # fmt: skip
    stages["lora"] = {**stages.get("lora", {}), **_adapter(options)}
    return _recipe(base, stages, (original,), adapter, options)


def one_stage_recipe(
    verb: str, values: dict[str, Any], source: str, destination: str, options: dict[str, Any]
) -> Recipe:
    """The recipe of a command that is one stage: ``values`` are the stage's options, None where one was not given."""
    given = {name: value for name, value in values.items() if value is not None}
    return _recipe(Recipe(), {verb: given}, (source,), destination, options)


def _recipe(
    base: Recipe, stages: dict[str, dict[str, Any]], source: tuple[str, ...], destination: str, options: dict[str, Any]
) -> Recipe:  # fmt: skip
    """These stages, with how and where to write as given or as ``base`` has it."""
    run = {**vars(base.run), **_given(options, {name: name for name in _RUN})}
    if options.get("memory") is not None:
        run["memory"] = parse_size(options["memory"], "--memory")
    output = vars(base.output) if base.output else {}
    given = _given(options, {"dialect": "dialect", "overwrite": "overwrite"})
    if options.get("shard_size") is not None:
        given["shard_bytes"] = parse_size(options["shard_size"], "--shard-size")
    recipe = Recipe(source, (), Output(**{**output, **given, "path": destination}), Run(**run))
    for verb, values in stages.items():
        recipe = recipe.with_stage(make_stage(verb, values))
    return recipe


def _adapter(options: dict[str, Any]) -> dict[str, Any]:
    """Options of the lora stage that were given."""
    values = _given(options, {f"lora_{name}": name for name in _LORA})
    return {name: _value(value) if name in ("rank", "budget") else value for name, value in values.items()}


def _rounding_options(given: tuple[str, ...]) -> dict[str, Any]:
    """NAME=VALUE pairs as a mapping."""
    pairs = [text.partition("=") for text in given]
    if wrong := [text for text, pair in zip(given, pairs, strict=True) if not pair[0] or not pair[1]]:
        raise click.UsageError(f"--rounding-option {wrong[0]!r} is not NAME=VALUE, such as damping=0.1")
    values = {name.strip().replace("-", "_"): _value(value.strip()) for name, _, value in pairs}
    if len(values) < len(pairs):
        raise click.UsageError(f"--rounding-option names an option twice: {', '.join(given)}")
    return values


def _value(text: str) -> Any:
    """A number, true or false where the text is one; otherwise the text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, int | float | bool) else text


def _given(options: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Options that were given on the command line, under the names that recipes use."""
    values = {name: options.get(option) for option, name in names.items()}
    joined = {name: "|".join(f"(?:{part})" for part in value) if len(value) > 1 else value[0]
              for name, value in values.items() if isinstance(value, tuple) and value}  # fmt: skip
    return {name: value for name, value in values.items() if value is not None and value != ()} | joined
