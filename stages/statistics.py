"""Statistics of layers' inputs, as they are read from a store that ``quantloom calibrate`` has written.

A `Statistics` value is a path, a digest and the store's table; numbers are read when they are asked for. Pickled it is
path and digest alone: plans travel to workers, which open the store again and refuse one that has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..formats.errors import CheckpointError, UsageError, did_you_mean, listed
from ..formats.urls import is_url, shown_url
from .statistics_table import Table, read_table

if TYPE_CHECKING:
    import torch

    from .statistics_table import InputEntry


@dataclass(frozen=True)
class Moments:
    """What is known of the inputs x of one layer, estimated over ``tokens`` of them."""

    hessian: torch.Tensor
    """Float32 (n, n): E[x x^T]. Float32 (n,) where only its diagonal is known (`Statistics.has_hessian` is False)."""
    mean: torch.Tensor
    """Float32 (n,): E[x]."""
    tokens: int
    made: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)
    """What was computed from them last, for the next layer that has the same inputs."""

    def derived(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What ``make`` gives, kept until something else is asked for."""
        if key not in self.made:
            self.made.clear()  # before the next is made: two of them need not fit
            self.made[key] = make()
        return self.made[key]


class Statistics:
    """An opened store of statistics, complete when it was opened. Layers are named as `Layer.name` names them."""

    def __init__(self, path: str, table: Table) -> None:
        self.path = path
        """Absolute path of the store."""
        self.table = table
        self.digest = table.digest
        """sha256 (hex) over names, token counts and checksums: the same wherever the store lies."""

    @classmethod
    def open(cls, path: str | Path) -> Statistics:
        """Raises CheckpointError for what is no store, one of another version, or one whose calibration is unfinished.

        Reads one small file.
        """
        if is_url(path):
            raise UsageError(f"{shown_url(str(path))}: statistics are read from this machine only: copy the store here")
        root = Path(path).absolute()
        table = read_table(root)
        if missing := table.incomplete():
            names = [name for entry in missing for name in table.layers_of(entry)]
            raise CheckpointError(
                f"{root}: {len(missing)} of {len(table.inputs)} inputs are not complete, those of {listed(names, 5)}; "
                "the calibration was stopped: run the same command again, and it goes on where it stood"
            )
        return cls(str(root), table)

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return _reopened, (self.path, self.digest)

    def __repr__(self) -> str:
        return f"Statistics({self.path!r}, {len(self.names)} layers)"

    def __contains__(self, name: object) -> bool:
        layer = self.table.layers.get(name) if isinstance(name, str) else None
        return layer is not None and self.table.inputs[layer.input].tokens > 0

    @property
    def names(self) -> tuple[str, ...]:
        """Layers with statistics, in the order in which the model calls them."""
        return tuple(name for name in self.table.layers if name in self)

    @property
    def unseen(self) -> tuple[str, ...]:
        """Layers that calibration watched and no token ever reached. They count as layers without statistics."""
        return tuple(name for name in self.table.layers if name not in self)

    def input_of(self, name: str) -> str:
        """Id of the layer's input; layers with equal ids (q, k and v; gate and up) have the very same statistics."""
        self._entry(name)
        return self.table.layers[name].input

    def width(self, name: str) -> int:
        """Length n of one input."""
        return self._entry(name).width

    def tokens(self, name: str) -> int:
        """Inputs counted. A norm prior counts as one."""
        return self._entry(name).tokens

    def has_hessian(self, name: str) -> bool:
        """Whether E[x x^T] is known whole, not only its diagonal."""
        return self._entry(name).hessian

    def measured(self, name: str) -> bool:
        """Whether inputs were seen: a norm prior has seen none."""
        return self._entry(name).amax is not None

    def transposed(self, name: str) -> bool:
        """Whether the stored weight is (inputs, outputs), as transformers' ``Conv1D`` keeps it."""
        self._entry(name)
        return self.table.layers[name].transposed

    def moments(self, name: str, device: torch.device | str = "cpu") -> Moments:
        """Second and first moments, float32 on ``device``; H is read row block by row block, so (n, n) lives once.

        Where only the diagonal is known, ``hessian`` is that (n,) vector: no matrix is made of it.
        Raises CheckpointError when a part of the store is missing or is no number.
        """
        import torch

        from .statistics_store import read_estimate, row_blocks

        entry = self._entry(name)
        estimate = read_estimate(Path(self.path), entry)
        if estimate.rows is None:
            hessian = estimate.diagonal.to(device, torch.float32)
        else:
            hessian = torch.empty(entry.width, entry.width, dtype=torch.float32, device=device)
            for start, stop in row_blocks(entry.width):
                hessian[start:stop].copy_(estimate.rows(start, stop))
        mean = estimate.mean.to(device, torch.float32)
        diagonal = hessian.diagonal() if hessian.dim() == 2 else hessian
        # A sum is as finite as its terms: what overflows is of no use either.
        if not (hessian.sum().isfinite() and mean.isfinite().all() and (diagonal >= 0).all()):
            raise CheckpointError(
                f"{self.path}: statistics of {name!r} are missing in part, or hold NaN, Inf or negative squares; "
                "calibrate again"
            )
        return Moments(hessian, mean, entry.tokens)

    def mean(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """Float32 (n,): E[x], without reading H."""
        import torch

        from .statistics_store import read_estimate

        return read_estimate(Path(self.path), self._entry(name)).mean.to(device, torch.float32)

    def diagonal(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """Float32 (n,): E[x^2] of every channel, without reading H."""
        import torch

        from .statistics_store import read_estimate

        return read_estimate(Path(self.path), self._entry(name)).diagonal.to(device, torch.float32)

    def amax(self, name: str) -> float:
        """Largest |x|. Raises UsageError for a norm prior, which knows no values."""
        found = self._entry(name).amax
        if found is None:
            raise UsageError(
                f"{self.path}: statistics of {name!r} come from a norm's weights, which say nothing of the largest "
                "input; calibrate with --random-tokens or --text"
            )
        return found

    def percentile(self, name: str, q: float) -> float:
        """The value that ``q`` percent (0 < q <= 100) of all |x| do not exceed; within 6 %, usually far closer.

        From a histogram with sixteen bins per octave, interpolated; never above `amax`.
        """
        from .histogram import percentile
        from .statistics_store import read_estimate

        if not 0 < q <= 100:
            raise UsageError(f"percentile {q!r} is not between 0 and 100; 99.9 is a common choice")
        largest = self.amax(name)
        return percentile(read_estimate(Path(self.path), self._entry(name)).histogram, largest, q)

    def check(self, layers: Mapping[str, tuple[int, int]]) -> list[str]:
        """What does not fit a checkpoint whose matrices are ``layers`` (name -> (m, n)); empty when all does."""
        problems = [] if self.names else [f"{self.path} has counted no token in any layer"]
        if self.names and layers and not any(name in layers for name in self.names):
            first, other = next(iter(self.names)), next(iter(layers))
            return [f"none of their {len(self.names)} layers is there; they name {first!r}, the checkpoint {other!r}"]
        for name in self.names:
            shape, width = layers.get(name), self.width(name)
            if shape is None:
                problems.append(f"{name}: the checkpoint has no such layer{_near(name, layers)}")
            elif shape[0 if self.transposed(name) else 1] != width:
                problems.append(f"{name}: statistics of {width} inputs, but the weight is {shape[0]}x{shape[1]}")
        return problems

    def describe(self) -> dict[str, Any]:
        """What the store holds, for people and programs (JSON)."""
        inputs = [self.table.inputs[key] for key in dict.fromkeys(self.input_of(name) for name in self.names)]
        return {
            "path": self.path,
            "digest": self.digest,
            "layers": len(self.names),
            "inputs": len(inputs),
            "diagonal": sum(not entry.hessian for entry in inputs),
            "tokens": max((entry.tokens for entry in inputs), default=0),
            "runs": list(self.table.runs.values()),
            "unseen": list(self.unseen),
        }

    def _entry(self, name: str) -> InputEntry:
        if name not in self:
            raise UsageError(f"{self.path}: no statistics of layer {name!r}{_near(name, self.names)}")
        return self.table.inputs[self.table.layers[name].input]


@lru_cache(maxsize=4)
def _reopened(path: str, digest: str) -> Statistics:
    """The same store, seen by another process."""
    found = Statistics.open(path)
    if found.digest != digest:
        raise CheckpointError(f"{path}: has changed since the plan was made; make the plan again")
    return found


def _near(name: str, known: Mapping[str, Any] | tuple[str, ...]) -> str:
    hint = did_you_mean(name, known)
    return hint if hint.startswith("; did") else ""

