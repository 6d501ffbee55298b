"""The input_scales stage: static activation scales for a model that is quantized already; all else stays as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from ..formats.errors import PlanError, UsageError, listed, shown
from ..formats.layers import Layer
from ..formats.manifest import KEY
from ..formats.markers import flat
from ..formats.tensors import number_tensor
from .activation_sources import AdapterDirections, Found, Given, Measured, Source
from .adapter_targeting import matches
from .evidence import NAMED, TAKE_INPUT_SCALES, percent
from .forms import COMFY, INPUT_SCALES, LEGACY
from .keeping import keep, renamed, verbatim, with_tensor, without_tensor
from .rules import compile_pattern, is_scale, nearest_names
from .scale_files import ScaleFile
from .stage import Context
from .work import LayerPlan

_MUCH = 2.0
"""Inputs that are cut down to less than half are worth a warning."""


@dataclass(frozen=True)
class InputScales:
    """Sets ``.input_scale`` of FP8 and NVFP4 layers with ComfyUI's markers.

    Of several sources a file's own numbers win, then statistics, then an adapter.
    """

    verb: ClassVar[str] = "input_scales"
    alone: ClassVar[bool] = True

    statistics: str | None = None
    """Statistics of the layers' inputs, as ``quantloom calibrate`` writes them."""
    input_scale: str | None = None
    """What of an input meets the largest code: ``amax`` or a percentile such as ``p99.9``. None: amax of statistics,
    p99.9 of an adapter's directions, which have no largest input."""
    file: str | None = None
    """Scales by layer: JSON, or a checkpoint's ``.input_scale`` tensors."""
    lora: str | None = None
    """An adapter, whose down factors tell the directions of inputs, not their size."""
    lora_rms: float = 1.0
    """Root mean square of the inputs that ``lora`` goes by; 1 is what norms without weights give."""
    filter: str | None = None
    """Pattern: only layers that it finds."""
    only_missing: bool = False
    """Leave layers alone that have an activation scale."""
    remove: bool = False
    """Take the activation scales away, instead of setting them."""

    def __post_init__(self) -> None:
        sources = [name for name in ("statistics", "file", "lora") if getattr(self, name) is not None]
        if self.remove and (sources or self.only_missing):
            raise UsageError(f"input_scales: remove sets no scale: leave {', '.join(sources) or 'only_missing'} out")
        if not self.remove and not sources:
            raise UsageError(
                "input_scales: nothing says how large inputs are: name statistics of them (--statistics, from "
                "`quantloom calibrate MODEL --random-tokens`), a file of scales (--input-scales) or a LoRA (--lora)"
            )
        if self.filter is not None:
            compile_pattern(self.filter, "filter")
        self._check_numbers()

    def _check_numbers(self) -> None:
        wanted = None if self.input_scale is None else percent(self.input_scale)
        if self.input_scale is not None and wanted is None:
            raise UsageError(f"input_scales: {shown(self.input_scale)} must be amax, or a percentile like p99.9")
        if self.input_scale is not None and self.statistics is None and self.lora is None:
            raise UsageError(f"input_scales: {self.input_scale} is taken of statistics or an adapter: name one")
        if self.lora is not None and wanted is not None and not 0 < wanted < 100:
            raise UsageError(f"input_scales: an adapter's directions have no {self.input_scale}; name one like p99.9")
        if not is_scale(self.lora_rms):
            raise UsageError(f"input_scales: lora_rms {shown(self.lora_rms)} must be a positive number")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def identity(self) -> dict[str, Any]:
        """The options, with what their files hold in place of paths."""
        return {**self.to_dict(), **{option: source.digest for option, source in self._sources().items()}}

    def _sources(self) -> dict[str, Source]:
        """What the scales come from, by option: the best last."""
        sources: dict[str, Source] = {}
        if self.lora is not None:
            sources["lora"] = AdapterDirections.open(self.lora, self.input_scale, self.lora_rms)
        if self.statistics is not None:
            sources["statistics"] = Measured.open(self.statistics, self.input_scale)
        if self.file is not None:
            sources["file"] = Given(ScaleFile.open(self.file))
        return sources

    def plan(self, layers: Sequence[LayerPlan], context: Context) -> list[LayerPlan]:
        """Raises PlanError when no layer takes a scale or none gets one, and for files and statistics that do not fit
        the checkpoint; UsageError for a filter that finds no layer."""
        context.metadata = {**context.source.metadata, KEY: ""}  # its checksums, whether or not the source has any
        takers = self._takers(layers, context)
        had = {name for name, plan in takers.items() if _has_scale(plan.layer)}
        if self.remove:
            if not had:
                raise PlanError(f"{context.source.place}: no layer has an activation scale: there is nothing to remove")
            return [_without(plan.layer) if plan.layer.name in had else _as_it_is(plan) for plan in layers]
        wanting = {name: plan for name, plan in takers.items() if not (self.only_missing and name in had)}
        found: dict[str, Found] = {}
        for source in self._sources().values():
            found |= source.scales(wanting, layers, context)
        if not found:
            left = f"none of {len(wanting)} layers gets an activation scale from {', '.join(self._sources())}"
            raise PlanError(
                f"{context.source.place}: {left if wanting else 'every layer has an activation scale already'}"
            )
        _announce(wanting, found, context)
        planned = []
        for plan in layers:
            name = plan.layer.name
            if name in found:
                planned.append(_with(plan.layer, found[name], replaced=name in had))
            elif name in wanting:
                planned.append(_as_it_is(plan, "nothing says its activation scale"))
            else:
                planned.append(_as_it_is(plan, "has an activation scale already" if name in takers else ""))
        return planned

    def _takers(self, layers: Sequence[LayerPlan], context: Context) -> dict[str, LayerPlan]:
        """The layers that are meant, by name."""
        takers = {plan.layer.name: plan for plan in layers if _takes(plan.layer)}
        if not takers:
            raise PlanError(
                f"{context.source.place}: no layer takes an activation scale: FP8 and NVFP4 layers with ComfyUI's "
                "markers do. Quantize first, or store scales with `quantloom convert --input-scale amax`"
            )
        if self.filter is None:
            return takers
        chosen = {name: plan for name, plan in takers.items() if matches(self.filter, name)}
        if not chosen:
            near = nearest_names(self.filter, list(takers))
            raise UsageError(f"filter {shown(self.filter)} matches no FP8 or NVFP4 layer{near}")
        return chosen


