"""From the flags of convert_to_quant to a recipe, and to notes about what they do not do here."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..formats.errors import UsageError
from ..stages.presets import load_presets
from ..stages.rules import Rule
from ..stages.stage import make_stage
from .compat_flags import Options, all_flags
from .compat_layers import Inherited, LayerConfig, read_layer_config, scaling_of
from .compat_modes import MODES, mode_notes, mode_of
from .recipe import Output, Recipe, Run
from .sizes import parse_size


@dataclass(frozen=True)
class Translation:
    """What a command line means."""

    recipe: Recipe
    notes: tuple[str, ...]
    """For people: what differs from what the flags would do in convert_to_quant."""


def translate(options: Options) -> Translation:
    """Raises UsageError for flags that this program cannot honour, or that contradict each other."""
    _refuse(options)
    if mode := mode_of(options):
        stage = make_stage(MODES[mode].verb, MODES[mode].stage_options(options))
        return Translation(_without_stages(options).with_stage(stage), tuple(mode_notes(mode, options)))
    inherited = _inherited(options)
    config = LayerConfig()
    if "layer_config" in options:
        config = read_layer_config(options["layer_config"], inherited, "fullmatch" in options)
    quantize = _quantize(options, inherited, config)
    rules = (*config.rules, *_custom_rules(options, inherited, len(config.rules)))
    rules = tuple(replace(rule, settings={**rule.settings, **_input_scale(options, rule.settings)}) for rule in rules)
    presets = [name for name in load_presets() if name in options]
    fallback = _fallback(options, inherited)
    target = {
        "preset": ",".join(presets) or "none", "exclude": options.get("exclude_layers"), "rules": rules,
        "fallback": fallback, "heuristics": "heur" in options,
    }  # fmt: skip
    chosen = [quantize, *(rule.settings for rule in rules), *([fallback] if fallback else [])]
    _check_rotation(options, chosen)
    recipe = _without_stages(options)
    for verb, values in (("target", target), ("quantize", quantize), *_adapter(options)):
        recipe = recipe.with_stage(make_stage(verb, values))
    notes = _notes(options, chosen)
    if config.default is not None and any(name in options for name in ("int8", "nvfp4", "mxfp8", "scaling_mode")):
        notes.append("_default of the layer configuration takes the place of the format on the command line")
    return Translation(recipe, tuple(notes))


def _without_stages(options: Options) -> Recipe:
    """Input, output, and how to run."""
    output = options.get("output") or automatic_output(options)
    run = Run(parse_size(options.get("memory"), "--memory"), options.get("workers"), options.get("device", "cpu"))
    return Recipe((options["input"],), (), Output(output, overwrite="overwrite" in options), run)


def _adapter(options: Options) -> list[tuple[str, dict[str, Any]]]:
    """The lora stage, where an adapter is asked for; an empty pattern or path is none, as in the original."""
    if "extract_lora" not in options:
        return []
    names = ("rank", "target", "depth", "ar_threshold", "output")
    given = {name: options[f"lora_{name}"] for name in names if options.get(f"lora_{name}") not in (None, "")}
    return [("lora", given)]


def automatic_output(options: Options) -> str:
    """The name that convert_to_quant gives to an output; for rotated INT8, that of the row scales which it has here."""
    if mode := mode_of(options):
        return f"{base_name(options['input'])}_{MODES[mode].ending}.safetensors"
    base, primary = base_name(options["input"]), _primary(options)
    rounding = "simple" if "simple" in options else "learned"
    mixed = "mixed" if "custom_layers" in options or any(name in options for name in load_presets()) else ""
    settings = _inherited(options).settings(primary)
    if primary in ("nvfp4", "mxfp8"):
        both = "custom_type" in options or "fallback" in options
        name = f"{primary}_mixed" if both else f"{rounding}_{primary}{mixed}"
    elif primary == "int8":
        words = {"tensor": "tensorwise", "row": "rowwise", "block": f"bs{settings.get('block_size')}"}
        name = f"{rounding}_int8{mixed}_{words[settings['scaling']]}"
    else:
        name = f"{rounding}_fp8{mixed}_{options.get('scaling_mode', 'tensor')}"
    return f"{base}_{name}.safetensors"


def base_name(source: str) -> str:
    """The input's path without its ending; that of a folder as it is."""
    if os.path.isdir(source):
        return source.rstrip("/\\")
    if any(character in source for character in "*?[") and not os.path.exists(source):
        raise UsageError(f"--input {source}: several files give the output no name; name it with --output")
    for ending in (".safetensors.index.json", ".index.json"):
        if source.endswith(ending):
            return source.removesuffix(ending)
    return os.path.splitext(source)[0]


def _refuse(options: Options) -> None:
    if "custom_layers" in options and "custom_type" not in options:
        raise UsageError("--custom-layers needs --custom-type: which format shall these layers get?")


