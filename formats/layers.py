"""Layers of a checkpoint: which stored tensors make up one weight, and whether its numbers can be read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .comfy import MARKER
from .encoding import Encoding
from .markers import Entry, Markers, is_legacy_marker, read_markers
from .recognize import recognize
from .record import Record
from .source import Source
from .stored import Declared, Stored, Undecodable
from .tensors import FLOAT_DTYPES, TensorRef, TensorSpec

WEIGHT = ".weight"
PACKED = ".weight_packed"
_WEIGHT_SCALES = (
    ".weight_scale", ".weight_scale_2", ".weight_scale_inv", ".weight_global_scale", ".weight_scalar",
    ".weight_zero_point", ".weight_g_idx", ".weight_shape", ".pre_quant_scale",
)  # fmt: skip
"""Companions without which the codes beside them mean nothing."""
_OTHERS = (".scale_weight", ".scale_input", ".input_scale", ".input_zero_point", ".input_global_scale")
"""Companions that may stand beside a plain weight: activation scales, and legacy scales of what was not quantized."""
_PARTS = (WEIGHT, PACKED, *_WEIGHT_SCALES, *_OTHERS, MARKER)
_SUFFIXES = frozenset(part.removeprefix(".") for part in _PARTS)
_INTEGERS = ("BOOL", "I16", "U16", "I32", "U32", "I64", "U64")
"""Dtypes of tables and indices that may be named ``weight`` without being quantized."""

Parts = Mapping[str, TensorRef]


@dataclass(frozen=True, slots=True)
class Layer(Record):
    """The tensors that make up one weight, or one tensor that stands alone."""

    name: str
    """Key without ``.weight``; for a tensor that stands alone, its key."""
    weight: TensorSpec
    """The logical weight (or the tensor): full key, original dtype as far as known, shape without padding."""
    tensors: tuple[TensorRef, ...]
    """Everything stored for it, the weight first."""
    encoding: Encoding | None = None
    """How to decode it; None when the stored numbers are the weights."""
    marker: Entry | None = None
    """ComfyUI's description of it, when it has one."""
    problem: str | None = None
    """Why its numbers cannot be read: then it can only be passed through."""

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return sum([tensor.nbytes for tensor in self.tensors])

    @property
    def orphan(self) -> bool:
        """Whether it is a scale or marker whose weight the checkpoint lacks."""
        return self.problem is not None and self.name == self.weight.name

    def part(self, tensor: TensorSpec) -> str:
        """What one of its tensors is: ``.weight``, ``.weight_scale`` ..."""
        return tensor.name.removeprefix(self.name)


def group_layers(source: Source) -> list[Layer]:
    """Every tensor of the source, in order, as part of exactly one layer; legacy markers of whole models are left out.

    Reads headers, markers and config.json, never weights. Raises CheckpointError for a marker that is no JSON object.
    """
    markers = read_markers(source)
    declared = Declared.of(source.config)
    families = _families(source.refs)
    layers: list[Layer] = []
    for key, ref in source.refs.items():
        base, _, last = key.rpartition(".")
        if last not in _SUFFIXES or not base:
            if not is_legacy_marker(key):
                layers.append(Layer(key, ref, (ref,)))
            continue
        parts = families[base]
        weight = parts.get(WEIGHT) or parts.get(PACKED)
        if weight is None:
            layers.append(Layer(key, ref, (ref,), problem=f"belongs to {base}{WEIGHT}, which the checkpoint lacks"))
        elif weight is ref:
            stored = Stored(parts, markers.layers.get(base), _bias_rows(source, base), declared)
            layers.append(_layer(base, stored, markers))
    return layers


def describe(layer: Layer) -> str:
    """``nvfp4``, ``fp8 block 128``, ``int8 row rotated 256`` as in plans, or the dtype of plain numbers."""
    if layer.encoding is None:
        return layer.weight.dtype
    name, scaling, size = layer.encoding.format
    words = [name]
    if layer.encoding.scales is None:
        words.append("without scale")
    elif scaling != "group":
        words += [scaling, *([str(size)] if size else [])]
    if layer.encoding.rotation:
        words += ["rotated", str(layer.encoding.rotation)]
    return " ".join(words)


