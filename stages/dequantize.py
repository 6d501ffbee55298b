"""The dequantize stage: quantized layers become plain weights, in every format and dialect that is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from ..formats.errors import PlanError, UsageError, did_you_mean, listed, shown
from ..formats.tensors import TensorSpec
from .keeping import decoded
from .stage import Context
from .work import LayerPlan

DTYPES = {"bf16": "BF16", "f16": "F16", "f32": "F32"}
"""Names of dtypes as options give them -> as safetensors does."""
_NAMED = 8


@dataclass(frozen=True)
class Dequantize:
    """Decodes every quantized layer; other tensors are copied."""

    verb: ClassVar[str] = "dequantize"
    alone: ClassVar[bool] = True

    dtype: str = "bf16"
    """Of the decoded weights: bf16, f16 or f32."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UsageError(f"dequantize: unknown dtype {shown(self.dtype)}{did_you_mean(self.dtype, DTYPES)}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def identity(self) -> dict[str, Any]:
        """The options: none depends on the machine."""
        return self.to_dict()

    def plan(self, layers: Sequence[LayerPlan], context: Context) -> list[LayerPlan]:
        """Raises PlanError for layers that cannot be decoded, and for a checkpoint without quantized layers."""
        broken = [f"{plan.layer.name}: {plan.layer.problem}" for plan in layers if plan.layer.problem]
        if broken:
            raise PlanError(
                f"{context.source.place}: {len(broken)} layers cannot be decoded: {listed(broken, _NAMED, '; ')}. "
                "Passed through, their codes would be taken for weights"
            )
        if not any(plan.layer.encoding for plan in layers):
            raise PlanError(f"{context.source.place}: no layer is quantized: there is nothing to decode")
        return [plan if plan.layer.encoding is None else self._decoded(plan) for plan in layers]

    def _decoded(self, plan: LayerPlan) -> LayerPlan:
        encoding, weight = plan.layer.encoding, plan.layer.weight
        assert encoding is not None
        change = f"decoded from {encoding.dialect} {encoding.format[0]} to {DTYPES[self.dtype]}"
        return decoded(plan.layer, TensorSpec(weight.name, DTYPES[self.dtype], weight.shape), change=change)
