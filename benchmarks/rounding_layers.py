#!/usr/bin/env python3
"""Weight, projected and held-out output error of every rounding method on single layers, beside convert-to-quant.

    python benchmarks/rounding_layers.py [--layers query,1024x1024] [--formats "nvfp4,fp8 row"] [--methods mse,learned]
                                         [--cache peer.json] [--envs DIR] [--no-peer] [--json FILE]

F = ||E|| / ||W||, P = ||U_k^T E V_k|| / ||W|| with exact singular vectors of W, O = ||X E^T|| / ||X W^T|| on inputs X
that took no part, E being stored minus original weight. Inputs of MiniLM's layers are real activations of generated
English sentences: every other sentence makes the statistics, the rest judges. All weights are decoded from codes and
scales.

convert-to-quant runs its own learned rounding with its command line's defaults (prodigy, 4000 iterations, plateau,
top_p 0.2, k 256 to 1280) in an environment of its own (peers.py), one thread; its stored tensors are decoded by
quantloom. What it stores is kept beside the file named by --cache and made once. It takes 20 minutes of a core.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from measure import HERE, machine, save_json, table
from peers import CONVERT_TO_QUANT_PROGRAM, add_peer_options, create
from rounding_cases import (
    FORMATS,
    GENERATED,
    LAYERS,
    METHODS,
    REAL,
    Errors,
    Judge,
    Layer,
    chosen,
    decoded_peer,
    make_layers,
    round_matrix,
)  # fmt: skip
from rounding_peer import DEFAULTS
from safetensors.torch import load_file, save_file

from quantloom.stages.statistics import Moments

PEER = "convert-to-quant"
OPTIMIZER = "prodigy"
TARGET_PROJECTED, TARGET_OUTPUT = 0.87, 0.40
"""Geometric means relative to the peer: P of learned, O of calibrated."""
NOISE = 1e-6
"""A relative difference of float32 sums, and no loss."""


@dataclass(frozen=True)
class Cell:
    """A method on a layer in a format."""

    layer: str
    format: str
    method: str
    errors: Errors | None
    seconds: float | None
    loss: tuple[float, float] | None = None
    """The method's own objective, as stored and with plain rounding."""
    kept_start: bool = False
    failed: str = ""

    def __str__(self) -> str:
        if self.errors is None:
            return self.failed
        star = "*" if self.kept_start else ""
        return f"{self.errors if self.errors.finite else 'NaN'}{star} ({self.seconds:.2f} s)"


# -- the peer ----------------------------------------------------------------------------------------------------------


