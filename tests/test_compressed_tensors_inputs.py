"""Checkpoints that the compressed-tensors library itself has made, decoded as it decodes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_cases import LAYER, decode, layer_of, save

library = pytest.importorskip("compressed_tensors.quantization")
compressors = pytest.importorskip("compressed_tensors.compressors")

FLOAT8, INT8 = {"num_bits": 8, "type": "float"}, {"num_bits": 8, "type": "int"}
GROUPS = {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
FLOAT4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}

SCHEMES: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "float-quantized tensor": (FLOAT8 | {"strategy": "tensor"}, (130, 70)),
    "float-quantized channel": (FLOAT8 | {"strategy": "channel"}, (130, 70)),
    "float-quantized block": (FLOAT8 | {"strategy": "block", "block_structure": [128, 128]}, (130, 300)),
    "int-quantized tensor": (INT8 | {"strategy": "tensor"}, (33, 50)),
    "int-quantized channel": (INT8 | {"strategy": "channel"}, (33, 50)),
    "mxfp8-quantized": (FLOAT8 | GROUPS, (33, 64)),
    "nvfp4-pack-quantized": (FLOAT4 | {"scale_dtype": torch.float8_e4m3fn}, (33, 48)),
}


def compress(
    format: str, arguments: dict[str, Any], parts: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, Any]]:
    """What the library stores, what it decodes that to, and the config.json of such a checkpoint."""
    scheme = library.QuantizationScheme(targets=["Linear"], weights=library.QuantizationArgs(**arguments))
    compressor = compressors.BaseCompressor.get_value_from_registry(format)
    stored = compressor.compress(parts, scheme)
    groups = {"group_0": json.loads(scheme.model_dump_json())}
    config = {"quant_method": "compressed-tensors", "format": format, "config_groups": groups}
    decoded = compressor.decompress(stored, scheme)["weight"]
    named = {f"{LAYER}.{part}": tensor.contiguous() for part, tensor in stored.items()}
    return named, decoded, {"quantization_config": config}


def scales_for(strategy: str, shape: tuple[int, int], group: int) -> torch.Tensor:
    rows, columns = shape
    counts = {"tensor": (1,), "channel": (rows, 1), "block": (-(-rows // 128), -(-columns // 128))}
    return torch.rand(counts.get(strategy, (rows, columns // group))) / 64 + 0.001


@pytest.mark.parametrize("name", SCHEMES)
def test_decodes_as_the_library_does(name: str, tmp_path: Path) -> None:
    arguments, shape = SCHEMES[name]
    format = name.partition(" ")[0]
    scales = scales_for(arguments["strategy"], shape, arguments.get("group_size", 1))
    parts = {"weight": torch.randn(shape), "weight_scale": scales}
    if format == "mxfp8-quantized":
        parts["weight_scale"] = torch.exp2(scales.log2().floor())
    if format == "nvfp4-pack-quantized":
        parts["weight_scale"] = (scales * 8000).to(torch.float8_e4m3fn).float()
        parts["weight_global_scale"] = torch.tensor([911.0])
    stored, decoded, config = compress(format, arguments, parts)
    layer = layer_of(save(tmp_path, stored, config))
    assert layer.encoding is not None, layer.problem
    assert layer.encoding.dialect == "compressed-tensors"
    ours = decode(layer, [(0, 5), (5, shape[0])], 1000)
    assert torch.equal(ours.to(decoded.dtype), decoded)


@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_that_it_packs_are_passed_through(symmetric: bool, tmp_path: Path) -> None:
    arguments = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": symmetric}
    parts = {"weight": torch.randn(32, 64), "weight_scale": torch.full((32, 2), 0.1)}
    if not symmetric:
        parts["weight_zero_point"] = torch.zeros(32, 2, dtype=torch.int8)
    stored, _, config = compress("pack-quantized", arguments, parts)
    assert "integers packed into I32 (pack-quantized)" in (layer_of(save(tmp_path, stored, config)).problem or "")


def test_asymmetric_integers_are_passed_through(tmp_path: Path) -> None:
    parts = {"weight": torch.randn(32, 64), "weight_scale": torch.full((32, 1), 0.1)}
    parts["weight_zero_point"] = torch.full((32, 1), 3, dtype=torch.int8)
    stored, _, config = compress("int-quantized", INT8 | {"strategy": "channel", "symmetric": False}, parts)
    assert "asymmetric or permuted groups" in (layer_of(save(tmp_path, stored, config)).problem or "")
