"""Layers of a checkpoint: which tensors belong together, and how a quantized one is to be decoded.

Recognised by names, markers and config: ComfyUI markers, legacy ``scaled_fp8``, FP8 blocks with ``weight_scale_inv``
(DeepSeek), compressed-tensors, and plain FP8 casts. A low-precision weight that fits none is never taken for numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .comfy import HEADER_KEY, MARKER, model_prefix
from .encoding import Encoding, Layout
from .errors import CheckpointError
from .fileio import Reader
from .source import Source
from .tensors import FLOAT_DTYPES, TensorRef, TensorSpec

WEIGHT = ".weight"
_LEGACY = "scaled_fp8"
_PARTS = (
    WEIGHT, ".weight_packed", ".weight_scale", ".weight_scale_2", ".weight_scale_inv", ".weight_global_scale",
    ".weight_shape", ".weight_zero_point", ".weight_g_idx", ".scale_weight", ".scale_input", ".input_scale",
    ".input_global_scale", ".weight_scalar", MARKER,
)  # fmt: skip
"""Suffixes of the tensors that can make up one quantized layer."""


@dataclass(frozen=True)
class Layer:
    """The tensors that make up one weight, or one tensor that stands alone."""

    name: str
    """Key without ``.weight``; for a tensor that stands alone, its key."""
    weight: TensorSpec
    """The logical weight (or the tensor): full key, original dtype as far as known, shape without padding."""
    tensors: tuple[TensorRef, ...]
    """Everything stored for it."""
    encoding: Encoding | None = None
    """How to decode it; None when the stored numbers are the weights."""
    marker: Mapping[str, object] | None = None
    """ComfyUI's description of it, when it has one."""
    problem: str | None = None
    """Why the layer cannot be decoded: then it can only be passed through."""

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return sum(tensor.nbytes for tensor in self.tensors)


def group_layers(source: Source) -> list[Layer]:
    """Every tensor of the source, in order, as part of exactly one layer. Reads markers, never weights.

    Raises CheckpointError for a marker that is not JSON or names an unknown format or impossible shapes.
    """
    markers = _markers(source)
    legacy = any(name == _LEGACY or name.endswith("." + _LEGACY) for name in source.refs)
    layers: list[Layer] = []
    claimed: set[str] = set()
    for key, ref in source.refs.items():
        base, is_weight = _base(key)
        if key in claimed or key.rpartition(".")[2] == _LEGACY:
            continue
        parts = {}
        if is_weight and base is not None:
            parts = {part: source.refs[base + part] for part in _PARTS if base + part in source.refs}
        if base is not None and _is_quantized(ref, parts, base in markers):
            parts.pop("", None)
            layer = _decodable(_Found(base, parts, markers.get(base), source, legacy))
            claimed.update(tensor.name for tensor in layer.tensors)
            layers.append(layer)
        elif not _belongs(key, source):
            layers.append(Layer(base if is_weight and base else key, ref, (ref,)))
    return layers


def _base(key: str) -> tuple[str | None, bool]:
    for suffix in (WEIGHT, ".weight_packed"):
        if key.endswith(suffix):
            return key.removesuffix(suffix), True
    return None, False


def _belongs(key: str, source: Source) -> bool:
    """Whether ``key`` is a companion (scale, marker ...) that its quantized weight, seen before or later, claims."""
    for part in _PARTS[2:]:
        if key.endswith(part):
            base = key.removesuffix(part)
            weight = source.refs.get(base + WEIGHT) or source.refs.get(base + ".weight_packed")
            return weight is not None and weight.dtype not in FLOAT_DTYPES
    return False


def _is_quantized(ref: TensorRef, parts: Mapping[str, TensorRef], marked: bool) -> bool:
    if not parts or ref.dtype in FLOAT_DTYPES:
        return False
    return marked or len(parts) > 1 or (len(ref.shape) == 2 and ref.dtype not in ("BOOL", "I64", "I32"))


def _markers(source: Source) -> dict[str, dict[str, object]]:
    """ComfyUI's description of each layer; the header wins over marker tensors, as in its loader."""
    found: dict[str, dict[str, object]] = {}
    readers: dict[str, Reader] = {}
    try:
        for key, ref in source.refs.items():
            if key.endswith(MARKER):
                if ref.path not in readers:
                    readers[ref.path] = Reader(ref.path).__enter__()
                content = bytearray(ref.nbytes)
                readers[ref.path].read_into(memoryview(content), ref.start)
                found[key.removesuffix(MARKER)] = _parse(bytes(content), key, ref.path)
    finally:
        for reader in readers.values():
            reader.__exit__(None, None, None)
    if HEADER_KEY in source.metadata:
        header = _parse(source.metadata[HEADER_KEY].encode(), f"header entry {HEADER_KEY}", str(source.root))
        entries = header.get("layers")
        if isinstance(entries, dict):
            prefix = model_prefix(source.refs)
            for name, entry in entries.items():
                full = prefix + name if prefix + name + WEIGHT in source.refs else name
                if isinstance(entry, dict):
                    found[full] = {**found.get(full, {}), **entry}
    return found


