"""What a migration does to each layer, and to the tensors that mark whole models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..formats.comfy import HEADER_KEY, model_prefix
from ..formats.errors import PlanError, UsageError, listed, shown
from ..formats.layers import Layer, describe
from ..formats.markers import LEGACY as LEGACY_MARKER
from ..formats.markers import is_legacy_marker
from ..formats.tensors import FLOAT_DTYPES, PLAIN_DTYPES, TensorSpec
from .forms import (
    COMFY,
    LEGACY,
    Form,
    Inexpressible,
    asks_full_precision,
    check_legacy,
    comfy_form,
    legacy_form,
    lost_words,
    plain_form,
    regular,
    with_input_scale,
    with_unused,
    without_constant_scale,
)
from .stage import Context
from .work import LayerPlan

if TYPE_CHECKING:
    from .migrate import Migrate

SAME = "same"
_NAMED = 8
_LISTED = 100
"""Removed tensors that a report names."""


@dataclass
class Migration:
    """One planning of the stage."""

    stage: Migrate
    context: Context
    broken: dict[str, list[str]] = field(default_factory=dict)
    """Why the form cannot say how layers are stored -> these layers."""
    removed: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    cast: int = 0
    """Tensors that ``cast_filter`` matches."""

    def plan(self, layers: Sequence[LayerPlan]) -> list[LayerPlan]:
        planned = [self._layer(plan) for plan in layers]
        scaled = [plan.layer for plan in planned if plan.layer.encoding and plan.layer.encoding.scales]
        marks = self._marks([layer for layer in scaled if self._dialect(layer) == LEGACY])
        if self.broken:
            self._refuse()
        if self.stage.cast_filter is not None and not self.cast:
            raise UsageError(f"migrate: cast filter {shown(self.stage.cast_filter)} matches no tensor of floats")
        dropped = self._dropped(marks)
        if not any(plan.change for plan in planned) and not dropped and not self._lacks_header(planned):
            raise PlanError(f"{self.context.source.place}: nothing to migrate: {_already(scaled)}")
        self._announce(dropped, planned)
        return [*planned, *marks]

    def _dialect(self, layer: Layer) -> str:
        """The form that a quantized layer gets."""
        if self.stage.to != SAME:
            return self.stage.to
        return LEGACY if layer.encoding and layer.encoding.dialect == LEGACY else COMFY

    def _layer(self, plan: LayerPlan) -> LayerPlan:
        layer = plan.layer
        try:
            if layer.orphan:
                return self._orphan(plan)
            if layer.encoding is not None and layer.encoding.scales is not None:
                return self._quantized(layer)
            if layer.problem and layer.weight.dtype not in FLOAT_DTYPES:
                if layer.marker is None or self._dialect(layer) == LEGACY:
                    raise Inexpressible(layer.problem)
                return plan  # of a format that only clients know
            return self._plain(plan)
        except Inexpressible as reason:
            self._break(layer, str(reason))
            return plan

    def _quantized(self, layer: Layer) -> LayerPlan:
        stage, dialect = self.stage, self._dialect(layer)
        assert layer.encoding is not None
        if stage.to == LEGACY:
            check_legacy(layer)
        if stage.to == SAME and layer.encoding.dialect not in (COMFY, LEGACY):
            raise Inexpressible(f"stored as {layer.encoding.dialect}, which has no form to stay in; name comfy")
        form = legacy_form(layer) if dialect == LEGACY else comfy_form(layer, stage.full_precision_matmul)
        if stage.input_scale is not None:
            form = with_input_scale(layer, form, dialect, stage.input_scale)
        form = self._companions(layer, form)
        if not form.differs(layer):
            return form.plan(layer, "")
        return form.plan(layer, _change(layer, form, dialect))

    def _plain(self, plan: LayerPlan) -> LayerPlan:
        layer = plan.layer
        stored, dtype = layer.tensors[0], PLAIN_DTYPES.get(self.stage.cast or "")
        floats = stored.dtype in FLOAT_DTYPES and not layer.problem
        if not floats or not re.search(self.stage.cast_filter or "", stored.name):
            dtype = None
        self.cast += dtype is not None
        form = plain_form(layer, dtype)
        casts = dtype not in (None, stored.dtype)
        cleans = self.stage.clean and bool(form.unused)
        form = self._companions(layer, form)
        if not casts and not cleans:
            return form.plan(layer, "") if layer.marker is None else plan
        words = [f"cast from {stored.dtype} to {dtype}"] if casts else []
        return form.plan(layer, ", ".join([*words, *(["leftovers removed"] if cleans else [])]))

    def _companions(self, layer: Layer, form: Form) -> Form:
        """The form with its leftovers, or without."""
        if self.stage.clean:
            self.removed += form.unused
            return form
        self.kept += form.unused
        return with_unused(layer, form)

    def _orphan(self, plan: LayerPlan) -> LayerPlan:
        name = plan.layer.name
        (self.removed if self.stage.clean else self.kept).append(name)
        return Form(()).plan(plan.layer, "removed: its weight is missing") if self.stage.clean else plan

    def _marks(self, layers: Sequence[Layer]) -> list[LayerPlan]:
        """The tensors that mark a model as legacy: of two numbers when it is to multiply in full precision."""
        if not layers:
            return []
        refs = self.context.source.refs
        prefixes = [name.removesuffix(LEGACY_MARKER) for name in refs if is_legacy_marker(name)]
        prefixes = prefixes or [model_prefix(refs)]
        asked: dict[str, set[bool]] = {prefix: set() for prefix in prefixes}
        for layer in layers:
            own = [prefix for prefix in prefixes if layer.name.startswith(prefix)]
            if not own:
                self._break(layer, f"lies outside of {prefixes[0]!r}, all that a legacy marker covers")
                continue
            said, wanted = asks_full_precision(layer), self.stage.full_precision_matmul
            asked[max(own, key=len)].add(said if wanted is None else wanted)
        if mixed := [prefix for prefix, answers in asked.items() if len(answers) > 1]:
            raise PlanError(
                f"{self.context.source.place}: some layers below {mixed[0] + LEGACY_MARKER!r} ask to be multiplied in "
                "full precision, others do not, and a legacy file has one word for all: pass --full-precision-matmul "
                "or --no-full-precision-matmul"
            )
        return [_mark(prefix, answers == {True}) for prefix, answers in asked.items() if answers]

    def _dropped(self, marks: Sequence[LayerPlan]) -> list[str]:
        """Legacy markers of the source that the output lacks, or has in another form."""
        made = {(spec.name, spec.shape) for mark in marks for spec in mark.outputs}
        refs = self.context.source.refs.values()
        return [ref.name for ref in refs if is_legacy_marker(ref.name) and (ref.name, ref.shape) not in made]

    def _lacks_header(self, planned: Sequence[LayerPlan]) -> bool:
        return any(plan.entry for plan in planned) and HEADER_KEY not in self.context.source.metadata

    def _break(self, layer: Layer, reason: str) -> None:
        self.broken.setdefault(reason, []).append(layer.name)

    def _refuse(self) -> None:
        reasons = [f"{listed(names, _NAMED)}: {reason}" for reason, names in self.broken.items()]
        count = sum(len(names) for names in self.broken.values())
        raise PlanError(
            f"{self.context.source.place}: {count} layers cannot be stored in the form {self.stage.to}: "
            f"{listed(reasons, _NAMED, '; ')}. Ways out: quantloom dequantize makes plain weights of what it can "
            "decode; quantloom convert quantizes those anew"
        )

    def _announce(self, dropped: Sequence[str], planned: Sequence[LayerPlan]) -> None:
        if self.removed:
            self.context.notes.append(f"{len(self.removed)} leftovers removed: {listed(self.removed, _LISTED)}")
        if self.kept:
            self.context.warnings.append(
                f"{len(self.kept)} scales or markers belong to no quantized weight and are kept: "
                f"{listed(self.kept, _NAMED)}; --clean leaves them out"
            )
        if dropped:
            self.context.notes.append(f"the marker {listed(dropped, _NAMED)} is removed, or written anew")
        lost = {word for plan in planned if plan.layer.encoding and self.stage.to == LEGACY
                for word in lost_words(plan.layer)}  # fmt: skip
        if lost:
            words = ", ".join(sorted(lost))
            self.context.warnings.append(f"scaled_fp8 files have no place for these words of markers: {words}")


def _change(layer: Layer, form: Form, dialect: str) -> str:
    """What happens to a layer, in words."""
    assert layer.encoding is not None
    name = LEGACY_MARKER if form.entry is None else form.entry["format"]
    stays = layer.encoding.dialect == dialect and (dialect == LEGACY or regular(layer))
    rest, added = without_constant_scale(form)
    words = [f"{layer.encoding.dialect} {describe(layer)} to {name}"]
    if stays:
        words = [f"{name} made regular"] if rest.differs(layer) else []
    return ", ".join([*words, *(["activation scale added"] if added else [])])


def _already(scaled: Sequence[Layer]) -> str:
    if not scaled:
        return "no layer is quantized with scales"
    return "its layers have this form already, and nothing that is asked for would change them"


def _mark(prefix: str, full_precision: bool) -> LayerPlan:
    """The plan of a tensor that no layer of the source is: two zeros, or nothing."""
    count = 2 if full_precision else 0
    spec = TensorSpec(prefix + LEGACY_MARKER, "F8_E4M3", (count,))
    return Form((), ((spec, bytes(count)),)).plan(Layer(spec.name, spec, ()), "")