@dataclass
class Cache:
    """What the peer made of layers, by their content."""

    path: Path
    held: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Seconds, or why it failed."""

    @classmethod
    def open(cls, path: Path) -> Cache:
        return cls(path, json.loads(path.read_text()) if path.exists() else {})

    def tensors(self, key: str) -> Path:
        """What it stored, in a folder beside the JSON file."""
        return self.path.with_suffix(".d") / f"{key}.safetensors"

    def put(self, key: str, line: dict[str, Any], stored: Path) -> None:
        if stored.exists():
            self.tensors(key).parent.mkdir(exist_ok=True)
            shutil.copy(stored, self.tensors(key))
        self.held[key] = line
        self.path.write_text(json.dumps(self.held, indent=1) + "\n")


def key_of(layer: Layer, format: str, rank: int = 0) -> str:
    """Tells weights and settings apart."""
    settings = [OPTIMIZER, DEFAULTS, CONVERT_TO_QUANT_PROGRAM.requirements[0], *([rank] if rank else [])]
    digest = hashlib.sha256(json.dumps(settings).encode())
    digest.update(layer.weight.contiguous().numpy().tobytes())
    return f"{layer.name}, {format}, {digest.hexdigest()[:16]}"


def run_peer(layer: Layer, formats: Sequence[str], envs: Path, cache: Cache, rank: int = 0) -> None:
    """Has the peer round a layer in the formats that the cache lacks, and extract an adapter if it has a rank."""
    missing = [format for format in formats if key_of(layer, format, rank) not in cache.held]
    if not missing:
        return
    python = create(CONVERT_TO_QUANT_PROGRAM, envs)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file({"weight": layer.weight.contiguous()}, folder / "weight.safetensors")
        argv = [str(python), str(HERE / "rounding_peer.py"), str(folder / "weight.safetensors"), name,
                "--formats", ",".join(missing), "--optimizer", OPTIMIZER, "--lora-rank", str(rank)]  # fmt: skip
        quiet = {"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=quiet) as process:
            assert process.stdout is not None
            for text in process.stdout:
                line = json.loads(text)
                format = line.pop("format")
                cache.put(key_of(layer, format, rank), line, folder / f"{format}.safetensors")
                print(f"  {PEER}: {layer.name}, {format}: {line}", file=sys.stderr, flush=True)
        for format in missing:
            if key_of(layer, format, rank) not in cache.held:
                cache.put(key_of(layer, format, rank), {"failed": f"exit status {process.returncode}"}, folder / "none")


def peer_cell(layer: Layer, format: str, judge: Judge, cache: Cache) -> Cell:
    line, errors = cache.held[key_of(layer, format)], None
    if "failed" not in line:
        stored = load_file(cache.tensors(key_of(layer, format)))
        errors = judge.errors(decoded_peer(stored, format, (layer.weight.shape[0], layer.weight.shape[1])))
    return Cell(layer.name, format, PEER, errors, line.get("seconds"), failed=line.get("failed", ""))


# -- quantloom ---------------------------------------------------------------------------------------------------------


def cells(
    layer: Layer, formats: Sequence[str], methods: Sequence[str], judge: Judge
) -> Iterator[Cell]:
    """Every method in every format. Moments keep what was derived of them: each cell gets its own."""
    moments = layer.moments()
    for format in formats:
        for method in methods:
            given = Moments(moments.hessian, moments.mean, moments.tokens) if method == "calibrated" else None
            result = round_matrix(layer, format, method, given)
            errors = judge.errors(result.values)
            yield Cell(layer.name, format, method, errors, result.seconds, result.loss, result.kept_start)


# -- tables ------------------------------------------------------------------------------------------------------------

Found = Mapping[tuple[str, str, str], Cell]
"""By layer, format and method."""


def geometric(values: Iterable[float]) -> float:
    logarithms = [math.log(value) for value in values]
    return math.exp(math.fsum(logarithms) / len(logarithms)) if logarithms else math.nan


def errors_table(found: Found, methods: Sequence[str]) -> str:
    pairs = dict.fromkeys((layer, format) for layer, format, _ in found)
    rows = []
    for layer, format in pairs:
        line = (found.get((layer, format, method)) for method in methods)
        rows.append([layer, format, *(str(cell) if cell else "" for cell in line)])
    return table(["layer", "format", *methods], rows)


def ratios(found: Found, method: str, to: str, of: Callable[[Errors], float]) -> dict[tuple[str, str], float]:
    """By layer and format, where both are numbers."""
    result = {}
    for (layer, format, name), cell in found.items():
        other = found.get((layer, format, to))
        if name != method or other is None or cell.errors is None or other.errors is None or not other.errors.finite:
            continue
        result[layer, format] = of(cell.errors) / of(other.errors)
    return result


ORIGINS = {"MiniLM": tuple(REAL), "generated": tuple(GENERATED), "all": LAYERS}

MEASURES: dict[str, Callable[[Errors], float]] = {
    "F": lambda errors: errors.weight, "P": lambda errors: errors.projected, "O": lambda errors: errors.output,
}  # fmt: skip


def summary_table(found: Found, methods: Sequence[str], to: str) -> str:
    """Geometric means of F / P / O relative to a method, by format and by where layers come from; and how many times
    less CPU the peer's are made in."""
    groups: dict[str, Found] = {}
    for key, cell in found.items():
        for group in (key[1], *(name for name, layers in ORIGINS.items() if key[0] in layers)):
            groups[group] = {**groups.get(group, {}), key: cell}
    rows = []
    for group in (*(name for name in groups if name not in ORIGINS), *(name for name in ORIGINS if name in groups)):
        row = [group]
        for method in methods:
            means = (geometric(ratios(groups[group], method, to, of).values()) for of in MEASURES.values())
            row.append(" / ".join(f"{mean:.3f}" for mean in means) + faster(groups[group], method, to))
        rows.append(row)
    return table([f"relative to {to}", *methods], rows)


