"""Calibration: runs a model over batches and writes what its linear layers are given into a statistics store.

A store is filled pass by pass. Each pass goes over all batches and sums up as many inputs as memory allows; then they
are written, and the table names them. A run that was stopped therefore goes on with the inputs that are missing, and
another run on the same store adds to every input in the same way.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from ..formats.errors import PlanError, SinkError, UsageError, memory_problem
from .batches import Run, call_model, check_batches, evaluating
from .calibration_run import CalibrationRun, Progress, Silent
from .sizes import count, parse_size

if TYPE_CHECKING:
    from typing import Unpack

    from torch import nn

    from ..stages.collect import Linear
    from ..stages.statistics import Statistics


class Options(TypedDict, total=False):
    """What ``calibrate`` may be told."""

    checkpoint: str | Path | None
    """The safetensors checkpoint whose key names the store gets. Default: the module's own names."""
    memory: str | int | None
    """Bytes (or ``4GB``) for the matrices of one pass. Default: half of what the model's device has free."""
    diagonal: bool
    """Keep E[x^2] of every channel instead of E[x x^T]."""
    share: bool
    """Layers that get the very same tensor share statistics (default)."""
    run: Run | None
    """Calls the model with a batch, where calling it directly will not do."""
    label: str
    """What the run is called in the store."""
    progress: Progress | None


@dataclass(frozen=True)
class Calibration:
    """What a calibration did."""

    statistics: Statistics
    passes: int
    """Passes over the batches; 0 when the store had them already."""
    seconds: float
    notes: tuple[str, ...]
    """Layers that were left out or have less than was asked for, and why."""

    def to_dict(self) -> dict[str, Any]:
        """JSON."""
        held = {"passes": self.passes, "seconds": round(self.seconds, 3), "notes": list(self.notes)}
        return {**self.statistics.describe(), **held}


def calibrate(
    model: nn.Module, batches: Iterable[Any], out: str | Path = "stats.zarr", **options: Unpack[Options]
) -> Calibration:
    """Runs ``model`` over ``batches`` and adds the moments of every linear layer's input to the store ``out``.

    ``batches`` holds what the model is called with: tensors, tuples of arguments or mappings of them; it is gone
    through once for a fingerprint and once for each pass. Tokens that an ``attention_mask`` in a mapping hides do not
    count where a layer's input is (batch, sequence, n). Batches that the store has already seen are not counted twice.

    Raises UsageError for batches or a model that cannot be used, NonFiniteError for NaN or Inf in an input, PlanError
    when the store cannot take this run, CheckpointError when a given checkpoint does not fit the model.
    """
    from ..stages.collect import linear_layers
    from ..stages.statistics import Statistics
    from .commit import hold
    from .key_names import named_layers

    began = time.perf_counter()
    check_batches(batches)
    found = linear_layers(model)
    if not found:
        raise UsageError(f"{type(model).__name__} has no linear layer (torch.nn.Linear or transformers' Conv1D)")
    if "" in found:
        raise UsageError("the model is itself a linear layer, which has no name; put it into a torch.nn.Module")
    layers, notes = named_layers(model, found, options.get("checkpoint"))
    root = Path(out).absolute()
    root.parent.mkdir(parents=True, exist_ok=True)
    with hold([root.with_name(f".{root.name}.lock")]), evaluating(model), _failures(root):
        run = CalibrationRun(model, batches, options.get("run") or call_model, layers)
        bound = _bound(layers, options)
        groups = run.groups(options.get("share", True))
        made, more = run.begin(root, groups, (bound, options.get("diagonal", False)), options.get("label") or "")
        passes = run.passes(made, bound)
        watcher = options.get("progress") or Silent()
        try:
            watcher.start(len(passes), run.batches, sum(map(len, passes)))
            for keys in passes:
                made = run.collect(root, made, keys, watcher)
        finally:
            watcher.stop()
    statistics = Statistics.open(root)
    if statistics.unseen:
        more.append(f"{count(len(statistics.unseen), 'layer')} never called: {', '.join(statistics.unseen[:8])}")
    return Calibration(statistics, len(passes), time.perf_counter() - began, (*notes, *more))


def _bound(layers: dict[str, Linear], options: Options) -> int:
    """Bytes for the matrices of one pass."""
    given = parse_size(options.get("memory"), "memory")
    if given is not None:
        return given
    import torch

    device = next(iter(layers.values())).weight.device
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // 2
    from .budget import free_memory

    return free_memory() // 2


@contextmanager
def _failures(root: Path) -> Iterator[None]:
    """Errors of memory and disk in words, with the way out."""
    try:
        yield
    except OSError as error:
        raise SinkError(
            f"{error.filename or root}: {error.strerror or error}; what is complete is kept: run the same command again"
        ) from error
    except (MemoryError, RuntimeError) as error:
        if (problem := memory_problem(error)) is None:
            raise
        raise PlanError(f"{problem}; lower --batch-size or --memory") from error
