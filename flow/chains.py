"""What the nodes of the graph call. It runs in workers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from ..stages.inputs import release
from ..stages.scaling import Scale
from ..stages.work import Environment, LayerPlan, Receipt, Step, Work
from .runner import prepare_thread


def start(plan: LayerPlan, rows: tuple[int, int], environment: Environment, step: Step, _after: object = None) -> Work:
    """A fresh work with the first step's stream. Whatever it waited for is done."""
    prepare_thread(environment)
    work = Work(plan, rows, environment, started=time.perf_counter())
    return step.run(work)


def run_chains(plans: Sequence[LayerPlan], environment: Environment) -> list[Receipt]:
    """The chains of a batch, one after the other: what ``stage_graph`` has for them, fused."""
    receipts = []
    for plan in plans:
        work = start(plan, (0, plan.rows), environment, plan.steps[0])
        for step in plan.steps[1:]:
            work = step.run(work)
        receipts.append(make_receipt(work))
    return gather_receipts(receipts)


def part_amax(step: Scale, work: Work) -> float:
    """Largest magnitude of a row range."""
    return step.amax(work, work.rows)


def combine_amaxes(plan: LayerPlan, environment: Environment, amaxes: Sequence[float]) -> float:
    """The scale of the whole tensor."""
    prepare_thread(environment)
    work = Work(plan, (0, plan.rows), environment)
    for step in plan.steps:
        if isinstance(step, Scale):
            return step.combine(work, list(amaxes))
        work = step.run(work)
    raise AssertionError("a shared scale without a scale step")


def apply_scale(step: Scale, work: Work, whole: float) -> Work:
    """The scale step, given the scale of the whole tensor."""
    return step.run(replace(work, whole=whole))


def make_receipt(work: Work) -> Receipt:
    """What is reported of a finished chain; bytes known from the plan are counted once, with the first row range."""
    plan = work.plan
    share = (work.rows[1] - work.rows[0]) / max(1, plan.rows)
    return Receipt(
        plan.layer.name, plan.format, round(plan.layer.nbytes * share), round(plan.nbytes_out * share),
        time.perf_counter() - work.started, work.squared_error, work.squared_weight, work.rows,
        work.quality, work.gain, work.pieces,
    )  # fmt: skip


def gather_receipts(receipts: Sequence[Receipt]) -> list[Receipt]:
    """The receipts of one task, which lets go of what its layers shared."""
    release()
    return list(receipts)
