"""Targeting: for every weight of a checkpoint, whether it is quantized, and with which settings of its own.

One chain decides, first word wins::

    facts            not a matrix, not stored as floats, a text encoder whose markers ComfyUI does not read
    rules            the per-layer file: skip, or a format (which overrides all that follows)
    include          when given, everything else stays
    exclude, preset  stay, or get the fallback format
    name rules       norms, embeddings, heads, routers
    heuristics       when asked for: small or elongated layers

Every layer that stays has its reason in words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..formats.errors import UsageError, shown
from ..formats.registry import format_info
from ..formats.tensors import FLOAT_DTYPES
from .decisions import Candidate, Decision, TargetingResult
from .naming import (
    EMBEDDING,
    NORM,
    ROUTER,
    awkward,
    barred_formats,
    name_rule,
    not_a_matrix,
    unread_text_encoder,
)
from .presets import Preset, detect_preset, find_preset
from .rules import Rule, compile_pattern, match_rules, nearest_names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


@dataclass(frozen=True)
class Targeting:
    """Which layers are quantized. Raises UsageError at once for a preset, pattern or format that does not exist."""

    preset: str = "auto"
    """auto, none, a name, or several names joined by commas."""
    include: str | None = None
    """Pattern: only layers that it finds are quantized."""
    exclude: str | None = None
    """Pattern: layers that it finds are not."""
    rules: tuple[Rule, ...] = ()
    fallback: str | Mapping[str, object] | None = field(default=None, hash=False)
    """Format, or settings as a rule has them, of layers that ``exclude`` or the preset would keep; None: they stay."""
    heuristics: bool = False
    """Whether small and elongated layers stay."""

    def __post_init__(self) -> None:
        if self.preset not in ("auto", "none"):
            find_preset(self.preset)
        for what in ("include", "exclude"):
            pattern = getattr(self, what)
            if pattern is not None:
                compile_pattern(pattern, what)
        if isinstance(self.fallback, Mapping):
            if "format" not in Rule(".*", self.fallback).settings:
                raise UsageError(f"fallback {shown(dict(self.fallback))} names no format")
        elif self.fallback is not None:
            if not isinstance(self.fallback, str):
                raise UsageError(f"fallback must be a format or settings of a rule, is {shown(self.fallback)}")
            format_info(self.fallback)

    def to_dict(self) -> dict[str, Any]:
        return {
            "preset": self.preset,
            "include": self.include,
            "exclude": self.exclude,
            "rules": [rule.to_dict() for rule in self.rules],
            "fallback": self.fallback,
            "heuristics": self.heuristics,
        }

    def decide(
        self, candidates: Sequence[Candidate], keys: Iterable[str] = (), *, comfy: bool = True
    ) -> TargetingResult:
        """Decides for every candidate.

        ``keys``: every key of the checkpoint, which tells models apart better than the candidates alone.
        ``comfy``: whether ComfyUI is to load the result; what only ComfyUI cannot read stays out of it then.
        Raises UsageError for a pattern that finds no layer, with the nearest names.
        """
        names = [candidate.name for candidate in candidates]
        if not names:
            return TargetingResult({})
        notes: list[str] = []
        unread = _unread(candidates, notes) if comfy else {}
        all_keys = list(dict.fromkeys([*keys, *(f"{name}.weight" for name in names)]))
        preset = self._preset([key for key in all_keys if key.removesuffix(".weight") not in unread], notes)
        if preset is None and self.preset == "auto" and any(_open(candidate, unread) for candidate in candidates):
            notes.append("warning: no preset fits these keys; only the rules by name keep layers (see --preset)")
        removed = self._removed(preset, all_keys, notes)
        judge = _Judge(
            unread=unread,
            removed=frozenset(removed),
            rules=match_rules(self.rules, names),
            included=_searcher("include", self.include, names),
            excluded=_searcher("exclude", self.exclude, names),
            preset=preset,
            targeting=self,
        )
        decisions: dict[str, Decision] = {}
        for candidate in candidates:
            keep, settings = judge.verdict(candidate)
            barred = barred_formats(candidate.name, candidate.shape) if comfy and keep is None else {}
            decisions[candidate.name] = Decision(keep, settings, barred)
        _note_powerless_rules(judge.rules, decisions, notes)
        return TargetingResult(decisions, preset, notes, removed)

    def _preset(self, keys: list[str], notes: list[str]) -> Preset | None:
        if self.preset == "none" or not keys:
            return None
        detected = detect_preset(keys)
        if self.preset == "auto":
            if detected:
                notes.append(f"preset {detected.name} ({detected.title}) detected")
            return detected
        preset = find_preset(self.preset)
        parts = [find_preset(part) for part in preset.name.split(",")]
        if detected and all(part.detect for part in parts) and not any(part.fits(keys) for part in parts):
            notes.append(f"warning: preset {preset.name} was asked for, but the keys look like {detected.name}")
        elif not any(preset.keeps(key) for key in keys) and preset.keep:
            notes.append(f"warning: preset {preset.name} keeps nothing here: no key holds one of its names")
        return preset

    def _removed(self, preset: Preset | None, keys: list[str], notes: list[str]) -> list[str]:
        removed = preset.removed(keys) if preset else []
        if not preset or not removed:
            return []
        parts = ", ".join(preset.remove)
        if self.preset == "auto":
            notes.append(
                f"{len(removed)} tensors of {parts} are kept; name the preset (--preset {preset.name}) to drop them"
            )
            return []
        notes.append(f"preset {preset.name} drops {len(removed)} tensors of {parts}")
        return removed


@dataclass(frozen=True)
class _Judge:
    """The chain of the module's docstring, with everything looked up that does not depend on the layer."""

    unread: Mapping[str, str]
    removed: frozenset[str]
    rules: Mapping[str, Rule]
    included: Callable[[str], bool] | None
    excluded: Callable[[str], bool] | None
    preset: Preset | None
    targeting: Targeting

    def verdict(self, candidate: Candidate) -> tuple[str | None, dict[str, object]]:
        """(reason to keep or None, settings of its own)."""
        fact = self._fact(candidate)
        if fact is not None:
            return fact, {}
        rule = self.rules.get(candidate.name)
        settings = rule.overrides if rule else {}
        if rule and rule.skips:
            return f"rule {rule.pattern!r}", {}
        if rule and rule.decides:
            return (awkward(candidate.shape) if rule.settings.get("heuristics") else None), settings
        if self.included and not self.included(candidate.name):
            return f"not in include {self.targeting.include!r}", {}
        by_name = name_rule(candidate.name, candidate.shape)
        reason = self._excluded(candidate.name)
        if reason is not None:
            if self.targeting.fallback is None or (by_name and by_name.kind in (NORM, EMBEDDING, ROUTER)):
                return reason, {}
            own = {key: value for key, value in settings.items() if key == "rounding"}
            fallback = self.targeting.fallback
            return None, {**own, **(fallback if isinstance(fallback, Mapping) else {"format": fallback})}
        if by_name:
            return by_name.reason, {}
        reason = awkward(candidate.shape) if self.targeting.heuristics else None
        return (reason, {}) if reason else (None, settings)

    def _fact(self, candidate: Candidate) -> str | None:
        fact = not_a_matrix(candidate.shape)
        if fact is None and candidate.dtype not in FLOAT_DTYPES:
            fact = f"stored as {candidate.dtype}: not plain weights"
        if fact is None:
            fact = self.unread.get(candidate.name)
        if f"{candidate.name}.weight" in self.removed:
            fact = f"dropped by preset {self.preset.name if self.preset else ''}"
        return fact

    def _excluded(self, name: str) -> str | None:
        if self.excluded and self.excluded(name):
            return f"exclude {self.targeting.exclude!r}"
        part = self.preset.keeps(f"{name}.weight") if self.preset else None
        return f"preset {self.preset.name}: {part!r}" if self.preset and part is not None else None


