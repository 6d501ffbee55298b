"""What travels along one layer's chain of steps: a lazy stream of row chunks, and the receipt at its end.

A step never holds the tensor. It wraps the stream of the step before it; only the last one, the write, pulls chunks
through. A stream can be opened again on any row range, so a step that must see everything first can look twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ..formats.record import Record

if TYPE_CHECKING:
    import torch

    from ..formats.adapters import AdapterTensors
    from ..formats.checksums import Piece
    from ..formats.format import Scales
    from ..formats.layers import Layer
    from ..formats.tensors import Slot, TensorSpec
    from .inputs import Inputs
    from .quality import AdapterGain, Quality

ADAPTER = "\0adapter "
"""Begins the slot names of an adapter: its file may use names that the output has too."""


@dataclass
class Chunk:
    """A range of rows on its way. Tensors live in scratch memory until the next chunk."""

    start: int
    """First row, counted in the whole weight."""
    x: torch.Tensor
    """Rows: as stored (``Read``), float32 and padded to whole groups after ``Load`` (destroyed by rounding)."""
    scales: Scales | None = None
    codes: torch.Tensor | None = None
    writes: list[tuple[str, int, torch.Tensor]] = field(default_factory=list)
    """(slot name, byte offset within the slot, bytes on the CPU), filled by packing."""


Stream = Callable[[int, int], Iterator[Chunk]]
"""Opens the chunks of rows ``start`` to ``stop``."""


@dataclass(frozen=True)
class Environment:
    """Where steps run: decided by the driver, the same for every layer of a run."""

    run_id: str = ""
    """Names the run within a process, so that it can be cancelled."""
    device: str = "cpu"
    chunk_bytes: int = 2 << 20
    """Source bytes per chunk."""
    threads: int = 1
    """Torch threads of one task. Chunks that stay in cache gain nothing from more, and waiting threads burn time."""
    sync: bool = False
    """Whether each task makes its bytes survive a power cut: on machines where nobody else can."""


class Step(Protocol):
    """One node of a layer's chain."""

    @property
    def name(self) -> str:
        """What the node is called in graphs and plans."""

    def run(self, work: Work) -> Work:
        """Wraps the work's stream, or drains it."""

    def memory(self, plan: LayerPlan, environment: Environment) -> int:
        """Bytes that the step holds at most while a task of the layer runs."""


