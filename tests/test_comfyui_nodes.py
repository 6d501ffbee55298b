"""The custom nodes of examples/comfyui, in what ComfyUI does with them, on weights that quantloom wrote."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfyui_stand_in as stand_in
import pytest
import torch
import torch.nn.functional as F
from numerics import one_thread  # noqa: F401  (an autouse fixture)
from quantized_cases import decode, layer_of, marker_tensor, same_bytes
from safetensors.torch import load_file, save_file

import quantloom
from quantloom import Pipeline

kitchen = pytest.importorskip("comfy_kitchen.tensor")

FOLDER = Path(__file__).parents[1] / "examples" / "comfyui"
NAMES = ["float8_e4m3fn_blockwise", "float8_e4m3fn_rowwise", "hybrid_mxfp8", "int8_blockwise"]
WRITTEN = {
    "float8_e4m3fn_rowwise": ({"format": "fp8", "scaling": "row"}, [(64, 96), (33, 50), (1, 48)]),
    "float8_e4m3fn_blockwise": ({"format": "fp8", "scaling": "block", "block_size": 16}, [(64, 96), (16, 16)]),
    "int8_blockwise": ({"format": "int8", "scaling": "block", "block_size": 16}, [(64, 96), (16, 16)]),
}
"""What quantloom writes in formats that stock ComfyUI refuses: options and shapes."""


@pytest.fixture
def comfy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """ComfyUI with the folder copied into its custom nodes: its modules, and ``package``."""
    loras = tmp_path / "loras"
    loras.mkdir()
    found = stand_in.modules(loras)
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    before = set(sys.modules)
    nodes = shutil.copytree(FOLDER, tmp_path / "custom_nodes" / "quantloom", ignore=shutil.ignore_patterns("__*__"))
    shutil.copy(FOLDER / "__init__.py", nodes)
    package = stand_in.load_custom_node(nodes)
    node = package.NODE_CLASS_MAPPINGS["QuantloomErrorCorrectionLora"]()
    own = {name.rpartition(".")[2]: module for name, module in sys.modules.items() if name not in before}
    yield SimpleNamespace(
        ops=found["comfy.ops"], algorithms=found["comfy.quant_ops"].QUANT_ALGOS, quant_ops=found["comfy.quant_ops"],
        node=node, loras=loras, nodes=nodes, hybrid=own["hybrid"], loading=own["loading"],
    )  # fmt: skip
    for name in set(sys.modules) - before:
        del sys.modules[name]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(made: torch.Tensor, wanted: torch.Tensor) -> float:
    assert torch.isfinite(made).all()
    return float((made.double() - wanted.double()).norm() / wanted.double().norm())


def linear(comfy: Any, tensors: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """ComfyUI's linear layer with the tensors of layer ``l``."""
    rows = tensors["l.bias"].shape[0]
    columns = more.pop("columns", None) or tensors["l.weight"].shape[1]
    model = torch.nn.Module()
    model.l = comfy.ops.mixed_precision_ops({}, dtype, **more).Linear(columns, rows)
    missing, unexpected = model.load_state_dict(dict(tensors), strict=False)
    assert not missing
    assert not unexpected
    return model.l


def written(folder: Path, shape: tuple[int, int], **options: Any) -> Path:
    """A layer ``l`` as quantloom writes it."""
    weight = random(*shape) * torch.rand(shape[0], 1, generator=torch.Generator().manual_seed(1)).add(0.1) / 7
    save_file({"l.weight": weight, "l.bias": random(shape[0], seed=2)}, folder / "in.safetensors")
    pipeline = Pipeline(scheduler="sync").read(folder / "in.safetensors").target(preset="none")
    pipeline.quantize(**options).write(folder / "out.safetensors", overwrite=True)
    return folder / "out.safetensors"


def everywhere(test: Callable[..., None]) -> Callable[..., None]:
    cases = [(name, shape) for name, (_, shapes) in WRITTEN.items() for shape in shapes]
    return pytest.mark.parametrize(("name", "shape"), cases)(test)


# -- registration ------------------------------------------------------------------------------------------------------


def test_the_formats_are_added_once_and_never_replace_others(comfy: Any) -> None:
    assert set(NAMES) | set(stand_in.stock_formats()) == set(comfy.algorithms)
    assert all(kitchen.get_layout_class(comfy.algorithms[name]["comfy_tensor_layout"]) for name in NAMES)
    made = comfy.ops.mixed_precision_ops
    assert comfy.loading.install(comfy.ops, comfy.quant_ops) == []
    assert comfy.ops.mixed_precision_ops is made
    foreign = comfy.algorithms["hybrid_mxfp8"] = {"comfy_tensor_layout": "SomebodyElses"}
    del comfy.algorithms["int8_blockwise"]
    assert comfy.loading.install(comfy.ops, comfy.quant_ops) == ["int8_blockwise"]
    assert comfy.algorithms["hybrid_mxfp8"] is foreign


