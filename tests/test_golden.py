"""Bytes of the reference converter (convert_to_quant 1.3.1): equal, or different for a reason that a test names."""

from __future__ import annotations

import json
from fractions import Fraction
from functools import cache
from pathlib import Path

import pytest
import torch
from numerics import decode, one_thread, padded, quantize  # noqa: F401
from safetensors.torch import load_file

from quantloom.formats.format import Format
from quantloom.formats.registry import make_format
from quantloom.formats.rotation import rotate_, rotation_group
from quantloom.formats.swizzle import swizzle

GOLDEN = Path(__file__).parent / "data" / "golden"

FILES: dict[str, tuple[str, str | None, int | None]] = {
    "fp8_tensor": ("fp8", "tensor", None),
    "fp8_row": ("fp8", "row", None),
    "fp8_block16": ("fp8", "block", 16),
    "fp8_block64": ("fp8", "block", 64),
    "int8_tensor": ("int8", "tensor", None),
    "int8_row": ("int8", "row", None),
    "int8_block16": ("int8", "block", 16),
    "int8_block64": ("int8", "block", 64),
    "mxfp8_unifiedpath_fp32": ("mxfp8", None, None),
    "nvfp4_unifiedpath_fp32": ("nvfp4", None, None),
}
ROTATIONS = ("4", "16", "64", "256", "1024", "_dynamic_min64")
REFERENCE_FLOOR = 1e-12
"""The reference takes an amax below this for this: the codes of such a group are all 0."""