def faster(found: Found, method: str, to: str) -> str:
    """How many times less CPU than the peer a method takes."""
    pairs = []
    for (layer, name, made), cell in found.items():
        other = found.get((layer, name, to))
        if made == method != to == PEER and other is not None and cell.seconds and other.seconds:
            pairs.append(other.seconds / cell.seconds)
    if not pairs:
        return ""
    mean = geometric(pairs)
    return f", {mean:.0f}x" if mean >= 10 else f", {mean:.2g}x"


def misses(found: Found) -> Iterator[str]:
    """Every target that is not met."""
    for name in ("F", "O"):
        for (layer, format), ratio in ratios(found, "learned", PEER, MEASURES[name]).items():
            if ratio > 1:
                peer, plain = found[layer, format, PEER].errors, found.get((layer, format, "nearest"))
                same = plain is not None and peer is not None and plain.errors == peer
                said = ", which stores what nearest stores" if same else ""
                yield f"learned, {layer}, {format}: {name} is {ratio:.4f} of {PEER}'s{said}"
    for method, name, target in (("learned", "P", TARGET_PROJECTED), ("calibrated", "O", TARGET_OUTPUT)):
        for origin, layers in ORIGINS.items():
            every = ratios(found, method, PEER, MEASURES[name])
            some = [ratio for (layer, _), ratio in every.items() if layer in layers]
            if (mean := geometric(some)) > target:
                yield f"{method}, {origin}: {name} {mean:.4f} of {PEER}'s in the geometric mean, wanted {target}"
    for (layer, format), ratio in ratios(found, "mse", "nearest", MEASURES["F"]).items():
        if ratio > 1 + NOISE:
            yield f"mse, {layer}, {format}: F is {ratio:.6f} of nearest's"
    for cell in found.values():
        if cell.loss and not cell.loss[0] <= cell.loss[1] * (1 + NOISE):
            ours, plain = cell.loss
            yield f"{cell.method}, {cell.layer}, {cell.format}: objective {ours:.6g}, nearest {plain:.6g}"
        if cell.errors is not None and not cell.errors.finite:
            yield f"{cell.method}, {cell.layer}, {cell.format}: NaN"
        if cell.failed:
            yield f"{cell.method}, {cell.layer}, {cell.format}: {cell.failed}"


def measured(args: argparse.Namespace, formats: Sequence[str], methods: Sequence[str]) -> Found:
    """All cells, shown as they come."""
    found: dict[tuple[str, str, str], Cell] = {}
    with tempfile.TemporaryDirectory() as folder:  # of a run without a cache
        cache = Cache.open(args.cache or Path(folder) / "peer.json")
        for layer in make_layers(chosen(args.layers, LAYERS)):
            judge = Judge(layer)
            if not args.no_peer:
                run_peer(layer, formats, args.envs, cache)
                for format in formats:
                    found[layer.name, format, PEER] = peer_cell(layer, format, judge, cache)
            for cell in cells(layer, formats, methods, judge):
                found[cell.layer, cell.format, cell.method] = cell
                print(f"  {cell.layer}, {cell.format}, {cell.method}: {cell}", file=sys.stderr, flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Errors of rounding methods on single layers.")
    parser.add_argument("--layers", default=",".join(LAYERS))
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--methods", default=",".join(METHODS))
    add_peer_options(parser)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    formats, methods = chosen(args.formats, FORMATS), chosen(args.methods, METHODS)
    found = measured(args, formats, methods)
    shown = [*([] if args.no_peer else [PEER]), *methods]
    print("F / P / O (CPU seconds); * nothing better than the start was found\n")
    print(errors_table(found, shown))
    for to in [name for name in (PEER, "nearest") if name in shown]:
        seconds = f", and how many times less CPU time than {to}" if to == PEER else ""
        print(f"\nGeometric means of F / P / O{seconds}:\n")
        print(summary_table(found, shown, to))
    print("\nTargets missed:")
    missed = list(misses(found))
    print("\n".join(f"- {line}" for line in missed) or "- none")
    save_json(args.json, {"machine": machine(), "cells": [asdict(cell) for cell in found.values()], "missed": missed})
    return 0


if __name__ == "__main__":
    sys.exit(main())