def _parse(content: bytes, what: str, path: str) -> dict[str, object]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {what} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {what} must be a JSON object, is {type(value).__name__}")
    return value


@dataclass(frozen=True)
class _Found:
    """A quantized layer before its encoding is worked out."""

    base: str
    parts: Mapping[str, TensorRef]
    marker: dict[str, object] | None
    source: Source
    legacy: bool


def _decodable(found: _Found) -> Layer:
    """The layer with its encoding, or with the problem that forbids decoding."""
    tensors = tuple(found.parts.values())
    stored = found.parts.get(WEIGHT) or found.parts[".weight_packed"]
    try:
        encoding = next(_encodings(found, stored))
        _check(encoding)
    except (StopIteration, ValueError) as error:
        reason = str(error) or f"{stored.dtype} weight with {', '.join(sorted(p for p in found.parts if p != WEIGHT)) or 'no scale'}"
        weight = TensorSpec(found.base + WEIGHT, stored.dtype, stored.shape)
        return Layer(found.base, weight, tensors, None, found.marker, f"quantized in a way that cannot be decoded: {reason}")
    weight = TensorSpec(found.base + WEIGHT, _original_dtype(found), encoding.shape)
    return Layer(found.base, weight, tensors, encoding, found.marker)


def _original_dtype(found: _Found) -> str:
    names = {"torch.bfloat16": "BF16", "torch.float16": "F16", "torch.float32": "F32"}
    return names.get(str((found.marker or {}).get("orig_dtype")), "BF16")


def _encodings(found: _Found, stored: TensorRef) -> Iterator[Encoding]:
    """The first that fits; dialects that say what they are come before those known by their names."""
    if len(stored.shape) != 2:
        raise ValueError(f"{stored.dtype} weight of shape {list(stored.shape)}")
    if found.marker is not None:
        yield _comfy(found, stored)
    parts = found.parts
    if found.legacy and ".scale_weight" in parts:
        yield _scaled("legacy", stored, parts[".scale_weight"])
    if ".weight_scale_inv" in parts:
        yield _fp8_blocks(found, stored)
    if ".weight_packed" in parts:
        yield _packed(found, stored)
    if ".weight_zero_point" in parts or ".weight_g_idx" in parts:
        raise ValueError("asymmetric or permuted groups")
    if ".weight_scale" in parts and ".weight_scale_2" not in parts:
        yield _scaled("compressed-tensors", stored, parts[".weight_scale"], _block_structure(found.source))
    if set(parts) == {WEIGHT} and stored.dtype in ("F8_E4M3", "F8_E5M2"):
        name = "fp8" if stored.dtype == "F8_E4M3" else "fp8_e5m2"
        yield Encoding("plain-fp8", (name, "tensor", None), _two(stored.shape), stored)


def _two(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], shape[1]


def _comfy(found: _Found, stored: TensorRef) -> Encoding:
    assert found.marker is not None
    name = str(found.marker.get("format"))
    scale = found.parts.get(".weight_scale")
    if scale is None:
        raise ValueError(f"format {name} without .weight_scale")
    params = found.marker.get("params")
    entry = {**params, **found.marker} if isinstance(params, dict) else found.marker
    if name in ("mxfp8", "hybrid_mxfp8", "nvfp4"):
        return _comfy_groups(found, stored, scale, entry)
    rotation = _positive(entry.get("convrot_groupsize", 256)) if entry.get("convrot") else None
    known = {"float8_e4m3fn", "float8_e4m3fn_rowwise", "float8_e4m3fn_blockwise", "float8_e5m2", "int8_tensorwise", "int8_blockwise"}
    if name not in known:
        raise ValueError(f"format {name!r}")
    block = _positive(entry["group_size"]) if name.endswith("blockwise") and "group_size" in entry else None
    scaled = _scaled("comfy", stored, scale, block)
    return Encoding("comfy", scaled.format, scaled.shape, stored, scale, rotation=rotation)


