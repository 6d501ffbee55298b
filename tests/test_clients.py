"""Files as their clients read them: comfy-kitchen builds and multiplies the layers that the converter wrote.

``Loader`` does to tensors what ComfyUI's loader does (``comfy/ops.py``, ``comfy/utils.py``): the header entry
overwrites markers, codes are cast to the dtype of the format, scales are viewed, the logical shape is the module's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from quantized_cases import header_of, marker_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantloom import Pipeline

kitchen = pytest.importorskip("comfy_kitchen.tensor")

PREFIX = "model.diffusion_model."
SHAPES = {
    "aligned": (256, 128),
    "odd": (130, 70),
    "small": (33, 50),
    "wide": (48, 192),
    "tall": (288, 64),
    "square": (64, 64),
}
STORAGE = {
    "float8_e4m3fn": (torch.float8_e4m3fn, "TensorCoreFP8Layout"),
    "float8_e5m2": (torch.float8_e5m2, "TensorCoreFP8Layout"),
    "int8_tensorwise": (torch.int8, "TensorWiseINT8Layout"),
    "mxfp8": (torch.float8_e4m3fn, "TensorCoreMXFP8Layout"),
    "nvfp4": (torch.uint8, "TensorCoreNVFP4Layout"),
}
"""Formats of stock ComfyUI: dtype that the loader casts codes to, and layout."""


@dataclass(frozen=True)
class Format:
    """Options of the quantize stage, and how wrong its weights may be."""

    options: dict[str, Any]
    bound: float
    """Relative Frobenius error. Sound files stay well below; a wrong layout or scale gives 0.5 and more."""


FORMATS = {
    "fp8": Format({"format": "fp8"}, 0.035),
    "fp8_e5m2": Format({"format": "fp8_e5m2"}, 0.07),
    "int8 tensor": Format({"format": "int8", "scaling": "tensor"}, 0.03),
    "int8 row": Format({"format": "int8"}, 0.012),
    "int8 rotated": Format({"format": "int8", "rotate": "hadamard"}, 0.012),
    "int8 rotated by 16": Format({"format": "int8", "rotate": "hadamard:16"}, 0.012),
    "mxfp8": Format({"format": "mxfp8"}, 0.035),
    "nvfp4": Format({"format": "nvfp4"}, 0.12),
}


class Loader:
    """The tensors of a file as ComfyUI's diffusion model loader sees them."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        below = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
        self.tensors = below or tensors
        for name, entry in json.loads(metadata.get("_quantization_metadata", '{"layers": {}}'))["layers"].items():
            self.tensors[f"{name}.comfy_quant"] = torch.tensor(list(json.dumps(entry).encode()), dtype=torch.uint8)

    def weight(self, name: str, shape: tuple[int, int]) -> Any:
        """The layer's QuantizedTensor; KeyError for a format or a scale that is not there."""
        entry = json.loads(bytes(self.tensors[f"{name}.comfy_quant"].tolist()))
        dtype, layout = STORAGE[entry["format"]]
        codes = self.tensors[f"{name}.weight"].to(dtype)
        scale = self.tensors[f"{name}.weight_scale"]
        more: dict[str, Any] = {"scale": scale}
        if entry["format"] == "mxfp8":
            more = {"scale": scale.view(torch.float8_e8m0fnu)}
        elif entry["format"] == "nvfp4":
            more = {"scale": self.tensors[f"{name}.weight_scale_2"], "block_scale": scale.view(torch.float8_e4m3fn)}
        elif entry["format"] == "int8_tensorwise" and entry.get("convrot"):
            more |= {"convrot": True, "convrot_groupsize": int(entry.get("convrot_groupsize", 256))}
        params = kitchen.get_layout_class(layout).Params(**more, orig_dtype=torch.float32, orig_shape=shape)
        return kitchen.QuantizedTensor(codes, layout, params)


def error(made: torch.Tensor, wanted: torch.Tensor) -> float:
    if not torch.isfinite(made).all():
        return float("inf")
    return float((made.double() - wanted.double()).norm() / wanted.double().norm())


