"""Which layers are solved in one: launching work for few rows costs a GPU, and a CPU, as much as for many."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import replace

from ..formats.registry import make_format
from ..stages.matrix import Solve
from ..stages.methods import Stacking
from ..stages.work import LayerPlan

_MOST = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Weights of all layers that are solved in one: what keeps a device busy needs no company."""


def put_together(layers: Sequence[LayerPlan], device: str) -> list[LayerPlan]:
    """The layers; those with inputs, format and method in common know each other, where their rows are few."""
    alike: dict[Hashable, list[LayerPlan]] = defaultdict(list)
    for plan in layers:
        if (key := _key(plan)) is not None:
            alike[key].append(plan)
    most = _MOST[device.partition(":")[0]]
    found: dict[str, tuple[tuple[str, int], ...]] = {}
    for plans in alike.values():
        for group in _groups(plans, most):
            together = tuple((plan.layer.name, plan.rows) for plan in group)
            found.update({plan.layer.name: together for plan in group if len(group) > 1})
    if not found:
        return list(layers)
    return [replace(plan, together=found[plan.layer.name]) if plan.layer.name in found else plan for plan in layers]


def _key(plan: LayerPlan) -> Hashable | None:
    """What layers have in common that can be solved in one; None for one that cannot."""
    solve = next((step for step in plan.steps if isinstance(step, Solve)), None)
    if solve is None or solve.inputs is None or not isinstance(solve.method, Stacking) or not plan.affinity:
        return None
    if plan.rows % make_format(*solve.format).rows_multiple:
        return None  # the next layer would begin within a tile
    return replace(solve, inputs=replace(solve.inputs, layer="")), plan.layer.weight.shape[1]


def _groups(plans: Sequence[LayerPlan], most: int) -> list[list[LayerPlan]]:
    groups: list[list[LayerPlan]] = []
    size = most
    for plan in plans:
        rows, columns = plan.layer.weight.shape
        if size + rows * columns > most:
            groups.append([])
            size = 0
        groups[-1].append(plan)
        size += rows * columns
    return groups
