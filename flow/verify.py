"""Verification: decodes what was written and compares it with the source, range by range."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..formats.encoding import Encoding
from ..formats.errors import UsageError
from ..formats.fileio import Reader
from ..formats.layers import Layer, group_layers
from ..formats.reduce import absmax
from ..formats.source import Source, open_source
from ..formats.tensors import TensorRef, torch_dtype
from ..stages.reading import Decode, Read
from ..stages.work import Environment, LayerPlan, Work
from .budget import CPU_CHUNK_BYTES
from .inspect import describe
from .threads import map_layers

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


_RANGE_WEIGHTS = 1 << 18
"""Weights that are compared at a time: their float32 forms stay in a core's cache."""


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
        if not self.layers and (self.missing or self.unknown):
            return ["no tensor name in common: is SOURCE the checkpoint that OUTPUT was made from?"]
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
    checks = map_layers(lambda name, environment: _check(ours[name], theirs[name], environment), common, workers)
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
    except (KeyError, ValueError, StopIteration, TypeError, UsageError):
        return set()


def _check(made: Layer, source: Layer, environment: Environment) -> LayerCheck:
    form = describe(made) if made.encoding else ""
    if made.problem:
        same = made.problem == source.problem and [t.nbytes for t in made.tensors] == [t.nbytes for t in source.tensors]
        return LayerCheck(made.name, "", 0.0, "" if same else made.problem)
    if made.weight.shape != source.weight.shape:
        shapes = f"shape {list(made.weight.shape)}, the source has {list(source.weight.shape)}"
        return LayerCheck(made.name, form, math.inf, shapes)
    if made.encoding is None and source.encoding is None:
        equal = made.weight.dtype == source.weight.dtype and _equal_bytes(made.tensors[0], source.tensors[0])
        return LayerCheck(made.name, "", 0.0 if equal else math.inf, "" if equal else "kept, but its bytes differ")
    if made.encoding is not None and source.encoding is not None and _same_storage(made.encoding, source.encoding):
        return LayerCheck(made.name, form, 0.0)
    name = made.encoding.format[0] if made.encoding else ""
    rotation = made.encoding.rotation if made.encoding else None
    found = _compare(made, source, environment)
    return LayerCheck(made.name, form, found.error, found.problem(name, rotation))


def _same_storage(made: Encoding, source: Encoding) -> bool:
    """Whether a quantized layer was passed through: then it is sound whatever its scales are."""
    if (made.format, made.layout, made.rotation) != (source.format, source.layout, source.rotation):
        return False
    pairs = [(made.codes, source.codes), (made.scales, source.scales), (made.whole, source.whole)]
    return all(ours is theirs is None or (ours and theirs and _equal_bytes(ours, theirs)) for ours, theirs in pairs)


def _equal_bytes(ours: TensorRef, theirs: TensorRef) -> bool:
    if ours.nbytes != theirs.nbytes:
        return False
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
    if len(made.weight.shape) != 2:
        pairs = iter([(_whole(made), _whole(source))])
    else:
        rows = max(1, _RANGE_WEIGHTS // made.weight.shape[1])
        pairs = zip(_rows(made, rows, environment), _rows(source, rows, environment), strict=True)
    for ours, theirs in pairs:
        distance, magnitude = (ours - theirs).abs_(), theirs.abs()
        unit = max(float(magnitude.max()), float(distance.max())) or 1.0
        found.difference += _sum((distance / unit).square_()) * unit**2  # squares of float32 leave its range
        found.weight += _sum((magnitude / unit).square_()) * unit**2
        found.amax = max(found.amax, float(magnitude.max()))
        share = _block_amax(theirs) if name == "nvfp4" else magnitude
        distance.sub_(share, alpha=WEIGHT_BOUNDS[name][0])
        if float(distance.max()) > found.excess:
            worst = int(distance.argmax())
            found.excess = float(distance[worst // theirs.shape[1], worst % theirs.shape[1]])
            values = float(ours.reshape(-1)[worst]), float(theirs.reshape(-1)[worst])
            place = f"[{first + worst // theirs.shape[1]}, {worst % theirs.shape[1]}]"
            found.where = f"weight {place} is {values[0]:.6g}, the source has {values[1]:.6g}"
        first += theirs.shape[0]
    return found


def _sum(x: torch.Tensor) -> float:
    """Sum in float64 of float32 rows, added up row by row first: several times as fast as float64 throughout."""
    return float(x.sum(dim=1).sum(dtype=torch.float64))


def _block_amax(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each 16 consecutive weights of a row, in the place of all of them."""
    rows, columns = x.shape
    padded = torch.nn.functional.pad(x, (0, -columns % 16)) if columns % 16 else x
    blocks = absmax(padded.view(rows, -1, 16))
    return blocks[:, :, None].expand(-1, -1, 16).reshape(rows, -1)[:, :columns]


def _rows(layer: Layer, rows: int, environment: Environment) -> Iterator[torch.Tensor]:
    """Float32 rows of a layer, ``rows`` at a time whatever the storage, so that two layers can be walked together."""
    environment = replace(environment, chunk_bytes=1)  # a chunk is then ``multiple`` rows
    plan = LayerPlan(layer, (), ())
    step = Decode(multiple=rows) if layer.encoding else Read(multiple=rows)
    for chunk in step.run(Work(plan, (0, plan.rows), environment)).chunks():
        yield chunk.x.to(torch.float32, copy=True)  # the buffers below are the thread's, and the other layer's too


def _whole(layer: Layer) -> torch.Tensor:
    """A tensor that is no matrix, as one row."""
    ref = layer.tensors[0]
    content = bytearray(ref.nbytes)
    with Reader(ref.path) as reader:
        reader.read_into(memoryview(content), ref.start)
    return torch.frombuffer(content, dtype=torch_dtype(ref.dtype)).float()[None]
