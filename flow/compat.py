"""The command line of convert_to_quant 1.3.1, by the same recipe, plan and graph as ``quantloom convert``.

What its flags mean here is in ``compat_recipe``; docs/COMPAT.md says what differs on purpose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from .. import __version__
from . import console
from .compat_flags import SECTIONS, Flag, all_flags, long_names
from .entry import STOPPED, run_command

_VERBOSITY = {"MINIMAL": -1, "NORMAL": 0, "VERBOSE": 1, "DEBUG": 2}


class _Option(click.Option):
    """An option that knows its help screen."""

    def __init__(self, flag: Flag) -> None:
        kind: Any = click.Choice(flag.value, case_sensitive=False) if isinstance(flag.value, tuple) else flag.value
        declarations = [flag.option, *flag.names.split()]
        shown = "|".join(flag.value) if isinstance(flag.value, tuple) else None
        required = flag.option == "input"
        switch = True if flag.value is None else None  # an explicit False would take values like -1 for flags
        super().__init__(declarations, help=flag.help, type=kind, is_flag=switch, metavar=shown, required=required)
        self.section = flag.section


class _Command(click.Command):
    """Accepts underscores for dashes and unambiguous beginnings of flags; ``--help`` shows the core flags alone."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, normalise(args))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self.format_section(ctx, formatter, "core")
        screens = [(f"{long}, {short}", title) for long, short, title in SECTIONS.values() if long]
        with formatter.section("More help"):
            formatter.write_dl(screens)

    def format_section(self, ctx: click.Context, formatter: click.HelpFormatter, section: str) -> None:
        options = [param for param in self.params if isinstance(param, _Option) and param.section == section]
        with formatter.section(SECTIONS[section][2]):
            formatter.write_dl([record for option in options if (record := option.get_help_record(ctx))])


def normalise(args: Sequence[str]) -> list[str]:
    """Flags with dashes for underscores and their full names; ``--dry-run`` with its default value."""
    known = long_names()
    result: list[str] = []
    for index, arg in enumerate(args):
        if arg == "--":
            return [*result, *args[index:]]
        if not arg.startswith("--"):
            result.append(arg)
            continue
        name, equals, value = arg.removeprefix("--").partition("=")
        name = name.replace("_", "-")
        if name not in known and not name.startswith("help"):
            meant = {long for long in known if long.startswith(name)}
            name = meant.pop() if len({known[long] for long in meant}) == 1 else name
        result.append(f"--{name}{equals}{value}")
        following = args[index + 1] if index + 1 < len(args) else "-"
        if name == "dry-run" and not equals and following.startswith("-"):
            result.append("analyze")
    return result


def _show_section(section: str) -> Any:
    def show(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
        if not value:
            return
        assert isinstance(ctx.command, _Command)
        formatter = ctx.make_formatter()
        ctx.command.format_section(ctx, formatter, section)
        click.echo(formatter.getvalue().rstrip("\n"))
        ctx.exit()

    return show


def make_command() -> click.Command:
    """The command with every flag of the table."""
    params: list[click.Parameter] = [_Option(flag) for flag in all_flags().values()]
    params += [
        click.Option([f"help_{section}", long, short], is_flag=True, is_eager=True, expose_value=False, hidden=True,
                     callback=_show_section(section))
        for section, (long, short, _) in SECTIONS.items() if long
    ]  # fmt: skip
    params.append(_version())
    settings = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
    return _Command(
        "convert_to_quant", context_settings=settings, callback=_callback, params=params, help=_HELP, epilog=_EPILOG
    )


_HELP = """Quantize a checkpoint for ComfyUI: FP8 by default.

Understands the flags of convert_to_quant, in dashes or underscores; `quantloom convert` is the same in fewer words."""

_EPILOG = """\b
Examples:
  convert_to_quant -i flux.safetensors --nvfp4 --flux2
  convert_to_quant -i model.safetensors -o out.safetensors --int8 --scaling_mode row --convrot
  convert_to_quant -i t5xxl.safetensors --t5xxl --simple --dry-run
"""


def _version() -> click.Option:
    def show(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
        if value:
            click.echo(f"convert_to_quant of quantloom {__version__}")
            ctx.exit()

    return click.Option(["--version"], is_flag=True, is_eager=True, expose_value=False, hidden=True, callback=show)


def parse(arguments: Sequence[str]) -> dict[str, Any]:
    """The options that a command line gives, by ``Flag.option``; raises click's UsageError."""
    return _given(make_command().make_context("convert_to_quant", list(arguments)).params)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None and value is not False}


def _callback(**options: Any) -> int:
    return console.guarded(lambda: run(_given(options)), STOPPED)


def run(options: dict[str, Any]) -> int:
    """Does what the given options say; raises what planning and running raise."""
    verbosity = _VERBOSITY[options.get("verbose", "NORMAL")]
    console.setup_logging(verbosity)
    if options.get("dry_run") == "create-template":
        return _write_template(options, verbosity < 0)
    from .compat_recipe import translate
    from .pipeline import Flow

    translation = translate(options)
    if verbosity >= 0:
        for note in translation.notes:
            console.stderr().print(f"note: {note}", markup=False)
    flow = Flow(translation.recipe)
    if "dry_run" in options:
        from .budget import make_budget

        console.print_plan(flow.plan, make_budget(flow.plan.layers, flow.recipe.run, ""))
    else:
        console.run_flow(flow, quiet=verbosity < 0, as_json=False)
    return 0


def _write_template(options: dict[str, Any], quiet: bool) -> int:
    from .compat_layers import write_template
    from .compat_recipe import base_name

    path = Path(base_name(options["input"]) + "_layer_config_template.json")
    layers, left_out = write_template(options["input"], path, "overwrite" in options)
    if not quiet:
        text = f"{path}: {layers} layers to fill in; {left_out} weights left out (not a matrix, or narrower than 16)"
        console.stdout().print(text, markup=False, soft_wrap=True)
    return 0


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry point; returns through sys.exit with 0 done, 1 the work failed, 2 wrong usage."""
    run_command(make_command(), "convert_to_quant", arguments)


if __name__ == "__main__":
    main()
