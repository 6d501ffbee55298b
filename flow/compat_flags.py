"""The flags of convert_to_quant 1.3.1 as a table: names, kind of value, help screen, and what becomes of each here.

Names are written with dashes; the command accepts underscores in their place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from ..stages.presets import load_presets

Options = Mapping[str, Any]
"""Options that were given, by ``Flag.option``."""

FORMATS = ("fp8", "int8", "mxfp8", "nvfp4")
SCALING_MODES = ("tensor", "row", "block", "block3d", "block2d")
VERBOSITIES = ("DEBUG", "VERBOSE", "NORMAL", "MINIMAL")
DRY_RUNS = ("analyze", "create-template")

SECTIONS = {
    "core": ("", "", "Options"),
    "formats": ("--help-experimental", "-he", "Formats, custom layers, fallback and layer configuration"),
    "filters": ("--help-filters", "-hf", "Filters: layers of known models that stay unquantized; several add up"),
    "learned": ("--help-learned", "-hl", "Learned rounding: accepted, without effect (see --simple)"),
    "advanced": ("--help-advanced", "-ha", "Learning-rate schedules and early stopping: accepted, without effect"),
    "modes": ("--help-modes", "-hm", "Dry runs and utility modes"),
    "lora": ("--help-lora", "-hlr", "Error-correction LoRA"),
}
"""section -> (flag of its help screen, its short name, title)"""


@dataclass(frozen=True)
class Flag:
    """One flag."""

    names: str
    """All its names, separated by blanks; the first long one gives the option's name."""
    help: str
    value: type | tuple[str, ...] | None = None
    """Type of the value, or the words allowed; None: a switch."""
    section: str = "core"
    tuning: bool = False
    """Only tunes learned rounding."""
    needs: str = ""
    """The option without which it means nothing."""

    @property
    def long(self) -> str:
        """The long name that messages use."""
        return next(name for name in self.names.split() if name.startswith("--"))

    @property
    def option(self) -> str:
        """Key among the options."""
        return self.long.removeprefix("--").replace("-", "_")


_CORE = (
    Flag("-i --input", "Checkpoint to convert: a .safetensors file, folder, index.json or glob.", str),
    Flag("-o --output", "Output; by default the input's name with rounding, format and scaling appended.", str),
    Flag("--comfy-quant", "Without effect: layers always get ComfyUI's markers."),
    Flag("--simple", "Scales from the largest weight, rounding to nearest. Without it: scales of least squared error."),
    Flag("--full-precision-matrix-mult -fpmm", "Mark layers so that the client multiplies in full precision."),
    Flag("--heur", "Also keep layers that are too small or too long to gain."),
    Flag("--device", "cpu (default), cuda or cuda:0. The bytes are the same.", str),
    Flag("--verbose", "How much to print: MINIMAL (errors), NORMAL (default), VERBOSE, DEBUG.", VERBOSITIES),
    Flag("--manual-seed", "Without effect: nothing here is random.", int),
    Flag("--save-quant-metadata", "With --edit-quant: write the header entry from the markers. Conversions always do."),
    Flag("--low-memory -lm", "Without effect: weights always stream in bounded memory."),
    Flag("--verbose-pinned", "Without effect."),
    Flag("--overwrite", "Replace an existing output (not in convert_to_quant, which always does)."),
    Flag("--memory", "What the process may use, such as 8GB (not in convert_to_quant).", str),
    Flag("--workers", "Tasks at a time (not in convert_to_quant).", int),
    Flag("--nonfinite", "A layer with NaN or Inf: refuse to convert (default) or keep it (not in convert_to_quant).",
         ("refuse", "keep")),
)  # fmt: skip

