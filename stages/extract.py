"""The steps that look at what quantization took from a layer: one makes an adapter of it, one only measures.

The error is taken from what is stored (codes and scales, decoded), in the basis of the original weight and without
padding, and is held whole: a layer with an adapter is one task, while its rows still stream. Sums run over fixed ranges
of rows, so that the size of chunks changes no bit.
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
from .inputs import Inputs
from .low_rank import Weighting, low_rank, memory_of_low_rank
from .quality import Errors
from .reading import chunk_elements
from .work import ADAPTER, Chunk, Environment, LayerPlan, Work

MOST_SURVEYED = 128
"""Singular values that a survey looks at: no adapter of automatic rank is larger."""

_BLOCK = {"cpu": (256, 512), "cuda": (1024, 2048)}
"""Rows and columns that are summed at a time."""


@dataclass(frozen=True)
class AdapterGain:
    """What an adapter brings to a layer; in a survey, what it could bring."""

    rank: int
    before: Errors
    """Of the stored weight alone. Output errors are known where there are statistics."""
    after: Errors
    """Of stored weight and adapter, as both are stored."""
    spectrum: tuple[float, ...] = ()
    """In a survey: the share of the squared error that each further rank removes, falling."""


class Energies:
    """Squared norms of the rows that are added: ||X||^2, and with second moments H tr(X H X^T), in float64.

    H is symmetric: blocks of columns meet those before them and count twice, which saves almost half of the work.
    """

    def __init__(self, columns: int, hessian: torch.Tensor | None, device: torch.device) -> None:
        self.hessian, self.held = hessian, 0
        rows, self.width = _BLOCK[device.type]
        self.block = torch.empty(rows, columns, dtype=torch.float32, device=device)
        self.plain = torch.zeros((), dtype=torch.float64, device=device)
        self.weighted = torch.zeros_like(self.plain)

    def add(self, x: torch.Tensor) -> None:
        """Takes float32 (r, n)."""
        rows = len(self.block)
        while len(x):
            part = x[: rows - self.held]
            self.block[self.held : self.held + len(part)] = part
            self.held, x = self.held + len(part), x[len(part) :]
            if self.held == rows:
                self._sum()

    def _sum(self) -> None:
        x, h = self.block[: self.held], self.hessian
        double, self.held = x.double(), 0
        self.plain += double.square().sum()
        if h is None:
            return
        if h.dim() == 1:
            self.weighted += double.square_().mul_(h).sum()
            return
        for start in range(0, x.shape[1], self.width):
            part = slice(start, start + self.width)
            weighted = (x[:, part] @ h[part, part]).addmm_(x[:, :start], h[:start, part], alpha=2)
            self.weighted += weighted.double().mul_(double[:, part]).sum()

    def total(self) -> tuple[float, float | None]:
        """||X||^2, and tr(X H X^T) where H is known."""
        self._sum()
        return float(self.plain), None if self.hessian is None else max(0.0, float(self.weighted))


class Lost:
    """Collects E = W - W' of one layer as its quantized chunks pass."""

    def __init__(self, work: Work, format: tuple[str, str, int | None], inputs: Inputs | None) -> None:
        rows, columns = work.plan.layer.weight.shape
        self.format, self.device = make_format(*format), torch.device(work.environment.device)
        self.hessian = None
        if inputs is not None:
            moments = replace(inputs, rotation=None).moments(self.format.columns(columns), self.device)
            self.hessian = moments.hessian[(slice(columns),) * moments.hessian.dim()]
        fresh = work.plan.steps[0].run(Work(work.plan, work.rows, work.environment))
        assert fresh.stream is not None
        self.original = fresh.stream
        self.error = torch.empty(rows, columns, dtype=torch.float32, device=self.device)
        self.weight = Energies(columns, self.hessian, self.device)

    def add(self, chunk: Chunk, rotation: int | None) -> None:
        """Takes a chunk with codes, whose rows were rotated by groups of ``rotation``; reads their original again."""
        assert chunk.codes is not None
        assert chunk.scales is not None
        count, columns = chunk.x.shape[0], self.error.shape[1]
        for original in self.original(chunk.start, chunk.start + count):
            x = original.x.float()
            part = slice(original.start - chunk.start, original.start - chunk.start + len(x))
            multiplier = self.format.row_multipliers(chunk.scales.multiplier, part, count)
            decoded = self.format.decode(chunk.codes[part], multiplier)
            if rotation:
                decoded = rotate_(decoded, rotation)
            torch.sub(x, decoded[:, :columns], out=self.error[original.start : original.start + len(x)])
            self.weight.add(x)

    def errors(self, error: torch.Tensor) -> Errors:
        """Relative errors of what is left."""
        energies = Energies(error.shape[1], self.hessian, self.device)
        energies.add(error)
        (plain, weighted), (whole, output) = energies.total(), self.weight.total()
        share = None if weighted is None or output is None else _root_share(weighted, output)
        return Errors(_root_share(plain, whole), output=share)


