"""A stage of one's own: merges a LoRA into the weights before they are quantized.

A stage is a frozen dataclass with a verb. Its ``plan`` sees every layer with the chain of steps that the stages before
it have made, and gives the layers back with what it adds; it reads shapes, never weights. What it adds is a step: a
value with ``run``, which wraps the stream of row chunks, and ``memory``, which says what it holds. A step sees some
rows at a time, so that this one merges into a weight of any size. Registered, the stage is a verb of ``Pipeline`` and
of JSON recipes.

    python examples/custom_stage.py [FOLDER]
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from small_models import flux_tensors, save_flux, working_folder

from quantloom import Pipeline
from quantloom.formats.errors import PlanError
from quantloom.formats.fileio import Reader
from quantloom.formats.source import open_source
from quantloom.formats.tensors import TensorRef
from quantloom.stages.reading import as_float32, chunk_elements, read_rows, read_whole
from quantloom.stages.stage import Context, register_stage
from quantloom.stages.work import Chunk, Environment, LayerPlan, Work

PREFIX = "diffusion_model."


@dataclass(frozen=True)
class AddProduct:
    """Adds ``strength`` * up @ down to the rows that pass."""

    up: TensorRef
    """(rows of the weight, rank)."""
    down: TensorRef
    """(rank, columns of the weight)."""
    strength: float
    name: str = "merge"

    def run(self, work: Work) -> Work:
        upstream = work.stream
        assert upstream is not None

        def stream(start: int, stop: int) -> Iterator[Chunk]:
            down = read_whole(self.down).view(self.down.shape).float()
            with Reader(self.up.path) as reader:
                for chunk in upstream(start, stop):
                    rows = (chunk.start, chunk.start + chunk.x.shape[0])
                    up = read_rows(reader, self.up, rows, "merge").float()
                    chunk.x = as_float32(chunk.x, chunk.x.shape[1])
                    chunk.x.addmm_(up.to(chunk.x.device), down.to(chunk.x.device), alpha=self.strength)
                    yield chunk

        work.stream = stream
        return work

    def memory(self, plan: LayerPlan, environment: Environment) -> int:
        """The float32 rows, those of ``up``, and ``down`` as stored and in float32."""
        return chunk_elements(plan, environment) * 4 + self.up.nbytes + 8 * self.down.numel


@dataclass(frozen=True)
class Merge:
    """Merges the LoRA in a file into the layers that it names; they must be among those that are quantized."""

    verb: ClassVar[str] = "merge"

    adapter: str
    """A .safetensors file with ``diffusion_model.<layer>.lora_up.weight`` and ``.lora_down.weight``."""
    strength: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def identity(self) -> dict[str, Any]:
        """A file is known by its content: on another machine it lies elsewhere."""
        return {**asdict(self), "adapter": hashlib.sha256(Path(self.adapter).read_bytes()).hexdigest()}

    def plan(self, layers: Sequence[LayerPlan], context: Context) -> list[LayerPlan]:
        refs = open_source(self.adapter).refs
        suffix = ".lora_up.weight"
        wanted = {key[len(PREFIX) : -len(suffix)] for key in refs if key.startswith(PREFIX) and key.endswith(suffix)}
        planned = []
        for plan in layers:
            name = plan.layer.name
            if name not in wanted or not plan.format:
                planned.append(plan)
                continue
            wanted.remove(name)
            up, down = refs[f"{PREFIX}{name}{suffix}"], refs[f"{PREFIX}{name}.lora_down.weight"]
            if (up.shape[0], down.shape[1]) != plan.layer.weight.shape or up.shape[1] != down.shape[0]:
                shapes = f"{list(up.shape)} times {list(down.shape)}"
                raise PlanError(f"{self.adapter}: {name}: {shapes} does not fit {list(plan.layer.weight.shape)}")
            step = AddProduct(up, down, self.strength)
            planned.append(replace(plan, steps=(plan.steps[0], step, *plan.steps[1:])))  # right behind the read
        if wanted:
            raise PlanError(f"{self.adapter}: {', '.join(sorted(wanted))}: not among the layers that are quantized")
        context.notes.append(f"merged: {self.adapter} at strength {self.strength}")
        return planned


def save_adapter(path: str) -> dict[str, torch.Tensor]:
    """A LoRA of rank 4 for two layers; the weights as they should be after merging."""
    random = torch.Generator().manual_seed(1)
    weights, adapter, merged = flux_tensors(), {}, {}
    for name in ("double_blocks.0.img_attn.qkv", "single_blocks.0.linear2"):
        weight = weights[f"{name}.weight"].float()
        up, down = (torch.randn(shape, generator=random) * 0.1 for shape in ((len(weight), 4), (4, weight.shape[1])))
        adapter |= {f"{PREFIX}{name}.lora_up.weight": up, f"{PREFIX}{name}.lora_down.weight": down}
        merged[name] = weight + 0.8 * up @ down
    save_file(adapter, path)
    return merged


def main() -> None:
    register_stage("merge", f"{__name__}:Merge")
    folder = working_folder("custom_stage")
    source, adapter = save_flux(folder / "flux.safetensors"), str(folder / "style_lora.safetensors")
    merged = save_adapter(adapter)
    pipeline = Pipeline().read(source).quantize("int8").merge(adapter, strength=0.8)
    print(pipeline)
    report = pipeline.write(folder / "flux-style-int8.safetensors", overwrite=True)
    print(report.summary())
    output = open_source(report.output)
    for name, expected in merged.items():
        codes, scale = (output.refs[f"{name}.{part}"] for part in ("weight", "weight_scale"))
        stored = read_whole(codes).view(codes.shape).float() * read_whole(scale).view(scale.shape)
        print(f"{name}: error {float((stored - expected).norm() / expected.norm()):.4f} to weight + LoRA")


if __name__ == "__main__":
    main()
