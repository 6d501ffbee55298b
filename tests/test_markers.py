"""ComfyUI's markers, its header entry, and the legacy marker: what a layer is believed to be, and under which names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_cases import CASES, LAYER, convert, layer_of, marker_of, mxfp8, nvfp4, rotated, save
from safetensors.torch import load_file

from quantloom.formats.errors import CheckpointError
from quantloom.formats.layers import group_layers
from quantloom.formats.source import open_source

PREFIX = "model.diffusion_model."


def test_the_header_wins_and_its_names_lack_the_model_prefix(tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for index in range(3):
        tensors |= CASES["comfy fp8"]().stored(f"{PREFIX}b{index}")
    flagged = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    header = {"format_version": "1.0", "layers": {"b1": flagged, f"{PREFIX}b2": flagged, "absent": {}}}
    path = save(tmp_path, tensors, header=header)
    markers = {layer.name.removeprefix(PREFIX): layer.marker for layer in group_layers(open_source(path))}
    assert markers == {"b0": {"format": "float8_e4m3fn"}, "b1": flagged, "b2": flagged}


def test_what_the_header_does_not_repeat_is_gone(tmp_path: Path) -> None:
    case = CASES["comfy fp8"]()
    case.marker = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    path = save(tmp_path, case.stored(), header={"layers": {LAYER: {"format": "float8_e4m3fn"}}})
    assert layer_of(path).marker == {"format": "float8_e4m3fn"}


def test_names_of_the_header_are_found_below_a_prefix_with_few_keys(tmp_path: Path) -> None:
    case = CASES["comfy fp8"]()
    marker, case.marker = case.marker, None
    path = save(tmp_path, case.stored(f"{PREFIX}b0"), header={"layers": {"b0": marker}})
    assert layer_of(path, f"{PREFIX}b0").marker == marker


def test_a_header_alone_describes_a_layer(tmp_path: Path) -> None:
    case = nvfp4((130, 70))
    marker, case.marker = case.marker, None
    layer = layer_of(save(tmp_path, case.stored(), header={"layers": {LAYER: marker}}))
    assert layer.marker == marker
    assert layer.weight.shape == (130, 70)
    assert layer.weight.dtype == "F16"


def test_a_header_that_forgets_the_rotation_is_not_believed_in_silence(tmp_path: Path) -> None:
    case = rotated((33, 128), 16, {"convrot": True, "convrot_groupsize": 16})
    path = save(tmp_path, case.stored(), header={"layers": {LAYER: {"format": "int8_tensorwise"}}})
    problem = layer_of(path).problem or ""
    assert "its marker says int8_tensorwise rotated 16, the header int8_tensorwise" in problem


def test_a_header_that_only_omits_the_original_shape_agrees_with_its_marker(tmp_path: Path) -> None:
    header = {"layers": {LAYER: {"format": "mxfp8", "group_size": 32}}}
    assert layer_of(save(tmp_path, mxfp8((130, 70)).stored(), header=header)).weight.shape == (130, 70)


def test_a_marker_keeps_its_order_beside_a_header(tmp_path: Path) -> None:
    stored = mxfp8((130, 70)).stored()
    header = {"layers": {LAYER: {"group_size": 32, "format": "mxfp8"}}}
    assert list(layer_of(save(tmp_path, stored, header=header)).marker or {}) == list(marker_of(stored, LAYER))


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("{", "broken JSON"),
        ("[]", "must be a JSON object, is list"),
        ("{}", "'layers' must be a JSON object, is NoneType"),
        ('{"layers": {}, "layers": {}}', "duplicate key"),
        ({"layers": {LAYER: "float8_e4m3fn"}}, f"'{LAYER}' must be a JSON object, is str"),
    ],
)
def test_a_broken_header_is_refused(header: Any, reason: str, tmp_path: Path) -> None:
    path = save(tmp_path, CASES["comfy fp8"]().stored(), header=header)
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*_quantization_metadata") as caught:
        group_layers(open_source(path))
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("marker", "reason"),
    [
        (torch.tensor(list(b"{"), dtype=torch.uint8), "broken JSON"),
        (torch.tensor(list(b"7"), dtype=torch.uint8), "must be a JSON object, is int"),
        (torch.zeros(3), "holds 12 bytes of F32"),
        (torch.zeros(1 << 21, dtype=torch.uint8), "holds 2097152 bytes of U8"),
    ],
)
def test_a_broken_marker_is_refused(marker: torch.Tensor, reason: str, tmp_path: Path) -> None:
    path = save(tmp_path, CASES["comfy fp8"]().stored() | {LAYER + ".comfy_quant": marker})
    with pytest.raises(CheckpointError, match=r"model\.safetensors: blocks\.0\.lin\.comfy_quant") as caught:
        group_layers(open_source(path))
    assert reason in str(caught.value)


# Legacy scaled_fp8 files.


def legacy_file(folder: Path, elements: int, prefix: str, **input_scales: torch.Tensor) -> Path:
    """Quantized layers with these activation scales, a plain one below the prefix that has a scale too, one outside."""
    tensors = {f"{prefix}scaled_fp8": torch.zeros(elements).to(torch.float8_e4m3fn)}
    for name, scale in input_scales.items():
        base = f"{prefix}blocks.{name}.lin"
        tensors[base + ".weight"] = torch.randn(16, 32).to(torch.float8_e4m3fn)
        tensors[base + ".scale_weight"] = torch.tensor(0.5)
        tensors[base + ".scale_input"] = scale
    tensors[f"{prefix}plain.weight"] = torch.randn(16, 32, dtype=torch.bfloat16)
    tensors[f"{prefix}plain.scale_weight"] = torch.tensor(1.0)
    tensors["elsewhere.weight"] = torch.randn(16, 32, dtype=torch.bfloat16)
    return Path(save(folder, tensors))


@pytest.mark.parametrize(("elements", "full_precision"), [(0, False), (1, False), (2, True)])
@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_kept_legacy_layers_take_the_names_and_the_marker_that_comfyui_gives(
    elements: int, full_precision: bool, prefix: str, tmp_path: Path
) -> None:
    scales = {"a": torch.tensor(1.0), "b": torch.tensor(0.25), "c": torch.tensor([0.25])}
    source = legacy_file(tmp_path / "in", elements, prefix, **scales)
    made = load_file(convert(source, tmp_path / "out.safetensors", exclude="blocks|plain"))
    entry = {"format": "float8_e4m3fn"} | ({"full_precision_matrix_mult": True} if full_precision else {})
    for name in scales:
        base = f"{prefix}blocks.{name}.lin"
        assert marker_of(made, base) == entry
        assert made[base + ".weight_scale"] == 0.5
        assert (base + ".input_scale" in made) == (name != "a"), "an input scale of 1.0 is what clients assume"
    assert made[f"{prefix}plain.weight"].dtype == torch.bfloat16
    assert not any(name.endswith(("scale_weight", "scale_input", "scaled_fp8")) for name in made)


def test_the_nearest_legacy_marker_counts(tmp_path: Path) -> None:
    inner, outer = CASES["legacy fp8"](), CASES["legacy fp8"]()
    inner.extra, outer.extra = {"text.scaled_fp8": torch.zeros(2)}, {"scaled_fp8": torch.zeros(0)}
    path = save(tmp_path, inner.stored("text.blocks.0") | outer.stored("blocks.0"))
    flagged = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    assert layer_of(path, "text.blocks.0").marker == flagged
    assert layer_of(path, "blocks.0").marker == {"format": "float8_e4m3fn"}


def test_a_layer_that_a_legacy_file_left_unquantized_is_quantized_as_plain_weights(tmp_path: Path) -> None:
    source = legacy_file(tmp_path / "in", 0, "", a=torch.tensor(1.0))
    made = load_file(convert(source, tmp_path / "out.safetensors"))
    weight = load_file(source)["plain.weight"].float()
    decoded = made["plain.weight"].float() * made["plain.weight_scale"]
    assert (decoded - weight).norm() < 0.02 * weight.norm()


@pytest.mark.parametrize("scale", [torch.tensor([0.5, 0.25]), torch.tensor(0.0), torch.tensor(float("nan"))])
def test_a_legacy_layer_whose_input_scale_no_client_reads_is_decoded_when_kept(
    scale: torch.Tensor, tmp_path: Path
) -> None:
    source = legacy_file(tmp_path / "in", 0, "", a=scale)
    made = load_file(convert(source, tmp_path / "out.safetensors", exclude="blocks"))
    assert made["blocks.a.lin.weight"].dtype == torch.bfloat16
    assert not any(name.startswith("blocks.a.lin.") and name != "blocks.a.lin.weight" for name in made)
