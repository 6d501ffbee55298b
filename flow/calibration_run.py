"""One model over one set of batches: its passes, and how each of them reaches the statistics store."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..formats.errors import PlanError, UsageError
from .batches import Run, attention_mask, fingerprint
from .sizes import show_size

if TYPE_CHECKING:
    from torch import nn

    from ..stages.collect import Linear
    from ..stages.statistics_table import InputEntry, Table


class Progress(Protocol):
    """Someone who watches a calibration."""

    def start(self, passes: int, batches: int, inputs: int) -> None:
        """Called once, before the first pass."""

    def advance(self, batches: int) -> None:
        """Called after each batch of each pass."""

    def stop(self) -> None:
        """Called once, after work or failure."""


class Silent:
    """Nobody watches."""

    def start(self, passes: int, batches: int, inputs: int) -> None: ...

    def advance(self, batches: int) -> None: ...

    def stop(self) -> None: ...


class CalibrationRun:
    """One model over one set of batches."""

    def __init__(self, model: nn.Module, batches: Iterable[Any], call: Run, layers: dict[str, Linear]) -> None:
        self.model, self.source, self.call, self.layers = model, batches, call, layers
        self.fingerprint, self.batches = fingerprint(layers, batches)

    def groups(self, share: bool) -> list[list[str]]:
        """Layers by input, as the first batch shows it."""
        from ..stages.collect import Sharing, listening

        sharing = Sharing()
        with listening(self.layers, sharing):
            self.call(self.model, next(iter(self.source)))
        if not sharing.calls:
            raise UsageError(f"{type(self.model).__name__} called none of its {len(self.layers)} linear layers")
        return sharing.groups(list(self.layers), share)

    def begin(
        self, root: Path, groups: list[list[str]], kept: tuple[int, bool], label: str
    ) -> tuple[Table, list[str]]:
        """The store's table with this run in it, and notes. Nothing is written: a run begins with its first full pass.

        ``kept``: bytes that one H may take, and whether diagonals are enough. A store that exists keeps what it keeps.
        """
        from ..stages.statistics_store import check_free, is_store
        from ..stages.statistics_table import read_table

        notes: list[str] = []
        if is_store(root):
            table = read_table(root)
            self._check(root, table, groups)
        else:
            check_free(root)
            table, notes = self._new_table(groups, *kept)
        if table.inputs and all(self.fingerprint in entry.runs for entry in table.inputs.values()):
            return table, [f"{root} holds this run already; nothing was added"]
        words = label or f"{type(self.model).__name__}, {self._amount()}"
        return replace(table, runs={**table.begun(), self.fingerprint: words}), notes

    def _amount(self) -> str:
        return "1 batch" if self.batches == 1 else f"{self.batches} batches"

    def _new_table(self, groups: list[list[str]], bound: int, diagonal: bool) -> tuple[Table, list[str]]:
        """A table of no run, and a note for each input of which only the diagonal fits."""
        from ..stages.statistics_table import InputEntry, make_table

        widths = [self.layers[names[0]].width for names in groups]
        large = [4 * width**2 > bound for width in widths]
        entries = [(names, InputEntry(width, not (diagonal or too_large)))
                   for names, width, too_large in zip(groups, widths, large, strict=True)]  # fmt: skip
        notes = [f"{', '.join(names[:4])}: E[x x^T] of {width} inputs takes {show_size(4 * width**2)}, more than the "
                 f"{show_size(bound)} of --memory; only its diagonal is kept"
                 for names, width, too_large in zip(groups, widths, large, strict=True) if too_large]  # fmt: skip
        transposed = frozenset(name for name, layer in self.layers.items() if layer.transposed)
        return make_table(entries, transposed), [] if diagonal else notes

    def passes(self, table: Table, bound: int) -> list[list[str]]:
        """Inputs that lack this run, in the order of their first calls, as many in a pass as ``bound`` bytes hold.

        Raises PlanError when the store keeps a matrix that alone exceeds the bound.
        """
        passes: list[list[str]] = []
        used = bound + 1
        for key, entry in table.inputs.items():
            if self.fingerprint in entry.runs:
                continue
            need = 4 * entry.width**2 if entry.hessian else 16 * entry.width
            if entry.hessian and need > bound:
                raise PlanError(
                    f"{key}: the store keeps E[x x^T] of its {entry.width} inputs, which takes {show_size(need)}; "
                    f"the memory for calibration is {show_size(bound)}: raise --memory"
                )
            if used + need > bound:
                passes.append([])
                used = 0
            passes[-1].append(key)
            used += need
        return passes

    def collect(self, root: Path, table: Table, keys: Sequence[str], watcher: Progress) -> Table:
        """One pass: sums up some inputs over all batches, writes them and names them in the table."""
        from ..stages.collect import Collector, listening
        from ..stages.estimates import merged
        from ..stages.statistics_store import commit, create_store, is_store, read_estimate, write_estimate

        groups = {key: table.layers_of(key) for key in keys}
        whole = {key: table.inputs[key].hessian for key in keys}
        collector = Collector(groups, self.layers, whole)
        number = 0
        with listening(collector.layers, collector):
            for number, batch in enumerate(self.source, 1):  # noqa: B007
                collector.begin(attention_mask(batch))
                self.call(self.model, batch)
                collector.end()
                watcher.advance(1)
        if number != self.batches:
            raise UsageError(f"batches held {self.batches} batches at first and {number} now; it must not change")
        if not is_store(root):
            create_store(root, table)
        entries: dict[str, InputEntry] = {}
        for key in keys:
            old, new = table.inputs[key], collector.sums.pop(key).estimate()
            estimate = merged([read_estimate(root, old), new]) if old.tokens else new
            entries[key] = write_estimate(root, key, estimate, (*old.runs, self.fingerprint))
            del new, estimate
        return commit(root, table, entries)

    def _check(self, root: Path, table: Table, groups: list[list[str]]) -> None:
        """PlanError when a store is of other layers, or of another run that is not complete."""
        mine = {frozenset(names): self.layers[names[0]].width for names in groups}
        held = {frozenset(table.layers_of(key)): entry.width for key, entry in table.inputs.items()}
        if mine != held:
            one = sorted(name for names in mine.keys() ^ held.keys() for name in names)
            raise PlanError(
                f"{root}: holds statistics of other layers, widths or shared inputs than this model has"
                f"{', ' + one[0] if one else ''}; calibrate into another store, and merge the two"
            )
        others = {run: words for run, words in table.begun().items() if run != self.fingerprint}
        if any(not set(entry.runs) >= others.keys() for entry in table.inputs.values()):
            words = list(others.values())[-1]
            raise PlanError(
                f"{root}: another run ({words}) was begun and is not complete; run that command again to "
                "complete it, or remove the store"
            )
