"""The layer configuration of convert_to_quant: its template, and its entries as rules.

A configuration is a JSON object of regular expression -> settings. Its format names are those of ComfyUI's markers, and
here they decide the scaling too: ``float8_e4m3fn_rowwise`` has row scales, ``int8_blockwise`` block scales.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..formats.errors import PlanError, SinkError, UsageError, did_you_mean
from ..formats.layers import Layer, group_layers
from ..formats.registry import DEFAULT_BLOCK_SIZE, format_info
from ..formats.source import open_source
from ..formats.tensors import FLOAT_DTYPES
from ..stages.rule_files import no_duplicates
from ..stages.rules import Rule
from .compat_flags import SCALING_MODES

CONFIG_FORMATS: dict[str, tuple[str, tuple[str, ...]]] = {
    "float8_e4m3fn": ("fp8", ("tensor", "row", "block")),
    "float8_e4m3fn_rowwise": ("fp8", ("row",)),
    "float8_e4m3fn_blockwise": ("fp8", ("block",)),
    "float8_e4m3fn_block3d": ("fp8", ("block",)),
    "int8_tensorwise": ("int8", ("tensor", "row")),
    "int8_blockwise": ("int8", ("block",)),
    "nvfp4": ("nvfp4", ()),
    "mxfp8": ("mxfp8", ()),
    "hybrid_mxfp8": ("hybrid_mxfp8", ()),
}
"""Format name of an entry -> format, and the scalings that the name allows, default first."""

_SETTINGS: dict[str, type] = {
    "format": str, "scaling_mode": str, "block_size": int, "simple": bool, "full_precision_matrix_mult": bool,
    "skip": bool,
}  # fmt: skip
_MIN_DIMENSION = 16
"""Narrower layers are not offered by the template."""


def scaling_of(mode: str) -> str:
    """The scaling behind a scaling mode; ``block2d`` and ``block3d`` are older words for ``block``."""
    return "block" if mode.startswith("block") else mode


@dataclass(frozen=True)
class Inherited:
    """What every format of a run takes over from the flags for the whole run."""

    scaling: str | None = None
    """None: tensor, and row for INT8 that is rotated."""
    block_size: int | None = None
    rotate: str | None = None
    """Rotation of whatever is INT8 with row scales."""

    def settings(self, format_: str, scaling: str | None = None, block_size: int | None = None) -> dict[str, Any]:
        """Settings of one format, as rules and the quantize stage have them; what is given here wins."""
        if format_info(format_).group_size:
            return {"format": format_}
        chosen = scaling or self.scaling or ("row" if format_ == "int8" and self.rotate else "tensor")
        settings: dict[str, Any] = {"format": format_, "scaling": chosen}
        if chosen == "block":
            sizes = (block_size, self.block_size, DEFAULT_BLOCK_SIZE)
            settings["block_size"] = next(size for size in sizes if size is not None)
        if self.rotate and format_ == "int8" and chosen == "row":
            settings["rotate"] = self.rotate
        return settings


@dataclass(frozen=True)
class LayerConfig:
    """A layer configuration, translated."""

    rules: tuple[Rule, ...] = ()
    default: Mapping[str, Any] | None = None
    """Settings of layers that no entry names: they take the place of the run's own."""


def read_layer_config(path: str, inherited: Inherited, fullmatch: bool = False) -> LayerConfig:
    """Raises UsageError, naming file and entry, for whatever cannot mean anything."""
    data = _load(Path(path))
    rules: list[Rule] = []
    default: dict[str, Any] | None = None
    for key, entry in data.items():
        try:
            if key == "_exclusions":
                rules += [_rule(pattern, {"skip": True}, len(rules), fullmatch) for pattern in _patterns(entry)]
            elif key == "_default":
                default = _settings(entry, inherited)
            elif not key.startswith("_"):
                rules.append(_rule(key, _settings(entry, inherited), len(rules), fullmatch))
        except UsageError as error:
            raise UsageError(f"layer configuration {path}: {key!r}: {error}") from None
    if default == {"skip": True}:
        rules.append(Rule(".*", default, len(rules)))
        default = None
    return LayerConfig(tuple(rules), default)


