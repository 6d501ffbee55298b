"""Ranks that depend on the errors: automatic ones, and those that a budget allows.

Here (and in ``nonfinite``) weights are read before the plan is final: every candidate layer is quantized once,
nothing is written, and the singular values of what it lost decide. Equal sources and options give equal ranks.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..formats.errors import PlanError
from ..formats.tensors import DTYPE_BITS
from ..stages.bias import CorrectBias, Project
from ..stages.extract import MOST_SURVEYED, Survey
from ..stages.lora import AUTO, Lora, extraction
from ..stages.quality import AdapterGain
from ..stages.quantize import Quantize
from ..stages.work import LayerPlan
from .execute import collect
from .nonfinite import nonfinite_layers
from .plan import Plan, make_plan
from .recipe import Recipe
from .sizes import count, parse_size, show_size
from .together import put_together

_log = logging.getLogger(__name__)

STEP = 8
"""Automatic ranks are multiples of this."""
WORTH = 2.0
"""Further ranks must remove so many times the share of the squared error that their numbers are of the weight's: an
error without structure (white noise) has no such ranks."""
LEAST_GAIN = 0.03
"""Share of the error that an adapter of automatic rank must remove."""


@dataclass(frozen=True)
class _Candidate:
    """What a layer's adapter costs and brings."""

    name: str
    shape: tuple[int, int]
    spectrum: tuple[float, ...]
    """Shares of the squared error, falling."""
    squared: float
    """The relative squared error that they are shares of."""

    def cost(self, rank: int, dtype: str) -> int:
        """Bytes."""
        return rank * sum(self.shape) * DTYPE_BITS[dtype] // 8


def settle_ranks(plan: Plan) -> Plan:
    """The plan, or one with a rank for each adapter where the recipe leaves that to the errors."""
    lora = next((stage for stage in plan.recipe.stages if isinstance(stage, Lora)), None)
    if lora is None or not lora.surveyed:
        return plan
    ranks, notes = decide_ranks(plan, lora)
    return make_plan(plan.recipe, replace(plan.settled, ranks=ranks, notes=tuple(notes)))


def decide_ranks(plan: Plan, lora: Lora) -> tuple[dict[str, int], list[str]]:
    """Ranks by layer, 0 for none, and what to tell the user."""
    marked = [layer for layer in plan.layers if layer.adapter is not None]
    gains = _survey(plan.recipe, lora, marked)
    found = []
    for layer in marked:
        if (gain := gains.get(layer.layer.name)) is not None:
            rows, columns = layer.layer.weight.shape
            weighted = extraction(layer, 1).weighted
            error = gain.before.output if weighted and gain.before.output is not None else gain.before.weight
            found.append(_Candidate(layer.layer.name, (rows, columns), gain.spectrum, error**2))
    notes = [f"ranks come from a survey: {count(len(marked), 'layer')} were read and quantized once, without writing"]
    if lora.budget is None:
        ranks = {each.name: automatic_rank(each.spectrum, each.shape) for each in found}
    else:
        limit = _bytes(lora.budget, plan.source.nbytes)
        ranks = spend(found, limit, lora)
        spent = sum(each.cost(ranks.get(each.name, 0), lora.dtype) for each in found)
        notes.append(f"adapters take {show_size(spent)} of a budget of {show_size(limit)}")
    if none := sum(rank == 0 for rank in ranks.values()):
        why = "it would bring too little there" if lora.budget is None else "the budget helps more elsewhere"
        notes.append(f"no adapter for {none} of {count(len(marked), 'layer')}: {why}")
    return ranks, notes


def automatic_rank(spectrum: Sequence[float], shape: tuple[int, int]) -> int:
    """The smallest multiple of 8 (at most 128) from which on 8 more ranks would not remove twice the share of the
    squared error that their numbers are of the weight's; 0 where that removes less than 3 % of the error."""
    share = sum(shape) / (shape[0] * shape[1])
    rank = 0
    while rank < len(spectrum):
        further = spectrum[rank : rank + STEP]
        if sum(further) < WORTH * share * len(further):
            break
        rank += len(further)
    return rank if sum(spectrum[:rank]) >= 1 - (1 - LEAST_GAIN) ** 2 else 0


def spend(candidates: Sequence[_Candidate], limit: int, lora: Lora) -> dict[str, int]:
    """Ranks by layer that cost at most ``limit`` bytes: what removes most squared relative error per byte comes first.

    PlanError when not even the cheapest adapter fits.
    """
    offers = []
    for each in candidates:
        step = STEP if lora.rank == AUTO else len(each.spectrum)
        for start in range(0, len(each.spectrum), step):
            block = each.spectrum[start : start + step]
            cost = each.cost(len(block), lora.dtype)
            offers.append((-sum(block) * each.squared / cost, each.name, start, len(block), cost))
    ranks = dict.fromkeys((each.name for each in candidates), 0)
    left = limit
    for gain, name, start, length, cost in sorted(offers):
        if gain < 0 and ranks[name] == start and cost <= left:
            ranks[name] += length
            left -= cost
    if candidates and not any(ranks.values()):
        cheapest = min(offers, key=lambda offer: offer[-1])
        raise PlanError(
            f"lora: a budget of {show_size(limit)} holds no adapter: the smallest, rank {cheapest[3]} of "
            f"{cheapest[1]}, takes {show_size(cheapest[-1])}; raise the budget, or lower the rank"
        )
    return ranks


def _bytes(budget: int | str, source: int) -> int:
    """A budget in bytes; a share is of the source's bytes."""
    share = re.fullmatch(r"\s*([\d.]+)\s*%\s*", str(budget))
    if share:
        return int(source * float(share[1]) / 100)
    return parse_size(budget, "lora budget") or 0


def _survey(recipe: Recipe, lora: Lora, layers: Sequence[LayerPlan]) -> Mapping[str, AdapterGain]:
    """What adapters would bring, by layer; layers that will be kept for their NaN or Inf are left out."""
    if any(isinstance(stage, Quantize) and stage.nonfinite == "keep" for stage in recipe.stages):
        spoiled = nonfinite_layers(layers)
        layers = [plan for plan in layers if plan.layer.name not in spoiled]
    plans = put_together([_looked_at(plan, lora) for plan in layers], recipe.run.device)
    _log.info("surveying %d layers", len(plans))
    return {receipt.name: receipt.gain for receipt in collect(plans, recipe.run) if receipt.gain is not None}


def _looked_at(plan: LayerPlan, lora: Lora) -> LayerPlan:
    """The layer with a chain that ends in a survey instead of a write."""
    most = lora.rank if isinstance(lora.rank, int) else MOST_SURVEYED
    extract = extraction(plan, min(most, *plan.layer.weight.shape))
    steps = [step for step in plan.steps[:-1] if not isinstance(step, Project | CorrectBias)]
    survey = Survey(extract.coded, extract.rank, extract.inputs, extract.weighted)
    return replace(plan, steps=(*steps, survey))
