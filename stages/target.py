"""The target stage: which layers are to be quantized, and why the others are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from ..formats.tensors import FLOAT_DTYPES
from .keeping import keep
from .rules import Rule, load_rules, parse_rules
from .stage import Context
from .targeting import Candidate, Targeting
from .work import LayerPlan, Settings


@dataclass(frozen=True)
class Target:
    """Chooses layers by preset, patterns and per-layer rules."""

    verb: ClassVar[str] = "target"

    preset: str = "auto"
    """Name of a preset, ``auto`` (found by key names) or ``none``."""
    include: str | None = None
    """Regular expression: only layers that match are quantized."""
    exclude: str | None = None
    """Regular expression: layers that match are kept."""
    rules: Any = ()
    """Per-layer settings: a file (JSON, YAML, TOML), a mapping of pattern to settings, or rules."""
    fallback: str | None = None
    """Format for layers that preset or ``exclude`` would keep."""
    heuristics: bool = False
    """Also keep layers whose size or shape gains little."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", _rules(self.rules))
        self._targeting()

    def _targeting(self) -> Targeting:
        return Targeting(self.preset, self.include, self.exclude, self.rules, self.fallback, self.heuristics)

    def to_dict(self) -> dict[str, Any]:
        return {
            "preset": self.preset, "include": self.include, "exclude": self.exclude,
            "rules": [rule.to_dict() for rule in self.rules], "fallback": self.fallback, "heuristics": self.heuristics,
        }  # fmt: skip

    def plan(self, layers: Sequence[LayerPlan], context: Context) -> list[LayerPlan]:
        """Raises UsageError for a pattern that is broken or matches nothing."""
        candidates = {
            plan.layer.name: Candidate(plan.layer.name, plan.layer.weight.shape, plan.layer.weight.dtype)
            for plan in layers
            if _is_candidate(plan)
        }
        result = self._targeting().decide(list(candidates.values()))
        context.notes += result.notes
        context.warnings += result.warnings
        planned = []
        for plan in layers:
            name = plan.layer.name
            if name in result.removed:
                continue
            if name not in candidates:
                planned.append(plan)
                continue
            decision = result.decisions[name]
            if decision.keep is not None:
                planned.append(keep(plan.layer, decision.keep))
            else:
                planned.append(replace(plan, settings=Settings(decision.settings, decision.formats_barred)))
        return planned


def _is_candidate(plan: LayerPlan) -> bool:
    """A ``.weight`` whose numbers can be read; what cannot be is passed through with that reason."""
    layer = plan.layer
    readable = layer.encoding is not None or layer.weight.dtype in FLOAT_DTYPES
    return readable and layer.problem is None and layer.weight.name.endswith(".weight") and layer.weight.numel > 0


def _rules(value: Any) -> tuple[Rule, ...]:
    if isinstance(value, str | Path):
        return load_rules(value)
    if isinstance(value, Mapping):
        return parse_rules(value)
    return tuple(item if isinstance(item, Rule) else Rule.from_dict(item) for item in value)
