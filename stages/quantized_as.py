"""The quantized_as stage: the source was quantized already, by whatever program; adapters are made for that model.

Nothing is quantized and no model is written: a layer's chain reads what is stored of it, and the adapter's step the
original beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from ..formats.errors import PlanError, UsageError, listed
from ..formats.layers import Layer, describe, group_layers
from ..formats.places import same_file
from ..formats.source import Source, open_source
from ..formats.tensors import FLOAT_DTYPES
from .evidence import NAMED, Evidence
from .origin import Origin
from .reading import Decode
from .stage import Context
from .work import Environment, LayerPlan, Work
from .writing import Write

_TOLD = 3
"""So many layers stand in a warning with their reasons."""


@dataclass(frozen=True)
class QuantizedAs:
    """Takes a model that the source was quantized to, instead of quantizing; the lora stage then makes its adapter."""

    verb: ClassVar[str] = "quantized_as"

    model: str
    """The quantized checkpoint: a .safetensors file, folder, index.json or glob, in any format that is read."""
    statistics: str | None = None
    """Statistics of the layers' inputs, as ``quantloom calibrate`` writes them."""

    def __post_init__(self) -> None:
        if not self.model:
            raise UsageError("quantized_as: the path of the quantized model is empty")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def identity(self) -> dict[str, Any]:
        """Model and statistics by what they are, wherever they lie."""
        statistics = None if self.statistics is None else Evidence.open(self.statistics).digest
        return {"model": Origin.of(open_source(self.model)).digest, "statistics": statistics}

    def plan(self, layers: Sequence[LayerPlan], context: Context) -> list[LayerPlan]:
        """Every layer of the source: those that the model has quantized with a chain, the others without.

        Raises PlanError where model and source do not fit: names, shapes, nothing that is quantized and can be decoded.
        """
        base = context.base = open_source(self.model)
        stored = {layer.name: layer for layer in group_layers(base) if layer.encoding is not None or layer.problem}
        originals = {plan.layer.name: plan.layer for plan in layers}
        self._check(base, stored, originals)
        evidence = None
        if self.statistics is not None:
            evidence = Evidence.open(self.statistics)
            evidence.check(layers)
        reasons = {name: reason for name, layer in stored.items() if (reason := _why_not(layer, originals[name], base))}
        if len(reasons) == len(stored):
            first = next(iter(reasons))
            raise PlanError(f"{self.model}: no layer can have an adapter, the first is {first}: {reasons[first]}")
        if reasons:
            named = listed([f"{name}: {reason}" for name, reason in reasons.items()], _TOLD, "; ")
            context.warnings.append(f"no adapter for {len(reasons)} quantized layers: {named}")
        return [
            self._beside(plan.layer, None if plan.layer.name in reasons else stored.get(plan.layer.name), evidence)
            for plan in layers
        ]

    def _check(self, base: Source, stored: Mapping[str, Layer], originals: Mapping[str, Layer]) -> None:
        files = {ref.path for layer in originals.values() for ref in layer.tensors}
        if taken := [str(path) for path in base.files if any(same_file(path, other) for other in files)]:
            raise PlanError(f"{taken[0]}: is the original and the quantized model at once; name two checkpoints")
        if not stored:
            raise PlanError(f"{self.model}: holds no quantized layer; name the original first, then its quantized form")
        if unknown := [name for name in stored if name not in originals]:
            raise PlanError(
                f"{self.model}: {len(unknown)} of {len(stored)} quantized layers are not in the original: "
                f"{listed(unknown, NAMED)}; name the checkpoint that it was made from"
            )
        for name, layer in stored.items():
            ours, theirs = list(originals[name].weight.shape), list(layer.weight.shape)
            if layer.encoding is not None and ours != theirs:
                raise PlanError(f"{self.model}: {name} has shape {theirs}, the original {ours}; they do not fit")

    @staticmethod
    def _beside(original: Layer, stored: Layer | None, evidence: Evidence | None) -> LayerPlan:
        """The chain of a quantized layer; none for another one."""
        if stored is None:
            return LayerPlan(original, (), (), reason="not quantized")
        inputs = None if evidence is None else evidence.inputs(original.name, None, centred=False)
        return LayerPlan(original, (ReadStored(stored), Write()), (), format=describe(stored), inputs=inputs)


def _why_not(stored: Layer, original: Layer, base: Source) -> str:
    """Why a quantized layer can have no adapter; empty when it can."""
    if stored.problem or original.problem:
        return stored.problem or f"of the original: {original.problem}"
    if original.encoding is None and original.weight.dtype not in FLOAT_DTYPES:
        return f"the original is stored as {original.weight.dtype}"
    if Origin.of(base).bias_correction and f"{stored.name}.bias" in base.refs:
        return "its bias was corrected for what the weight lost, an adapter would make up for it twice"
    return ""


@dataclass(frozen=True)
class ReadStored:
    """Reads and decodes rows of the quantized layer beside the original, which is the plan's layer."""

    stored: Layer
    name: str = "decode"

    def run(self, work: Work) -> Work:
        made = Decode().run(Work(replace(work.plan, layer=self.stored), work.rows, work.environment))
        work.stream = made.stream
        return work

    def memory(self, plan: LayerPlan, environment: Environment) -> int:
        """What decoding holds."""
        return Decode().memory(replace(plan, layer=self.stored), environment)
