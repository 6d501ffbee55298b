#!/usr/bin/env python3
"""What static activation scales do to products, on MiniLM's layers and sentences, multiplied by comfy-kitchen on CPU.

    python benchmarks/activation_scales.py [--steps 60] [--json FILE]

Weights are quantized by the pipeline (``nearest``), scales are set by its ``input_scales`` stage; statistics come from
generated English, the adapter is a LoRA of rank 8 on every linear layer, trained with PEFT so that both halves of a
sentence are embedded alike. Inputs are those of the sentences for evaluation, which neither has seen. The error is that
of a product with quantized inputs, relative to the product of the same quantized weight with inputs as they are: mean
(geometric) and largest over the layers. ``as the client does``: FP8 layers assume 1.0, NVFP4 layers take the amax of
each batch.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import QuantizedTensor, get_layout_class
from errors import minilm
from measure import machine, save_json, table
from safetensors.torch import load_file
from sentences import EVALUATION, english

from quantloom import Pipeline, calibrate

LAYOUTS = {"fp8": "TensorCoreFP8Layout", "nvfp4": "TensorCoreNVFP4Layout"}
BATCH, SENTENCES = 16, 400


class Model:
    """MiniLM, its tokens and the inputs of its layers."""

    def __init__(self) -> None:
        import transformers

        self.folder = Path(minilm()).parent
        self.network = transformers.AutoModel.from_pretrained(self.folder, dtype=torch.float32).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder)

    def tokens(self, sentences: list[str]) -> Any:
        return self.tokenizer(sentences, padding=True, truncation=True, max_length=64, return_tensors="pt")

    def inputs(self) -> dict[str, torch.Tensor]:
        """(tokens, n) of every linear layer, for the sentences for evaluation one by one: no padding."""
        seen: dict[str, list[torch.Tensor]] = {}
        hooks = [module.register_forward_pre_hook(
            lambda _module, args, name=name: seen.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1])))
            for name, module in self.network.named_modules() if isinstance(module, torch.nn.Linear)]  # fmt: skip
        with torch.no_grad():
            for sentence in EVALUATION:
                self.network(**self.tokens([sentence]))
        for hook in hooks:
            hook.remove()
        return {name: torch.cat(parts) for name, parts in seen.items()}

    def train_adapter(self, folder: Path, steps: int) -> str:
        """A LoRA for every linear layer: halves of a sentence are pulled together, those of others apart."""
        import peft

        torch.manual_seed(0)
        wrapped = peft.get_peft_model(self.network, peft.LoraConfig(r=8, lora_alpha=8, target_modules="all-linear"))
        optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=2e-3)
        text = [sentence.split() for sentence in english(steps * BATCH, seed=5)]
        for step in range(steps):
            words = text[step * BATCH : (step + 1) * BATCH]
            halves = [[" ".join(part) for part in parts] for parts in zip(
                *((each[: len(each) // 2], each[len(each) // 2 :]) for each in words), strict=True)]  # fmt: skip
            hidden = [wrapped(**self.tokens(half)).last_hidden_state for half in halves]
            left, right = (F.normalize(states.mean(1), dim=1) for states in hidden)
            loss = F.cross_entropy(left @ right.T * 20, torch.arange(len(words)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        wrapped.save_pretrained(folder)
        self.network = wrapped.unload()
        return str(folder / "adapter_model.safetensors")


def mean_and_largest(errors: list[float]) -> tuple[float, float]:
    """Geometric mean, and the largest."""
    return math.exp(sum(map(math.log, errors)) / len(errors)), max(errors)


def product_error(kind: str, tensors: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> float:
    """Of a layer's product with inputs that are quantized by its scale, or as the client does without one."""
    layout, shape = get_layout_class(LAYOUTS[kind]), (tensors[f"{name}.bias"].numel(), x.shape[1])
    given: dict[str, Any] = {"scale": tensors[f"{name}.weight_scale"]}
    if kind == "nvfp4":
        given = {"scale": tensors[f"{name}.weight_scale_2"], "block_scale": tensors[f"{name}.weight_scale"]}
    weight = QuantizedTensor(tensors[f"{name}.weight"], LAYOUTS[kind],
                             layout.Params(**given, orig_dtype=torch.float32, orig_shape=shape))  # fmt: skip
    scale = tensors.get(f"{name}.input_scale", torch.tensor(1.0) if kind == "fp8" else None)
    quantized = QuantizedTensor.from_float(x, LAYOUTS[kind], scale=scale)
    wanted = F.linear(x, weight.dequantize())
    return float((F.linear(quantized.dequantize(), weight.dequantize()) - wanted).norm() / wanted.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of training the adapter")
    parser.add_argument("--json", help="also write the rows here")
    arguments = parser.parse_args()
    model, rows = Model(), []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        text = english(SENTENCES, seed=1)
        batches = [model.tokens(text[start : start + BATCH]) for start in range(0, SENTENCES, BATCH)]
        store = str(folder / "stats.zarr")
        calibrate(model.network, batches, store, checkpoint=model.folder)
        lora = model.train_adapter(folder / "lora", arguments.steps)
        inputs = model.inputs()
        ways: dict[str, dict[str, Any]] = {
            "as the client does": {},
            **{f"{wanted} of statistics": {"statistics": store, "input_scale": wanted}
               for wanted in ("amax", "p99.99", "p99.9")},
            **{f"the adapter at RMS {rms:g}": {"lora": lora, "lora_rms": rms} for rms in (1 / 16, 1.0, 16.0, 256.0)},
        }  # fmt: skip
        for kind in LAYOUTS:
            source = folder / f"{kind}.safetensors"
            Pipeline().read(model.folder / "model.safetensors").target(preset="none").quantize(
                kind, rounding="nearest").write(source)  # fmt: skip
            for way, options in ways.items():
                made = source
                if options:
                    made = folder / "out.safetensors"
                    Pipeline().read(source).input_scales(**options).write(made, overwrite=True)
                tensors = load_file(made)
                layers = [name for name in inputs if f"{name}.comfy_quant" in tensors]
                for times in (1.0,) if options else (1.0, 1e-3, 1e3):
                    errors = [product_error(kind, tensors, name, inputs[name] * times) for name in layers]
                    words = way if times == 1.0 else f"{way}, inputs x {times:g}"
                    mean, largest = mean_and_largest(errors)
                    row = {"format": kind, "scale": words, "layers": len(layers), "mean": mean, "largest": largest}
                    rows.append(row)
    print(machine())
    print(table(["format", "scale", "layers", "mean", "largest"],
                [[row["format"], row["scale"], str(row["layers"]), f"{row['mean']:.4f}", f"{row['largest']:.4f}"]
                 for row in rows]))  # fmt: skip
    save_json(arguments.json, {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