def _open(candidate: Candidate, unread: Mapping[str, str]) -> bool:
    """Whether a preset could still matter to this layer."""
    name, shape = candidate.name, candidate.shape
    return not_a_matrix(shape) is None and name not in unread and name_rule(name, shape) is None


def _unread(candidates: Sequence[Candidate], notes: list[str]) -> dict[str, str]:
    """Reasons by name for the layers of text encoders that ComfyUI would load as plain numbers."""
    unread: dict[str, str] = {}
    for pattern, reason in unread_text_encoder((candidate.name, candidate.shape) for candidate in candidates):
        search = re.compile(pattern).search
        layers = [candidate.name for candidate in candidates if search(candidate.name)]
        unread.update(dict.fromkeys(layers, reason))
        notes.append(f"warning: {len(layers)} tensors stay: {reason}")
    return unread


def _searcher(what: str, pattern: str | None, names: Sequence[str]) -> Callable[[str], bool] | None:
    """Whether the pattern finds a name, with or without ``.weight``; UsageError if it finds none at all."""
    if pattern is None:
        return None
    search = compile_pattern(pattern, what).search

    def found(name: str) -> bool:
        return search(name) is not None or search(f"{name}.weight") is not None

    if not any(map(found, names)):
        raise UsageError(f"{what} {shown(pattern)} matches no layer{nearest_names(pattern, names)}")
    return found


def _note_powerless_rules(rules: Mapping[str, Rule], decisions: Mapping[str, Decision], notes: list[str]) -> None:
    """Says where a rule asks for what a fact forbids: nothing that was asked for is dropped in silence."""
    denied: dict[tuple[str, str], int] = {}
    for name, rule in rules.items():
        keep = decisions[name].keep
        if rule.decides and keep is not None:
            denied[rule.pattern, keep] = denied.get((rule.pattern, keep), 0) + 1
    for (pattern, keep), count in denied.items():
        notes.append(f"warning: rule {pattern!r} cannot change {count} of its layers: {keep}")
