"""The key lists of convert_to_quant's ``--edit-quant`` as options of the edit stage."""

from __future__ import annotations

import re
from typing import Any

from ..formats.errors import UsageError, shown
from .compat_flags import Options

EDITING = ("add_keys", "remove_keys", "quant_filter", "save_quant_metadata")

_QUOTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_KEY = re.compile(rf"\s*({_QUOTED}|[^\s'\",:\[\]{{}}]+)\s*")
_VALUE = re.compile(rf"\s*({_QUOTED}|\[[^\[\]]*\]|[^,'\"\[\]{{}}]*[^\s,'\"\[\]{{}}])\s*")


def edit_options(options: Options) -> dict[str, Any]:
    """Options of the edit stage; UsageError for a list that is malformed, and for nothing to do."""
    if not any(name in options for name in ("add_keys", "remove_keys", "save_quant_metadata")):
        raise UsageError("--edit-quant needs --add-keys, --remove-keys or --save-quant-metadata")
    add = parse_pairs(options["add_keys"]) if "add_keys" in options else {}
    remove = parse_keys(options["remove_keys"]) if "remove_keys" in options else []
    pattern = options.get("quant_filter") if add or remove else None  # the header is written for every layer
    return {"add": add, "remove": remove, "filter": pattern, "rebuild_header": "save_quant_metadata" in options}


def parse_pairs(text: str) -> dict[str, Any]:
    """``'key': value`` pairs between commas: a value is a string in quotes, true, false, a number, a list of those in
    brackets, or bare text. Quotes protect commas and colons."""
    pairs: dict[str, Any] = {}
    position = 0
    while position <= len(text):
        key = _KEY.match(text, position)
        value = _VALUE.match(text, key.end() + 1) if key and text.startswith(":", key.end()) else None
        if key is None or value is None or text[value.end() : value.end() + 1] not in ("", ","):
            raise UsageError(f"--add-keys {shown(text)}: expected 'key': value at {shown(text[position:].strip())}")
        if (name := _unquoted(key[1])) in pairs:
            raise UsageError(f"--add-keys {shown(text)}: {name!r} is named twice")
        pairs[name] = _value(value[1])
        position = value.end() + 1
    return pairs


def parse_keys(text: str) -> list[str]:
    """Keys between commas, in quotes or not."""
    keys: list[str] = []
    position = 0
    while position <= len(text):
        key = _KEY.match(text, position)
        if key is None or text[key.end() : key.end() + 1] not in ("", ","):
            raise UsageError(f"--remove-keys {shown(text)}: expected a key at {shown(text[position:].strip())}")
        keys.append(_unquoted(key[1]))
        position = key.end() + 1
    return keys


def _value(text: str) -> Any:
    if text.startswith("["):
        inner = text[1:-1].strip()
        return [_value(item) for item in re.findall(rf"{_QUOTED}|[^\s,'\"]+", inner)]
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text, re.IGNORECASE):
        return float(text)
    return _unquoted(text)


def _unquoted(text: str) -> str:
    if text[0] not in "'\"":
        return text
    return re.sub(r"\\(.)", r"\1", text[1:-1])