def _primary(options: Options) -> str:
    given = [name for name in ("int8", "nvfp4", "mxfp8") if name in options]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(f'--{name}' for name in given)} contradict each other; give one of them")
    return given[0] if given else "fp8"


def _inherited(options: Options) -> Inherited:
    rotate = _rotation("convrot" in options, options.get("convrot_group_size"))
    if "dynamic_convrot" in options:
        rotate = "hadamard"
    mode = options.get("scaling_mode")
    return Inherited(scaling_of(mode) if mode else None, options.get("block_size"), rotate)


def _rotation(wanted: bool, group: int | None) -> str | None:
    return f"hadamard:{256 if group is None else group}" if wanted else None


def _rounding(simple: bool) -> str:
    return "nearest" if simple else "mse"


def _quantize(options: Options, inherited: Inherited, config: LayerConfig) -> dict[str, Any]:
    """Options of the quantize stage. The configuration's default is the format of the run."""
    settings = {
        **(inherited.settings(_primary(options)) if config.default is None else {}),
        "rounding": _rounding("simple" in options),
        "full_precision_matmul": "full_precision_matrix_mult" in options,
        "nonfinite": options.get("nonfinite", "refuse"),
        "input_scales": options.get("input_scales"),
    }
    settings = {**settings, **(config.default or {})}
    return {**settings, "input_scale": None, **_input_scale(options, settings)}


def _input_scale(options: Options, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The activation scale for settings of FP8; others have none."""
    return {"input_scale": 1.0} if "input_scale" in options and settings.get("format") == "fp8" else {}


def _custom_rules(options: Options, inherited: Inherited, order: int) -> list[Rule]:
    if "custom_layers" not in options:
        return []
    rotate = _rotation("custom_convrot" in options, options.get("custom_convrot_group_size"))
    if rotate:
        inherited = replace(inherited, rotate=rotate)
    mode = options.get("custom_scaling_mode")
    scaling = scaling_of(mode) if mode else None
    settings = inherited.settings(options["custom_type"], scaling, options.get("custom_block_size"))
    if rotate and "rotate" not in settings:
        raise UsageError("--custom-convrot needs --custom-type int8 and --custom-scaling-mode row: only they rotate")
    settings["rounding"] = _rounding("custom_simple" in options)
    if "custom_full_precision_mm" in options:
        settings["full_precision_matmul"] = True
    if "custom_heur" in options:
        settings["heuristics"] = True
    return [Rule(without_weight(options["custom_layers"]), settings, order)]


def _fallback(options: Options, inherited: Inherited) -> dict[str, Any] | None:
    if "fallback" not in options:
        return None
    settings = inherited.settings(options["fallback"], None, options.get("fallback_block_size"))
    return {**settings, **_input_scale(options, settings), "rounding": _rounding("fallback_simple" in options)}


def without_weight(pattern: str) -> str:
    """A pattern for full keys as one for names without ``.weight``."""
    return re.sub(r"(\\?\.)([*+]?\??)weight(?!\w)\$?", lambda match: (".*" if match[2] else "") + "$", pattern)


def _check_rotation(options: Options, chosen: Iterable[Mapping[str, Any]]) -> None:
    flags = [name for name in ("convrot", "dynamic_convrot") if name in options]
    if flags and not any("rotate" in settings for settings in chosen):
        name = all_flags()[flags[0]].long
        raise UsageError(f"{name} needs --int8 and --scaling-mode row: nothing else is rotated")


def _notes(options: Options, chosen: list[Mapping[str, Any]]) -> list[str]:
    notes = []
    tuning = [flag.long for option, flag in all_flags().items() if flag.tuning and option in options]
    if "simple" not in options:
        notes.append(
            "without --simple, convert_to_quant runs learned rounding; here scales of least squared error are chosen "
            "(rounding mse), which measures better" + (f"; without effect: {', '.join(tuning)}" if tuning else "")
        )
    elif tuning:
        notes.append(f"without effect beside --simple: {', '.join(tuning)}")
    idle = [f"{flag.long} (needs {all_flags()[flag.needs].long})" for option, flag in all_flags().items()
            if option in options and flag.needs and flag.needs not in options]  # fmt: skip
    idle += _idle_settings(options, chosen)
    if idle:
        notes.append(f"without effect here: {', '.join(idle)}")
    return notes


def _idle_settings(options: Options, chosen: list[Mapping[str, Any]]) -> list[str]:
    """Flags about scales that no format of this run uses."""
    idle = []
    if "scaling_mode" in options and not any("scaling" in settings for settings in chosen):
        idle.append("--scaling-mode (the format defines its groups)")
    if "block_size" in options and not any("block_size" in settings for settings in chosen):
        idle.append("--block-size (needs --scaling-mode block)")
    if "input_scale" in options and not any(settings.get("format") == "fp8" for settings in chosen):
        idle.append("--input-scale (needs FP8 layers)")
    return idle