def stored_as(layer: Layer, marker: Entry, source: Source) -> Stored:
    """The tensors of a layer under another description."""
    parts = {ref.name.removeprefix(layer.name): ref for ref in layer.tensors}
    return Stored(parts, marker, _bias_rows(source, layer.name), Declared.of(source.config))


def _bias_rows(source: Source, base: str) -> int | None:
    bias = source.refs.get(f"{base}.bias")
    return bias.shape[0] if bias is not None and len(bias.shape) == 1 else None


def _families(refs: Mapping[str, TensorRef]) -> dict[str, dict[str, TensorRef]]:
    """Base name -> its tensors by suffix, the weight first."""
    families: dict[str, dict[str, TensorRef]] = {}
    for key, ref in refs.items():
        base, _, last = key.rpartition(".")
        if last in _SUFFIXES and base:
            families.setdefault(base, {})[f".{last}"] = ref
    for parts in families.values():
        for first in (PACKED, WEIGHT):
            if first in parts and next(iter(parts)) != first:
                ordered = {first: parts.pop(first), **parts}
                parts.clear()
                parts.update(ordered)
    return families


def _layer(base: str, stored: Stored, markers: Markers) -> Layer:
    """The layer of a weight that has at least itself."""
    weight, tensors = stored.codes, tuple(stored.parts.values())
    if weight.dtype in FLOAT_DTYPES or _is_table(stored):
        problem = _beside_floats(stored)
        return Layer(base, _named(base, weight), tensors, None, stored.marker, problem)
    try:
        if base in markers.conflicts:
            raise Undecodable(markers.conflicts[base])
        encoding = recognize(stored)
    except Undecodable as reason:
        problem = f"quantized in a way that cannot be decoded: {reason}"
        return Layer(base, _named(base, weight), tensors, None, stored.marker, problem)
    spec = TensorSpec(base + WEIGHT, _original_dtype(stored), encoding.shape)
    return Layer(base, spec, tensors, encoding, stored.marker or _legacy_marker(base, encoding, markers))


def _named(base: str, weight: TensorRef) -> TensorSpec:
    return weight if weight.name == base + WEIGHT else TensorSpec(base + WEIGHT, weight.dtype, weight.shape)


def _is_table(stored: Stored) -> bool:
    """Whether a weight that is no float stands for itself: nothing belongs to it and it is no matrix of codes."""
    alone = len(stored.parts) == 1 and stored.marker is None
    return alone and (len(stored.codes.shape) != 2 or stored.codes.dtype in _INTEGERS)


def _beside_floats(stored: Stored) -> str | None:
    """What forbids to read a float weight as plain numbers, or None."""
    if stored.marker is not None:
        return f"marked {stored.marker.get('format')} but stored as {stored.codes.dtype}"
    scales = [part for part in (PACKED, *_WEIGHT_SCALES) if part in stored.parts]
    if scales:
        return f"stored as {stored.codes.dtype} beside {', '.join(scales)}: whether the scale is applied is not known"
    return None


def _original_dtype(stored: Stored) -> str:
    names = {"torch.bfloat16": "BF16", "torch.float16": "F16", "torch.float32": "F32"}
    return names.get(str((stored.marker or {}).get("orig_dtype")), stored.declared.dtype)


def _legacy_marker(base: str, encoding: Encoding, markers: Markers) -> Entry | None:
    """The description that ComfyUI's loader gives a legacy layer, whatever the shape of its scales."""
    label = {"fp8": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}.get(encoding.format[0])
    if encoding.dialect != "legacy" or label is None:
        return None
    return {"format": label, **({"full_precision_matrix_mult": True} if markers.full_precision(base) else {})}
