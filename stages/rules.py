"""Per-layer rules: regular expressions on layer names, each with the settings that the matching layers get.

A file of rules is JSON, YAML or TOML and holds one mapping::

    double_blocks\\.\\d+\\.img_attn: {format: nvfp4}
    single_blocks\\.0\\.: {format: fp8, scaling: row}
    final_layer: {skip: true}

A pattern is searched in the name without ``.weight``. Where several match, the most specific wins: the one that fixes
the most literal characters; at a tie, the first in the file.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from ..formats.errors import UsageError, did_you_mean, shown
from ..formats.registry import FORMATS, format_info

_TYPES: dict[str, tuple[Any, str]] = {
    "format": (str, "a format name"),
    "scaling": (str, "a scaling such as 'row'"),
    "block_size": (int, "a whole number above 0"),
    "rotate": (str, "a rotation such as 'hadamard:256'"),
    "rounding": (str, "a rounding such as 'mse'"),
    "rounding_options": (dict, "options of the rounding, such as {'damping': 0.1}"),
    "full_precision_matmul": (bool, "true or false"),
    "input_scale": (float | str, "a number such as 1.0, amax, or a percentile such as p99.9"),
    "heuristics": (bool, "true or false"),
    "skip": (bool, "true or false"),
}
"""Every setting, its type, and how a message calls it."""


@dataclass(frozen=True)
class Rule:
    """One pattern and what holds for the layers that it wins. Raises UsageError if it cannot mean anything."""

    pattern: str
    settings: Mapping[str, object] = field(hash=False)
    """Some of format, scaling, block_size, rotate, rounding, rounding_options, full_precision_matmul,
    input_scale, heuristics (whether the layer stays when it is small or elongated), skip."""
    order: int = 0
    """Place in the file; the first wins a tie."""

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise UsageError(f"rule: {shown(self.pattern)} is no pattern")
        compile_pattern(self.pattern, "rule")
        problem = _problem(self.settings)
        if isinstance(self.order, bool) or not isinstance(self.order, int):
            problem = f"order must be a whole number, not {shown(self.order)}"
        if problem:
            raise UsageError(f"rule {shown(self.pattern)}: {problem}")

    @property
    def skips(self) -> bool:
        return self.settings.get("skip") is True

    @property
    def decides(self) -> bool:
        """Whether the rule says by itself that its layers are quantized: it names a format, or sets skip to false."""
        return not self.skips and ("format" in self.settings or "skip" in self.settings)

    @property
    def overrides(self) -> dict[str, object]:
        """The settings that remain for a layer that is quantized."""
        return {name: value for name, value in self.settings.items() if name not in ("skip", "heuristics")}

    def to_dict(self) -> dict[str, Any]:
        return {"pattern": self.pattern, "settings": dict(self.settings), "order": self.order}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Rule:
        known = {"pattern", "settings", "order"}
        if not isinstance(data, Mapping) or not {"pattern", "settings"} <= data.keys() <= known:
            raise UsageError(f"a rule has pattern, settings and order; this is {shown(data)}")
        return cls(data["pattern"], data["settings"], data.get("order", 0))


def compile_pattern(pattern: str, what: str) -> re.Pattern[str]:
    """The compiled pattern; UsageError with the position of the mistake. ``what`` says where it was given."""
    try:
        return re.compile(pattern)
    except re.error as error:
        place = "" if error.pos is None else f" at position {error.pos}"
        raise UsageError(f"{what}: {shown(pattern)} is not a regular expression: {error.msg[:200]}{place}") from None
    except (OverflowError, RecursionError, ValueError) as error:
        raise UsageError(f"{what}: {shown(pattern)} is not a usable regular expression: {error}") from None


def is_scale(value: float) -> bool:
    """Whether a number can be stored as a scale: above zero, and a normal number of float32."""
    return 2.0**-126 <= value <= (2 - 2.0**-23) * 2.0**127


def _problem(settings: object) -> str | None:
    if not isinstance(settings, Mapping):
        return f"settings must be a mapping such as {{format: fp8}}, not {shown(settings)}"
    if not settings:
        return f"no settings; known: {', '.join(_TYPES)}"
    for name, value in settings.items():
        if name not in _TYPES:
            return f"unknown setting {shown(name)}{did_you_mean(str(name), _TYPES)}"
        kind, words = _TYPES[name]
        whole = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31
        if not (whole if kind is int else isinstance(value, kind)):
            return f"{name} must be {words}, not {shown(value)}"
    scale = settings.get("input_scale")
    if isinstance(scale, float) and not is_scale(scale):
        return f"input_scale {scale} must be a positive number that float32 holds"
    if settings.get("skip") is True and len(settings) > 1:
        return f"skip leaves nothing to set, but {', '.join(name for name in settings if name != 'skip')} is set too"
    return _scaling_problem(settings.get("format"), settings.get("scaling"))


def _scaling_problem(of: object, scaling: object) -> str | None:
    known = tuple(dict.fromkeys(each for info in FORMATS.values() for each in info.scalings))
    if isinstance(of, str):
        try:
            known = format_info(of).scalings
        except UsageError as error:
            return str(error)
    if isinstance(scaling, str) and scaling not in known:
        return f"unknown scaling {shown(scaling)}{f' of {of}' if of else ''}{did_you_mean(scaling, known)}"
    return None


@cache
def literal_characters(pattern: str) -> int:
    """How many characters of a match the pattern fixes: its specificity.

    Counted in the parsed pattern, so escapes and classes do not count by their spelling. Of alternatives the shortest
    counts, of a repetition the least number of times; what may be absent fixes nothing.
    """
    return _literals(importlib.import_module("re._parser").parse(pattern))


def _literals(nodes: Any) -> int:
    total = 0
    for op, value in nodes:
        name = str(op)
        if name == "LITERAL":
            total += 1
        elif name == "BRANCH":
            total += min(_literals(branch) for branch in value[1])
        elif name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            total += int(value[0]) * _literals(value[2])
        elif name == "SUBPATTERN":
            total += _literals(value[3])
        elif name == "ATOMIC_GROUP":
            total += _literals(value)
        elif name == "ASSERT":
            total += _literals(value[1])
    return total


def match_rules(rules: Sequence[Rule], names: Sequence[str]) -> dict[str, Rule]:
    """The winning rule of every name (without ``.weight``) that a rule matches.

    Raises UsageError for a rule that matches no name: a mistyped pattern must not pass as "nothing to do".
    """
    ranked = sorted(rules, key=lambda rule: (-literal_characters(rule.pattern), rule.order))
    won: dict[str, Rule] = {}
    for rule in ranked:
        search = compile_pattern(rule.pattern, "rule").search
        matched = [name for name in names if search(name)]
        if not matched:
            raise UsageError(f"rule {shown(rule.pattern)} matches no layer{nearest_names(rule.pattern, names)}")
        for name in matched:
            won.setdefault(name, rule)
    return won


_INDEX = re.compile(r"\d+")
_LOOKED_AT = 2000
"""Distinct names that a hint compares with; enough for any model, and bounded."""


def nearest_names(pattern: str, names: Sequence[str]) -> str:
    """A hint such as ``; nearest: 'blocks.0.attn.q'``: names with a part most like the pattern's own text."""
    text = re.sub(r"\\[DwWsSbBAZ]|[\\^$*+?()\[\]{}|]", "", pattern.replace(r"\d", "0"))
    text = _INDEX.sub("0", text.removesuffix(".weight"))
    parts = text.count(".") + 1
    distinct: dict[str, str] = {}
    for name in names:
        distinct.setdefault(_INDEX.sub("0", name), name)
    scored = []
    for folded, name in list(distinct.items())[:_LOOKED_AT]:
        path = folded.split(".")
        windows = [".".join(path[i : i + parts]) for i in range(max(1, len(path) - parts + 1))]
        scored.append((max(difflib.SequenceMatcher(None, text, window).ratio() for window in windows), name))
    best = sorted(scored, key=lambda each: -each[0])[:3]
    return "; nearest: " + ", ".join(repr(name) for _, name in best) if best else ""