_FORMATS = (
    Flag("--int8", "INT8 instead of FP8."),
    Flag("--nvfp4", "NVFP4 instead of FP8."),
    Flag("--mxfp8", "MXFP8 instead of FP8."),
    Flag("--scaling-mode", "Where one scale of FP8 and INT8 holds: tensor (default), row or block. block2d and block3d "
         "mean block.", SCALING_MODES),
    Flag("--block-size --group-size", "Edge of the blocks of --scaling-mode block. Default: 128.", int),
    Flag("--convrot", "Rotate rows by a Hadamard matrix first; implies --scaling-mode row for INT8."),
    Flag("--convrot-group-size", "Group of --convrot: 4, 16, 64, 256 (default) or 1024.", int, needs="convrot"),
    Flag("--dynamic-convrot", "Rotate every layer by the largest group that divides."),
    Flag("--input-scale", "Store an activation scale of 1.0 with FP8 layers."),
    Flag("--input-scales", "File of activation scales for FP8 and NVFP4 layers: JSON {layer: number}, or a checkpoint "
         "with .input_scale tensors.", str),
    Flag("--no-normalize-scales", "Without effect."),
    Flag("--exclude-layers", "Regular expression: keep layers that match.", str),
    Flag("--custom-layers", "Regular expression: layers that get --custom-type, whatever filters say.", str),
    Flag("--custom-type", "Format of the custom layers.", FORMATS, needs="custom_layers"),
    Flag("--custom-block-size", "As --block-size, for the custom layers.", int, needs="custom_layers"),
    Flag("--custom-scaling-mode", "As --scaling-mode, for the custom layers.", SCALING_MODES, needs="custom_layers"),
    Flag("--custom-simple", "As --simple, which custom layers do not inherit.", needs="custom_layers"),
    Flag("--custom-heur", "As --heur, for the custom layers.", needs="custom_layers"),
    Flag("--custom-full-precision-mm --custom-fpmm", "As --full-precision-matrix-mult, for the custom layers.",
         needs="custom_layers"),
    Flag("--custom-convrot", "As --convrot, for the custom layers.", needs="custom_layers"),
    Flag("--custom-convrot-group-size", "As --convrot-group-size, for the custom layers.", int, needs="custom_convrot"),
    Flag("--fallback", "Format of layers that --exclude-layers or a filter would keep.", FORMATS),
    Flag("--fallback-block-size", "As --block-size, for the fallback.", int, needs="fallback"),
    Flag("--fallback-simple", "As --simple, which fallback layers do not inherit.", needs="fallback"),
    Flag("--layer-config", "JSON file: regular expression -> format, scaling_mode, block_size, simple, "
         "full_precision_matrix_mult, or skip.", str),
    Flag("--fullmatch", "Patterns of --layer-config must match whole layer names.", needs="layer_config"),
)  # fmt: skip

_LEARNED = (
    ("--optimizer", ("original", "adamw", "radam", "prodigy")), ("--num-iter", int), ("--lr", float),
    ("--use-speed", None), ("--lr-schedule", ("adaptive", "exponential", "plateau")), ("--top-p", float),
    ("--min-k", int), ("--max-k", int), ("--full-matrix", None), ("--calib-samples", int), ("--calib-cpu", None),
)  # fmt: skip
_ADVANCED = (
    ("--lr-gamma", float), ("--lr-patience", int), ("--lr-factor", float), ("--lr-min", float), ("--lr-cooldown", int),
    ("--lr-threshold", float), ("--lr-threshold-mode", ("rel", "abs")), ("--lr-shape-influence", float),
    ("--lr-adaptive-mode", ("simple-reset", "no-reset")), ("--early-stop-loss -esloss", float),
    ("--early-stop-lr -eslr", float), ("--early-stop-stall -esstall", int), ("--scale-refinement", int),
    ("--scale-optimization", ("fixed", "iterative", "joint", "dualround")),
)  # fmt: skip

