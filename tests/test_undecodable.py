"""Quantized layers that cannot be decoded: passed through untouched, with the reason in the plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_cases import CASES, LAYER, Case, layer_of, marker_tensor, nvfp4, packed_nvfp4, rotated, same_bytes, save
from safetensors import safe_open
from safetensors.torch import load_file

from quantloom import Pipeline
from quantloom.formats.layers import group_layers
from quantloom.formats.source import open_source

OTHER = "blocks.1.lin"
PLAIN = {OTHER + ".weight": torch.randn(32, 64, dtype=torch.bfloat16)}

Entry = dict[str, Any]


def named(name: str, drop: str = "", marker: Entry | None = None, config: Entry | None = None, **parts: Any) -> Case:
    """A sound case with some tensors replaced (``weight_scale=...``), one dropped, or another description."""
    return changed(CASES[name](), drop, marker, config, **parts)


def changed(case: Case, drop: str = "", marker: Entry | None = None, config: Entry | None = None, **parts: Any) -> Case:
    case.tensors = {part: tensor for part, tensor in case.tensors.items() if part != f".{drop}"}
    case.tensors |= {f".{part}": tensor for part, tensor in parts.items()}
    case.config = config or case.config
    case.marker = marker or case.marker
    return case


def unmarked(case: Case) -> Case:
    case.marker = None
    return case


def packed(**changes: Any) -> Case:
    return changed(packed_nvfp4((33, 48)), **changes)


def fp8(*shape: int) -> torch.Tensor:
    return torch.zeros(shape).to(torch.float8_e4m3fn)


def u8(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


f32 = torch.ones

MARKED = {
    "an unknown format": (
        lambda: named("comfy fp8", marker={"format": "convrot_w4a4"}),
        "ComfyUI format 'convrot_w4a4'",
    ),
    "blocks in three dimensions": (
        lambda: named("comfy fp8", marker={"format": "float8_e4m3fn_block3d"}, weight_scale=f32(130, 1, 1)),
        "ComfyUI format 'float8_e4m3fn_block3d'",
    ),
    "no format": (lambda: named("comfy fp8", marker={"group_size": 1}), "ComfyUI format 'None'"),
    "fp8 labelled nvfp4": (
        lambda: named("comfy fp8", marker={"format": "nvfp4"}),
        "marked nvfp4 but stored as F8_E4M3, needs U8",
    ),
    "fp8 stored as bytes": (lambda: named("comfy fp8", weight=u8(4, 4)), "stored as U8, needs F8_E4M3"),
    "no scale": (lambda: named("comfy fp8", drop="weight_scale"), "marked float8_e4m3fn but without .weight_scale"),
    "too few row scales": (
        lambda: named("comfy fp8 row", weight_scale=f32(129)),
        ".weight_scale of shape [129] for a 130 x 70 weight",
    ),
    "scales in three dimensions": (
        lambda: named("comfy fp8", weight_scale=f32(130, 2, 1)),
        ".weight_scale of shape [130, 2, 1] for a 130 x 70 weight",
    ),
    "empty scales": (lambda: named("comfy int8", weight_scale=f32(0, 0)), "shape [0, 0] for a 33 x 50 weight"),
    "integer scales": (
        lambda: named("comfy fp8", weight_scale=torch.ones((), dtype=torch.int32)),
        ".weight_scale is I32, needs BF16 or",
    ),
    "blocks that do not fit": (
        lambda: named("comfy fp8 block", weight_scale=f32(2, 2)),
        "[2, 2] for a 128 x 192 weight: does not fit blocks of 64",
    ),
    "e5m2 with row scales": (
        lambda: named("comfy fp8_e5m2", weight_scale=f32(130)),
        "F8_E5M2 weight with row scales",
    ),
    "a rotation that clients refuse": (
        lambda: rotated((33, 128), 16, {"convrot": True, "convrot_groupsize": 32}),
        "groups of 32, which is no power of four that divides 128 columns",
    ),
    "a rotation that does not divide": (
        lambda: rotated((33, 80), 16, {"convrot": True, "convrot_groupsize": 64}),
        "groups of 64, which is no power of four that divides 80 columns",
    ),
    "mxfp8 scales in rows": (
        lambda: named("comfy mxfp8", weight_scale=u8(160, 3)),
        ".weight_scale has shape [160, 3], a 160 x 96 mxfp8 weight needs [256, 4]",
    ),
    "mxfp8 without padding": (
        lambda: named("comfy mxfp8", weight=fp8(130, 70)),
        "a 130 x 70 mxfp8 weight that is not padded to multiples of 32",
    ),
    "no tensor scale": (lambda: named("comfy nvfp4", drop="weight_scale_2"), "NVFP4 without .weight_scale_2"),
    "two tensor scales": (
        lambda: named("comfy nvfp4", weight_scale_2=f32(2)),
        ".weight_scale_2 has shape [2], needs one number",
    ),
    "float scales of blocks": (
        lambda: named("comfy nvfp4", weight_scale=f32(256, 8)),
        ".weight_scale is F32, needs F8_E4M3 or U8",
    ),
    "an impossible original shape": (
        lambda: named("comfy mxfp8", marker={"format": "mxfp8", "orig_shape": [100, 70]}),
        "orig_shape [100, 70] does not pad to the stored [160, 96]",
    ),
    "a nonsense original shape": (
        lambda: named("comfy mxfp8", marker={"format": "mxfp8", "orig_shape": [130.0, None]}),
        "orig_shape [130.0, None] does not pad",
    ),
    "an unknown original shape": (
        lambda: named("comfy mxfp8", marker={"format": "mxfp8"}, bias=f32(130)),
        "padded to [160, 96] (its bias has 130 rows), and no orig_shape says from what",
    ),
    "scaled inputs": (
        lambda: named("comfy nvfp4", pre_quant_scale=f32(70)),
        "its inputs are scaled by .pre_quant_scale",
    ),
    "a convolution": (
        lambda: named("comfy fp8", weight=fp8(4, 4, 3, 3)),
        "F8_E4M3 weight of shape [4, 4, 3, 3]",
    ),
}
UNMARKED = {
    "blocks that are not square": (
        lambda: named(
            "deepseek blocks",
            weight_scale_inv=f32(3, 3),
            config={"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 128]}},
        ),
        "blocks of 64 x 128 are not square",
    ),
    "truncated blocks": (
        lambda: named("deepseek blocks", weight_scale_inv=f32(2, 2)),
        "[2, 2] for a 130 x 300 weight: does not fit blocks of 128",
    ),
    "blocks of an unknown size": (
        lambda: named("scaled fp8 without a marker", weight=fp8(130, 130), weight_scale=f32(2, 2)),
        "blocks of 65 or 128, and nothing says which",
    ),
    "groups along rows": (
        lambda: named("scaled fp8 without a marker", weight=fp8(130, 128), weight_scale=f32(130, 4)),
        "[130, 4] for a 130 x 128 weight: fits no square blocks",
    ),
    "packed integers": (
        lambda: packed(weight_packed=torch.zeros(33, 6, dtype=torch.int32)),
        "integers packed into I32 (pack-quantized)",
    ),
    "mxfp4": (lambda: packed(drop="weight_global_scale", weight_scale=u8(33, 2)), "MXFP4 (mxfp4-pack-quantized)"),
    "packed without scales": (lambda: packed(drop="weight_scale"), ".weight_packed of U8 with no scales"),
    "packed with truncated scales": (
        lambda: packed(weight_scale=fp8(33, 2)),
        ".weight_scale has shape [33, 2], a 33 x 48 weight in groups of 16 needs [33, 3]",
    ),
    "packed without global scale": (
        lambda: packed(drop="weight_global_scale"),
        "NVFP4 without .weight_global_scale",
    ),
    "packed beside codes": (lambda: packed(weight=fp8(33, 48)), "both .weight and .weight_packed"),
    "asymmetric": (
        lambda: named("compressed-tensors int8 channel", weight_zero_point=torch.zeros(33, 1, dtype=torch.int8)),
        "asymmetric or permuted groups",
    ),
    "mxfp8 with truncated scales": (
        lambda: named("compressed-tensors mxfp8", weight_scale=u8(33, 1)),
        ".weight_scale has shape [33, 1], a 33 x 64 weight in groups of 32 needs [33, 2]",
    ),
    "a lost scale": (
        lambda: named("compressed-tensors fp8 channel", drop="weight_scale"),
        "F8_E4M3 weight without a scale, though config.json declares quantization",
    ),
    "only an activation scale": (
        lambda: named("plain fp8", input_scale=f32(())),
        "F8_E4M3 weight with .input_scale",
    ),
    "nvfp4 without a marker": (
        lambda: unmarked(nvfp4((32, 64))),
        "NVFP4 without a marker: nibble order and layout of the scales are unknown",
    ),
    "integers without a scale": (
        lambda: unmarked(named("comfy int8", drop="weight_scale")),
        "I8 weight with no scale",
    ),
    "bytes without a scale": (
        lambda: unmarked(named("comfy int8", drop="weight_scale", weight=u8(8, 8))),
        "U8 weight with no scale",
    ),
}
CASES_WITH_REASON: dict[str, tuple[Callable[[], Case], str]] = MARKED | UNMARKED


@pytest.mark.parametrize("name", CASES_WITH_REASON)
def test_is_passed_through_with_its_reason(name: str, tmp_path: Path) -> None:
    build, reason = CASES_WITH_REASON[name]
    case, output = build(), tmp_path / "out.safetensors"
    source = save(tmp_path / "in", case.stored() | PLAIN, case.config)
    layer = layer_of(source)
    assert layer.encoding is None
    assert layer.problem is not None
    assert reason in layer.problem
    flow = Pipeline(scheduler="sync").read(source).quantize("int8").write(output, compute=False)
    assert layer.problem in flow.plan.kept
    flow.compute()
    made = load_file(output)
    assert all(same_bytes(made[LAYER + part], tensor) for part, tensor in case.tensors.items())
    with safe_open(output, "pt") as file:
        header = json.loads(file.metadata()["_quantization_metadata"])["layers"]
    assert header.get(LAYER) == case.marker
    if case.marker is not None:
        assert json.loads(bytes(made[LAYER + ".comfy_quant"].tolist())) == case.marker


STRAYS = {
    "a scale without a weight": (
        {".weight_scale": f32(8)},
        "belongs to blocks.0.lin.weight, which the checkpoint lacks",
    ),
    "a marker without a weight": (
        {".comfy_quant": marker_tensor({"format": "nvfp4"})},
        "belongs to blocks.0.lin.weight, which the checkpoint lacks",
    ),
    "a float weight beside a scale": (
        {".weight": f32(32, 64), ".weight_scale": f32(())},
        "stored as F32 beside .weight_scale: whether the scale is applied is not known",
    ),
    "a float weight beside block scales": (
        {".weight": f32(32, 64).bfloat16(), ".weight_scale_inv": f32(1, 1)},
        "stored as BF16 beside .weight_scale_inv",
    ),
    "a float weight with a marker": (
        {".weight": f32(32, 64).half(), ".comfy_quant": marker_tensor({"format": "float8_e4m3fn"})},
        "marked float8_e4m3fn but stored as F16",
    ),
}


@pytest.mark.parametrize("name", STRAYS)
def test_what_belongs_to_no_quantized_weight_is_passed_through_with_its_reason(name: str, tmp_path: Path) -> None:
    parts, reason = STRAYS[name]
    tensors = {LAYER + part: tensor for part, tensor in parts.items()}
    source = save(tmp_path / "in", tensors | PLAIN)
    stray = next(layer for layer in group_layers(open_source(source)) if layer.name.startswith(LAYER))
    assert stray.problem is not None
    assert reason in stray.problem
    output = tmp_path / "out.safetensors"
    Pipeline(scheduler="sync").read(source).quantize("int8").write(output)
    made = load_file(output)
    assert all(torch.equal(made[key], tensor) for key, tensor in tensors.items())
