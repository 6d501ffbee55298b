"""The utility modes of convert_to_quant: each is a recipe of one stage here, its flags that stage's options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..formats.errors import UsageError
from .compat_flags import Options, all_flags


@dataclass(frozen=True)
class Mode:
    """What a mode is here."""

    verb: str
    """The stage that does it."""
    ending: str
    """What the automatic name of the output ends in."""
    stage_options: Callable[[Options], dict[str, Any]]
    """The stage's options, from those of the command line."""
    takes: tuple[str, ...] = ()
    """Options of the command line that mean something to it, beside ``EVERY_RUN``."""


MODES: dict[str, Mode] = {}
"""By the option that asks for it."""

EVERY_RUN = frozenset((
    "input", "output", "overwrite", "verbose", "dry_run", "device", "memory", "workers",
    "comfy_quant", "save_quant_metadata", "low_memory", "verbose_pinned", "manual_seed",
))  # fmt: skip
"""Options that every mode understands, or that are without effect anywhere."""


def mode_of(options: Options) -> str | None:
    """The option of the mode that is asked for; UsageError for two."""
    given = [name for name in MODES if name in options]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(all_flags()[name].long for name in given)} are two runs: give one of them")
    return given[0] if given else None


def mode_notes(option: str, options: Options) -> list[str]:
    """For people: flags that mean nothing to the mode."""
    known = {option, *MODES[option].takes} | EVERY_RUN
    idle = [all_flags()[name].long for name in options if name not in known]
    return [f"without effect beside {all_flags()[option].long}: {', '.join(idle)}"] if idle else []