def _comfy_groups(found: _Found, stored: TensorRef, scale: TensorRef, entry: Mapping[str, object]) -> Encoding:
    four_bit = entry.get("format") == "nvfp4"
    rows, columns = stored.shape[0], stored.shape[1] * (2 if four_bit else 1)
    original = entry.get("orig_shape")
    shape = (rows, columns)
    if isinstance(original, list) and len(original) == 2:
        shape = (_positive(original[0]), _positive(original[1]))
        if not (rows - 32 < shape[0] <= rows and columns - 32 < shape[1] <= columns):
            raise ValueError(f"orig_shape {original} does not fit the stored {[rows, columns]}")
    whole = found.parts.get(".weight_scale_2")
    if four_bit and whole is None:
        raise ValueError("nvfp4 without .weight_scale_2")
    name = ("nvfp4", "group", 16) if four_bit else ("mxfp8", "group", 32)
    layout = Layout(swizzled=True, high_nibble_first=four_bit)
    return Encoding("comfy", name, shape, stored, scale, whole if four_bit else None, layout)


def _positive(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{value!r} where a positive whole number belongs")
    return value


def _scaled(dialect: str, stored: TensorRef, scale: TensorRef, block: int | None = None) -> Encoding:
    """One-byte codes with multiplying scales whose shape tells the scaling."""
    names = {"F8_E4M3": "fp8", "F8_E5M2": "fp8_e5m2", "I8": "int8"}
    if stored.dtype not in names:
        raise ValueError(f"{stored.dtype} weight with .{scale.name.rpartition('.')[2]}")
    rows, columns = _two(stored.shape)
    if stored.dtype == "F8_E4M3" and scale.dtype in ("U8", "F8_E8M0") and scale.shape == (rows, -(-columns // 32)):
        return Encoding(dialect, ("mxfp8", "group", 32), (rows, columns), stored, scale)
    if scale.numel == 1:
        scaling: tuple[str, int | None] = ("tensor", None)
    elif scale.shape in ((rows,), (rows, 1)):
        scaling = ("row", None)
    elif len(scale.shape) == 2:
        size = block or -(-rows // scale.shape[0])
        if scale.shape != (-(-rows // size), -(-columns // size)):
            raise ValueError(f"scales {list(scale.shape)} are no {size} x {size} blocks of {rows} x {columns}")
        scaling = ("block", size)
    else:
        raise ValueError(f"scales {list(scale.shape)} of a {rows} x {columns} weight")
    return Encoding(dialect, (names[stored.dtype], *scaling), (rows, columns), stored, scale)


def _block_structure(source: Source) -> int | None:
    """Edge of the square blocks that config.json declares, in either of the two common places."""
    quantization = (source.config or {}).get("quantization_config")
    if not isinstance(quantization, dict):
        return None
    sizes = [quantization.get("weight_block_size")]
    groups = quantization.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        sizes.append(weights.get("block_structure") if isinstance(weights, dict) else None)
    for size in sizes:
        if isinstance(size, list) and len(size) == 2 and size[0] == size[1] and isinstance(size[0], int) and size[0] > 0:
            return size[0]
    return None


def _fp8_blocks(found: _Found, stored: TensorRef) -> Encoding:
    scaled = _scaled("fp8-block", stored, found.parts[".weight_scale_inv"], _block_structure(found.source) or 128)
    return scaled


def _packed(found: _Found, stored: TensorRef) -> Encoding:
    """compressed-tensors' two-a-byte NVFP4: row-major scales, low nibble first, the tensor scale divides."""
    scale, whole = found.parts.get(".weight_scale"), found.parts.get(".weight_global_scale")
    rows, columns = stored.shape[0], stored.shape[1] * 2
    if stored.dtype != "U8" or scale is None or whole is None or scale.dtype != "F8_E4M3":
        raise ValueError("packed weights that are not NVFP4")
    if scale.shape != (rows, columns // 16):
        raise ValueError(f"scales {list(scale.shape)} are no groups of 16 of {rows} x {columns}")
    return Encoding("compressed-tensors", ("nvfp4", "group", 16), (rows, columns), stored, scale, whole, Layout(divisor=True))


def _check(encoding: Encoding) -> None:
    """Refuses shapes of codes and scales that the encoding cannot have, before any byte is read."""
    built = encoding.build()
    rows, columns = encoding.shape
    if encoding.scales is None:
        return
    if encoding.layout.swizzled:
        from .swizzle import swizzled_shape

        wanted = swizzled_shape((encoding.codes.shape[0], built.columns(columns) // (built.block_size or 1)))
        if encoding.scales.shape != wanted:
            raise ValueError(f"scales {list(encoding.scales.shape)}, needs {list(wanted)}")
    if encoding.whole is not None and encoding.whole.numel != 1:
        raise ValueError(f"tensor scale of shape {list(encoding.whole.shape)}")
    if encoding.rotation and columns % encoding.rotation:
        raise ValueError(f"rotation group {encoding.rotation} does not divide {columns} columns")
    if encoding.codes.dtype != built.code_dtype:
        raise ValueError(f"{encoding.codes.dtype} codes, {built.name} needs {built.code_dtype} ({rows} x {columns})")