@dataclass(frozen=True, slots=True)
class Settings(Record):
    """What targeting decided for a layer that is to be quantized."""

    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Options of the quantize stage that a rule or the fallback sets for this layer."""
    barred: Mapping[str, str] = field(default_factory=dict)
    """Formats that this layer must not have, with the reason."""


@dataclass(frozen=True, slots=True)
class AdapterPlan(Record):
    """The adapter that a layer gets."""

    method: str
    """svd, weighted or svdquant."""
    rank: int = 0
    """0: not decided yet, the layer is a candidate."""
    tensors: AdapterTensors | None = None
    """How it is stored."""
    slots: tuple[Slot, ...] = ()
    """Places of its tensors in the adapter's file."""

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """Every tensor that is stored for it."""
        if self.tensors is None:
            return ()
        return (self.tensors.up, self.tensors.down, *(spec for spec, _ in self.tensors.constants))

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors, padding included."""
        return sum(spec.nbytes for spec in self.specs)


@dataclass(frozen=True, slots=True)
class LayerPlan(Record):
    """Everything that will happen to one layer, before any weight is read."""

    layer: Layer
    steps: tuple[Step, ...]
    """Chain from the first read to the write; a layer that is copied has just these two."""
    outputs: tuple[TensorSpec, ...]
    """Tensors that are written for it."""
    format: str = ""
    """What it becomes, in words: ``nvfp4``, ``fp8 row``; empty when it is kept."""
    rounding: str = ""
    """How a quantized layer is rounded."""
    reason: str = ""
    """Why it is kept."""
    constants: tuple[tuple[TensorSpec, bytes], ...] = ()
    """Of ``outputs``, those whose bytes are known already."""
    entry: Any = None
    """What marker and header say of it (JSON), in the output's dialect."""
    settings: Settings | None = None
    """What targeting decided for it, until a later stage uses it."""
    slots: tuple[Slot, ...] = ()
    """Places of ``outputs``, once the shards are laid out."""
    parts: tuple[tuple[int, int], ...] = ()
    """Row ranges that run as tasks of their own; empty: one task."""
    affinity: str = ""
    """Layers of equal affinity run in one task, one after the other: they share what is costly to load."""
    together: tuple[tuple[str, int], ...] = ()
    """Name and rows of each layer that is solved in one with this one, itself included; empty for a layer alone."""
    change: str = ""
    """What happens to a layer that is neither quantized nor kept, in the words of plans and reports."""
    inputs: Inputs | None = None
    """Statistics of a quantized layer's inputs, where there are any."""
    adapter: AdapterPlan | None = None

    @property
    def rows(self) -> int:
        """Length of the weight's first dimension; 1 for a scalar."""
        return self.layer.weight.shape[0] if self.layer.weight.shape else 1

    @property
    def nbytes_out(self) -> int:
        """Bytes written."""
        return sum(spec.nbytes for spec in self.outputs)

    def having(self, **changes: Any) -> LayerPlan:
        """``dataclasses.replace``, which checks every field again: plans of 100,000 layers change several times."""
        made = object.__new__(LayerPlan)
        for name in LayerPlan.__slots__:
            object.__setattr__(made, name, changes[name] if name in changes else getattr(self, name))
        return made

    @property
    def places(self) -> dict[str, Slot]:
        """Places of all that its tasks write, by the names that steps use: ``ADAPTER`` begins those of its adapter."""
        slots = {slot.name: slot for slot in self.slots}
        if self.adapter is not None:
            slots |= {ADAPTER + slot.name: slot for slot in self.adapter.slots}
        return slots

    @property
    def known(self) -> dict[str, bytes]:
        """By the same names, the contents that were known before any work."""
        contents = {spec.name: content for spec, content in self.constants}
        if self.adapter is not None and self.adapter.tensors is not None:
            contents |= {ADAPTER + spec.name: content for spec, content in self.adapter.tensors.constants}
        return contents

    def peak_bytes(self, environment: Environment) -> int:
        """Working memory of one task of it, at most."""
        return sum(step.memory(self, environment) for step in self.steps)


@dataclass
class Work:
    """One task's layer (or row range of one), and the stream built so far."""

    plan: LayerPlan
    rows: tuple[int, int]
    """Range of rows that this task writes."""
    environment: Environment
    whole: float | None = None
    """Scale of the whole tensor, when another task has computed it."""
    stream: Stream | None = None
    squared_error: float = 0.0
    squared_weight: float = 0.0
    """Sums over the sampled rows, in float64."""
    quality: Quality | None = None
    """What a rounding method brought."""
    gain: AdapterGain | None = None
    """What the layer's adapter brought."""
    projection: torch.Tensor | None = None
    """Float32 (rows of the layer,): original weights times the mean input, where the bias is corrected."""
    started: float = 0.0
    """Clock (seconds) when the first step began."""
    pieces: tuple[Piece, ...] = ()
    """What was written, with its checksums."""

    def chunks(self) -> Iterator[Chunk]:
        """The stream over this task's rows."""
        assert self.stream is not None
        return self.stream(*self.rows)


def root_share(squared_error: float, squared: float) -> float:
    """The relative error of two sums of squares; 0 for 0 / 0."""
    if squared == 0:
        return 0.0 if squared_error == 0 else math.inf
    return math.sqrt(squared_error / squared)


@dataclass(frozen=True)
class Receipt:
    """What a finished task reports. A few hundred bytes; tensors never come back."""

    name: str
    format: str
    nbytes_in: int
    nbytes_out: int
    seconds: float
    squared_error: float = 0.0
    squared_weight: float = 0.0
    rows: tuple[int, int] = (0, 0)
    """The range of rows that the task wrote: all of them, or one of the layer's parts."""
    quality: Quality | None = None
    """What a rounding method brought."""
    gain: AdapterGain | None = None
    """What the layer's adapter brought."""
    pieces: tuple[Piece, ...] = ()
    """Checksums of what was written."""

    @property
    def first(self) -> bool:
        """Whether this is the layer's first (or only) row range."""
        return self.rows[0] == 0

    @property
    def error(self) -> float | None:
        """Relative Frobenius error of the stored weight, from sampled rows; None for a layer that is kept."""
        if not self.format:
            return None
        return root_share(self.squared_error, self.squared_weight)
