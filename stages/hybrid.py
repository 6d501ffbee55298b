"""The hybrid stage: MXFP8 layers get a scale for the whole tensor, for GPUs that multiply FP8 but know no groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch

from ..formats.comfy import MARKER, WHOLE, marker_tensor
from ..formats.errors import PlanError, UsageError, did_you_mean, listed, shown
from ..formats.layers import Layer
from ..formats.markers import flat
from ..formats.registry import make_format
from ..formats.tensors import TensorSpec
from .chain import Choice, quantized
from .reading import read_whole
from .scalar import AddScalar
from .stage import Context
from .tensor_scales import TensorScales
from .work import LayerPlan
from .writing import Write

HYBRID = "hybrid_mxfp8"
MXFP8 = ("mxfp8", HYBRID)
MODES = ("exact", "legacy")
_OWN_PARTS = (".weight", ".weight_scale", WHOLE[HYBRID], MARKER)
_NAMED = 8


@dataclass(frozen=True)
class Hybrid:
    """Makes MXFP8 layers (and hybrid ones, anew) hybrid MXFP8; other tensors are copied."""

    verb: ClassVar[str] = "hybrid"
    alone: ClassVar[bool] = True

    mode: str | None = None
    """``exact``: one exponent for all groups of a tensor, so that both decodes are the same number; ``legacy``: codes
    and scales as they are, under which the scalar decodes wrongly. None: legacy with tensor scales, else exact."""
    tensor_scales: str | None = None
    """An FP8 model whose scales become the scalars of mode legacy; None: the largest scale of each tensor."""

    def __post_init__(self) -> None:
        if self.mode is not None and self.mode not in MODES:
            raise UsageError(f"hybrid: unknown mode {shown(self.mode)}{did_you_mean(str(self.mode), MODES)}")
        if self.mode == "exact" and self.tensor_scales is not None:
            raise UsageError(
                "hybrid: tensor scales belong to mode legacy: codes of mode exact have one scale, and an imported one "
                "would not be it. Leave the tensor scales out, or name mode legacy"
            )

    @property
    def legacy(self) -> bool:
        """Whether codes and scales stay as they are."""
        return self.mode == "legacy" or self.tensor_scales is not None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def identity(self) -> dict[str, Any]:
        """The options as digests and output files have them: scales by their values, wherever they lie."""
        scales = None if self.tensor_scales is None else TensorScales.open(self.tensor_scales).digest
        return {"mode": "legacy" if self.legacy else "exact", "tensor_scales": scales}

    def plan(self, layers: Sequence[LayerPlan], context: Context) -> list[LayerPlan]:
        """Raises PlanError for a checkpoint without MXFP8 layers, for those that cannot be decoded, and for tensor
        scales that lack a layer."""
        root = context.source.place
        marked = [each.layer for each in layers if each.layer.marker and flat(each.layer.marker).get("format") in MXFP8]
        if broken := [f"{layer.name}: {layer.problem}" for layer in marked if layer.problem]:
            raise PlanError(f"{root}: {len(broken)} MXFP8 layers cannot be decoded: {listed(broken, _NAMED, '; ')}")
        chosen = [each for each in layers if each.layer.encoding and each.layer.encoding.format[0] in MXFP8]
        if not chosen:
            raise PlanError(
                f"{root}: no layer is MXFP8. From original weights: quantloom convert MODEL OUT --format {HYBRID}"
            )
        made = self._with_scalars(chosen, context) if self.legacy else self._shared(chosen, context)
        return [made.get(each.layer.name, each) for each in layers]

    def _shared(self, chosen: Sequence[LayerPlan], context: Context) -> dict[str, LayerPlan]:
        """Decoded, and encoded again with one exponent."""
        context.notes.append("mode exact: errors are what the shared exponent adds to those of the MXFP8 model")
        return {each.layer.name: _with_companions(_encoded(each)) for each in chosen}

    def _with_scalars(self, chosen: Sequence[LayerPlan], context: Context) -> dict[str, LayerPlan]:
        """Copied, with a scalar."""
        layers = [each.layer for each in chosen]
        if foreign := [layer.name for layer in layers if layer.encoding and layer.encoding.dialect != "comfy"]:
            raise PlanError(
                f"{context.source.place}: {len(foreign)} MXFP8 layers are not stored as ComfyUI reads them, so they "
                f"cannot be copied: {listed(foreign, _NAMED)}. Use mode exact, which encodes them anew"
            )
        scalars: Sequence[float | None] = [None] * len(layers)
        words = "the largest scale of its groups"
        if self.tensor_scales is not None:
            scalars, words = TensorScales.open(self.tensor_scales).of(layers), "an imported scale"
            if self.mode is None:
                context.notes.append("tensor scales are given: mode legacy")
        context.warnings.append(
            "mode legacy: codes stay relative to the scales of their groups, so weights decoded by .weight_scalar are "
            "wrong wherever these differ; the report says by how much. Mode exact makes both decodes the same"
        )
        change = f"{HYBRID}, legacy: {words} as .weight_scalar"
        return {
            layer.name: _with_companions(_copied(layer, scalar, change))
            for layer, scalar in zip(layers, scalars, strict=True)
        }


def _encoded(plan: LayerPlan) -> LayerPlan:
    full_precision = bool(flat(plan.layer.marker or {}).get("full_precision_matrix_mult"))
    return quantized(plan, Choice(make_format(HYBRID), "nearest", {}, full_precision_matmul=full_precision))


def _copied(layer: Layer, scalar: float | None, change: str) -> LayerPlan:
    encoding = layer.encoding
    assert encoding is not None
    assert encoding.scales is not None
    entry = {**(layer.marker or {}), "format": HYBRID}
    codes, scales = (TensorSpec(ref.name, ref.dtype, ref.shape) for ref in (encoding.codes, encoding.scales))
    added, marker = TensorSpec(layer.name + WHOLE[HYBRID], "F32", ()), marker_tensor(layer.name, entry)
    return LayerPlan(
        layer, (AddScalar(added.name, scalar), Write()), (codes, scales, added, marker[0]), constants=(marker,),
        entry=entry, change=change,
    )  # fmt: skip


def _with_companions(plan: LayerPlan) -> LayerPlan:
    """The layer with the numbers that stand beside its weight, such as an activation scale, as they are."""
    others = [ref for ref in plan.layer.tensors if ref.name.removeprefix(plan.layer.name) not in _OWN_PARTS]
    added = tuple(
        (TensorSpec(ref.name, ref.dtype, ref.shape), read_whole(ref).view(torch.uint8).numpy().tobytes())
        for ref in others
    )
    specs = tuple(spec for spec, _ in added)
    return replace(plan, outputs=(*plan.outputs, *specs), constants=(*plan.constants, *added))
