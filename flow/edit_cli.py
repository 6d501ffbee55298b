"""The command ``quantloom edit``."""

from __future__ import annotations

import json
from typing import Any

import click

from ..formats.errors import UsageError
from . import console
from .options import DRY_RUN, TALKING, WRITING, add_options
from .running import run_stage

_EPILOG = """\b
Examples:
  quantloom edit t5xxl-fp8.safetensors t5xxl-full.safetensors --add full_precision_matrix_mult=true
  quantloom edit model.safetensors out.safetensors --remove per_row,note --filter 'blocks\\.0\\.'
  quantloom edit model.safetensors --in-place --rebuild-header
"""

_WRITING = ("shard_size", "memory", "workers", "device", "scheduler", "writes", "overwrite")
_STOPPED = "stopped: the checkpoint is as it was; what had been written was removed"


@click.command(epilog=_EPILOG, short_help="Change what a quantized model says of its layers.")
@click.argument("model")
@click.argument("output", required=False)
@click.option("--add", multiple=True, metavar="KEY=VALUE",
              help="Add a key, or give it another value: JSON where it is some, else text. Repeatable.")
@click.option("--remove", multiple=True, metavar="KEY[,KEY]", help="Remove keys. Repeatable.")
@click.option("--filter", "pattern", metavar="REGEX", help="Edit only layers that match. Default: all with a marker.")
@click.option("--rebuild-header", is_flag=True,
              help="Write the header entry from the markers, which are right where both disagree.")
@click.option("--in-place", is_flag=True,
              help="Change MODEL itself: only the bytes that differ where there is room for them, else through a new "
              "file. Finishes an edit that was interrupted.")
@add_options(WRITING, [DRY_RUN], TALKING)
def edit(model: str, output: str | None, in_place: bool, **options: Any) -> int:  # fmt: skip
    """Change keys of the markers (.comfy_quant) and of the header entry that repeats them, in MODEL or in a copy of it.

    Both say the same afterwards. Everything else is copied byte for byte. A value that a layer's format cannot have is
    refused, and so is what would decode weights to other numbers.
    """
    values = {
        "add": _added(options["add"]), "remove": [key.strip() for text in options["remove"] for key in text.split(",")],
        "filter": options["pattern"], "rebuild_header": options["rebuild_header"],
    }  # fmt: skip
    if not in_place:
        if output is None:
            raise click.UsageError("Missing argument 'OUTPUT', or --in-place to change MODEL itself.")
        return run_stage("edit", values, model, output, options)
    if output is not None:
        raise click.UsageError("--in-place changes MODEL itself: leave OUTPUT out.")
    if idle := [name for name in _WRITING if options[name] is not None]:
        raise click.UsageError(f"--{idle[0].replace('_', '-')} means nothing beside --in-place: leave it out.")
    return _edit_in_place(model, values, options)


def _edit_in_place(model: str, values: dict[str, Any], options: dict[str, Any]) -> int:
    def action() -> int:
        from ..stages.edit import Edit
        from ..stages.stage import make_stage
        from .in_place import edit_in_place

        console.setup_logging(-1 if options["quiet"] else options["verbose"])
        asked = any(value for value in values.values())
        stage = make_stage("edit", values) if asked else None
        assert stage is None or isinstance(stage, Edit)
        report = edit_in_place(model, stage, options["dry_run"])
        if not asked and not report.finished:
            raise UsageError("edit: nothing to do: name keys to --add or --remove, or give --rebuild-header")
        if options["as_json"]:
            console.print_json(report.to_dict())
        elif not options["quiet"]:
            console.stdout().print(str(report), markup=False, soft_wrap=True)
        return 0

    return console.guarded(action, _STOPPED)


def _added(given: tuple[str, ...]) -> dict[str, Any]:
    """KEY=VALUE pairs; a value is JSON where it is some."""
    pairs = [text.partition("=") for text in given]
    if wrong := [text for text, pair in zip(given, pairs, strict=True) if not pair[0].strip() or not pair[2].strip()]:
        raise click.UsageError(f"--add {wrong[0]!r} is not KEY=VALUE, such as full_precision_matrix_mult=true")
    values = {key.strip(): _value(text.strip()) for key, _, text in pairs}
    if len(values) < len(pairs):
        raise click.UsageError(f"--add names a key twice: {', '.join(given)}")
    return values


def _value(text: str) -> Any:
    def refuse(word: str) -> None:
        raise ValueError(word)

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return text
