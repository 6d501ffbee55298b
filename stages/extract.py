"""The steps that look at what quantization took from a layer: one makes an adapter of it, one only measures.

The error is taken from what is stored (codes and scales of the chain, or decoded rows of a model that is quantized
already), in the basis of the original weight and without padding, and is held whole: a layer with an adapter is one
task, while its rows still stream. Sums run over fixed ranges of rows, so that the size of chunks changes no bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..formats.errors import NonFiniteError
from ..formats.registry import make_format
from ..formats.rotation import rotate_
from ..formats.tensors import torch_dtype
from .cancelling import cancellable
from .counter import seed_of
from .energies import Energies, memory_of_energies
from .inputs import Inputs
from .low_rank import Weighting, low_rank, memory_of_low_rank, operations_of_low_rank
from .quality import AdapterGain, Errors
from .reading import chunk_elements, reader
from .work import ADAPTER, Chunk, Environment, LayerPlan, Work, root_share

MOST_SURVEYED = 128
"""Singular values that a survey looks at: no adapter of automatic rank is larger."""

_KEPT_BYTES = 48 << 20
"""What the C library keeps of temporaries that are freed, and LAPACK of its own: measured on layers of 2048x6144."""


@dataclass(frozen=True)
class Coded:
    """How the codes that chunks of a chain hold decode."""

    format: tuple[str, str, int | None]
    """Arguments of ``make_format``."""
    rotation: int | None = None
    """Order of the Hadamard rotation that rows went through before they were rounded."""

    def rows(self, chunk: Chunk, part: slice) -> torch.Tensor:
        """Float32 rows of a chunk, in the basis of the original; padding stays."""
        assert chunk.codes is not None
        assert chunk.scales is not None
        fmt = make_format(*self.format)
        multiplier = fmt.row_multipliers(chunk.scales.multiplier, part, chunk.codes.shape[0])
        decoded = fmt.decode(chunk.codes[part], multiplier)
        return rotate_(decoded, self.rotation) if self.rotation else decoded


class Lost:
    """Collects E = W - W' of one layer as its quantized chunks pass."""

    def __init__(self, work: Work, coded: Coded | None, inputs: Inputs | None) -> None:
        rows, columns = work.plan.layer.weight.shape
        self.coded, self.device = coded, torch.device(work.environment.device)
        self.hessian = None
        if inputs is not None:
            moments = replace(inputs, rotation=None).moments(padded_columns(coded, columns), self.device)
            self.hessian = moments.hessian[(slice(columns),) * moments.hessian.dim()]
        fresh = reader(work.plan.layer).run(Work(work.plan, work.rows, work.environment))
        assert fresh.stream is not None
        self.name, self.original = work.plan.layer.name, fresh.stream
        self.error = torch.empty(rows, columns, dtype=torch.float32, device=self.device)
        self.weight = Energies(columns, self.hessian, self.device)

    def add(self, chunk: Chunk) -> None:
        """Takes a chunk with codes, or with decoded rows where nothing says how codes decode; reads their original."""
        columns = self.error.shape[1]
        for original in self.original(chunk.start, chunk.start + chunk.x.shape[0]):
            x = original.x.float()
            part = slice(original.start - chunk.start, original.start - chunk.start + len(x))
            decoded = chunk.x[part] if self.coded is None else self.coded.rows(chunk, part)
            torch.sub(x, decoded[:, :columns], out=self.error[original.start : original.start + len(x)])
            self.weight.add(x)

    def whole(self) -> torch.Tensor:
        """E, once every chunk has passed. NonFiniteError for one that holds NaN or Inf."""
        low, high = torch.aminmax(self.error)  # NaN wins; isfinite would hold as much again
        if not torch.stack((low, high)).isfinite().all():
            where = [int(index) for index in (~self.error.isfinite()).nonzero()[0]]
            raise NonFiniteError(
                f"{self.name}: weights of the original or of the quantized model are NaN or Inf, the first at {where}; "
                "repair the checkpoint, or let the adapter's target leave this layer out"
            )
        return self.error

    def errors(self, error: torch.Tensor) -> Errors:
        """Relative errors of what is left."""
        energies = Energies(error.shape[1], self.hessian, self.device)
        energies.add(error)
        return relative_errors(energies.total(), self.weight.total())


def padded_columns(coded: Coded | None, columns: int) -> int:
    """Columns as the chain's other steps have them, with which it shares its statistics."""
    return columns if coded is None else make_format(*coded.format).columns(columns)