_MODES = (
    Flag("--dry-run", "analyze (default): print the plan and write nothing. create-template: write a layer "
         "configuration to fill in, INPUT_layer_config_template.json.", DRY_RUNS),
    Flag("--convert-fp8-scaled", "Turn a legacy scaled_fp8 checkpoint into ComfyUI's form of today."),
    Flag("--hp-filter", "Regular expression: refuse when a layer that matches is quantized.", str,
         needs="convert_fp8_scaled"),
    Flag("--full-precision-mm", "Ask for multiplication in full precision, with --convert-fp8-scaled.",
         needs="convert_fp8_scaled"),
    Flag("--convert-int8-scaled", "Turn legacy INT8 layers into ComfyUI's form of today."),
    Flag("--make-hybrid-mxfp8", "Add a .weight_scalar to the layers of an MXFP8 model: as in "
         "convert_to_quant it decodes wrongly, and the report says by how much."),
    Flag("--tensor-scales", "With --make-hybrid-mxfp8: FP8 model whose scales become the scalars.", str,
         needs="make_hybrid_mxfp8"),
    Flag("--legacy-input-add", "Give FP8 layers without activation scale one of 1.0."),
    Flag("--cleanup-fp8-scaled", "Remove scales and markers that belong to no quantized weight."),
    Flag("--scaled-fp8-marker", "Numbers in the legacy marker, with --cleanup-fp8-scaled; 2 asks for multiplication in "
         "full precision. Default: as before.", ("0", "2"), needs="cleanup_fp8_scaled"),
    Flag("--actcal", "Store activation scales in a model that is quantized already, from --statistics, --input-scales "
         "or --actcal-lora; random inputs give none."),
    Flag("--actcal-percentile", "With --actcal: percentile of inputs that meets the largest code. Default: the largest "
         "input of --statistics, 99.9 with --actcal-lora.", float, needs="actcal"),
    Flag("--actcal-lora", "With --actcal: a LoRA whose down factors tell the directions of inputs; their size is "
         "assumed.", str, needs="actcal"),
    Flag("--statistics", "With --actcal: statistics of inputs, from quantloom calibrate (not in convert_to_quant).",
         str, needs="actcal"),
    Flag("--actcal-samples", "Without effect: nothing is drawn.", int, needs="actcal"),
    Flag("--actcal-seed", "Without effect: nothing is drawn.", int, needs="actcal"),
    Flag("--actcal-device", "Without effect.", str, needs="actcal"),
    Flag("--edit-quant", "Change keys of the markers of a quantized checkpoint, and of its header entry."),
    Flag("--remove-keys", "With --edit-quant: keys that go, such as a,b.", str, needs="edit_quant"),
    Flag("--add-keys", "With --edit-quant: keys that come or change, such as \"'a': true, 'b': 64\".", str,
         needs="edit_quant"),
    Flag("--quant-filter", "With --edit-quant: regular expression for the layers.", str, needs="edit_quant"),
)  # fmt: skip

_LORA = (
    Flag("--extract-lora", "Write a LoRA with what chosen layers lost, beside the output. Apply it beside the matmul: "
         "merged into quantized weights it was measured to be worse than none."),
    Flag("--lora-rank", "Its rank. Default: 32.", int, needs="extract_lora"),
    Flag("--lora-target", "Regular expression: layers that get one. Default: the first blocks' layers that are about "
         "square, or attention.", str, needs="extract_lora"),
    Flag("--lora-depth", "Layers of so many first blocks. Default: 1.", int, needs="extract_lora"),
    Flag("--lora-ar-threshold", "Layers of any name with an aspect ratio below this. Default 0: rules decide.", float,
         needs="extract_lora"),
    Flag("--lora-output --lora-save-path", "Where it goes. Default: the output's name with _lora.", str,
         needs="extract_lora"),
)  # fmt: skip


@cache
def all_flags() -> dict[str, Flag]:
    """Every flag by its option, in the order of the help screens."""
    filters = [Flag(f"--{name.replace('_', '-')}", f"{preset.title}.") for name, preset in load_presets().items()]
    flags = [*_CORE, *_in("formats", _FORMATS), *_in("filters", filters)]
    for section, rows in (("learned", _LEARNED), ("advanced", _ADVANCED)):
        flags += [Flag(names, "Without effect.", value, section, tuning=True) for names, value in rows]
    flags += [*_in("modes", _MODES), *_in("lora", _LORA)]
    return {flag.option: flag for flag in flags}


def _in(section: str, flags: Iterable[Flag]) -> list[Flag]:
    return [replace(flag, section=section) for flag in flags]


@cache
def long_names() -> dict[str, str]:
    """Every long name without dashes in front, and the option that it gives."""
    pairs = ((name, flag.option) for flag in all_flags().values() for name in flag.names.split())
    return {name.removeprefix("--"): option for name, option in pairs if name.startswith("--")}
