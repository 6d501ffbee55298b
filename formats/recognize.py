"""Encodings: how the tensors of one quantized layer decode to weights, one small function per dialect.

A function answers with an encoding, with None when the layer is not of its dialect, or raises Undecodable when it is
but cannot be read: codes are never taken for numbers.
"""

from __future__ import annotations

from collections.abc import Callable

from .comfy import WHOLE
from .encoding import Encoding, Layout
from .markers import Entry, flat
from .rotation import is_power_of_four
from .stored import (
    ONE_BYTE,
    Shape,
    Stored,
    Undecodable,
    as_count,
    as_grid,
    as_pair,
    expect_dtype,
    expect_shape,
    fits,
    scaled,
    tensor_scale,
)
from .swizzle import swizzled_shape
from .tensors import TensorRef

COMFY_CODES = {
    "float8_e4m3fn": "F8_E4M3", "float8_e4m3fn_rowwise": "F8_E4M3", "float8_e4m3fn_blockwise": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int8_tensorwise": "I8", "int8_blockwise": "I8",
    "mxfp8": "F8_E4M3", "hybrid_mxfp8": "F8_E4M3", "nvfp4": "U8",
}  # fmt: skip
"""Formats of ComfyUI and ComfyUI-QuantOps that are decoded -> dtype of their codes."""

_MX_ZERO = 2.0**-127
"""What exponent byte 0 means by the OCP MX specification."""


def recognize(stored: Stored) -> Encoding:
    """The encoding of a layer. Raises Undecodable with the reason when there is none."""
    if len(stored.codes.shape) != 2:
        raise Undecodable(f"{stored.codes.dtype} weight of shape {list(stored.codes.shape)}")
    if ".pre_quant_scale" in stored.parts:
        raise Undecodable("its inputs are scaled by .pre_quant_scale")
    for dialect in _DIALECTS:
        encoding = dialect(stored)
        if encoding is not None:
            return encoding
    others = ", ".join(sorted(part for part in stored.parts if part not in (".weight", ".weight_packed")))
    raise Undecodable(f"{stored.codes.dtype} weight with {others or 'no scale'}")


def _comfy(stored: Stored) -> Encoding | None:
    if stored.marker is None:
        return None
    entry = flat(stored.marker)
    name = str(entry.get("format"))
    if name not in COMFY_CODES:
        raise Undecodable(f"ComfyUI format {name!r}")
    if ".weight" not in stored.parts or stored.codes.dtype != COMFY_CODES[name]:
        raise Undecodable(f"marked {name} but stored as {stored.codes.dtype}, needs {COMFY_CODES[name]}")
    scale = stored.parts.get(".weight_scale")
    if scale is None:
        raise Undecodable(f"marked {name} but without .weight_scale")
    if name in ("mxfp8", "hybrid_mxfp8", "nvfp4"):
        return _comfy_groups(stored, scale, entry)
    edge = as_count(entry.get("group_size")) if name.endswith("blockwise") else None
    encoding = scaled("comfy", stored, scale, (edge, edge) if edge else None)
    if name != "int8_tensorwise" or not entry.get("convrot"):
        return encoding
    group, columns = as_count(entry.get("convrot_groupsize", 256)), stored.shape[1]
    if group is None or not is_power_of_four(group) or columns % group:
        given = entry.get("convrot_groupsize")
        raise Undecodable(f"rotated in groups of {given}, which is no power of four that divides {columns} columns")
    return Encoding("comfy", encoding.format, encoding.shape, stored.codes, scale, rotation=group)


