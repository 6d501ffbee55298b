"""Verification: decodes what was written and compares it with the source, range by range."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..formats.fileio import Reader
from ..formats.layers import Layer, group_layers
from ..formats.source import Source, open_source
from ..formats.tensors import torch_dtype
from ..stages.reading import Decode, Read
from ..stages.work import Environment, LayerPlan, Work
from .budget import CPU_CHUNK_BYTES, cores
from .inspect import describe
from .runner import prepare_thread

ERROR_BOUNDS = {"": 0.01, "fp8": 0.06, "fp8_e5m2": 0.12, "int8": 0.25, "mxfp8": 0.06, "nvfp4": 0.18}
"""Relative errors that no sound layer reaches; a wrong layout, nibble order or scale gives 0.6 and more.

An INT8 layer with outliers may exceed it, by as much as a step of amax / 127 explains."""

WEIGHT_BOUNDS = {
    "": (2.0**-7, 2.0**-15), "fp8": (0.13, 2.0**-15), "fp8_e5m2": (0.26, 2.0**-15), "int8": (0.0, 1 / 120),
    "mxfp8": (0.13, 2.0**-15), "nvfp4": (0.4, 2.0**-12),
}  # fmt: skip
"""How far a single weight may be off: a share of itself (NVFP4: of the largest of its block) plus a share of the
largest weight of the layer. That is a whole step of the format's grid and its smallest step, so that one flipped
exponent is found among millions of weights."""


@dataclass(frozen=True)
class LayerCheck:
    """One layer of the output beside its source."""

    name: str
    format: str
    """Format it is stored in; empty: kept."""
    error: float
    """Relative Frobenius error over all weights; 0 for one that is equal."""
    problem: str = ""
    """What is broken; empty when it is sound."""


@dataclass(frozen=True)
class Verification:
    """What a verification found."""

    output: str
    source: str
    layers: tuple[LayerCheck, ...]
    missing: tuple[str, ...]
    """Tensors of the source that the output lacks."""
    unknown: tuple[str, ...]
    """Tensors of the output that the source lacks."""

    @property
    def problems(self) -> list[str]:
        """Everything that makes the output broken."""
        broken = [f"{layer.name}: {layer.problem}" for layer in self.layers if layer.problem]
        return broken + [f"{name}: missing from the output" for name in self.missing]

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def worst(self) -> list[LayerCheck]:
        """Quantized layers by falling error."""
        return sorted((layer for layer in self.layers if layer.format), key=lambda layer: -layer.error)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; an error that is no number is written as null."""
        layers = [
            {**asdict(layer), "error": layer.error if math.isfinite(layer.error) else None} for layer in self.layers
        ]
        return {
            "output": self.output, "source": self.source, "ok": self.ok, "problems": self.problems, "layers": layers,
            "missing": list(self.missing), "unknown": list(self.unknown),
        }  # fmt: skip


def verify(output: str, against: str | list[str], workers: int | None = None) -> Verification:
    """Compares every layer of ``output`` with ``against``; both may be quantized, in any dialect that is read.

    Raises CheckpointError when a file itself is broken (truncated, bad header).
    """
    made, source = open_source(output), open_source(against)
    ours = {layer.name: layer for layer in group_layers(made)}
    theirs = {layer.name: layer for layer in group_layers(source)}
    common = [name for name in theirs if name in ours]
    environment = Environment(chunk_bytes=CPU_CHUNK_BYTES)
    with ThreadPoolExecutor(workers or cores()) as pool:
        checks = list(pool.map(lambda name: _check(ours[name], theirs[name], environment), common))
    removed = _removed(made, [name for name in theirs if name not in ours])
    return Verification(
        output, ", ".join(against) if isinstance(against, list) else against, tuple(checks),
        tuple(name for name in theirs if name not in ours and name not in removed),
        tuple(name for name in ours if name not in theirs),
    )  # fmt: skip


def _removed(made: Source, missing: list[str]) -> set[str]:
    """Of the missing layers, those that the preset named in the output's own recipe drops on purpose."""
    import json

    from ..stages.presets import find_preset

    try:
        stages = json.loads(made.metadata["quantloom"])["recipe"]["stages"]
        name = next(stage["preset"] for stage in stages if stage["stage"] == "target")
        return set() if name in ("auto", "none") else set(find_preset(name).removed(missing))
    except (KeyError, ValueError, StopIteration, TypeError):
        return set()


def _check(made: Layer, source: Layer, environment: Environment) -> LayerCheck:
    prepare_thread(environment)
    form = describe(made) if made.encoding else ""
    if made.problem:
        same = made.problem == source.problem and [t.nbytes for t in made.tensors] == [t.nbytes for t in source.tensors]
        return LayerCheck(made.name, "", 0.0, "" if same else made.problem)
    if made.weight.shape != source.weight.shape:
        shapes = f"shape {list(made.weight.shape)}, the source has {list(source.weight.shape)}"
        return LayerCheck(made.name, form, math.inf, shapes)
    if made.encoding is None and source.encoding is None:
        equal = made.weight.dtype == source.weight.dtype and _equal_bytes(made, source)
        return LayerCheck(made.name, "", 0.0 if equal else math.inf, "" if equal else "kept, but its bytes differ")
    name = made.encoding.format[0] if made.encoding else ""
    rotation = made.encoding.rotation if made.encoding else None
    found = _compare(made, source, environment)
    return LayerCheck(made.name, form, found.error, found.problem(name, rotation))