def _root_share(error: float, of: float) -> float:
    if of == 0:
        return 0.0 if error == 0 else float("inf")
    return float((error / of) ** 0.5)


@dataclass(frozen=True)
class Extract:
    """Makes the adapter of a layer and hands it over with the last chunk."""

    format: tuple[str, str, int | None]
    """Arguments of ``make_format``."""
    rank: int
    inputs: Inputs | None = None
    """Statistics of the layer's inputs: output errors are measured with them ..."""
    weighted: bool = False
    """... and decide which part of the error counts."""
    rotation: int | None = None
    """Order of the Hadamard rotation that rows go through before they are rounded."""
    name: str = "adapter"

    def run(self, work: Work) -> Work:
        upstream = work.stream
        assert upstream is not None

        def stream(start: int, stop: int) -> Iterator[Chunk]:
            lost = Lost(work, self.format, self.inputs)
            for chunk in upstream(start, stop):
                lost.add(chunk, self.rotation)
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
        before = lost.errors(lost.error)
        up, down, _ = low_rank(lost.error, self.rank, seed_of(work.plan.layer.name), self._weighting(lost))
        dtype = torch_dtype(up_spec.dtype)
        up, down = up.to(dtype), down.to(dtype)
        if not (up.isfinite().all() and down.isfinite().all()):
            raise NonFiniteError(f"{work.plan.layer.name}: its adapter does not fit {up_spec.dtype}; use BF16 or F32")
        after = lost.errors(lost.error.addmm_(up.float(), down.float(), alpha=-1))
        work.gain = AdapterGain(self.rank, before, after)
        padding = up_spec.shape[1] - self.rank
        stored = torch.nn.functional.pad(up, (0, padding)), torch.nn.functional.pad(down, (0, 0, 0, padding))
        return [
            (ADAPTER + spec.name, 0, part.cpu().contiguous())
            for spec, part in zip((up_spec, down_spec), stored, strict=True)
        ]

    def _weighting(self, lost: Lost) -> Weighting | None:
        return Weighting(lost.hessian) if self.weighted and lost.hessian is not None else None

    def memory(self, plan: LayerPlan, environment: Environment) -> int:
        """The error, rows that are summed, the statistics twice while they are read, what the decomposition takes,
        and decoded rows."""
        rows, columns = plan.layer.weight.shape
        statistics = 8 * make_format(*self.format).columns(columns) ** 2 if self.inputs else 0
        sums = 28 * _BLOCK[environment.device.partition(":")[0]][0] * columns
        fixed = 4 * rows * columns + sums + statistics
        return fixed + memory_of_low_rank((rows, columns), self.rank) + chunk_elements(plan, environment) * 24


@dataclass(frozen=True)
class Survey(Extract):
    """Ends a chain that writes nothing: says what ranks would bring."""

    name: str = "survey"

    def run(self, work: Work) -> Work:
        lost = Lost(work, self.format, self.inputs)
        for chunk in work.chunks():
            lost.add(chunk, self.rotation)
        weighting = self._weighting(lost)
        with cancellable(work.environment.run_id):
            values = low_rank(lost.error, self.rank, seed_of(work.plan.layer.name), weighting)[2][: self.rank]
        before = lost.errors(lost.error)
        energies = Energies(lost.error.shape[1], lost.hessian, lost.device)
        energies.add(lost.error)
        plain, output = energies.total()
        total = plain if weighting is None or output is None else output + float(weighting.added) * plain
        removed = (values.square() / total).tolist() if total else [0.0] * len(values)
        work.gain = AdapterGain(0, before, before, tuple(removed))
        return work
