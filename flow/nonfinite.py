"""``nonfinite="keep"``: which layers hold NaN or Inf must be known before the output is laid out.

Here (and in ``survey``) weights are read before the plan is final: every layer that is to be quantized is scanned
once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..stages.quantize import Quantize
from ..stages.scaling import count_nonfinite
from ..stages.work import Environment, LayerPlan, Work
from .plan import Plan, make_plan
from .threads import map_layers


def settle_nonfinite(plan: Plan) -> Plan:
    """The plan, or one in which layers with NaN or Inf weights are kept, when the recipe asks for that."""
    if not any(isinstance(stage, Quantize) and stage.nonfinite == "keep" for stage in plan.recipe.stages):
        return plan
    reasons = nonfinite_layers(plan.quantized)
    return make_plan(plan.recipe, replace(plan.settled, kept=reasons)) if reasons else plan


def nonfinite_layers(layers: Sequence[LayerPlan]) -> dict[str, str]:
    """By name, what is wrong with the weights of those layers that hold NaN or Inf."""
    reasons = {}
    for layer, (count, first) in zip(layers, map_layers(_scan, layers), strict=True):
        if count:
            assert first is not None
            reasons[layer.layer.name] = f"{count} weights are NaN or Inf, the first at {list(first)}"
    return reasons


def _scan(layer: LayerPlan, environment: Environment) -> tuple[int, tuple[int, int] | None]:
    work = Work(replace(layer, parts=()), (0, layer.rows), environment)
    return count_nonfinite(layer.steps[0].run(work))