def errors(loader: Loader, name: str, weight: torch.Tensor) -> tuple[float, float]:
    """(error of the weight, error of a product with it)."""
    quantized = loader.weight(name, (weight.shape[0], weight.shape[1]))
    x = torch.randn(16, weight.shape[1], generator=torch.Generator().manual_seed(1))
    bias = loader.tensors[f"{name}.bias"].float()
    product = F.linear(x, weight, bias) - bias
    return error(quantized.dequantize(), weight), error(F.linear(x, quantized, bias) - bias, product)


def source_tensors(prefix: str) -> dict[str, torch.Tensor]:
    """A linear layer with a bias for each shape, a norm, and an odd number of bytes to push others off alignment."""
    generator = torch.Generator().manual_seed(0)
    tensors = {prefix + "flag": torch.ones(3, dtype=torch.bool)}
    for name, shape in SHAPES.items():
        weight = torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator).add(0.5) / 50
        tensors[f"{prefix}blocks.{name}.lin.weight"] = weight.bfloat16()
        tensors[f"{prefix}blocks.{name}.lin.bias"] = torch.randn(shape[0], generator=generator).bfloat16()
    tensors[prefix + "norm.weight"] = torch.ones(64)
    return tensors


@dataclass
class Converted:
    path: Path
    source: dict[str, torch.Tensor]
    prefix: str


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Converted]:
    """Converts the source once for each set of options."""
    done: dict[str, Converted] = {}

    def convert(prefix: str = "", **options: Any) -> Converted:
        key = repr((prefix, sorted(options.items())))
        if key not in done:
            folder = tmp_path_factory.mktemp("client")
            tensors = source_tensors(prefix)
            save_file(tensors, folder / "in.safetensors")
            pipeline = Pipeline(scheduler="sync").read(folder / "in.safetensors").target(preset="none")
            pipeline.quantize(**options).write(folder / "out.safetensors")
            done[key] = Converted(folder / "out.safetensors", tensors, prefix)
        return done[key]

    return convert


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize("name", FORMATS)
def test_comfy_kitchen_builds_every_layer_and_multiplies_with_it(
    name: str, prefix: str, converted: Callable[..., Converted]
) -> None:
    made = converted(prefix, **FORMATS[name].options)
    loader = Loader(made.path)
    for shape_name, shape in SHAPES.items():
        layer = f"blocks.{shape_name}.lin"
        quantized = loader.weight(layer, shape)
        assert quantized.shape == shape
        stored = {"mxfp8": 32, "nvfp4": 16}.get(name)
        assert stored is None or tuple(quantized.padded_shape) == tuple(-(-size // stored) * stored for size in shape)
        weight_error, output_error = errors(loader, layer, made.source[f"{prefix}{layer}.weight"].float())
        assert weight_error <= FORMATS[name].bound, shape_name
        assert output_error <= 1.2 * FORMATS[name].bound, shape_name


def test_rotation_reaches_the_client_where_a_group_divides(converted: Callable[..., Converted]) -> None:
    made = load_file(converted(**FORMATS["int8 rotated"].options).path)
    groups = {name: marker_of(made, f"blocks.{name}.lin").get("convrot_groupsize") for name in SHAPES}
    assert groups == {"aligned": 64, "odd": None, "small": None, "wide": 64, "tall": 64, "square": 64}


@pytest.mark.parametrize("name", ["int8 row", "int8 rotated"])
def test_row_scales_are_columns(name: str, converted: Callable[..., Converted]) -> None:
    made = load_file(converted(**FORMATS[name].options).path)
    assert all(made[f"blocks.{layer}.lin.weight_scale"].shape == (shape[0], 1) for layer, shape in SHAPES.items())


@pytest.mark.parametrize("name", ["fp8", "int8 row", "int8 rotated"])
def test_products_with_quantized_activations_are_right_too(name: str, converted: Callable[..., Converted]) -> None:
    made = converted(**FORMATS[name].options)
    weight = made.source["blocks.aligned.lin.weight"].float()
    quantized = Loader(made.path).weight("blocks.aligned.lin", SHAPES["aligned"])
    x = torch.randn(16, 128, generator=torch.Generator().manual_seed(1))
    inputs = x if name.startswith("int8") else kitchen.QuantizedTensor.from_float(x.clone(), "TensorCoreFP8Layout")
    assert error(F.linear(inputs, quantized), F.linear(x, weight)) < 0.055


@pytest.mark.parametrize("name", ["fp8", "int8 row", "int8 tensor"])
def test_legacy_layers_load_once_they_are_migrated(
    name: str, converted: Callable[..., Converted], tmp_path: Path
) -> None:
    """The same layers as ``scaled_fp8`` files and old INT8 files name them, rows in one dimension."""
    made = converted(**FORMATS[name].options)
    old = {"scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn)}
    for key, tensor in load_file(made.path).items():
        if key.endswith(".weight_scale"):
            old[key.replace(".weight_scale", ".scale_weight")] = tensor.reshape(-1)
        elif not key.endswith(".comfy_quant"):
            old[key] = tensor
    save_file(old, tmp_path / "old.safetensors")
    Pipeline(scheduler="sync").read(tmp_path / "old.safetensors").migrate().write(tmp_path / "new.safetensors")
    before, after = Loader(made.path), Loader(tmp_path / "new.safetensors")
    for shape_name, shape in SHAPES.items():
        layer = f"blocks.{shape_name}.lin"
        pair = [loader.weight(layer, shape).dequantize() for loader in (before, after)]
        assert torch.equal(*pair)
        assert errors(before, layer, pair[0])[1] == errors(after, layer, pair[0])[1]


# Header, markers, bytes.

ALL = {name: form.options for name, form in FORMATS.items()} | {
    "fp8 row": {"format": "fp8", "scaling": "row"},
    "fp8 block": {"format": "fp8", "scaling": "block", "block_size": 16},
    "int8 block": {"format": "int8", "scaling": "block", "block_size": 16},
}


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize("name", ALL)
def test_header_and_markers_agree_and_the_header_has_short_names(
    name: str, prefix: str, converted: Callable[..., Converted]
) -> None:
    made = converted(prefix, **ALL[name])
    tensors = load_file(made.path)
    marked = {key.removesuffix(".comfy_quant") for key in tensors if key.endswith(".comfy_quant")}
    assert marked
    assert {layer.removeprefix(prefix): marker_of(tensors, layer) for layer in marked} == header_of(made.path)


@pytest.mark.parametrize("name", ALL)
def test_every_tensor_opens_and_is_aligned(name: str, converted: Callable[..., Converted]) -> None:
    made = converted(PREFIX, **ALL[name])
    with safe_open(made.path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    content = made.path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    table = json.loads(content[8 : 8 + length])
    table.pop("__metadata__")
    assert set(table) == set(tensors)
    for key, tensor in tensors.items():
        assert (8 + length + table[key]["data_offsets"][0]) % tensor.element_size() == 0, key
    for key in made.source:
        if not key.endswith("lin.weight"):
            assert torch.equal(tensors[key], made.source[key])


@pytest.mark.parametrize(
    ("name", "label", "layers"),
    [
        ("fp8 row", "float8_e4m3fn_rowwise", set(SHAPES)),
        ("fp8 block", "float8_e4m3fn_blockwise", {"aligned", "wide", "tall", "square"}),
        ("int8 block", "int8_blockwise", {"aligned", "wide", "tall", "square"}),
    ],
)
def test_what_stock_comfyui_rejects_is_labelled_for_its_extension(
    name: str, label: str, layers: set[str], converted: Callable[..., Converted]
) -> None:
    made = converted(**ALL[name])
    tensors = load_file(made.path)
    assert {key.split(".")[1] for key in tensors if key.endswith(".comfy_quant")} == layers
    for layer in layers:
        rows, columns = SHAPES[layer]
        base = f"blocks.{layer}.lin"
        block = {} if name == "fp8 row" else {"group_size": 16}
        assert marker_of(tensors, base) == {"format": label} | block
        codes, scale = tensors[base + ".weight"], tensors[base + ".weight_scale"]
        assert codes.shape == (rows, columns)
        assert codes.dtype == (torch.int8 if name == "int8 block" else torch.float8_e4m3fn)
        assert scale.dtype == torch.float32
        assert scale.shape == ((rows // 16, columns // 16) if block else (rows,))
        wide = scale.repeat_interleave(16, 0).repeat_interleave(16, 1) if block else scale[:, None]
        assert error(codes.float() * wide, made.source[base + ".weight"].float()) < 0.035
        assert (base + ".input_scale" in tensors) == (name == "int8 block")
        assert tensors.get(base + ".input_scale", torch.tensor(1.0)) == 1.0
        with pytest.raises(KeyError, match=label):
            Loader(made.path).weight(base, (rows, columns))


# The bounds do catch what is wrong.


def unswizzled(tensors: dict[str, torch.Tensor], layer: str) -> dict[str, torch.Tensor]:
    """Scales in row-major order."""
    stored = tensors[layer + ".weight_scale"]
    row, column = (index.reshape(-1) for index in torch.meshgrid(*map(torch.arange, stored.shape), indexing="ij"))
    tile = (row // 128) * (stored.shape[1] // 4) + column // 4
    places = tile * 512 + (row % 32) * 16 + (row % 128 // 32) * 4 + column % 4
    plain = stored.view(torch.uint8).reshape(-1)[places]
    return {layer + ".weight_scale": plain.view(stored.shape).view(stored.dtype)}


def swapped(tensors: dict[str, torch.Tensor], layer: str) -> dict[str, torch.Tensor]:
    codes = tensors[layer + ".weight"]
    return {layer + ".weight": codes << 4 | codes >> 4}


def divided(tensors: dict[str, torch.Tensor], layer: str) -> dict[str, torch.Tensor]:
    return {layer + ".weight_scale_2": 1 / tensors[layer + ".weight_scale_2"]}


def as_bytes(tensors: dict[str, torch.Tensor], layer: str) -> dict[str, torch.Tensor]:
    return {layer + ".weight": tensors[layer + ".weight"].view(torch.uint8)}


def flat_scale(tensors: dict[str, torch.Tensor], layer: str) -> dict[str, torch.Tensor]:
    return {layer + ".weight_scale": tensors[layer + ".weight_scale"].flatten()}


def unrotated(tensors: dict[str, torch.Tensor], layer: str) -> dict[str, torch.Tensor]:
    entry = {key: value for key, value in marker_of(tensors, layer).items() if not key.startswith("convrot")}
    return {layer + ".comfy_quant": torch.tensor(list(json.dumps(entry).encode()), dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("name", "shape", "spoil"),
    [
        ("mxfp8", "tall", unswizzled),
        ("nvfp4", "aligned", unswizzled),
        ("nvfp4", "aligned", swapped),
        ("nvfp4", "aligned", divided),
        ("fp8", "aligned", as_bytes),
        ("mxfp8", "aligned", as_bytes),
        ("int8 row", "square", flat_scale),
        ("int8 rotated", "aligned", unrotated),
    ],
)
def test_a_spoiled_file_is_far_outside_the_bounds(
    name: str, shape: str, spoil: Callable[..., Any], converted: Callable[..., Converted], tmp_path: Path
) -> None:
    made, layer = converted(**FORMATS[name].options), f"blocks.{shape}.lin"
    tensors = load_file(made.path)
    weight = made.source[layer + ".weight"].float()
    save_file(tensors, tmp_path / "sound.safetensors")
    assert errors(Loader(tmp_path / "sound.safetensors"), layer, weight)[0] <= FORMATS[name].bound
    save_file(tensors | spoil(tensors, layer), tmp_path / "spoiled.safetensors")
    assert errors(Loader(tmp_path / "spoiled.safetensors"), layer, weight)[0] > 4 * FORMATS[name].bound