def _equal_bytes(made: Layer, source: Layer) -> bool:
    ours, theirs = made.tensors[0], source.tensors[0]
    with Reader(ours.path) as first, Reader(theirs.path) as second:
        for start in range(0, ours.nbytes, CPU_CHUNK_BYTES):
            size = min(CPU_CHUNK_BYTES, ours.nbytes - start)
            pair = bytearray(size), bytearray(size)
            first.read_into(memoryview(pair[0]), ours.start + start)
            second.read_into(memoryview(pair[1]), theirs.start + start)
            if pair[0] != pair[1]:
                return False
    return True


@dataclass
class _Comparison:
    """Sums over the weights of a layer."""

    difference: float = 0.0
    """Squared distance from the source."""
    weight: float = 0.0
    """Squared weights of the source."""
    amax: float = 0.0
    """Largest weight of the source."""
    numel: int = 0
    excess: float = -math.inf
    """Largest distance of one weight, beyond its own share of ``WEIGHT_BOUNDS`` ..."""
    where: str = ""
    """... and which one that is."""

    @property
    def error(self) -> float:
        """||made - source|| / ||source||; infinite where a decoded weight is not finite."""
        if not math.isfinite(self.difference):
            return math.inf
        if not self.weight:
            return 0.0 if self.difference == 0 else math.inf
        return math.sqrt(self.difference / self.weight)

    def problem(self, name: str, rotation: int | None) -> str:
        """What no sound layer of this format shows; empty when there is nothing."""
        bound = ERROR_BOUNDS[name]
        if name == "int8" and self.weight:
            bound = max(bound, self.amax / 254 * math.sqrt(self.numel / self.weight))
        if not self.error <= bound:
            return f"relative error {self.error:.4f} is above {bound:.3g}, which no sound {name or 'copy'} reaches"
        if self.excess > WEIGHT_BOUNDS[name][1] * (rotation or 1) * self.amax:
            return f"{self.where}: further off than {name or 'a copy'} can be"
        return ""


def _compare(made: Layer, source: Layer, environment: Environment) -> _Comparison:
    found, first = _Comparison(numel=source.weight.numel), 0
    name = made.encoding.format[0] if made.encoding else ""
    for ours, theirs in zip(_rows(made, environment), _rows(source, environment), strict=True):
        distance, magnitude = (ours - theirs).abs_(), theirs.abs()
        found.difference += float(distance.square().sum(dtype=torch.float64))
        found.weight += float(theirs.square().sum(dtype=torch.float64))
        found.amax = max(found.amax, float(magnitude.max()))
        distance -= (_block_amax(magnitude) if name == "nvfp4" else magnitude) * WEIGHT_BOUNDS[name][0]
        worst = int(distance.argmax())
        if float(distance.view(-1)[worst]) > found.excess:
            found.excess = float(distance.view(-1)[worst])
            row, column = divmod(worst, theirs.shape[-1]) if theirs.dim() > 1 else (0, worst)
            values = float(ours.reshape(-1)[worst]), float(theirs.reshape(-1)[worst])
            found.where = f"weight [{first + row}, {column}] is {values[0]:.6g}, the source has {values[1]:.6g}"
        first += theirs.shape[0]
    return found


def _block_amax(magnitude: torch.Tensor) -> torch.Tensor:
    """The largest of each 16 consecutive weights of a row, in the place of all of them."""
    rows, columns = magnitude.shape
    blocks = torch.nn.functional.pad(magnitude, (0, -columns % 16)).view(rows, -1, 16).amax(dim=2, keepdim=True)
    return blocks.expand(-1, -1, 16).reshape(rows, -1)[:, :columns]


def _rows(layer: Layer, environment: Environment) -> Iterator[torch.Tensor]:
    """Float32 rows of a layer, in ranges of 256 whatever the storage, so that two layers can be walked together."""
    plan = LayerPlan(layer, (), ())
    step = Decode() if layer.encoding else Read()
    work = step.run(Work(plan, (0, plan.rows), environment))
    assert work.stream is not None
    if len(layer.weight.shape) != 2:
        yield _whole(layer)
        return
    for start in range(0, plan.rows, 256):
        stop = min(start + 256, plan.rows)
        yield torch.cat([chunk.x.float().clone() for chunk in work.stream(start, stop)])


def _whole(layer: Layer) -> torch.Tensor:
    ref = layer.tensors[0]
    content = bytearray(ref.nbytes)
    with ExitStack() as stack:
        stack.enter_context(Reader(ref.path)).read_into(memoryview(content), ref.start)
    return torch.frombuffer(content, dtype=torch_dtype(ref.dtype)).float()
