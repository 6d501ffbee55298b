"""The same codes and scales in another dialect: names, shapes of scales and descriptions change, numbers do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..formats.comfy import MARKER, LayerOptions, format_string, marker, marker_tensor
from ..formats.encoding import Encoding
from ..formats.layers import Layer, describe
from ..formats.markers import Entry, flat
from ..formats.tensors import FLOAT_DTYPES, TensorRef, TensorSpec, number_tensor
from .casting import Recast
from .reading import Copy
from .work import LayerPlan, Step
from .writing import Write

COMFY, LEGACY = "comfy", "legacy"
INPUT_SCALES = {COMFY: ".input_scale", LEGACY: ".scale_input"}
"""Dialect -> what it calls an activation scale."""
SCALES = {COMFY: ".weight_scale", LEGACY: ".scale_weight"}
"""Dialect -> what it calls the scales of a weight."""
CLEANING = "--clean leaves it out"
_OWN = frozenset({*SCALES.values(), *INPUT_SCALES.values(), MARKER})
_FULL_PRECISION = "full_precision_matrix_mult"
_SHAPED = ("format", "group_size", "per_row", "convrot", "convrot_groupsize", _FULL_PRECISION)
"""Keys of a marker that follow from how the layer is stored."""


class Inexpressible(ValueError):
    """Why a dialect cannot say how a layer is stored."""


@dataclass(frozen=True)
class Form:
    """How one layer is stored."""

    moves: tuple[tuple[TensorRef, TensorSpec], ...]
    """What is stored, and what it becomes."""
    constants: tuple[tuple[TensorSpec, bytes], ...] = ()
    entry: Entry | None = None
    """What marker and header say of it."""
    unused: tuple[str, ...] = ()
    """Tensors of the layer that mean nothing in its encoding: leftovers."""

    def plan(self, layer: Layer, change: str) -> LayerPlan:
        """Copies what keeps its dtype, and writes the rest anew."""
        same = tuple((ref.name, spec.name) for ref, spec in self.moves if ref.dtype == spec.dtype)
        other = tuple((ref, spec) for ref, spec in self.moves if ref.dtype != spec.dtype)
        steps: list[Step] = [Copy(same)] if not other else [Copy(same), Recast(other)]
        outputs = (*(spec for _, spec in self.moves), *(spec for spec, _ in self.constants))
        return LayerPlan(layer, (*steps, Write()), outputs, constants=self.constants, entry=self.entry, change=change)

    def differs(self, layer: Layer) -> bool:
        """Whether something of the layer changes."""
        stored = {(ref.name, ref.dtype, ref.shape) for ref in layer.tensors}
        made = {(spec.name, spec.dtype, spec.shape) for _, spec in self.moves}
        made |= {(spec.name, spec.dtype, spec.shape) for spec, _ in self.constants}
        return stored != made or self.entry not in (None, layer.marker)


def comfy_form(layer: Layer, full_precision: bool | None) -> Form:
    """A quantized layer with ComfyUI's names and marker. ``full_precision``: what the marker asks for; None: as before.

    Raises Inexpressible for scales of another layout, and blocks that no client of ComfyUI reads.
    """
    encoding = _encoding(layer)
    built = encoding.build()
    if encoding.dialect != COMFY:
        if built.scaling == "group":
            raise Inexpressible(f"{encoding.dialect} {built.name} has another layout of codes and scales")
        if problem := built.refuse(encoding.shape):
            raise Inexpressible(problem)
    entry = _comfy_entry(layer, encoding, full_precision)
    form = _form(layer, encoding, COMFY)
    constants = [marker_tensor(layer.name, entry)]
    if built.name == "int8" and built.scaling == "block" and not has_input_scale(form):
        constants.append(number_tensor(layer.name + INPUT_SCALES[COMFY], 1.0))  # the nodes that read it insist
    return replace(form, constants=tuple(constants), entry=entry)


def legacy_form(layer: Layer) -> Form:
    """A layer with the names of ``scaled_fp8`` files, whatever its scales are."""
    return _form(layer, _encoding(layer), LEGACY)


def check_legacy(layer: Layer) -> None:
    """Raises Inexpressible for what ComfyUI's reader of ``scaled_fp8`` files would get wrong: all but E4M3 codes with
    one scale."""
    name, scaling, _ = _encoding(layer).format
    if (name, scaling) == ("fp8", "tensor") and layer.encoding and layer.encoding.rotation is None:
        return
    raise Inexpressible(f"{describe(layer)}, and scaled_fp8 files hold FP8 E4M3 with one scale")


def asks_full_precision(layer: Layer) -> bool:
    """Whether its marker, or the legacy one above it, asks to be multiplied in full precision."""
    return bool(flat(layer.marker or {}).get(_FULL_PRECISION))


def lost_words(layer: Layer) -> list[str]:
    """Keys of its marker that a ``scaled_fp8`` file has no place for."""
    return [key for key in flat(layer.marker or {}) if key not in ("format", _FULL_PRECISION)]


def regular(layer: Layer) -> bool:
    """Whether its marker names the format that its scales really have."""
    said, built = flat(layer.marker or {}), _encoding(layer).build()
    if said.get("format") != format_string(built):
        return False
    return built.scaling != "block" or said.get("group_size") == built.block_size


def with_input_scale(layer: Layer, form: Form, dialect: str, value: float) -> Form:
    """An FP8 layer with an activation scale, where it lacks one; others as they are."""
    if not _encoding(layer).format[0].startswith("fp8") or has_input_scale(form):
        return form
    constant = number_tensor(layer.name + INPUT_SCALES[dialect], value)
    return replace(form, constants=(*form.constants, constant))


def without_constant_scale(form: Form) -> tuple[Form, bool]:
    """The form without the activation scale that is added to what is stored, and whether it has one."""
    others = tuple(each for each in form.constants if not each[0].name.endswith(tuple(INPUT_SCALES.values())))
    return replace(form, constants=others), len(others) < len(form.constants)


def has_input_scale(form: Form) -> bool:
    return any(spec.name.endswith(tuple(INPUT_SCALES.values())) for _, spec in form.moves)


def plain_form(layer: Layer, dtype: str | None) -> Form:
    """A layer that is not quantized, in another dtype if one is given; scales and markers beside it are unused."""
    weight, *others = layer.tensors
    wanted = dtype if dtype and weight.dtype in FLOAT_DTYPES else weight.dtype
    return Form(((weight, TensorSpec(weight.name, wanted, weight.shape)),), unused=tuple(ref.name for ref in others))


def with_unused(layer: Layer, form: Form) -> Form:
    """The form with its leftovers, under the names that they have. Raises Inexpressible where such a name is taken."""
    taken = {spec.name for _, spec in form.moves} | {spec.name for spec, _ in form.constants}
    kept = [ref for ref in layer.tensors if ref.name in form.unused]
    for ref in kept:
        part = layer.part(ref)
        if layer.encoding and part in INPUT_SCALES.values() and ref.numel != 1:
            raise Inexpressible(f"{part} has {ref.numel} numbers, and clients read one; {CLEANING}")
        if ref.name in taken:
            raise Inexpressible(f"{part} is taken by what another tensor is renamed to; {CLEANING}")
    return replace(form, moves=(*form.moves, *((ref, ref) for ref in kept)))


def _encoding(layer: Layer) -> Encoding:
    assert layer.encoding is not None
    return layer.encoding


def _form(layer: Layer, encoding: Encoding, dialect: str) -> Form:
    """Codes, scales and activation scale under the names of a dialect; other companions keep theirs."""
    used = [ref for ref in layer.tensors if encoding.scales and ref.name == encoding.scales.name]
    inputs = [ref for ref in layer.tensors if layer.part(ref) in INPUT_SCALES.values() and ref.numel == 1]
    moves, unused = [], []
    for ref in layer.tensors:
        if used and ref is used[0]:
            moves.append((ref, _scales(layer.name + SCALES[dialect], encoding, ref)))
        elif inputs and ref is inputs[0]:
            moves.append((ref, TensorSpec(layer.name + INPUT_SCALES[dialect], "F32", ref.shape)))
        elif layer.part(ref) not in _OWN:
            moves.append((ref, ref))
        elif layer.part(ref) != MARKER:
            unused.append(ref.name)
    return Form(tuple(moves), unused=tuple(unused))


def _scales(name: str, encoding: Encoding, ref: TensorRef) -> TensorSpec:
    """Scales as clients read them: float32 that multiply, rows of INT8 in a column, blocks in a grid; block scales of
    MXFP8 and NVFP4 as they are."""
    _, scaling, _ = encoding.format
    rows = encoding.shape[0]
    assert encoding.scales is not None
    if scaling == "group":
        return TensorSpec(name, ref.dtype, ref.shape)
    shape = encoding.scales.shape
    if scaling == "row":
        shape = (rows, 1) if encoding.format[0] == "int8" else (rows,)
    return TensorSpec(name, "F32", shape)


def _comfy_entry(layer: Layer, encoding: Encoding, full_precision: bool | None) -> dict[str, Any]:
    """The layer's marker, made anew where its format is not what is stored; other keys survive."""
    said: Mapping[str, Any] = flat(layer.marker or {})
    asked = asks_full_precision(layer) if full_precision is None else full_precision
    if regular(layer):
        if asked == asks_full_precision(layer):
            return {"format": said["format"], **said}
        entry = {key: value for key, value in said.items() if key != _FULL_PRECISION}
        return {**entry, _FULL_PRECISION: True} if asked else entry
    made = marker(encoding.build(), encoding.shape, LayerOptions(encoding.rotation, asked))
    return made | {key: value for key, value in said.items() if key not in _SHAPED}
