"""Verification of hybrid layers: whether ``.weight_scalar`` decodes them as the scales of their groups do."""

from __future__ import annotations

import math

from ..formats.layers import Layer
from ..stages.reading import read_whole
from ..stages.scalar import AddScalar
from ..stages.work import Environment, LayerPlan, Work, root_share


def scalar_error(made: Layer, environment: Environment) -> float | None:
    """Relative error of the weights under ``.weight_scalar``, over all of them; infinite where it is missing or no
    scale; None for layers that are no hybrid."""
    encoding = made.encoding
    if encoding is None or encoding.format[0] != "hybrid_mxfp8":
        return None
    scalar = math.nan if encoding.whole is None else float(read_whole(encoding.whole).float()[0])
    if not (math.isfinite(scalar) and scalar > 0):
        return math.inf
    plan = LayerPlan(made, (), ())
    work = AddScalar("", scalar).run(Work(plan, (0, plan.rows), environment))
    for _ in work.chunks():
        pass
    return root_share(work.squared_error, work.squared_weight)


def scalar_problem(error: float | None) -> str:
    """What is broken about a hybrid layer that was to have one scale; empty when nothing is."""
    if not error:
        return ""
    if error == math.inf:
        return ".weight_scalar is missing, or no positive number"
    return f"decoded by .weight_scalar, its relative error is {error:.3g}: its groups have other scales"
