#!/usr/bin/env python3
"""Extraction of an adapter on one NVIDIA GPU: milliseconds and memory per layer.

    python benchmarks/lora_cuda.py [--shapes 3072x3072,3072x12288] [--rank 32] [--device cuda] [--json FILE]

A generated layer is quantized to NVFP4 by the pipeline's own steps, up to the one that extracts; that step is timed
with the error and, for ``weighted``, H on the device: medians of several calls, the device synchronised before and
after each.

- low rank: the factors alone
- whole step: errors before and after, the factors, their copies on the CPU
- weight's energy: what measuring of relative errors takes beside that, while rows pass: ||W||^2, and tr(W H W^T)
- torch.svd_lowrank: with the arguments that convert-to-quant gives it

What is left is ||E'|| / ||E||, with statistics that of the outputs, sqrt(tr(E' H E'^T) / tr(E H E^T)).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from measure import machine, save_json, table
from rounding_cases import generated
from rounding_cuda import Clock, make_statistics
from safetensors.torch import save_file

from quantloom import Pipeline
from quantloom.stages.counter import seed_of
from quantloom.stages.energies import Energies
from quantloom.stages.extract import Extract, Lost
from quantloom.stages.low_rank import Weighting, low_rank
from quantloom.stages.work import Environment, Work

SHAPES = ("3072x3072", "3072x12288", "12288x3072")
RANK = 32
TARGETS = {("3072x12288", "svd"): 30.0, ("3072x12288", "weighted"): 120.0}
"""Milliseconds of the whole step at rank 32."""
NAME = "blocks.0.attn.q"
CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class Timed:
    """One part of the work."""

    shape: str
    method: str
    what: str
    milliseconds: float
    peak: float
    """Largest allocation on the GPU beyond what was there (error, H), in 1e6 bytes."""
    left: float | None = None
    """Share of the error that is left."""

    def cells(self) -> list[str]:
        left = "" if self.left is None else f"{self.left:.4f}"
        return [self.shape, self.method, self.what, f"{self.milliseconds:.1f}", f"{self.peak:.0f}", left]


class Layer:
    """A quantized layer right before its adapter is extracted."""

    def __init__(self, source: Path, store: Path | None, rank: int, device: torch.device) -> None:
        given = {"statistics": str(store)} if store else {}
        pipeline = Pipeline(device=str(device)).read(source).target(preset="none").quantize("nvfp4", **given)
        pipeline = pipeline.lora(rank=rank, target=".")
        plan = pipeline.write(source.with_name("out.safetensors"), compute=False).plan.layers[0]
        self.work = Work(plan, (0, plan.rows), Environment(device=str(device), chunk_bytes=CHUNK_BYTES))
        for step in plan.steps:
            if isinstance(step, Extract):
                self.step = step
                break
            self.work = step.run(self.work)
        self.lost = Lost(self.work, self.step.coded, self.step.inputs)
        for chunk in self.work.chunks():
            self.lost.add(chunk)
        self.error = self.lost.error.clone()

    def extract(self) -> float:
        """The whole step; the share of the error that it leaves."""
        self.lost.error.copy_(self.error)  # the step consumes it
        self.step.extract(self.work, self.lost)
        gain = self.work.gain
        assert gain is not None
        before, after = gain.before, gain.after
        if before.output is None or after.output is None:
            return after.weight / before.weight
        return after.output / before.output

    def energy(self, weight: torch.Tensor) -> None:
        """Sums of the original weight, as the rows pass."""
        energies = Energies(weight.shape[1], self.lost.hessian, weight.device)
        energies.add(weight)
        energies.total()


def timings(shape: str, rank: int, clock: Clock) -> Iterator[Timed]:
    """All parts for one shape."""
    rows, columns = (int(size) for size in shape.split("x"))
    weight, _, _ = generated(rows, columns, 2, clock.device)
    with tempfile.TemporaryDirectory() as name:
        source, store = Path(name) / "layer.safetensors", Path(name) / "stats.zarr"
        save_file({f"{NAME}.weight": weight.cpu().contiguous()}, source)
        make_statistics(source, store, clock.device)
        for method, statistics in (("svd", None), ("weighted", store)):
            layer = Layer(source, statistics, rank, clock.device)
            error, hessian = layer.error, layer.lost.hessian
            weighting = None if hessian is None else Weighting(hessian)
            calls = {
                "low rank": lambda error=error, weighting=weighting: low_rank(error, rank, seed_of(NAME), weighting),
                "whole step": layer.extract,
                "weight's energy": lambda layer=layer: layer.energy(weight),
            }
            for what, call in calls.items():
                milliseconds, peak, result = clock(call)
                left = result if isinstance(result, float) else None
                yield Timed(shape, method, what, milliseconds, peak, left)
        milliseconds, peak, (u, s, v) = clock(lambda: torch.svd_lowrank(error, q=rank, niter=4))
        left = float((error - (u * s) @ v.T).norm() / error.norm())
        yield Timed(shape, "torch.svd_lowrank", "", milliseconds, peak, left)


def misses(rows: Sequence[Timed]) -> Iterator[str]:
    """Every target that is not met."""
    for row in rows:
        target = TARGETS.get((row.shape, row.method))
        if target and row.what == "whole step" and row.milliseconds > target:
            yield f"{row.method}, {row.shape}: {row.milliseconds:.1f} ms, wanted {target:g}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Extraction of adapters on a GPU.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, NVFP4, rank {args.rank}\n", flush=True)
    rows = []
    for shape in args.shapes.split(","):
        for row in timings(shape, args.rank, Clock(device)):
            print("  " + ", ".join(row.cells()), file=sys.stderr, flush=True)
            rows.append(row)
    print(table(["shape", "method", "what", "ms", "GPU MB", "left"], [row.cells() for row in rows]))
    missed = list(misses(rows)) if device.type == "cuda" and args.rank == RANK else []
    print("\nTargets missed:\n" + ("\n".join(f"- {line}" for line in missed) or "- none"))
    save_json(args.json, {"machine": {**machine(), "device": name}, "rows": [asdict(row) for row in rows]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