@cache
def tensors(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def weight_of(layer: str) -> torch.Tensor:
    return tensors("inputs")[layer].float()


def layers_of(name: str) -> list[str]:
    return sorted(key.removesuffix(".weight") for key in tensors(name) if key.endswith(".weight"))


def cases(zeros: bool = False) -> list[tuple[str, str]]:
    """(file, layer) of every expected layer that is (not) all zero."""
    return [(file, layer) for file in FILES for layer in layers_of(f"expected_{file}") if ("zero_64" in layer) == zeros]


def equal_bits(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Per element; one-byte types as they are, so that NaN codes count."""
    as_bits = {1: torch.uint8, 4: torch.int32}
    return a.contiguous().view(as_bits[a.itemsize]) == b.contiguous().view(as_bits[b.itemsize])


def group_amax(fmt: Format, weight: torch.Tensor) -> torch.Tensor:
    """Amax of each weight's group, from the definition."""
    x, size = padded(fmt, weight).abs(), fmt.block_size or 1
    if fmt.scaling == "tensor":
        return x.max().expand(x.shape)
    if fmt.scaling == "row":
        return x.amax(1, keepdim=True).expand(x.shape)
    high = size if fmt.scaling == "block" else 1
    tiled = x.view(x.shape[0] // high, high, -1, size).amax((1, 3))
    return tiled.repeat_interleave(high, 0).repeat_interleave(size, 1)


@pytest.mark.parametrize(("file", "layer"), cases())
def test_bytes_of_the_reference(file: str, layer: str) -> None:
    fmt, weight, expected = make_format(*FILES[file]), weight_of(layer), tensors(f"expected_{file}")
    shape = (weight.shape[0], weight.shape[1])
    if fmt.refuse(shape):
        assert file.startswith("fp8_block"), "see test_indivisible_blocks_are_refused"
        return
    quantized = quantize(fmt, weight)
    codes, scales = expected[f"{layer}.weight"], expected[f"{layer}.weight_scale"]
    amax = group_amax(fmt, weight)
    if fmt.name == "nvfp4":
        same_blocked(swap_nibbles(quantized.codes), codes)
        same_blocked(swizzle(quantized.scales.stored), scales.view(torch.uint8))
        assert quantized.whole is not None
        assert equal_bits(quantized.whole, expected[f"{layer}.weight_scale_2"])
        return
    if fmt.name == "mxfp8":
        ours = torch.zeros_like(codes.view(torch.uint8))
        ours[: shape[0]] = quantized.codes.view(torch.uint8)
        sound = torch.zeros(codes.shape, dtype=torch.bool)
        sound[: shape[0]] = (amax == 0) | (amax > 448 * 2.0**-127)  # below: test_tiny_mxfp8_blocks_hold_no_nan
        assert (ours == codes.view(torch.uint8))[sound].all()
        below = amax.view(shape[0], -1, 32)[..., 0] <= 448 * 2.0**-127
        same = swizzle(quantized.scales.stored) == scales
        assert (same | swizzle(below.to(torch.uint8)).bool()).all()
        return
    sound = (amax == 0) | (amax >= REFERENCE_FLOOR)  # below: test_small_weights_keep_the_error_of_any_others
    assert equal_bits(quantized.codes, codes)[sound].all()
    if fmt.scaling == "row":
        sound = sound[:, 0]
    elif fmt.scaling == "block":
        sound = sound[:: fmt.block_size, :: fmt.block_size]
    else:
        sound = sound[0, 0]
    stored = quantized.scales.stored
    assert equal_bits(stored.reshape(-1), scales.reshape(-1)).view(stored.shape)[sound].all()


def same_blocked(ours: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal, and zero in the rows that the reference pads."""
    rows = ours.shape[0]
    assert torch.equal(ours, expected[:rows])
    assert not expected[rows:].any()


def swap_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """The reference stores the first of two weights in the high half of a byte."""
    return (codes << 4) | (codes >> 4)


def test_every_layer_is_compared() -> None:
    assert len(cases()) == sum(len(layers_of(f"expected_{file}")) - 1 for file in FILES)
    stored = {path.stem for path in GOLDEN.glob("expected_*")}
    rotated = {f"expected_int8_row_convrot{name}" for name in ROTATIONS}
    assert stored == {f"expected_{file}" for file in FILES} | rotated | {"expected_hybrid_mxfp8"}  # see test_hybrid.py


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_rotated_rows_of_the_reference(rotation: str) -> None:
    """The reference rotates by a matrix product, whose order of additions is the library's: near-ties go either way."""
    fmt, expected = make_format("int8", "row"), tensors(f"expected_int8_row_convrot{rotation}")
    for layer in layers_of(f"expected_int8_row_convrot{rotation}"):
        weight = weight_of(layer)
        marker = json.loads(bytes(expected[f"{layer}.comfy_quant"].tolist()))
        group = int(marker["convrot_groupsize"])
        if rotation.startswith("_dynamic"):
            assert group == rotation_group(weight.shape[1])
        rotated = rotate_(weight.clone(), group)
        amax = rotated.abs().amax(1)
        sound = amax >= REFERENCE_FLOOR
        quantized = quantize(fmt, rotated)
        codes = expected[f"{layer}.weight"]
        if not sound.any():  # the tests of zero and of small weights say more
            continue
        scales = expected[f"{layer}.weight_scale"].reshape(-1)
        assert torch.allclose(quantized.scales.stored[sound], scales[sound], rtol=1e-6, atol=0), layer
        scaled = rotated.double() * (127 / amax.double())[:, None]
        near_tie = ((scaled - scaled.floor()) - 0.5).abs() <= 1e-3
        off = (quantized.codes.int() - codes.int()).abs()
        assert (off[sound] <= near_tie[sound].int()).all(), layer


@pytest.mark.parametrize(("file", "layer"), cases(zeros=True))
def test_zero_tensors_have_valid_scales(file: str, layer: str) -> None:
    """The reference writes scale 1 for FP8 and a scale of shape (0, 0) for INT8, which no client can apply.

    Here a tensor of zeros is stored like any other: zero codes, and scales of the shape that its neighbours have.
    """
    fmt, weight, expected = make_format(*FILES[file]), weight_of(layer), tensors(f"expected_{file}")
    quantized = quantize(fmt, weight)
    stored = quantized.scales.stored
    assert not quantized.codes.view(torch.uint8).any()
    assert stored.shape == fmt.scale_shape((64, 64))
    assert not decode(fmt, quantized).any()
    if fmt.scale_dtype == "F32":
        assert (torch.isfinite(stored) & (stored > 0)).all()
    reference = expected[f"{layer}.weight_scale"]
    if file in ("int8_tensor", "int8_row"):
        assert tuple(reference.shape) == (0, 0)
    elif fmt.name in ("fp8", "int8") and file != "int8_block16":
        assert (reference == 1).all() or file == "int8_block64"
    else:
        assert not fmt.name.endswith("fp4") or quantized.whole == expected[f"{layer}.weight_scale_2"] == 1


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith(("fp8", "int8"))])
def test_small_weights_keep_the_error_of_any_others(file: str) -> None:
    """The reference puts a floor of 1e-12 under amax: every code of a layer below it is 0, and the layer is lost."""
    fmt = make_format(*FILES[file])
    small = weight_of("i_fp32_tiny_64x128")
    assert small.abs().max() < REFERENCE_FLOOR
    if not file.startswith("int8_block"):
        assert not tensors(f"expected_{file}")["i_fp32_tiny_64x128.weight"].float().any()
    factor = 2.0**40  # scales amax out of the floor, and no weight's mantissa
    ours, normal = quantize(fmt, small), quantize(fmt, small * factor)
    assert torch.equal(ours.codes.view(torch.uint8), normal.codes.view(torch.uint8))
    error = (decode(fmt, ours).double() - small.double()).norm() / small.double().norm()
    assert error < 0.04


@pytest.mark.parametrize("file", ["fp8_row", "int8_row"])
def test_subnormal_rows(file: str) -> None:
    """A row of subnormal numbers has no reciprocal scale in float32; ours is a finite one, and the codes are 0."""
    fmt, weight = make_format(*FILES[file]), weight_of("j_fp32_subnormal_rows_64x128")
    amax = weight.abs().amax(1)
    rows = (amax > 0) & (amax < 2.0**-126)
    assert rows.any()
    quantized = quantize(fmt, weight)
    stored = quantized.scales.stored[rows]
    assert (torch.isfinite(stored) & (stored > 0)).all()
    assert not decode(fmt, quantized)[rows].double().abs().gt(1e-37).any()


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_indivisible_blocks_are_refused(name: str) -> None:
    """The reference falls back to row scales for FP8 and still writes "blockwise", so that no reader can tell.

    For INT8 it aborts the whole conversion. Here the format refuses the shape, with the numbers, and the plan keeps
    the layer.
    """
    fmt = make_format(name, "block", 64)
    assert fmt.refuse((130, 70)) == "block size 64 does not divide 130 x 70"
    assert fmt.refuse((128, 64)) is None
    if name == "fp8":
        expected = tensors("expected_fp8_block64")
        refused = [layer for layer in layers_of("expected_fp8_block64") if expected[f"{layer}.weight_scale"].dim() == 1]
        assert refused
        for layer in refused:
            rows, columns = weight_of(layer).shape
            assert fmt.refuse((rows, columns)) is not None


def test_tiny_mxfp8_blocks_hold_no_nan() -> None:
    """The reference gives blocks up to 448 * 2**-127 the scale 0 and divides by it.

    Every weight becomes 448 times that 0, and an exact zero becomes a NaN code. Here the least scale is 2**-126.
    """
    layer, fmt = "j_fp32_subnormal_rows_64x128", make_format("mxfp8")
    weight = weight_of(layer)
    reference = tensors("expected_mxfp8_unifiedpath_fp32")[f"{layer}.weight"].float()
    amax = group_amax(fmt, weight)
    tiny = (amax > 0) & (amax <= 448 * 2.0**-127)
    assert tiny.any()
    assert (reference[tiny].abs() == 448).all()
    weight[tiny & (torch.arange(128) % 32 == 5)] = 0.0
    quantized = quantize(fmt, weight)
    assert torch.isfinite(quantized.codes.float()).all()
    assert (quantized.scales.stored[tiny[:, ::32]] == 1).all()
    decoded = decode(fmt, quantized)
    assert ((decoded - weight).abs() <= weight.abs() * 2.0**-4 + 2.0**-136).all()


def test_mxfp8_exponents_just_above_a_power_of_two() -> None:
    """A float32 logarithm cannot tell 448 * 2**k from the next number; the reference then rounds the exponent down.

    The largest weight of such a block is beyond 448 and saturates. Integer arithmetic takes the next exponent.
    """
    fmt, wrong = make_format("mxfp8"), 0
    for k in range(-100, 100):
        amax = torch.nextafter(torch.tensor(448.0 * 2.0**k), torch.tensor(torch.inf))
        block = torch.zeros(1, 32)
        block[0, 0] = amax
        exponent = int(quantize(fmt, block).scales.stored) - 127
        assert Fraction(float(amax)) <= 448 * Fraction(2) ** exponent
        assert exponent == k + 1
        wrong += int(torch.ceil(torch.log2(amax / 448.0))) != exponent
    assert wrong > 100
