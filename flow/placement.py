"""Where the tasks of a run may work: which files their workers must see, and which machine writes which of them."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ..stages.work import LayerPlan
from .graph import Key, LayersOf, batches

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placement:
    """The layers of a run, seen from the files that they read and write."""

    layers: Sequence[LayerPlan] = ()
    writes: str = "shared"
    """``Run.writes``."""

    @cached_property
    def sources(self) -> list[str]:
        """Files that workers read; those behind a URL are everybody's."""
        stores = {plan.inputs.store.path for plan in self.layers if plan.inputs is not None}
        return _local([*stores, *(tensor.path for plan in self.layers for tensor in plan.layer.tensors)])

    @cached_property
    def folders(self) -> list[str]:
        """Folders that workers write to."""
        return sorted({os.path.dirname(path) for path in _local(p for plan in self.layers for p in files_of(plan))})

    def groups(self) -> list[list[LayerPlan]]:
        """Layers that one machine must do, so that no file is written by two: those with files, or a solution, in
        common. Largest group first."""
        leader: dict[str, str] = {}

        def find(name: str) -> str:
            while leader.setdefault(name, name) != name:
                leader[name] = leader[leader[name]]
                name = leader[name]
            return name

        for plan in self.layers:
            shared = [f"file {path}" for path in files_of(plan)] + ([f"with {plan.affinity}"] if plan.affinity else [])
            for name in shared:
                leader[find(name)] = find(f"layer {plan.layer.name}")
        groups: dict[str, list[LayerPlan]] = defaultdict(list)
        for plan in self.layers:
            groups[find(f"layer {plan.layer.name}")].append(plan)
        return sorted(groups.values(), key=lambda group: (-_size(group), group[0].layer.name))


    def batches(self) -> list[list[LayerPlan]]:
        """Tasks of layers; where files are written exclusively, none has layers of two groups."""
        return [batch for group in self._groups for batch in batches(group)]

    def hosts(self, threads: Mapping[str, int], layers_of: LayersOf) -> dict[Key, list[str]]:
        """By key, the one host that may run it. ``threads``: tasks at a time by host."""
        if len(self._groups) < len(threads):
            _log.warning("only %d of %d machines will work: each file is written by one; make more files with "
                         "--shard-size", len(self._groups), len(threads))  # fmt: skip
        host_of = {plan.layer.name: host for host, plans in assign(self._groups, threads).items() for plan in plans}
        return {key: [host_of[layers[0].layer.name]] for key, layers in layers_of.items()}

    @cached_property
    def _groups(self) -> list[list[LayerPlan]]:
        return [list(self.layers)] if self.writes == "shared" else self.groups()


def files_of(plan: LayerPlan) -> list[str]:
    """Files that a layer's task writes to."""
    slots = (*plan.slots, *(plan.adapter.slots if plan.adapter is not None else ()))
    return sorted({slot.path for slot in slots})


def assign(groups: Sequence[list[LayerPlan]], threads: Mapping[str, int]) -> dict[str, list[LayerPlan]]:
    """By host, its layers: each group goes where it would be done first. ``threads``: tasks at a time by host."""
    chosen: dict[str, list[LayerPlan]] = {host: [] for host in sorted(threads)}
    load = dict.fromkeys(chosen, 0)
    for group in groups:
        host = min(chosen, key=lambda host: ((load[host] + _size(group)) / max(1, threads[host]), host))
        chosen[host] += group
        load[host] += _size(group)
    return {host: layers for host, layers in chosen.items() if layers}


def _size(group: Iterable[LayerPlan]) -> int:
    return sum(plan.layer.nbytes for plan in group)


def _local(paths: Iterable[str]) -> list[str]:
    return sorted({path for path in paths if "://" not in path})
