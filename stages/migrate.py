"""The migrate stage: a quantized checkpoint in ComfyUI's form or the older ``scaled_fp8`` one; no weight is decoded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from ..formats.errors import PlanError, UsageError, did_you_mean, listed, shown
from ..formats.tensors import PLAIN_DTYPES
from .forms import COMFY, LEGACY
from .migration import SAME, Migration
from .rules import compile_pattern, is_scale
from .stage import Context
from .work import LayerPlan

TARGETS = (COMFY, LEGACY, SAME)
_NAMED = 8


@dataclass(frozen=True)
class Migrate:
    """Stores codes and scales as they are, under the names and with the descriptions of another dialect."""

    verb: ClassVar[str] = "migrate"
    alone: ClassVar[bool] = True

    to: str = COMFY
    """comfy (``comfy_quant`` markers), legacy (``scaled_fp8``), or same: each layer in the form that it has."""
    input_scale: float | None = None
    """An activation scale for FP8 layers that have none."""
    clean: bool = False
    """Leave out scales and markers that belong to no quantized weight."""
    cast: str | None = None
    """dtype of float tensors that are not quantized: bf16, f16 or f32; None: as they are."""
    cast_filter: str | None = None
    """Regular expression: cast only tensors whose name matches."""
    high_precision: str | None = None
    """Regular expression: refuse when a layer that matches is quantized."""
    full_precision_matmul: bool | None = None
    """Whether layers ask the client to multiply in full precision; None: as before."""

    def __post_init__(self) -> None:
        if self.to not in TARGETS:
            raise UsageError(f"migrate: unknown form {shown(self.to)}{did_you_mean(self.to, TARGETS)}")
        if self.cast is not None and self.cast not in PLAIN_DTYPES:
            raise UsageError(f"migrate: unknown dtype {shown(self.cast)}{did_you_mean(self.cast, PLAIN_DTYPES)}")
        if self.cast_filter is not None and self.cast is None:
            raise UsageError("migrate: a cast filter needs a dtype to cast to")
        if self.input_scale is not None and not is_scale(self.input_scale):
            given = shown(self.input_scale)
            raise UsageError(f"migrate: input scale {given} must be a positive number that float32 holds")
        for pattern in (self.cast_filter, self.high_precision):
            if pattern is not None:
                compile_pattern(pattern, "migrate")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def identity(self) -> dict[str, Any]:
        """The options: none depends on the machine."""
        return self.to_dict()

    def plan(self, layers: Sequence[LayerPlan], context: Context) -> list[LayerPlan]:
        """Raises PlanError for layers that the form cannot express, and where nothing would change; UsageError for a
        pattern that matches nothing."""
        self._check_high_precision(layers, context)
        return Migration(self, context).plan(layers)

    def _check_high_precision(self, layers: Sequence[LayerPlan], context: Context) -> None:
        if self.high_precision is None:
            return
        found = [plan.layer for plan in layers if re.search(self.high_precision, plan.layer.name)]
        if not found:
            raise UsageError(f"migrate: high precision {shown(self.high_precision)} matches no layer")
        if quantized := [layer.name for layer in found if layer.encoding or layer.problem]:
            raise PlanError(
                f"{context.source.place}: {len(quantized)} layers that are to be in high precision are quantized: "
                f"{listed(quantized, _NAMED)}; take another checkpoint"
            )
