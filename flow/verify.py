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
from .runner import prepare_thread

ERROR_BOUNDS = {"fp8": 0.06, "fp8_e5m2": 0.12, "int8": 0.25, "mxfp8": 0.06, "nvfp4": 0.18}
"""Relative errors that no sound file reaches; a wrong layout, nibble order or scale gives 0.6 and more."""


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
        layers = [{**asdict(layer), "error": layer.error if math.isfinite(layer.error) else None} for layer in self.layers]
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
    form = " ".join(str(part) for part in made.encoding.format[:2]) if made.encoding else ""
    if made.problem:
        same = made.problem == source.problem and [t.nbytes for t in made.tensors] == [t.nbytes for t in source.tensors]
        return LayerCheck(made.name, "", 0.0, "" if same else made.problem)
    if made.weight.shape != source.weight.shape:
        shapes = f"shape {list(made.weight.shape)}, the source has {list(source.weight.shape)}"
        return LayerCheck(made.name, form, math.inf, shapes)
    if made.encoding is None and source.encoding is None:
        equal = made.weight.dtype == source.weight.dtype and _equal_bytes(made, source)
        return LayerCheck(made.name, "", 0.0 if equal else math.inf, "" if equal else "kept, but its bytes differ")
    error = _relative_error(made, source, environment)
    bound = ERROR_BOUNDS[made.encoding.format[0]] if made.encoding else 0.01
    problem = "" if error <= bound else f"relative error {error:.4f} is above {bound}, which no sound {form or 'copy'} reaches"
    return LayerCheck(made.name, form, error, problem)


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


def _relative_error(made: Layer, source: Layer, environment: Environment) -> float:
    """||made - source|| / ||source|| in float64; infinite where the decoded weight is not finite."""
    difference = weight = 0.0
    for ours, theirs in zip(_rows(made, environment), _rows(source, environment), strict=True):
        difference += float((ours - theirs).square_().sum(dtype=torch.float64))
        weight += float(theirs.square().sum(dtype=torch.float64))
    if not math.isfinite(difference):
        return math.inf
    return math.sqrt(difference / weight) if weight else (0.0 if difference == 0 else math.inf)


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


