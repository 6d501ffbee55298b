"""What a marker may say of the layer that it stands beside: checks of an edited description against what is stored.

An edit never changes numbers: a description that would decode the stored codes to others is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from .encoding import Encoding
from .errors import did_you_mean, shown
from .markers import Entry, flat
from .recognize import COMFY_CODES, recognize
from .rotation import is_power_of_four
from .stored import Stored, Undecodable, as_count, as_pair, fits

_MEANING = frozenset({"format", "group_size", "convrot", "convrot_groupsize", "orig_shape"})
"""Keys that decide what the codes decode to."""
_GROUPS = {"mxfp8": 32, "hybrid_mxfp8": 32, "nvfp4": 16}
_DTYPES = ("torch.bfloat16", "torch.float16", "torch.float32", "torch.float64")
_INT8_TENSOR = "int8_tensorwise"


def changed_keys(before: Entry, after: Entry) -> list[str]:
    """Keys that one of two descriptions lacks or that have another value, in order; nested ``params`` count as keys."""
    old, new = flat(before), flat(after)
    return [key for key in {**old, **new} if not (key in old and key in new and _same(old[key], new[key]))]


def decoded_as(stored: Stored) -> Encoding | None:
    """How a layer decodes; None when it does not."""
    try:
        return recognize(stored)
    except Undecodable:
        return None


def _numbers(encoding: Encoding) -> Encoding:
    """The encoding as far as it decides about numbers: the scalar of hybrid MXFP8 is another way to the same ones."""
    if encoding.format[0] != "hybrid_mxfp8":
        return encoding
    return replace(encoding, format=("mxfp8", *encoding.format[1:]), whole=None)


def check_marker(stored: Stored, keys: list[str], encoding: Encoding | None) -> None:
    """Holds a layer's new description to what is stored.

    Args:
        stored: The layer's tensors and the new description.
        keys: Those of its keys that are new, have another value, or are gone.
        encoding: How the layer decoded before; None when it did not.

    Raises:
        Undecodable: With the reason, for a value that the format cannot have, and for other numbers than before.
    """
    marker = stored.marker or {}
    if not isinstance(marker.get("params", {}), dict):
        raise Undecodable(f"params must be a JSON object, not {shown(marker['params'])}")
    entry = flat(marker)
    checked = [key for key in keys if key in entry and key in _CHECKS]
    if checked and len(stored.codes.shape) != 2:
        raise Undecodable(f"{checked[0]} describes a matrix, stored is a weight of shape {list(stored.codes.shape)}")
    for key in checked:
        _CHECKS[key](entry[key], entry, stored)
    name = entry.get("format")
    if name is None and "format" in keys:
        raise Undecodable("every client needs the key format: without it the codes mean nothing")
    if "group_size" in keys and "group_size" not in entry and str(name).endswith("blockwise"):
        raise Undecodable(f"{name} needs group_size")
    if not _MEANING.intersection(keys):
        return
    after = recognize(stored)
    if encoding is not None and "orig_shape" in keys and "orig_shape" in entry:
        encoding = replace(encoding, shape=after.shape)
    if encoding is not None and _numbers(after) != _numbers(encoding):
        words = f"as {_words(after)} instead of {_words(encoding)}"
        if after.shape != encoding.shape:
            words = f"a weight of {list(after.shape)} instead of {list(encoding.shape)}"
        raise Undecodable(f"its codes would decode to other numbers: {words}")


def _same(one: object, other: object) -> bool:
    """Whether two JSON values are one; ``true`` is not 1."""
    return type(one) is type(other) and one == other


def _words(encoding: Encoding) -> str:
    name, scaling, size = encoding.format
    rotation = f", rotated {encoding.rotation}" if encoding.rotation else ""
    return f"{name} {scaling}{f' {size}' if size else ''}{rotation}"


def _check_format(value: Any, entry: Mapping[str, Any], stored: Stored) -> None:
    if value not in COMFY_CODES:
        raise Undecodable(f"unknown format {shown(value)}{did_you_mean(str(value), COMFY_CODES)}")
    scale = stored.parts.get(".weight_scale")
    if stored.codes.dtype != COMFY_CODES[value] or scale is None:
        held = f"{stored.codes.dtype} codes{'' if scale else ' without .weight_scale'}"
        raise Undecodable(f"{value} has {COMFY_CODES[value]} codes and .weight_scale, stored are {held}")
    rows = stored.shape[0]
    if value.endswith("blockwise"):
        _check_group_size(entry.get("group_size"), entry, stored)
        right = True
    elif value in _GROUPS:
        right = value != "hybrid_mxfp8" or ".weight_scalar" in stored.parts
    elif value.endswith("rowwise"):
        right = scale.shape in ((rows,), (rows, 1))
    else:
        right = scale.numel == 1 or (value == _INT8_TENSOR and scale.shape == (rows, 1))
    if not right:
        lack = "without .weight_scalar" if value in _GROUPS else f"of shape {list(scale.shape)}"
        raise Undecodable(f"{value} does not have what is stored: a {rows} x {stored.shape[1]} weight, scales {lack}")


def _check_group_size(value: Any, entry: Mapping[str, Any], stored: Stored) -> None:
    name = str(entry.get("format"))
    if name in _GROUPS and value != _GROUPS[name]:
        raise Undecodable(f"{name} has groups of {_GROUPS[name]}, not {shown(value)}")
    if name not in _GROUPS and not name.endswith("blockwise"):
        raise Undecodable(f"{name} has no group_size")
    if name.endswith("blockwise"):
        edge, scale = as_count(value), stored.parts.get(".weight_scale")
        if edge is None or scale is None or not fits(stored.shape, scale.shape, (edge, edge)):
            held = list(scale.shape) if scale else "none"
            what = f"scales of shape {held} for a {stored.shape[0]} x {stored.shape[1]} weight"
            raise Undecodable(f"{name} with group_size {shown(value)} does not fit what is stored: {what}")


def _check_flag(value: Any, key: str) -> None:
    if not isinstance(value, bool):
        raise Undecodable(f"{key} must be true or false, not {shown(value)}")


def _check_matmul(value: Any, entry: Mapping[str, Any], stored: Stored) -> None:
    _check_flag(value, "full_precision_matrix_mult")


def _check_rotation(value: Any, entry: Mapping[str, Any], stored: Stored) -> None:
    _check_flag(value, "convrot")
    if entry.get("format") != _INT8_TENSOR:
        raise Undecodable(f"only {_INT8_TENSOR} has convrot, this layer is {entry.get('format')}")


def _check_rotation_group(value: Any, entry: Mapping[str, Any], stored: Stored) -> None:
    group, columns = as_count(value), stored.shape[1]
    if group is None or not is_power_of_four(group) or columns % group:
        raise Undecodable(f"convrot_groupsize {shown(value)} is no power of four that divides {columns} columns")
    if not entry.get("convrot"):
        raise Undecodable("convrot_groupsize means nothing without convrot")


def _check_per_row(value: Any, entry: Mapping[str, Any], stored: Stored) -> None:
    _check_flag(value, "per_row")
    scale, rows = stored.parts.get(".weight_scale"), stored.shape[0]
    if entry.get("format") != _INT8_TENSOR:
        raise Undecodable(f"only {_INT8_TENSOR} has per_row, this layer is {entry.get('format')}")
    if scale is not None and value != (scale.shape in ((rows,), (rows, 1))) and rows > 1:
        raise Undecodable(f"per_row {str(value).lower()} does not fit scales of shape {list(scale.shape)}")


def _check_dtype(value: Any, entry: Mapping[str, Any], stored: Stored) -> None:
    if value not in _DTYPES:
        raise Undecodable(f"orig_dtype {shown(value)} is none of {', '.join(_DTYPES)}")


def _check_shape(value: Any, entry: Mapping[str, Any], stored: Stored) -> None:
    shape = as_pair(value)
    if shape is None:
        raise Undecodable(f"orig_shape must be two positive whole numbers such as [3072, 64], not {shown(value)}")
    if stored.bias_rows not in (None, shape[0]):
        raise Undecodable(f"orig_shape {list(shape)} has {shape[0]} rows, the bias {stored.bias_rows}")
    if entry.get("format") not in _GROUPS and shape != stored.shape:
        raise Undecodable(f"orig_shape {list(shape)} is not the stored {list(stored.shape)}")


_CHECKS: Mapping[str, Callable[[Any, Mapping[str, Any], Stored], None]] = {
    "format": _check_format, "group_size": _check_group_size, "full_precision_matrix_mult": _check_matmul,
    "convrot": _check_rotation, "convrot_groupsize": _check_rotation_group, "per_row": _check_per_row,
    "orig_dtype": _check_dtype, "orig_shape": _check_shape,
}  # fmt: skip
KNOWN_KEYS = (*_CHECKS, "params")
"""What clients and this program read."""
