#!/usr/bin/env python3
"""What might bring an adapter of ``calibrated`` weights closer to the float32 model, on single layers in NVFP4.

    python benchmarks/lora_ideas.py [--layers "query,FFN down,FFN up"] [--rank 32] [--json FILE]

Every row gives the output error O (lora_layers.py) with an adapter by method ``weighted``, on the inputs that the
statistics are of and on those held out. Computed here, layer by layer, from the product's rounding and extraction:

- damping of the adapter's weighting, and of the rounding; more sweeps of the rounding
- rounds: sweeps for weight minus adapter, then a new adapter of what is lost
- statistics of a tenth of the sentences
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from lora_layers import FORMAT, LAYERS
from measure import machine, save_json, table
from rounding_cases import REAL, Layer, chosen, format_of, make_layers, minilm_layers, round_matrix, start_of

from quantloom.stages.calibrated import Calibrated
from quantloom.stages.error_feedback import sweep_
from quantloom.stages.low_rank import DAMPING, Weighting, low_rank
from quantloom.stages.methods import Problem
from quantloom.stages.products import Operand
from quantloom.stages.scale_search import Scaling

DAMPINGS = (0.0003, 0.001, 0.003, 0.03, 0.1, 0.5)
ROUNDING: tuple[dict[str, Any], ...] = ({"damping": 0.01}, {"damping": 0.1}, {"sweeps": 8})
ROUNDS, SWEEPS = 3, 2
FEW = 216
"""Sentences, half of them seen: about 2,100 tokens."""


@dataclass(frozen=True)
class Row:
    """One idea on one layer."""

    layer: str
    idea: str
    alone: float
    """O of the weights without an adapter, on inputs held out."""
    seen: float
    """O with it, on the inputs that the statistics are of."""
    held_out: float


class Ideas:
    """All ideas on one layer."""

    def __init__(self, layer: Layer, rank: int) -> None:
        self.layer, self.rank, self.moments = layer, rank, layer.moments()

    def rows(self) -> Iterator[Row]:
        error = self.lost({})
        yield self.row("as it is", error)
        for damping in DAMPINGS:
            yield self.row(f"damping of the weighting {damping:g}", error, damping)
        for options in ROUNDING:
            words = ", ".join(f"rounding's {name} {value}" for name, value in options.items())
            yield self.row(words, self.lost(options))
        yield from self.rounds()

    def lost(self, options: Mapping[str, Any]) -> torch.Tensor:
        """W - W' of calibrated rounding."""
        moments = replace(self.moments, made={})
        return self.layer.weight - round_matrix(self.layer, FORMAT, "calibrated", moments, options).values

    def adapter(self, error: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
        up, down, _ = low_rank(error, self.rank, 1, Weighting(self.moments.hessian, damping))
        return up @ down

    def row(self, idea: str, error: torch.Tensor, damping: float = DAMPING) -> Row:
        left = error - self.adapter(error, damping)
        seen, held_out = (self.output(x, left) for x in (self.layer.seen, self.layer.held_out))
        return Row(self.layer.name, idea, self.output(self.layer.held_out, error), seen, held_out)

    def output(self, inputs: torch.Tensor, error: torch.Tensor) -> float:
        return float((inputs @ error.T).norm() / (inputs @ self.layer.weight.T).norm())

    def rounds(self) -> Iterator[Row]:
        """Coordinate descent goes on from the rounded weights, towards the weight without its adapter."""
        fmt, weight = format_of(FORMAT), self.layer.weight
        scales, whole = start_of(fmt, weight, True)
        problem = Problem(self.layer.name, weight, fmt, scales, whole, replace(self.moments, made={}))
        solver = Calibrated().solver(problem)
        scaling = Scaling(fmt, solver.whole)
        panel = solver.first(solver.turned(weight), scaling)
        for _ in range(solver.sweeps):
            sweep_(panel, solver.factor, scaling)
        place = solver.order.argsort()
        for number in range(1, ROUNDS + 1):
            error = weight - panel.values[place].T
            panel.weight = solver.turned(weight - self.adapter(error))
            panel.error = Operand(panel.weight.shape, weight.device)
            panel.error.put(slice(None), panel.values - panel.weight)
            for _ in range(SWEEPS):
                sweep_(panel, solver.factor, scaling)
            yield self.row(f"rounds: {number}", weight - panel.values[place].T)


def measured(names: Sequence[str], rank: int) -> Iterator[Row]:
    for layer in make_layers(names):
        yield from Ideas(layer, rank).rows()
    for name, tensors in minilm_layers([REAL[name] for name in names], FEW).items():
        layer = Layer(next(short for short in names if REAL[short] == name), *tensors)
        few = Ideas(layer, rank)
        yield few.row(f"statistics of {len(layer.seen)} tokens", few.lost({}))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Ideas for adapters of calibrated weights.")
    parser.add_argument("--layers", default=",".join(LAYERS))
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    for row in measured(chosen(args.layers, LAYERS), args.rank):
        print(f"  {row}", file=sys.stderr, flush=True)
        rows.append(row)
    cells = [[row.layer, row.idea, f"{row.alone:.4f}", f"{row.seen:.4f}", f"{row.held_out:.4f}"] for row in rows]
    print(f"O, {FORMAT}, calibrated, rank {args.rank}\n")
    print(table(["layer", "idea", "without adapter", "seen", "held out"], cells))
    save_json(args.json, {"machine": machine(), "rows": [asdict(row) for row in rows]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
