"""How help is laid out: commands, and the options of commands that have many, under headings."""

from __future__ import annotations

import click

_COMMANDS = {
    "Quantize": ("convert", "plan", "assemble", "verify", "inspect"),
    "Measure and correct": ("calibrate", "calibrate-activations", "extract-lora"),
    "Change what is quantized": ("dequantize", "edit", "hybrid", "migrate"),
    "Look up": ("formats", "roundings"),
}
"""Every command, under the heading that ``--help`` shows it."""

_OPTIONS = {
    "Format and rounding": (
        "format_", "scaling", "block_size", "rotate", "rounding", "rounding_options", "statistics",
        "without_statistics", "bias_correction",
    ),
    "Which layers": ("preset", "include", "exclude", "fallback", "rules", "heuristics", "nonfinite"),
    "Activations": ("input_scale", "input_scales", "full_precision_matmul"),
    "Error-correction LoRA": (
        "lora_rank", "lora_target", "lora_depth", "lora_ar_threshold", "lora_method", "lora_budget", "lora_dtype",
        "lora_dialect", "lora_output",
    ),
    "Output": ("dialect", "shard_size", "overwrite", "recipe_file"),
    "Memory and devices": ("memory", "workers", "device", "scheduler", "writes", "simulate"),
    "Interruptions and errors": ("resume", "verify", "on_error"),
}  # fmt: skip
"""Options of ``convert`` by the names of their parameters; what is not here comes last."""


class CommandsByHeading(click.Group):
    """Shows commands under headings."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for heading, names in _COMMANDS.items():
            with formatter.section(heading):
                shown = [(name, command) for name in names if (command := self.get_command(ctx, name))]
                formatter.write_dl([(name.ljust(21), command.get_short_help_str(60)) for name, command in shown])


class OptionsByHeading(click.Command):
    """Shows options under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        heading_of = {name: heading for heading, names in _OPTIONS.items() for name in names}
        sections: dict[str, list[tuple[str, str]]] = {heading: [] for heading in (*_OPTIONS, "Messages")}
        for param in self.get_params(ctx):
            if isinstance(param, click.Option) and (record := param.get_help_record(ctx)):
                sections[heading_of.get(param.name or "", "Messages")].append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)