def _load(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=no_duplicates)
    except OSError as error:
        raise UsageError(f"layer configuration {file}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"layer configuration {file}: {error}") from None
    if not isinstance(data, dict):
        raise UsageError(f"layer configuration {file}: must be a JSON object of pattern to settings")
    return data


def _patterns(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UsageError("must be a list of patterns")
    return value


def _rule(pattern: str, settings: Mapping[str, Any], order: int, fullmatch: bool) -> Rule:
    return Rule(f"^(?:{pattern})$" if fullmatch else pattern, settings, order)


def _settings(entry: Any, inherited: Inherited) -> dict[str, Any]:
    """Settings of a rule from those of an entry; keys that begin with an underscore are remarks."""
    if not isinstance(entry, dict):
        raise UsageError(f"must be an object, not {entry!r}")
    given = {key: value for key, value in entry.items() if not key.startswith("_")}
    for key, value in given.items():
        if key not in _SETTINGS:
            raise UsageError(f"unknown setting {key!r}{did_you_mean(key, _SETTINGS)}")
        if not isinstance(value, _SETTINGS[key]) or (_SETTINGS[key] is int and isinstance(value, bool)):
            raise UsageError(f"{key} must be of type {_SETTINGS[key].__name__}, not {value!r}")
    if given.get("skip"):
        return {"skip": True}
    if not given.get("format"):
        raise UsageError('has no format; fill it in, or write "skip": true')
    return _quantized(given, inherited)


def _quantized(given: Mapping[str, Any], inherited: Inherited) -> dict[str, Any]:
    name, mode = given["format"], given.get("scaling_mode")
    if name not in CONFIG_FORMATS:
        raise UsageError(f"unknown format {name!r}{did_you_mean(name, CONFIG_FORMATS)}")
    format_, allowed = CONFIG_FORMATS[name]
    if mode is not None and mode not in SCALING_MODES:
        raise UsageError(f"unknown scaling_mode {mode!r}{did_you_mean(mode, SCALING_MODES)}")
    scaling = allowed[0] if allowed else None
    if mode is not None:
        scaling = scaling_of(mode)
        if scaling not in allowed:
            raise UsageError(f"{name} has no {scaling} scaling; drop scaling_mode or choose another format")
    elif name == "int8_tensorwise":  # the one name that stands for two scalings
        run = inherited.settings("int8")["scaling"]
        scaling = run if run in allowed else scaling
    settings = inherited.settings(format_, scaling, given.get("block_size"))
    if given.get("simple"):
        settings["rounding"] = "nearest"
    if "full_precision_matrix_mult" in given:
        settings["full_precision_matmul"] = given["full_precision_matrix_mult"]
    return settings


def write_template(source: str, path: Path, overwrite: bool = False) -> tuple[int, int]:
    """Writes a configuration to fill in; returns how many layers it holds, and how many weights it leaves out.

    Reads headers only. Raises PlanError when the file exists: it may have been filled in.
    """
    if path.exists() and not overwrite:
        raise PlanError(f"{path}: exists already; pass --overwrite to replace it")
    weights = [layer for layer in group_layers(open_source(source)) if layer.weight.name.endswith(".weight")]
    offered = [layer for layer in weights if _is_offered(layer)]
    template: dict[str, Any] = {"_default": {"format": ""}, "_exclusions": []}
    template |= {layer.name: {"format": "", "_shape": list(layer.weight.shape)} for layer in offered}
    try:
        path.write_text(json.dumps(template, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise SinkError(f"{path}: cannot write: {error.strerror}") from error
    return len(offered), len(weights) - len(offered)


def _is_offered(layer: Layer) -> bool:
    readable = layer.encoding is not None or layer.weight.dtype in FLOAT_DTYPES
    shape = layer.weight.shape
    return readable and layer.problem is None and len(shape) == 2 and min(shape) >= _MIN_DIMENSION
