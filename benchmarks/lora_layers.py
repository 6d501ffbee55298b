#!/usr/bin/env python3
"""Held-out output error of adapters for single layers in NVFP4, beside convert-to-quant's own extraction.

    python benchmarks/lora_layers.py [--ranks 16,32] [--cache peer.json] [--envs DIR] [--no-peer] [--json FILE]

O = ||X E^T|| / ||X W^T|| on inputs X that took no part, E being what is left of the error with the adapter applied.
Layers and inputs are those of rounding_layers.py: real activations of generated English in MiniLM; statistics are made
of every other sentence by ``quantloom.calibrate``, the rest judges. The pipeline writes model and adapter, and both
are read back.

convert-to-quant rounds with its own learned rounding and extracts with ``torch.svd_lowrank`` in an environment of its
own (peers.py); what it stores is kept beside the file named by --cache and made once. It takes minutes of a core.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lora_cases import EVERY, adapted
from measure import machine, save_json, table
from peers import add_peer_options
from rounding_cases import REAL, Judge, Layer, decoded_peer, make_layers
from rounding_end_to_end import Model, Stores
from rounding_layers import PEER, Cache, key_of, run_peer
from safetensors.torch import load_file

FORMAT = "nvfp4"
LAYERS = ("query", "FFN down", "FFN up")
ROUNDINGS = ("mse", "calibrated")
METHODS = ("svd", "weighted", "svdquant")
TARGETS = {
    ("mse", "svd"): {"query": 0.063, "FFN down": 0.027, "FFN up": 0.053},
    ("mse", "weighted"): {"query": 0.050, "FFN down": 0.017, "FFN up": 0.029},
    ("calibrated", "weighted"): {"query": 0.030, "FFN down": 0.0095, "FFN up": 0.0205},
}
"""Of O at rank 32, by layer."""
SOURCE = "first"
"""Every other English sentence; the inputs that judge are of the others."""


@dataclass(frozen=True)
class Cell:
    """One layer's weights with an adapter."""

    layer: str
    weights: str
    """How they were rounded."""
    method: str
    """How the adapter was made; empty: there is none."""
    rank: int
    weight: float
    """F: ||E|| / ||W||."""
    output: float
    """O."""


def ours(layers: Sequence[Layer], judges: Mapping[str, Judge], ranks: Sequence[int]) -> Iterator[Cell]:
    """What the pipeline makes."""
    only = "|".join(f"^{re.escape(REAL[layer.name])}$" for layer in layers)
    with tempfile.TemporaryDirectory() as name:
        folder, model = Path(name), Model()
        stores = Stores(model, folder)
        for rounding in ROUNDINGS:
            quantize = {"format": FORMAT, "rounding": rounding, "statistics": stores.path(SOURCE)}
            cases = [("", 0), *((method, rank) for method in METHODS for rank in ranks)]
            for method, rank in cases:
                lora = {"method": method, "rank": rank, "target": EVERY} if method else None
                weights, _ = adapted(model, folder, quantize, lora, only)
                for layer in layers:
                    errors = judges[layer.name].errors(weights[f"{REAL[layer.name]}.weight"])
                    yield Cell(layer.name, rounding, method, rank, errors.weight, errors.output)


def peers(layers: Sequence[Layer], judges: Mapping[str, Judge], ranks: Sequence[int], args: Any) -> Iterator[Cell]:
    """What convert-to-quant makes."""
    with tempfile.TemporaryDirectory() as folder:  # of a run without a cache
        cache = Cache.open(args.cache or Path(folder) / "peer.json")
        for layer in layers:
            for rank in ranks:
                run_peer(layer, [FORMAT], args.envs, cache, rank)
                stored = load_file(cache.tensors(key_of(layer, FORMAT, rank)))
                values = decoded_peer(stored, FORMAT, (layer.weight.shape[0], layer.weight.shape[1]))
                if rank == ranks[0]:
                    errors = judges[layer.name].errors(values)
                    yield Cell(layer.name, PEER, "", 0, errors.weight, errors.output)
                errors = judges[layer.name].errors(values + stored["lora_up"] @ stored["lora_down"])
                yield Cell(layer.name, PEER, "its own", rank, errors.weight, errors.output)


def errors_table(cells: Sequence[Cell], ranks: Sequence[int]) -> str:
    """A row for each way to make weights and adapter, a column for each layer and rank."""
    found = {(cell.weights, cell.method, cell.layer, cell.rank): cell for cell in cells}
    rows = []
    for weights, method in dict.fromkeys((cell.weights, cell.method) for cell in cells):
        line = [found[weights, method, layer, rank if method else 0] for layer in LAYERS for rank in ranks]
        rows.append([weights, method or "none", *(f"{cell.output:.4f}" for cell in line)])
    return table(["weights", "adapter", *(f"{layer}, {rank}" for layer in LAYERS for rank in ranks)], rows)


def misses(cells: Sequence[Cell]) -> Iterator[str]:
    """Every target that is not met."""
    for cell in cells:
        target = TARGETS.get((cell.weights, cell.method), {}).get(cell.layer)
        if target and cell.rank == 32 and cell.output > target:
            yield f"{cell.weights} + {cell.method}, {cell.layer}: {cell.output:.5f}, wanted {target}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Output errors of adapters for single layers.")
    parser.add_argument("--ranks", default="16,32")
    add_peer_options(parser)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    ranks = [int(rank) for rank in args.ranks.split(",")]
    layers = make_layers(LAYERS)
    judges = {layer.name: Judge(layer) for layer in layers}
    cells = [] if args.no_peer else list(peers(layers, judges, ranks, args))
    for cell in ours(layers, judges, ranks):
        print(f"  {cell}", file=sys.stderr, flush=True)
        cells.append(cell)
    print(f"O, {FORMAT}, by layer and rank\n\n{errors_table(cells, ranks)}")
    missed = list(misses(cells))
    print("\nTargets missed:\n" + ("\n".join(f"- {line}" for line in missed) or "- none"))
    save_json(args.json, {"machine": machine(), "cells": [asdict(cell) for cell in cells], "missed": missed})
    return 0


if __name__ == "__main__":
    sys.exit(main())
