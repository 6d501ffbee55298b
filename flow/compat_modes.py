"""The utility modes of convert_to_quant: each is a recipe of one stage here, its flags that stage's options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..formats.errors import UsageError
from .compat_edit import EDITING, edit_options
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
    note: str = ""
    """What to tell people who use it."""


def _fp8_scaled(options: Options) -> dict[str, Any]:
    return {
        "to": "comfy", "clean": True, "high_precision": options.get("hp_filter"),
        "full_precision_matmul": True if "full_precision_mm" in options else None, "input_scale": _input_scale(options),
    }  # fmt: skip


def _int8_scaled(_options: Options) -> dict[str, Any]:
    return {"to": "comfy", "clean": True}


def _legacy_input_add(_options: Options) -> dict[str, Any]:
    return {"to": "same", "input_scale": 1.0}


def _cleanup(options: Options) -> dict[str, Any]:
    marker = options.get("scaled_fp8_marker")
    asked = None if marker is None else marker == "2"
    return {"to": "same", "clean": True, "full_precision_matmul": asked, "input_scale": _input_scale(options)}


def _input_scale(options: Options) -> float | None:
    return 1.0 if "input_scale" in options else None


def _hybrid(options: Options) -> dict[str, Any]:
    return {"mode": "legacy", "tensor_scales": options.get("tensor_scales")}


def _actcal(options: Options) -> dict[str, Any]:
    flags = {"statistics": "statistics", "lora": "actcal_lora", "file": "input_scales"}
    sources = {option: options.get(flag) for option, flag in flags.items()}
    if not any(sources.values()):
        raise UsageError(
            "--actcal: random inputs say nothing of how large real ones are, and no scale at all is better than one "
            "made of them. Give measured inputs (--statistics STORE, from `quantloom calibrate`), numbers "
            "(--input-scales FILE) or an adapter (--actcal-lora FILE)"
        )
    percentile = options.get("actcal_percentile")
    return {**sources, "input_scale": None if percentile is None else f"p{percentile}".removesuffix(".0")}


MODES: dict[str, Mode] = {
    "convert_fp8_scaled": Mode(
        "migrate", "fp8mixed", _fp8_scaled, ("hp_filter", "full_precision_mm", "input_scale")
    ),
    "convert_int8_scaled": Mode("migrate", "int8_comfy", _int8_scaled),
    "legacy_input_add": Mode("migrate", "with_input_scale", _legacy_input_add),
    "cleanup_fp8_scaled": Mode("migrate", "cleaned", _cleanup, ("scaled_fp8_marker", "input_scale")),
    "actcal": Mode(
        "input_scales", "calibrated", _actcal, ("actcal_percentile", "actcal_lora", "statistics", "input_scales")
    ),
    "make_hybrid_mxfp8": Mode(
        "hybrid", "hybrid", _hybrid, ("tensor_scales",),
        "quantloom hybrid makes both ways to decode the same number; --make-hybrid-mxfp8 writes what convert_to_quant "
        "writes",
    ),
    "edit_quant": Mode("edit", "edited", edit_options, EDITING),
}
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
    notes = [note] if (note := MODES[option].note) else []
    return [*notes, f"without effect beside {all_flags()[option].long}: {', '.join(idle)}"] if idle else notes