def test_a_comfyui_that_is_too_old_keeps_the_lora_node(comfy: Any, caplog: pytest.LogCaptureFixture) -> None:
    comfy.algorithms.clear()
    package = stand_in.load_custom_node(comfy.nodes)
    assert "too old" in caplog.text
    assert not comfy.algorithms
    assert list(package.NODE_CLASS_MAPPINGS) == list(package.NODE_DISPLAY_NAME_MAPPINGS)


def test_without_comfyui_the_modules_can_be_imported(comfy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in ("comfy", "folder_paths")]:
        monkeypatch.delitem(sys.modules, name)
    assert stand_in.load_custom_node(comfy.nodes).NODE_CLASS_MAPPINGS


@everywhere
def test_stock_comfyui_refuses_them(name: str, shape: tuple[int, int], tmp_path: Path) -> None:
    tensors = load_file(written(tmp_path, shape, **WRITTEN[name][0]))
    with pytest.raises(KeyError, match=name):
        linear(SimpleNamespace(ops=stand_in.modules(tmp_path)["comfy.ops"]), tensors)


# -- rows and blocks ---------------------------------------------------------------------------------------------------


@everywhere
def test_a_file_loads_and_decodes_bit_for_bit(name: str, shape: tuple[int, int], comfy: Any, tmp_path: Path) -> None:
    path = written(tmp_path, shape, **WRITTEN[name][0])
    tensors, wanted = load_file(path), decode(layer_of(path, "l"), [(0, shape[0])])
    layer = linear(comfy, tensors)
    assert layer.quant_format == name
    assert layer.weight.shape == shape
    assert layer.weight.layout_cls is kitchen.get_layout_class(comfy.algorithms[name]["comfy_tensor_layout"])
    assert same_bytes(layer.weight._qdata, tensors["l.weight"])
    assert same_bytes(layer.weight.dequantize(), wanted)
    assert same_bytes(linear(comfy, tensors, torch.bfloat16).weight.dequantize(), wanted.bfloat16())
    assert hasattr(layer, "input_scale") == ("l.input_scale" in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@everywhere
def test_products_are_those_of_decoded_weights(
    name: str, shape: tuple[int, int], dtype: torch.dtype, comfy: Any, tmp_path: Path
) -> None:
    path = written(tmp_path, shape, **WRITTEN[name][0])
    tensors, weight = load_file(path), decode(layer_of(path, "l"), [(0, shape[0])]).to(dtype)
    x = random(2, 5, shape[1], seed=3).to(dtype)
    wanted = F.linear(x, weight, tensors["l.bias"].to(dtype))
    for full in (False, True):
        layer = linear(comfy, tensors, dtype, full=full)
        for context in (torch.inference_mode, torch.no_grad):
            with context():
                assert error(layer(x), wanted) < 1e-6
                assert layer(x).dtype == dtype


@everywhere
def test_a_saved_model_loads_again(name: str, shape: tuple[int, int], comfy: Any, tmp_path: Path) -> None:
    """ComfyUI saves a marker without group_size."""
    tensors = load_file(written(tmp_path, shape, **WRITTEN[name][0]))
    layer = linear(comfy, tensors)
    saved = {f"l.{key}": value for key, value in layer.state_dict().items()}
    assert set(saved) == set(tensors)
    assert same_bytes(linear(comfy, saved).weight.dequantize(), layer.weight.dequantize())


@everywhere
def test_weights_move_as_others_do(name: str, shape: tuple[int, int], comfy: Any, tmp_path: Path) -> None:
    """What ComfyUI does to stream weights: clone, flatten to plain tensors and back, copy into memory of its own."""
    weight = linear(comfy, load_file(written(tmp_path, shape, **WRITTEN[name][0]))).weight
    inner, context = weight.__tensor_flatten__()
    again = kitchen.QuantizedTensor.__tensor_unflatten__(
        {name: getattr(weight, name).clone() for name in inner}, context, 0, 0
    )
    target = torch.empty_like(weight)
    target.copy_(weight)
    for other in (weight.clone(), again, target, weight.detach().to(torch.device("cpu"))):
        assert same_bytes(other.dequantize(), weight.dequantize())


@pytest.mark.parametrize("name", NAMES)
def test_requantizing_keeps_the_tiles_and_the_error_of_the_format(name: str, comfy: Any) -> None:
    """ComfyUI does this when it merges a LoRA."""
    weight = random(64, 96) / 7
    layout = kitchen.get_layout_class(comfy.algorithms[name]["comfy_tensor_layout"])
    tile = {"float8_e4m3fn_rowwise": (1, 96), "hybrid_mxfp8": None}.get(name, (16, 16))
    first = kitchen.QuantizedTensor.from_float(weight, comfy.algorithms[name]["comfy_tensor_layout"], tile=tile)
    second = first.requantize_from_float(weight, scale="recalculate", stochastic_rounding=5, inplace_ops=True)
    assert error(second.dequantize(), weight) < {"int8_blockwise": 0.01}.get(name, 0.03)
    assert first._params.scale.shape == second._params.scale.shape
    assert second.layout_cls is layout
    assert error(first.requantize_from_float(first.dequantize()).dequantize(), first.dequantize()) < 1e-6
    assert not kitchen.QuantizedTensor.from_float(0 * weight, first._layout_cls).dequantize().any()


def test_rows_under_the_label_of_blocks(comfy: Any) -> None:
    """What other converters write where a block size does not divide."""
    codes, scale = random(24, 20).to(torch.float8_e4m3fn), random(24).abs()
    entry = {"format": "float8_e4m3fn_blockwise", "group_size": 16}
    tensors = {"l.weight": codes, "l.weight_scale": scale, "l.bias": random(24), "l.comfy_quant": marker_tensor(entry)}
    assert torch.equal(linear(comfy, tensors).weight.dequantize(), codes.float() * scale[:, None])


FP8 = torch.float8_e4m3fn
WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "no scale": ("float8_e4m3fn_rowwise", {"weight_scale": None}, "weight_scale is missing"),
    "too few rows": ("float8_e4m3fn_rowwise", {"weight_scale": torch.ones(16)}, r"\(16,\).*32 x 64"),
    "no blocks": ("float8_e4m3fn_blockwise", {"weight_scale": torch.ones(3, 4)}, r"\(3, 4\).*32 x 64"),
    "another block": ("float8_e4m3fn_blockwise", {"weight_scale": torch.ones(4, 8)}, "group_size is 16.* 8 x 8"),
    "three dimensions": ("int8_blockwise", {"weight_scale": torch.ones(2, 4, 2)}, r"\(2, 4, 2\)"),
    "bytes": ("float8_e4m3fn_rowwise", {"weight": torch.zeros(32, 64, dtype=torch.uint8)}, "uint8 instead of .*e4m3fn"),
    "another layer": ("int8_blockwise", {"weight": torch.zeros(32, 48, dtype=torch.int8)}, r"\(32, 48\).*\(32, 64\)"),
    "no scalar": ("hybrid_mxfp8", {"weight_scalar": None}, "weight_scalar is missing"),
    "scalars": ("hybrid_mxfp8", {"weight_scalar": torch.ones(2)}, "2 elements"),
    "untiled": ("hybrid_mxfp8", {"weight_scale": torch.ones(32, 2, dtype=torch.uint8)}, r"\(32, 2\).*\(128, 4\)"),
    "unpadded": ("hybrid_mxfp8", {"weight": torch.zeros(32, 60).to(FP8)}, r"\(32, 60\).*\(32, 64\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_with_the_layer_and_the_numbers(case: str, comfy: Any) -> None:
    name, change, message = WRONG[case]
    hybrid = {"weight_scale": torch.full((128, 4), 127, dtype=torch.uint8), "weight_scalar": torch.tensor(1.0)}
    sound = {
        "weight": torch.zeros(32, 64).to(torch.int8 if name.startswith("int8") else FP8),
        "bias": torch.zeros(32), "comfy_quant": marker_tensor({"format": name, "group_size": 16}),
        **(hybrid if name == "hybrid_mxfp8" else {"weight_scale": torch.ones(2, 4)}),
    }  # fmt: skip
    tensors = {f"l.{key}": value for key, value in (sound | change).items() if value is not None}
    if name != "float8_e4m3fn_rowwise":
        assert linear(comfy, {f"l.{key}": value for key, value in sound.items()}).quant_format == name
    with pytest.raises(ValueError, match=rf"l, {name}: .*{message}"):
        linear(comfy, tensors, columns=64)


def test_stock_formats_load_as_before(comfy: Any, tmp_path: Path) -> None:
    path = written(tmp_path, (64, 96), format="nvfp4")
    layer = linear(comfy, load_file(path), columns=96)
    assert layer.layout_type == "TensorCoreNVFP4Layout"
    assert error(layer.weight.dequantize(), decode(layer_of(path, "l"), [(0, 64)])) < 1e-6


# -- hybrid ------------------------------------------------------------------------------------------------------------


def to_blocked(exponents: torch.Tensor) -> torch.Tensor:
    from comfy_kitchen import to_blocked

    blocked: torch.Tensor = to_blocked(exponents, flatten=False)
    return blocked


def legacy_hybrid(folder: Path, shape: tuple[int, int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """MXFP8 as quantloom writes it, with the largest scale of a block as the one scale, and its weights."""
    path = written(folder, shape, format="mxfp8")
    tensors = load_file(path)
    tensors["l.weight_scalar"] = torch.tensor(2.0 ** (int(tensors["l.weight_scale"].max()) - 127))
    tensors["l.comfy_quant"] = marker_tensor({"format": "hybrid_mxfp8", "group_size": 32, "orig_shape": list(shape)})
    return tensors, decode(layer_of(path, "l"), [(0, shape[0])])


def exact_hybrid(folder: Path, shape: tuple[int, int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """One power of two for all blocks."""
    tensors, _ = legacy_hybrid(folder, shape)
    weight, scalar = load_file(folder / "in.safetensors")["l.weight"], tensors["l.weight_scalar"]
    rows, columns = tensors["l.weight"].shape
    padded = F.pad(weight, (0, columns - shape[1], 0, rows - shape[0]))
    byte = int(torch.log2(scalar)) + 127
    exponents = torch.full((rows, columns // 32), byte, dtype=torch.uint8)
    tensors |= {"l.weight": (padded / scalar).to(FP8), "l.weight_scale": to_blocked(exponents)}
    return tensors, (tensors["l.weight"].float() * scalar)[: shape[0], : shape[1]]


HYBRIDS = {"exact": exact_hybrid, "legacy": legacy_hybrid}
SHAPES = [(64, 96), (33, 50)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", HYBRIDS)
def test_hybrid_decodes_by_blocks_and_knows_whether_one_scale_would_do(
    kind: str, shape: tuple[int, int], comfy: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors, wanted = HYBRIDS[kind](tmp_path, shape)
    layer = linear(comfy, tensors, columns=shape[1])
    linear(comfy, tensors, columns=shape[1])
    assert caplog.text.count("does not fit all blocks") == (kind == "legacy")
    assert layer.weight.shape == shape
    assert same_bytes(layer.weight.dequantize().contiguous(), wanted.contiguous())
    by_scalar = (tensors["l.weight"].float() * tensors["l.weight_scalar"])[: shape[0], : shape[1]]
    assert layer.weight._params.exact == (kind == "exact") == torch.equal(by_scalar, wanted)
    assert kind == "exact" or error(by_scalar, wanted) > 0.5
    saved = {f"l.{key}": value for key, value in layer.state_dict().items()}
    assert set(saved) == set(tensors)
    assert all(same_bytes(saved[key], tensors[key]) for key in tensors if key not in ("l.comfy_quant", "l.bias"))


def test_blocks_of_zeros_may_have_any_scale(comfy: Any, tmp_path: Path) -> None:
    tensors, _ = exact_hybrid(tmp_path, (64, 96))
    tensors["l.weight"].view(torch.uint8)[3, 32:64] = torch.tensor([0, 0x80], dtype=torch.uint8).repeat(16)
    place = 3 * 16 + 1
    for byte in (0, 100, 200):
        tensors["l.weight_scale"].view(-1)[place] = byte
        assert linear(comfy, tensors).weight._params.exact
        tensors["l.weight"].view(torch.uint8)[3, 40] = 1
        assert not linear(comfy, tensors).weight._params.exact
        tensors["l.weight"].view(torch.uint8)[3, 40] = 0
    tensors["l.weight_scalar"] *= 2
    assert not linear(comfy, tensors).weight._params.exact


@pytest.mark.parametrize(
    ("capability", "exact", "path"),
    [
        (None, True, "DECODED"), ((7, 5), True, "DECODED"), ((8, 6), True, "DECODED"), ((8, 9), True, "SCALAR"),
        ((9, 0), True, "SCALAR"), ((10, 0), True, "BLOCKS"), ((12, 0), True, "BLOCKS"), ((8, 9), False, "DECODED"),
        ((9, 0), False, "DECODED"), ((10, 0), False, "BLOCKS"), ((12, 0), False, "BLOCKS"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("shape", SHAPES)
def test_capability_selects_the_product(
    capability: tuple[int, int] | None, exact: bool, path: str, shape: tuple[int, int], comfy: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """FP8 products run on a CPU as they are. MXFP8 ones do not, so there the call is looked at and answered."""
    import comfy_kitchen
    from comfy_kitchen.tensor import fp8

    tensors, weight = HYBRIDS["exact" if exact else "legacy"](tmp_path, shape)
    layer = linear(comfy, tensors, columns=shape[1])
    x, bias, called = random(2, 7, shape[1], seed=3), tensors["l.bias"], []

    def blocks(a: Any, b: Any, block_scale_a: Any, block_scale_b: Any, bias: Any, out_dtype: Any) -> torch.Tensor:
        called.append("BLOCKS")
        assert same_bytes(b, tensors["l.weight"])
        assert same_bytes(block_scale_b.view(torch.uint8), tensors["l.weight_scale"])
        decoded = [
            comfy_kitchen.dequantize_mxfp8(*each, torch.float32) for each in ((a, block_scale_a), (b, block_scale_b))
        ]
        return F.linear(*decoded, bias).to(out_dtype)

    def scalar(*operands: Any) -> torch.Tensor:
        called.append("SCALAR")
        assert same_bytes(operands[1].t(), tensors["l.weight"])
        assert operands[3] == tensors["l.weight_scalar"]
        product: torch.Tensor = real(*operands)
        return product

    real = fp8._fp8_scaled_mm
    monkeypatch.setattr(fp8, "_fp8_scaled_mm", scalar)
    monkeypatch.setattr(comfy_kitchen, "scaled_mm_mxfp8", blocks)
    monkeypatch.setattr(comfy.hybrid, "capability_of", lambda device: capability)
    monkeypatch.setattr(comfy.hybrid, "MXFP8_PRODUCT", True)
    with torch.inference_mode():
        y = layer(x)
    assert comfy.hybrid.select_path(capability, exact).name == path
    assert called == ([] if path == "DECODED" else [path])
    assert y.shape == (2, 7, shape[0])
    assert error(y - bias, F.linear(x, weight)) < (1e-6 if path == "DECODED" else 0.04)
    with torch.inference_mode():
        assert error(layer(x.bfloat16()).float() - bias, F.linear(x, weight)) < 0.05
        assert torch.equal(layer(0 * x), bias.expand(2, 7, -1))
        assert layer(x[:, :0]).shape == (2, 0, shape[0])
    with torch.no_grad():
        assert error(layer(x) - bias, F.linear(x, weight)) < 1e-6


def test_without_an_mxfp8_product_blackwell_does_as_older_gpus(comfy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comfy.hybrid, "MXFP8_PRODUCT", False)
    assert [comfy.hybrid.select_path((10, 0), exact).name for exact in (True, False)] == ["SCALAR", "DECODED"]


def test_this_machine_is_asked_for_its_capability(comfy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.version, "hip", None)
    assert comfy.hybrid.capability_of(torch.device("cpu")) is None
    assert comfy.hybrid.capability_of(torch.device("cuda", 0)) == (8, 9)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert comfy.hybrid.capability_of(torch.device("cuda", 0)) is None


# -- the LoRA node -----------------------------------------------------------------------------------------------------

WIDTH = 128


class Perceptron(torch.nn.Module):
    """Two layers, of which the second is called as ComfyUI's newer models call theirs: with its activation."""

    def __init__(self, make: Callable[[int, int], Any], act: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.fc1, self.fc2, self.act = make(WIDTH, 2 * WIDTH), make(2 * WIDTH, WIDTH), act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.act(self.fc2, self.fc1(x), "gelu_tanh")


def diffusion(make: Callable[[int, int], Any], act: Callable[..., torch.Tensor]) -> torch.nn.Module:
    model = torch.nn.Module()
    model.blocks = torch.nn.Sequential(Perceptron(make, act), Perceptron(make, act))
    model.forward = model.blocks.forward
    return model


def inputs(seed: int, rows: int = 512) -> torch.Tensor:
    """Mostly in a few directions, as those of trained models are."""
    return random(rows, 12, seed=seed) @ random(12, WIDTH, seed=7) + 0.1 * random(rows, WIDTH, seed=seed + 1)


KINDS: dict[str, dict[str, Any]] = {
    "nvfp4": {"format": "nvfp4"}, "int8 row": {"format": "int8"}, "fp8 row": {"format": "fp8", "scaling": "row"},
    "int8 block": {"format": "int8", "scaling": "block", "block_size": 64}, "mxfp8": {"format": "mxfp8"},
}  # fmt: skip


@pytest.fixture(scope="module")
def corrected(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder with ``model``, ``quantized`` and ``correction`` for a format: made once each."""
    folder = tmp_path_factory.mktemp("corrected")
    torch.manual_seed(0)
    model = diffusion(torch.nn.Linear, lambda layer, x, _: layer(F.gelu(x, approximate="tanh")))
    save_file(model.state_dict(), folder / "model.safetensors")
    store = folder / "stats.zarr"
    quantloom.calibrate(model, [inputs(seed) for seed in (1, 11)], out=store, checkpoint=folder / "model.safetensors")

    def make(kind: str) -> Path:
        made = folder / kind.replace(" ", "-")
        if not made.exists():
            made.mkdir()
            pipeline = Pipeline(scheduler="sync").read(folder / "model.safetensors").target(preset="none")
            pipeline = pipeline.quantize(**KINDS[kind], statistics=str(store), rounding="mse")
            pipeline = pipeline.lora(rank=16, target=".", output=str(made / "correction.safetensors"))
            pipeline.write(made / "quantized.safetensors")
        return made

    return make


def original(folder: Path) -> torch.nn.Module:
    model = diffusion(torch.nn.Linear, lambda layer, x, _: layer(F.gelu(x, approximate="tanh")))
    model.load_state_dict(load_file(folder.parent / "model.safetensors"))
    return model


def loaded(comfy: Any, folder: Path) -> stand_in.ModelPatcher:
    """The quantized model in ComfyUI, and the correction in its folder of LoRAs."""
    shutil.copy(folder / "correction.safetensors", comfy.loras)
    make = comfy.ops.mixed_precision_ops({}, torch.float32).Linear
    base = torch.nn.Module()
    base.diffusion_model = diffusion(make, comfy.ops.linear_input_act)
    tensors = {
        f"diffusion_model.{name}": tensor for name, tensor in load_file(folder / "quantized.safetensors").items()
    }
    missing, unexpected = base.load_state_dict(tensors, strict=False)
    assert not missing
    assert not unexpected
    return stand_in.ModelPatcher(base)


def run(patcher: stand_in.ModelPatcher, x: torch.Tensor) -> torch.Tensor:
    """One sampling: the model is loaded, runs, and makes room for the next clone of it."""
    with torch.inference_mode():
        y: torch.Tensor = patcher.load().diffusion_model(x)
    patcher.detach()
    return y


def by_hand(folder: Path, patcher: stand_in.ModelPatcher, x: torch.Tensor, strength: float) -> torch.Tensor:
    """Every layer's output plus strength * alpha / r * up(down(x)), from the adapter's tensors."""
    adapter = load_file(folder / "correction.safetensors")

    def layer(name: str, x: torch.Tensor) -> torch.Tensor:
        base = f"diffusion_model.{name}"
        up, down, alpha = (adapter[f"{base}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha"))
        return patcher.model.get_submodule(base)(x) + strength * alpha / len(down) * (x @ down.T @ up.T)

    with torch.inference_mode():
        for block in ("blocks.0", "blocks.1"):
            x = x + layer(f"{block}.fc2", F.gelu(layer(f"{block}.fc1", x), approximate="tanh"))
    return x


def weights_of(patcher: stand_in.ModelPatcher) -> dict[str, torch.Tensor]:
    return {name: module.weight for name, module in patcher.model.named_modules() if hasattr(module, "in_features")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_correction_beside_the_matmul(kind: str, comfy: Any, corrected: Callable[[str], Path]) -> None:
    folder, x = corrected(kind), inputs(21)
    patcher = loaded(comfy, folder)
    before = {name: weight._qdata.clone() for name, weight in weights_of(patcher).items()}
    wanted, plain = original(folder)(x).detach(), run(patcher, x)
    model, clip, report = comfy.node.apply(patcher, "correction.safetensors", 1.0)
    assert (clip, report) == (None, "correction.safetensors: 4 layers at strength 1")
    beside = run(model, x)
    assert error(beside, by_hand(folder, patcher, x, 1.0)) < 1e-5
    assert (
        error(run(comfy.node.apply(patcher, "correction.safetensors", 0.5)[0], x), by_hand(folder, patcher, x, 0.5))
        < 1e-5
    )
    # INT8 products round activations too, about which a correction of weights can do nothing.
    assert error(beside, wanted) < (0.95 if kind == "int8 row" else 0.8) * error(plain, wanted)
    assert torch.equal(run(patcher, x), plain)
    assert not patcher.injections
    for name, weight in weights_of(patcher).items():
        module = patcher.model.get_submodule(name)
        assert same_bytes(weight._qdata, before[name])
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert module._full_precision_mm == (kind in stand_in.EMULATED)


def test_merged_it_would_be_lost(comfy: Any, corrected: Callable[[str], Path]) -> None:
    """What ComfyUI's own LoRA loader does: decode, add, requantize."""
    folder, x = corrected("nvfp4"), inputs(21)
    patcher, wanted = loaded(comfy, folder), original(corrected("nvfp4"))(x).detach()
    plain = error(run(patcher, x), wanted)
    beside = error(run(comfy.node.apply(patcher, "correction.safetensors", 1.0)[0], x), wanted)
    adapter = load_file(folder / "correction.safetensors")
    for name, weight in weights_of(patcher).items():
        delta = adapter[f"{name}.lora_up.weight"] @ adapter[f"{name}.lora_down.weight"]
        merged = weight.requantize_from_float(weight.dequantize() + delta, scale=None)
        patcher.model.get_submodule(name).weight = torch.nn.Parameter(merged, requires_grad=False)
    merged_error = error(run(patcher, x), wanted)
    print(f"output error: without {plain:.4f}, merged {merged_error:.4f}, beside {beside:.4f}")
    assert beside < 0.8 * plain < plain < merged_error


def test_strength_zero_does_nothing(comfy: Any, corrected: Callable[[str], Path]) -> None:
    patcher = loaded(comfy, corrected("nvfp4"))
    model, clip, report = comfy.node.apply(patcher, "correction.safetensors", 0.0, clip="as it is")
    assert model is patcher
    assert clip == "as it is"
    assert "nothing" in report


@pytest.mark.parametrize("kind", ["nvfp4", "int8 row"])
def test_adapters_add_up_and_leave_in_any_order(kind: str, comfy: Any, corrected: Callable[[str], Path]) -> None:
    folder, x = corrected(kind), inputs(21)
    patcher = loaded(comfy, folder)
    plain = run(patcher, x)
    first, _, _ = comfy.node.apply(patcher, "correction.safetensors", 0.25)
    first.load()  # cloned while it is loaded, as in a workflow that runs again
    second, _, _ = comfy.node.apply(first, "correction.safetensors", 0.5)
    first.detach()
    for _ in range(2):
        assert error(run(second, x), by_hand(folder, patcher, x, 0.75)) < 1e-5
        assert error(run(first, x), by_hand(folder, patcher, x, 0.25)) < 1e-5
        assert torch.equal(run(patcher, x), plain)


def test_clones_that_nobody_needs_take_nothing_with_them(comfy: Any, corrected: Callable[[str], Path]) -> None:
    folder, x = corrected("fp8 row"), inputs(21)
    patcher = loaded(comfy, folder)
    first, _, _ = comfy.node.apply(patcher, "correction.safetensors", 0.25)
    first.load()
    between = first.clone()
    second, _, _ = comfy.node.apply(between, "correction.safetensors", 0.5)
    first.detach()
    model = second.load()
    del between
    with torch.inference_mode():
        assert error(model.diffusion_model(x), by_hand(folder, loaded(comfy, folder), x, 0.75)) < 1e-5


def test_a_layer_that_fails_is_left_as_it_was(comfy: Any, corrected: Callable[[str], Path]) -> None:
    patcher = loaded(comfy, corrected("int8 row"))
    plain = run(patcher, inputs(21))
    model, _, _ = comfy.node.apply(patcher, "correction.safetensors", 1.0)
    with pytest.raises((RuntimeError, ValueError)):
        model.load().diffusion_model(torch.zeros(3, WIDTH - 1))
    model.detach()
    assert torch.equal(run(patcher, inputs(21)), plain)


def test_activations_decide_the_dtype(comfy: Any, corrected: Callable[[str], Path]) -> None:
    patcher = loaded(comfy, corrected("fp8 row"))
    model, _, _ = comfy.node.apply(patcher, "correction.safetensors", 1.0)
    whole = run(model, inputs(21))
    half = run(model, inputs(21).bfloat16())
    assert half.dtype == torch.bfloat16
    assert error(half, whole) < 0.02


def with_adapter(comfy: Any, tensors: dict[str, torch.Tensor]) -> str:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, comfy.loras / "changed.safetensors")
    return "changed.safetensors"


def test_what_is_not_applied_is_reported(
    comfy: Any, corrected: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = corrected("fp8 row")
    patcher, adapter = loaded(comfy, folder), load_file(folder / "correction.safetensors")
    moved = {name.replace("blocks.1.fc2", "blocks.7.fc2"): tensor for name, tensor in adapter.items()}
    moved |= {f"transformer.a.lora_{part}.weight": random(4, 4) for part in "AB"}
    block = patcher.model.diffusion_model.blocks[0]
    block.fc1.weight = torch.nn.Parameter(block.fc1.weight.dequantize(), requires_grad=False)
    model, _, report = comfy.node.apply(patcher, with_adapter(comfy, moved), 1.0)
    assert report.startswith("changed.safetensors: 3 layers at strength 1\n")
    for line in (
        "layers that are not in this model: diffusion_model.blocks.7.fc2",
        "keys of another dialect: transformer.a.lora_A.weight, transformer.a.lora_B.weight; write",
        "layers that are not quantized, so a correction makes them worse: diffusion_model.blocks.0.fc1",
    ):
        assert line in report
        assert line in caplog.text
    assert len(next(iter(model.injections.values()))) == 1


def test_text_encoders(comfy: Any, corrected: Callable[[str], Path]) -> None:
    folder = corrected("fp8 row")
    patcher, adapter = loaded(comfy, folder), load_file(folder / "correction.safetensors")
    encoder = loaded(comfy, folder).model
    both = {name.replace("diffusion_model.", "text_encoders.t5.transformer."): each for name, each in adapter.items()}
    encoder.t5 = torch.nn.Module()
    encoder.t5.transformer = encoder.diffusion_model
    del encoder.diffusion_model
    clip, x = stand_in.clip_of(encoder), inputs(21)
    with torch.inference_mode():
        plain = encoder.t5.transformer(x)
    model, changed, report = comfy.node.apply(patcher, with_adapter(comfy, both), 1.0, clip)
    assert model is patcher
    assert "4 layers" in report
    assert not clip.patcher.injections
    with torch.inference_mode():
        assert error(changed.patcher.load().t5.transformer(x), by_hand(folder, patcher, x, 1.0)) < 1e-5
        changed.patcher.detach()
        assert torch.equal(encoder.t5.transformer(x), plain)
    _, none, report = comfy.node.apply(patcher, with_adapter(comfy, both | adapter), 1.0)
    assert none is None
    assert "4 layers at strength 1\n" in report
    assert "clip is not connected: text_encoders.t5.transformer.blocks.0.fc1, " in report
    with pytest.raises(ValueError, match=r"(?s)no layer of it.*clip is not connected"):
        comfy.node.apply(patcher, with_adapter(comfy, both), 1.0)


def test_what_cannot_be_applied_is_refused(comfy: Any, corrected: Callable[[str], Path]) -> None:
    folder = corrected("fp8 row")
    patcher, adapter = loaded(comfy, folder), load_file(folder / "correction.safetensors")
    base = "diffusion_model.blocks.0.fc1"
    for change, message in (
        ({"lora_down.weight": random(16, 64)}, r"made for another model: .*blocks.0.fc1 is 256 x 128, .* 256 x 64"),
        ({"lora_down.weight": None}, "fc1 has no lora_down.weight"),
        ({"lora_up.weight": None}, "fc1 has no lora_up.weight"),
        ({"lora_down.weight": random(15, 128)}, r"up \(256, 16\), down \(15, 128\)"),
        ({"alpha": torch.ones(2)}, r"alpha \(2,\)"),
    ):
        changed = adapter | {f"{base}.{name}": tensor for name, tensor in change.items()}
        with pytest.raises(ValueError, match=rf"changed.safetensors.*{message}"):
            comfy.node.apply(
                patcher, with_adapter(comfy, {name: each for name, each in changed.items() if each is not None}), 1.0
            )
    other = {name.replace("diffusion_model.", "base_model.model."): each for name, each in adapter.items()}
    with pytest.raises(ValueError, match=r"(?s)no layer of it.*--lora-dialect comfy"):
        comfy.node.apply(patcher, with_adapter(comfy, other), 1.0)
    assert not patcher.injections


def test_without_alpha_the_scale_is_one(comfy: Any, corrected: Callable[[str], Path]) -> None:
    folder, x = corrected("fp8 row"), inputs(21)
    patcher, adapter = loaded(comfy, folder), load_file(folder / "correction.safetensors")
    bare = {name: each for name, each in adapter.items() if not name.endswith(".alpha")}
    assert (
        error(run(comfy.node.apply(patcher, with_adapter(comfy, bare), 1.0)[0], x), by_hand(folder, patcher, x, 1.0))
        < 1e-5
    )


def test_the_node_offers_the_files_of_the_folder(comfy: Any, corrected: Callable[[str], Path]) -> None:
    loaded(comfy, corrected("fp8 row"))
    offered = comfy.node.INPUT_TYPES()
    assert offered["required"]["lora_name"] == (["correction.safetensors"],)
    assert offered["optional"] == {"clip": ("CLIP",)}
    assert len(comfy.node.RETURN_TYPES) == len(comfy.node.RETURN_NAMES) == 3
    assert callable(getattr(comfy.node, comfy.node.FUNCTION))
