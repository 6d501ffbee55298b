"""The lora stage: which quantized layers get an adapter for what they lost, and the chains that make it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from ..formats.adapters import ADAPTER_DIALECTS, adapter_layer, adapter_tensors, stored_rank
from ..formats.comfy import model_prefix
from ..formats.errors import PlanError, UsageError, did_you_mean, listed, shown
from .adapter_targeting import METHODS, AdapterTarget, matches, why_not
from .bias import CorrectBias
from .extract import Coded, Extract
from .rotation import Rotate
from .rules import nearest_names
from .scaling import Scale
from .stage import Context
from .svdquant import TakeOut
from .work import AdapterPlan, LayerPlan

AUTO = "auto"
DTYPES = ("F32", "BF16", "F16")
_NAMED = 8
_BUDGET = re.compile(r"\s*\d{1,18}(\.\d{1,18})?\s*([KMGT]i?)?(B|%)?\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Lora:
    """Makes an adapter of low rank of the quantization error of chosen layers, in a file of its own."""

    verb: ClassVar[str] = "lora"

    rank: int | str = 32
    """Of every adapter; ``auto``: per layer from the singular values of its error (0 to 128, in steps of 8)."""
    target: str | None = None
    """Pattern of the layers that get one; without it: the first blocks' layers that are about square, or attention."""
    depth: int = 1
    """Layers of so many first blocks."""
    ar_threshold: float = 0.0
    """Above 0: layers with an aspect ratio below it, whatever they are called."""
    method: str = AUTO
    """``svd``: least error of weights; ``weighted``: of outputs, by the statistics of the quantize stage;
    ``svdquant``: the low-rank part is taken out first, so that the quantized model needs its adapter;
    ``auto``: weighted where there are statistics, else svd."""
    budget: int | str | None = None
    """Bytes, a size such as ``50MB``, or a share of the source such as ``2%``, that all adapters may take: they go
    where the error falls most per byte, to any quantized layer (that the target matches)."""
    dtype: str = "F32"
    """F32, BF16 or F16."""
    dialect: str = "comfy"
    """Names and layout of the adapter's file: comfy, peft, peft-ranks or diffusers."""
    output: str | None = None
    """Path of the adapter; None: beside the output, ``*_lora.safetensors``."""

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or (self.rank != AUTO and not (isinstance(self.rank, int) and self.rank >= 1)):
            raise UsageError(f"lora: rank {shown(self.rank)} must be a whole number of at least 1, or auto")
        for option, known in (("method", METHODS), ("dtype", DTYPES), ("dialect", ADAPTER_DIALECTS)):
            value = getattr(self, option)
            if value not in known:
                raise UsageError(f"lora: unknown {option} {shown(value)}{did_you_mean(str(value), known)}")
        if self.output == "":
            raise UsageError("lora: the path of the adapter is empty")
        self._check_budget()
        self.targeting  # noqa: B018  (checks the pattern)

    def _check_budget(self) -> None:
        budget = self.budget
        if budget is None:
            return
        number = re.match(r"\s*[\d.]+", str(budget))
        if isinstance(budget, bool) or not _BUDGET.fullmatch(str(budget)):
            raise UsageError(f"lora: budget {shown(budget)} is no size; write for example 50MB or 2%")
        if number is None or float(number[0]) == 0:
            raise UsageError("lora: a budget of 0 leaves no adapter; raise it, or leave the stage out")
        if self.dialect == "peft" and self.rank == AUTO:
            raise UsageError(
                "lora: dialect peft pads every adapter to one rank, so that a budget cannot be spent layer by layer; "
                "name a rank, or use dialect peft-ranks"
            )

    @property
    def targeting(self) -> AdapterTarget:
        """How layers are chosen without a budget."""
        return AdapterTarget(self.target, self.depth, self.ar_threshold)

    @property
    def surveyed(self) -> bool:
        """Whether ranks can only be known once the layers' errors are."""
        return self.rank == AUTO or self.budget is not None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def identity(self) -> dict[str, Any]:
        """The options without the path, which does not change what is written."""
        return {name: value for name, value in self.to_dict().items() if name != "output"}

    def plan(self, layers: Sequence[LayerPlan], context: Context) -> list[LayerPlan]:
        """Marks the layers that get an adapter (``equip`` gives them their steps, once every rank is known).

        Raises UsageError for a target that matches nothing, a rank above a matching layer's edges, ``weighted``
        without statistics and ``svdquant`` without quantizing, PlanError when no layer is chosen, and for biases that
        are corrected too.
        """
        if self.method == "svdquant" and context.base is not None:
            raise UsageError(
                "lora: method svdquant takes the low-rank part out before it quantizes, which this model is already; "
                "use svd or weighted, or quantize the original anew with `quantloom convert --lora-method svdquant`"
            )
        if self.target is not None and not any(matches(self.target, plan.layer.name) for plan in layers):
            near = nearest_names(self.target, [plan.layer.name for plan in layers if plan.format])
            raise UsageError(f"lora: target {shown(self.target)} matches no layer{near}")
        reasons = {plan.layer.name: self._refusal(plan) for plan in layers}
        chosen = {name for name, reason in reasons.items() if reason is None}
        if not chosen:
            most = Counter(reasons[plan.layer.name] for plan in layers if plan.format).most_common(3)
            why = "; ".join(f"{number} x {reason}" for reason, number in most)
            why = why or "the layers that its target matches are not quantized"
            raise PlanError(f"lora: no layer gets an adapter: {why}. Name layers with the target, or raise the depth")
        without = [plan.layer.name for plan in layers if plan.layer.name in chosen and plan.inputs is None]
        if without and self.method == "weighted":
            if len(without) == len(chosen):
                raise UsageError(
                    "lora: method weighted needs statistics of the layers' inputs: make them with `quantloom calibrate "
                    "MODEL --random-tokens --out stats.zarr` and name them with --statistics stats.zarr"
                )
            context.notes.append(f"lora: no statistics, so svd, for {len(without)} layers: {listed(without, _NAMED)}")
        if self.method == "svdquant":
            context.warnings.append("lora svdquant: the quantized model is wrong without its adapter")
        return [self._marked(plan) if plan.layer.name in chosen else plan for plan in layers]

    def _refusal(self, plan: LayerPlan) -> str | None:
        """Why a layer gets no adapter."""
        if not plan.format:
            return "not quantized"
        rows, columns = plan.layer.weight.shape
        target = self.targeting
        if self.budget is None or target.pattern is not None:
            reason = why_not(plan.layer.name, (rows, columns), target)
            if reason is not None:
                return reason
        if isinstance(self.rank, int) and self.rank > min(rows, columns):
            if target.pattern is not None:
                raise UsageError(
                    f"lora: rank {self.rank} is above the smaller edge of {plan.layer.name} ({rows}x{columns}); "
                    f"lower it to {min(rows, columns)} or less, or let the target leave this layer out"
                )
            return f"has an edge shorter than rank {self.rank}"
        if any(isinstance(step, CorrectBias) for step in plan.steps):
            raise PlanError(
                f"{plan.layer.name}: bias correction and an adapter would make up for the same loss twice; drop "
                "--bias-correction, or let the target leave this layer out"
            )
        return None

    def _marked(self, plan: LayerPlan) -> LayerPlan:
        method = self.method
        if method in (AUTO, "weighted"):
            method = "svd" if plan.inputs is None else "weighted"
        affinity = plan.inputs.shared if plan.inputs is not None else plan.affinity
        rank = 0 if self.surveyed else self.rank
        assert isinstance(rank, int)
        return replace(plan, adapter=AdapterPlan(method, rank), affinity=affinity)

    def equip(self, layers: Sequence[LayerPlan]) -> list[LayerPlan]:
        """The layers whose adapters have a rank with the steps that make them, and with what is stored."""
        largest = max((plan.adapter.rank for plan in layers if plan.adapter is not None), default=0)
        prefix = model_prefix(plan.layer.weight.name for plan in layers)
        return [
            plan if plan.adapter is None else self._equipped(plan, plan.adapter, largest, prefix) for plan in layers
        ]

    def _equipped(self, plan: LayerPlan, adapter: AdapterPlan, largest: int, prefix: str) -> LayerPlan:
        if adapter.rank == 0:
            return replace(plan, adapter=None)
        rows, columns = plan.layer.weight.shape
        stored = stored_rank(self.dialect, adapter.rank, largest)
        base = adapter_layer(self.dialect, plan.layer.name, prefix)
        tensors = adapter_tensors(self.dialect, base, (rows, columns), stored, self.dtype)
        steps = list(plan.steps)
        extract = extraction(plan, adapter.rank)
        steps.insert(len(steps) - 1, extract)
        if adapter.method == "svdquant" and extract.coded is not None:
            place = next(index for index, step in enumerate(steps) if isinstance(step, Scale))
            steps.insert(place, TakeOut(extract.coded.format, adapter.rank, plan.inputs))
        return replace(plan, steps=tuple(steps), adapter=replace(adapter, tensors=tensors))


def extraction(plan: LayerPlan, rank: int) -> Extract:
    """The step that makes the adapter of a marked layer."""
    assert plan.adapter is not None
    weighted = plan.inputs is not None and plan.adapter.method != "svd"
    return Extract(_coded(plan), rank, plan.inputs, weighted)


def _coded(plan: LayerPlan) -> Coded | None:
    """How the codes of its chain decode; None for a layer that is quantized already."""
    scale = next((step for step in plan.steps if isinstance(step, Scale)), None)
    if scale is None:
        return None
    return Coded(scale.format, next((step.group for step in plan.steps if isinstance(step, Rotate)), None))