def _takes(layer: Layer) -> bool:
    """Whether a client that knows ComfyUI's markers, or its legacy ones, reads an activation scale of the layer."""
    encoding = layer.encoding
    return encoding is not None and encoding.dialect in INPUT_SCALES and encoding.format[0] in TAKE_INPUT_SCALES


def _has_scale(layer: Layer) -> bool:
    name = layer.name + INPUT_SCALES[LEGACY if _is_legacy(layer) else COMFY]
    return any(ref.name == name for ref in layer.tensors)


def _is_legacy(layer: Layer) -> bool:
    return layer.encoding is not None and layer.encoding.dialect == LEGACY


def _as_it_is(plan: LayerPlan, reason: str = "") -> LayerPlan:
    """Byte for byte; legacy layers lose the marker of the whole model, and get one each."""
    return keep(plan.layer, reason) if _is_legacy(plan.layer) else verbatim(plan.layer, reason)


def _with(layer: Layer, found: Found, replaced: bool) -> LayerPlan:
    """The layer with an activation scale, in place of what it had."""
    stored = renamed(layer) if _is_legacy(layer) else verbatim(layer)
    scale = number_tensor(layer.name + INPUT_SCALES[COMFY], found.scale)
    change = f"activation scale {'replaced' if replaced else 'added'}: {found.words}"
    return replace(with_tensor(stored, scale), change=change)


def _without(layer: Layer) -> LayerPlan:
    stored = renamed(layer) if _is_legacy(layer) else verbatim(layer)
    return replace(without_tensor(stored, layer.name + INPUT_SCALES[COMFY]), change="activation scale removed")


def _announce(takers: Mapping[str, LayerPlan], found: Mapping[str, Found], context: Context) -> None:
    """Names what got no scale, and says where none is read."""
    if missing := [name for name in takers if name not in found]:
        context.notes.append(
            f"nothing says the activation scale of {len(missing)} layers, which stay as they are: "
            f"{listed(missing, NAMED)}"
        )
    if assumed := [name for name, scale in found.items() if scale.assumed]:
        context.warnings.append(
            f"{len(assumed)} activation scales suppose how large inputs are: an adapter tells where they point, not "
            "how long they are. Statistics of real inputs are better; a scale that is far too small clips"
        )
    worst = max(found, key=lambda name: found[name].clips)
    if found[worst].clips > _MUCH:
        context.warnings.append(
            f"percentiles clip: {worst} has seen inputs {found[worst].clips:.3g} times as large as what its scale lets "
            "through; amax clips none of them, and FP8 and NVFP4 have range to spare"
        )
    unread = [name for name in found if flat(takers[name].layer.marker or {}).get("full_precision_matrix_mult")]
    if unread:
        context.notes.append(
            f"{len(unread)} layers are marked for multiplication in full precision, where clients read no activation "
            f"scale: {listed(unread, NAMED)}"
        )
