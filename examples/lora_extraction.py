"""What quantization took from chosen layers goes into a LoRA, which is loaded beside the quantized layers.

The error of a layer, original minus stored weight, is approximated by a product of low rank. With statistics of the
layer's inputs, it is the error of its outputs that counts, and a rank of 16 takes away a good part of it; without, the
error is nearly white, and no LoRA of low rank can hold much of it. The adapter must be applied beside the product, not
merged into the codes: merging rounds it away again.

    python examples/lora_extraction.py [FOLDER]
"""

from __future__ import annotations

import shutil

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small_models import working_folder

import quantloom
from quantloom import Pipeline
from quantloom.formats.layers import group_layers
from quantloom.formats.source import open_source
from quantloom.stages.reading import Decode
from quantloom.stages.work import Environment, LayerPlan, Work

WIDTH = 256


def make_model() -> torch.nn.Sequential:
    """Three layers whose inputs lie mostly in a few directions, as those of trained models do."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(WIDTH, 2 * WIDTH), torch.nn.GELU(), torch.nn.Linear(2 * WIDTH, WIDTH), torch.nn.Tanh(),
        torch.nn.Linear(WIDTH, WIDTH),
    )  # fmt: skip


def batches(seed: int) -> list[torch.Tensor]:
    directions = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(7))
    random = torch.Generator().manual_seed(seed)

    def draw() -> torch.Tensor:
        return torch.randn(256, 12, generator=random) @ directions + 0.1 * torch.randn(256, WIDTH, generator=random)

    return [draw() for _ in range(4)]


def decoded(path: str) -> dict[str, torch.Tensor]:
    """The weights of a quantized file in float32, and its other tensors as they are."""
    weights = {}
    for layer in group_layers(open_source(path)):
        if layer.encoding is not None:
            plan = LayerPlan(layer, (Decode(),), ())
            work = Decode().run(Work(plan, (0, plan.rows), Environment()))
            weights[layer.weight.name] = torch.cat([chunk.x.clone() for chunk in work.chunks()])
    return weights


Adapter = tuple[torch.Tensor, torch.Tensor, float]
"""``up`` (m, r), ``down`` (r, n), and what their product is scaled by."""


class Corrected(torch.nn.Module):
    """A quantized linear layer with an adapter beside it: W'x + scale * up(down(x)) + b."""

    def __init__(self, layer: torch.nn.Linear, weight: torch.Tensor, adapter: Adapter | None) -> None:
        super().__init__()
        self.weight, self.bias, self.adapter = weight, layer.bias, adapter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.linear(x, self.weight, self.bias)
        if self.adapter is None:
            return y
        up, down, scale = self.adapter
        return y + scale * (x @ down.T) @ up.T


def load_adapter(path: str) -> dict[str, Adapter]:
    """``diffusion_model.<layer>.lora_up.weight`` (m, r), ``.lora_down.weight`` (r, n), ``.alpha``: scale alpha / r."""
    found = {}
    with safe_open(path, "pt") as file:
        keys = set(file.keys())
        for key in keys:
            if key.endswith(".lora_up.weight"):
                base = key.removesuffix(".lora_up.weight")
                up, down = file.get_tensor(key).float(), file.get_tensor(f"{base}.lora_down.weight").float()
                alpha = float(file.get_tensor(f"{base}.alpha")) if f"{base}.alpha" in keys else len(down)
                found[base.removeprefix("diffusion_model.")] = (up, down, alpha / len(down))
    return found


def main() -> None:
    folder = working_folder("lora_extraction")
    model = make_model()
    source, store = folder / "model.safetensors", folder / "stats.zarr"
    save_file(model.state_dict(), source)
    shutil.rmtree(store, ignore_errors=True)
    quantloom.calibrate(model, batches(1), out=store, checkpoint=source)

    output = folder / "model-nvfp4.safetensors"
    report = (
        Pipeline()
        .read(source)
        .quantize("nvfp4", statistics=str(store))
        .lora(rank=16, target=r"^\d+$", output=str(folder / "correction_lora.safetensors"))
        .write(output, overwrite=True)
    )
    print(report.summary())

    weights, adapters = decoded(str(output)), load_adapter(str(folder / "correction_lora.safetensors"))
    print("ranks:", {name: len(down) for name, (_, down, _) in sorted(adapters.items())})
    x = torch.cat(batches(2))
    with torch.no_grad():
        wanted = model(x)
        for what, used in (("quantized", {}), ("with the adapter", adapters)):
            layers = [
                Corrected(layer, weights[f"{name}.weight"], used.get(name)) if hasattr(layer, "weight") else layer
                for name, layer in model.named_children()
            ]
            error = (torch.nn.Sequential(*layers)(x) - wanted).norm() / wanted.norm()
            print(f"{what}: output error {float(error):.4f}")


if __name__ == "__main__":
    main()