def _comfy_groups(stored: Stored, scale: TensorRef, entry: Entry) -> Encoding:
    """MXFP8 and NVFP4: weights padded to whole groups in both dimensions, scales in tile order.

    Hybrid MXFP8 is decoded by its groups, which are exact whatever its scalar is; it may even lack it.
    """
    name = str(entry["format"])
    four_bit = name == "nvfp4"
    group = 16 if four_bit else 32
    rows, columns = stored.shape[0], stored.shape[1] * (2 if four_bit else 1)
    what = f"a {rows} x {columns} {name} weight"
    if rows % group or columns % group:
        raise Undecodable(f"{what} that is not padded to multiples of {group}")
    expect_dtype(scale, ("F8_E4M3", "U8") if four_bit else ("F8_E8M0", "U8"))
    expect_shape(scale, swizzled_shape((rows, columns // group)), what)
    whole = tensor_scale(stored, WHOLE[name]) if four_bit or WHOLE.get(name) in stored.parts else None
    shape = _unpadded(stored, (rows, columns), group, entry.get("orig_shape"))
    layout = Layout(swizzled=True, high_nibble_first=four_bit)
    return Encoding("comfy", (name, "group", group), shape, stored.codes, scale, whole, layout)


def _unpadded(stored: Stored, padded: Shape, group: int, original: object) -> Shape:
    """The logical shape: what the marker says, else the stored one unless the bias tells that it is padded."""
    if original is None:
        if stored.bias_rows not in (None, padded[0]):
            true = f"its bias has {stored.bias_rows} rows"
            raise Undecodable(f"padded to {list(padded)} ({true}), and no orig_shape says from what")
        return padded
    shape = as_pair(original)
    if shape is None or any(-(-true // group) * group != wide for true, wide in zip(shape, padded, strict=True)):
        raise Undecodable(f"orig_shape {original} does not pad to the stored {list(padded)}")
    return shape


def _legacy(stored: Stored) -> Encoding | None:
    scale = stored.parts.get(".scale_weight")
    return None if scale is None else scaled("legacy", stored, *as_grid(stored.shape, scale))


def _fp8_blocks(stored: Stored) -> Encoding | None:
    """Blocks as DeepSeek and transformers store them: the scale multiplies, despite its name."""
    scale = stored.parts.get(".weight_scale_inv")
    if scale is None:
        return None
    block = stored.declared.block
    if block is None and fits(stored.shape, scale.shape, (128, 128)):
        block = (128, 128)
    return scaled("fp8-block", stored, scale, block)


def _packed(stored: Stored) -> Encoding | None:
    """NVFP4 of compressed-tensors: row-major scales, low nibble first, the tensor scale divides."""
    if ".weight_packed" not in stored.parts:
        return None
    scale = stored.parts.get(".weight_scale")
    if ".weight" in stored.parts:
        raise Undecodable("both .weight and .weight_packed")
    if stored.codes.dtype == "I32":
        raise Undecodable("integers packed into I32 (pack-quantized)")
    if stored.codes.dtype != "U8" or scale is None:
        raise Undecodable(f".weight_packed of {stored.codes.dtype} with {scale.dtype if scale else 'no'} scales")
    if scale.dtype == "U8" and ".weight_global_scale" not in stored.parts:
        raise Undecodable("MXFP4 (mxfp4-pack-quantized)")
    rows, columns = stored.shape[0], stored.shape[1] * 2
    expect_dtype(scale, ("F8_E4M3",))
    expect_shape(scale, (rows, -(-columns // 16)), f"a {rows} x {columns} weight in groups of 16")
    if columns % 16:
        raise Undecodable(f"{columns} columns are no whole groups of 16")
    whole = tensor_scale(stored, ".weight_global_scale")
    layout = Layout(divisor=True)
    return Encoding("compressed-tensors", ("nvfp4", "group", 16), (rows, columns), stored.codes, scale, whole, layout)


def _scaled_codes(stored: Stored) -> Encoding | None:
    """One-byte codes with ``weight_scale``: compressed-tensors, FP8 of ModelOpt, files that lost their markers."""
    scale = stored.parts.get(".weight_scale")
    if scale is None:
        return None
    if ".weight_zero_point" in stored.parts or ".weight_g_idx" in stored.parts:
        raise Undecodable("asymmetric or permuted groups")
    if ".weight_scale_2" in stored.parts:
        raise Undecodable("NVFP4 without a marker: nibble order and layout of the scales are unknown")
    dialect = "compressed-tensors" if stored.declared.method == "compressed-tensors" else "scaled"
    rows, columns = stored.shape
    grouped = columns % 32 == 0 and scale.shape == (rows, columns // 32)
    if stored.codes.dtype == "F8_E4M3" and (scale.dtype == "U8" or (scale.dtype == "F8_E8M0" and grouped)):
        expect_shape(scale, (rows, -(-columns // 32)), f"a {rows} x {columns} weight in groups of 32")
        if columns % 32:
            raise Undecodable(f"{columns} columns are no whole groups of 32")
        layout = Layout(zero_exponent=_MX_ZERO)
        return Encoding(dialect, ("mxfp8", "group", 32), stored.shape, stored.codes, scale, layout=layout)
    if dialect == "scaled" and stored.declared.block is None:
        return scaled(dialect, stored, *as_grid(stored.shape, scale))
    return scaled(dialect, stored, scale, stored.declared.block)


def _plain_fp8(stored: Stored) -> Encoding | None:
    """Weights that were cast to FP8: the codes are the numbers."""
    name = ONE_BYTE.get(stored.codes.dtype)
    if name not in ("fp8", "fp8_e5m2") or set(stored.parts) != {".weight"}:
        return None
    if stored.declared.method is not None:
        raise Undecodable(f"{stored.codes.dtype} weight without a scale, though config.json declares quantization")
    return Encoding("plain-fp8", (name, "tensor", None), stored.shape, stored.codes)


_DIALECTS: tuple[Callable[[Stored], Encoding | None], ...] = (
    _comfy, _legacy, _fp8_blocks, _packed, _scaled_codes, _plain_fp8,
)  # fmt: skip
"""Those that say what they are come before those that are known by their names."""
