"""The dequantize stage: quantized layers become plain weights, in every format and dialect that is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from ..formats.errors import PlanError, UsageError, did_you_mean, listed, shown
from ..formats.tensors import PLAIN_DTYPES, TensorSpec
from .casting import Cast, Finite
from .forms import plain_form
from .reading import Decode
from .stage import Context
from .work import LayerPlan, Step
from .writing import Write

_NONFINITE = ("refuse", "keep")
_NAMED = 8


@dataclass(frozen=True)
class Dequantize:
    """Decodes every quantized layer; other tensors are copied, without scales that stand beside them."""

    verb: ClassVar[str] = "dequantize"
    alone: ClassVar[bool] = True

    dtype: str = "bf16"
    """Of the decoded weights: bf16, f16 or f32. A weight that it cannot hold is refused."""
    nonfinite: str = "refuse"
    """A weight that decodes to NaN or Inf: refuse, or keep (write it as it is)."""

    def __post_init__(self) -> None:
        if self.dtype not in PLAIN_DTYPES:
            raise UsageError(f"dequantize: unknown dtype {shown(self.dtype)}{did_you_mean(self.dtype, PLAIN_DTYPES)}")
        if self.nonfinite not in _NONFINITE:
            hint = did_you_mean(self.nonfinite, _NONFINITE)
            raise UsageError(f"dequantize: unknown nonfinite {shown(self.nonfinite)}{hint}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def identity(self) -> dict[str, Any]:
        """The options: none depends on the machine."""
        return self.to_dict()

    def plan(self, layers: Sequence[LayerPlan], context: Context) -> list[LayerPlan]:
        """Raises PlanError for layers that cannot be decoded, and for a checkpoint without quantized layers."""
        lone = [plan.layer.name for plan in layers if plan.layer.orphan]
        whole = [plan for plan in layers if not plan.layer.orphan]
        broken = [f"{plan.layer.name}: {plan.layer.problem}" for plan in whole if plan.layer.problem]
        if broken:
            raise PlanError(
                f"{context.source.place}: {len(broken)} layers cannot be decoded: {listed(broken, _NAMED, '; ')}. "
                "Passed through, their codes would be taken for weights"
            )
        if not any(plan.layer.encoding for plan in layers):
            raise PlanError(f"{context.source.place}: no layer is quantized: there is nothing to decode")
        if lone:
            context.notes.append(f"{len(lone)} scales or markers without a weight are left out: {listed(lone, _NAMED)}")
        return [self._decoded(plan) if plan.layer.encoding else _bare(plan) for plan in whole]

    def _decoded(self, plan: LayerPlan) -> LayerPlan:
        encoding, weight = plan.layer.encoding, plan.layer.weight
        assert encoding is not None
        spec = TensorSpec(weight.name, PLAIN_DTYPES[self.dtype], weight.shape)
        steps: list[Step] = [Decode()] if self.nonfinite == "keep" else [Decode(), Finite()]
        steps += [Cast(spec.name, spec.dtype), Write()]
        change = f"decoded from {encoding.dialect} {encoding.format[0]} to {spec.dtype}"
        return LayerPlan(plan.layer, tuple(steps), (spec,), change=change)


def _bare(plan: LayerPlan) -> LayerPlan:
    """A layer that is not quantized, without scales beside it."""
    return plan if len(plan.layer.tensors) == 1 else plain_form(plan.layer, None).plan(plan.layer, "")
