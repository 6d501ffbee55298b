"""The target stage: which layers are to be quantized, and why the others are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..formats.errors import UsageError, shown
from ..formats.tensors import FLOAT_DTYPES
from .decisions import Candidate
from .keeping import keep
from .rule_files import load_rules
from .rules import Rule
from .stage import Context
from .targeting import Targeting
from .work import LayerPlan, Settings

_WARNING = "warning: "


@dataclass(frozen=True)
class Target(Targeting):
    """Chooses layers by preset, patterns and per-layer rules.

    ``rules`` may also be the path of a JSON, YAML or TOML file, or a mapping of pattern to settings.
    """

    verb: ClassVar[str] = "target"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", _rules(self.rules))
        super().__post_init__()

    def identity(self) -> dict[str, Any]:
        """The options: none depends on the machine."""
        return self.to_dict()

    def plan(self, layers: Sequence[LayerPlan], context: Context) -> list[LayerPlan]:
        """Raises UsageError for a pattern that is broken or matches nothing."""
        candidates = {
            plan.layer.name: Candidate(plan.layer.name, plan.layer.weight.shape, plan.layer.weight.dtype)
            for plan in layers
            if _is_candidate(plan)
        }
        result = self.decide(list(candidates.values()), [plan.layer.weight.name for plan in layers])
        for note in result.notes:
            (context.warnings if note.startswith(_WARNING) else context.notes).append(note.removeprefix(_WARNING))
        removed = set(result.removed)
        planned = []
        usual = Settings()
        for plan in layers:
            name = plan.layer.name
            if plan.layer.weight.name in removed:
                continue
            if name not in candidates:
                planned.append(plan)
                continue
            decision = result.decisions[name]
            if decision.keep is not None:
                planned.append(keep(plan.layer, decision.keep))
            else:
                own = decision.settings or decision.formats_barred
                settings = Settings(decision.settings, decision.formats_barred) if own else usual
                planned.append(plan.having(settings=settings))
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
        return tuple(Rule(pattern, settings, order) for order, (pattern, settings) in enumerate(value.items()))
    if not isinstance(value, Sequence):
        raise UsageError(f"target: rules must be a file, a mapping or a list of rules, is {shown(value)}")
    return tuple(item if isinstance(item, Rule) else Rule.from_dict(item) for item in value)