def relative_errors(error: tuple[float, float | None], weight: tuple[float, float | None]) -> Errors:
    """Relative errors from the energies of an error and of the weight."""
    share = None if error[1] is None or weight[1] is None else root_share(error[1], weight[1])
    return Errors(root_share(error[0], weight[0]), output=share)


@dataclass(frozen=True)
class Extract:
    """Makes the adapter of a layer and hands it over with the last chunk."""

    coded: Coded | None
    """How codes decode; None: chunks hold decoded weights."""
    rank: int
    inputs: Inputs | None = None
    """Statistics of the layer's inputs: output errors are measured with them ..."""
    weighted: bool = False
    """... and decide which part of the error counts."""
    name: str = "adapter"

    def run(self, work: Work) -> Work:
        upstream = work.stream
        assert upstream is not None

        def stream(start: int, stop: int) -> Iterator[Chunk]:
            lost = Lost(work, self.coded, self.inputs)
            for chunk in upstream(start, stop):
                lost.add(chunk)
                if chunk.start + chunk.x.shape[0] == stop:
                    with cancellable(work.environment.run_id):
                        chunk.writes += self.extract(work, lost)
                yield chunk

        work.stream = stream
        return work

    def extract(self, work: Work, lost: Lost) -> list[tuple[str, int, torch.Tensor]]:
        """What is written of the adapter: (slot, byte offset, rows). ``work`` gets the gain; takes the error away."""
        plan = work.plan.adapter
        assert plan is not None
        assert plan.tensors is not None
        up_spec, down_spec = plan.tensors.up, plan.tensors.down
        error = lost.whole()
        before = lost.errors(error)
        up, down, _ = low_rank(error, self.rank, seed_of(work.plan.layer.name), self._weighting(lost))
        dtype = torch_dtype(up_spec.dtype)
        up, down = up.to(dtype), down.to(dtype)
        if not (up.isfinite().all() and down.isfinite().all()):
            raise NonFiniteError(f"{work.plan.layer.name}: its adapter does not fit {up_spec.dtype}; use BF16 or F32")
        after = lost.errors(error.addmm_(up.float(), down.float(), alpha=-1))
        work.gain = AdapterGain(self.rank, before, after)
        padding = up_spec.shape[1] - self.rank
        stored = torch.nn.functional.pad(up, (0, padding)), torch.nn.functional.pad(down, (0, 0, 0, padding))
        return [
            (ADAPTER + spec.name, 0, part.cpu().contiguous())
            for spec, part in zip((up_spec, down_spec), stored, strict=True)
        ]

    def _weighting(self, lost: Lost) -> Weighting | None:
        return Weighting(lost.hessian) if self.weighted and lost.hessian is not None else None

    def operations(self, plan: LayerPlan) -> float:
        """Floating-point operations, roughly: of the decomposition, and of errors of outputs."""
        rows, columns = plan.layer.weight.shape
        moments = 3.0 * rows * columns**2 if self.inputs else 0.0
        return operations_of_low_rank((rows, columns), self.rank, self.weighted) + moments

    def memory(self, plan: LayerPlan, environment: Environment) -> int:
        """The error, rows that are summed, the statistics twice while they are read, what the decomposition takes,
        decoded rows, and what the allocator keeps."""
        rows, columns = plan.layer.weight.shape
        statistics = 8 * padded_columns(self.coded, columns) ** 2 if self.inputs else 0
        sums = 2 * memory_of_energies(columns, environment.device)
        fixed = 4 * rows * columns + sums + statistics + min(_KEPT_BYTES, 4 * rows * columns)
        return fixed + memory_of_low_rank((rows, columns), self.rank) + chunk_elements(plan, environment) * 24


@dataclass(frozen=True)
class Survey(Extract):
    """Ends a chain that writes nothing: says what ranks would bring."""

    name: str = "survey"

    def run(self, work: Work) -> Work:
        lost = Lost(work, self.coded, self.inputs)
        for chunk in work.chunks():
            lost.add(chunk)
        weighting = self._weighting(lost)
        with cancellable(work.environment.run_id):
            values = low_rank(lost.whole(), self.rank, seed_of(work.plan.layer.name), weighting)[2][: self.rank]
        before = lost.errors(lost.error)
        energies = Energies(lost.error.shape[1], lost.hessian, lost.device)
        energies.add(lost.error)
        plain, output = energies.total()
        total = plain if weighting is None or output is None else output + float(weighting.added) * plain
        removed = (values.square() / total).tolist() if total else [0.0] * len(values)
        work.gain = AdapterGain(0, before, before, tuple(removed))
        return work
