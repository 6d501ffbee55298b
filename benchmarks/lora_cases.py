"""MiniLM quantized with an adapter: what a client computes with that applies the adapter beside the stored weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rounding_end_to_end import Model, decoded
from safetensors.torch import load_file

from quantloom import Pipeline
from quantloom.flow.report import Report

EVERY = "."
"""Pattern of all layers."""
_UP, _DOWN, _PREFIX = ".lora_up.weight", ".lora_down.weight", "diffusion_model."


def adapted(
    model: Model, folder: Path, quantize: Mapping[str, Any], lora: Mapping[str, Any] | None, only: str | None = None
) -> tuple[dict[str, torch.Tensor], Report]:
    """Every tensor of the checkpoint as the pipeline stores it, the products of its adapter added, and the report.

    ``only``: pattern of the layers that are quantized; others stay. ``lora`` None: no adapter.
    """
    output = folder / "out.safetensors"
    pipeline = Pipeline(scheduler="sync").read(model.file).target(preset="none", include=only).quantize(**quantize)
    if lora is not None:
        pipeline = pipeline.lora(**lora)
    report = pipeline.write(output, overwrite=True)
    weights = decoded(output)
    if report.adapter is not None:
        for layer, (up, down) in factors(Path(report.adapter.path)).items():
            weights[f"{layer}.weight"] += up @ down
    return weights, report


def factors(path: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Float32 (m, r) and (r, n) by layer, of a file with ComfyUI's names whose scale is 1."""
    held = load_file(path)
    names = [key.removesuffix(_UP) for key in held if key.endswith(_UP)]
    return {
        name.removeprefix(_PREFIX): (held[name + _UP].float(), held[name + _DOWN].float()) for name in names
    }  # fmt: skip
