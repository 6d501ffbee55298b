"""The Dask graph of a plan: one node per (layer, stage), and what is submitted: one fused task per batch of layers.

Plans go in and receipts come out; no tensor is ever a task's argument or result. Large layers run as row ranges: their
amax nodes meet in a scale node, whose one number all ranges use.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from operator import itemgetter
from typing import Any

from dask._task_spec import GraphNode, List, Task, TaskRef

from ..stages.matrix import Solve, sees_whole
from ..stages.scaling import Scale
from ..stages.work import Environment, LayerPlan, Receipt
from .chains import apply_scale, combine_amaxes, gather_receipts, make_receipt, part_amax, run_chains, start

BATCH_BYTES = 64 << 20
"""Layers are put together into tasks of at least this many source bytes ..."""
SLOW = 8
"""Bytes of a layer that is seen as a whole matrix count so many times: its task takes as much longer, and what a task
has not finished is lost when a run is killed."""
MOST_BATCHES = 1024
"""... and of so many more that a model has about this many tasks: Dask takes two milliseconds for each ..."""
BATCH_LAYERS = 256
"""... but of no more layers than this: what Dask does within a fused task grows with the square of its nodes."""

_submissions = count()
"""A scheduler gives back what it has under a key: those of another try, or of another run, must not be equal."""

Key = tuple[str, ...]
Graph = dict[Key, GraphNode]
LayersOf = dict[Key, list[LayerPlan]]
"""Keys of a graph that are asked for, and the layers that each is for."""


@dataclass(frozen=True)
class Failure:
    """What a task gives back instead of receipts, or of a number that others need."""

    error: Exception


Results = Generator[tuple[Key, list[Receipt] | Failure], None, None]
"""What each task of a running graph gives, as it finishes."""


def receipt_keys(plan: LayerPlan) -> list[Key]:
    """Keys of the nodes that end a layer's chains."""
    return [("receipt", plan.layer.name, *_part_name(part)) for part in _ranges(plan)]


def stage_graph(layers: Sequence[LayerPlan], environment: Environment) -> Graph:
    """The whole graph, before fusion."""
    graph: Graph = {}
    before: LayerPlan | None = None
    after: dict[str, Key | None] = {}
    for plan in layers:
        first = plan.together[0][0] if plan.together else plan.layer.name
        if first not in after:  # layers that are solved in one wait for what came before the first of them
            shares = before is not None and plan.affinity and plan.affinity == before.affinity
            after[first] = receipt_keys(before)[-1] if before is not None and shares else None
        graph.update(_layer_graph(plan, environment, after[first]))
        before = plan
    return graph


def _ranges(plan: LayerPlan) -> tuple[tuple[int, int], ...]:
    return plan.parts or ((0, plan.rows),)


def _part_name(part: tuple[int, int]) -> tuple[str, ...]:
    return () if part[0] == 0 else (f"rows {part[0]}",)


def _layer_graph(plan: LayerPlan, environment: Environment, after: Key | None = None) -> Graph:
    """The nodes of one layer; it begins once the node ``after`` is done, whose layer it shares something with."""
    name = plan.layer.name
    graph: Graph = {}
    shared = _shared_scale(plan)
    amaxes = []
    for part in _ranges(plan):
        suffix = _part_name(part)
        above: TaskRef | None = None
        for index, step in enumerate(plan.steps):
            key = (step.name, name, *suffix)
            if index == 0:
                waits = () if after is None else (TaskRef(after),)
                graph[key] = Task(key, start, plan, part, environment, step, *waits)
            elif shared is not None and isinstance(step, Scale):
                amax_key = ("amax", name, *suffix)
                graph[amax_key] = Task(amax_key, part_amax, step, above)
                amaxes.append(TaskRef(amax_key))
                graph[key] = Task(key, apply_scale, step, above, TaskRef(shared))
            elif plan.together and isinstance(step, Solve):
                joint = ("together", plan.together[0][0])
                inputs = [TaskRef((plan.steps[index - 1].name, other)) for other, _ in plan.together]
                graph[joint] = Task(joint, step.run_together, List(*inputs))
                place = [other for other, _ in plan.together].index(name)
                graph[key] = Task(key, itemgetter(place), TaskRef(joint))
            else:
                graph[key] = Task(key, step.run, above)
            above = TaskRef(key)
        key = ("receipt", name, *suffix)
        graph[key] = Task(key, make_receipt, above)
    if shared is not None:
        graph[shared] = Task(shared, combine_amaxes, plan, environment, List(*amaxes))
    return graph


def _shared_scale(plan: LayerPlan) -> Key | None:
    """The node that makes the scale of the whole tensor for all its row ranges."""
    if not plan.parts:
        return None
    for step in plan.steps:
        if isinstance(step, Scale) and step.needs_stats:
            return ("tensor scale", plan.layer.name)
    return None


def batches(layers: Sequence[LayerPlan]) -> Iterator[list[LayerPlan]]:
    """Layers, biggest first, in groups of BATCH_BYTES (or of more, for MOST_BATCHES) or BATCH_LAYERS; a layer in row
    ranges is alone.

    Layers of one affinity stay side by side, whatever their sizes.
    """
    largest: dict[str, int] = {}
    enough = max(BATCH_BYTES, sum(plan.layer.nbytes for plan in layers) // MOST_BATCHES)
    for plan in layers:
        largest[plan.affinity] = max(largest.get(plan.affinity, 0), plan.layer.nbytes)

    def place(plan: LayerPlan) -> tuple[int, str, int, str]:
        size = largest[plan.affinity] if plan.affinity else plan.layer.nbytes
        return -size, plan.affinity, -plan.layer.nbytes, plan.layer.name

    pending: list[LayerPlan] = []
    size = 0
    for plan in sorted(layers, key=place):
        if plan.parts:
            yield [plan]
            continue
        together = bool(pending and plan.affinity and plan.affinity == pending[-1].affinity)
        if (size >= enough or len(pending) == BATCH_LAYERS) and not together:
            yield pending
            pending, size = [], 0
        pending.append(plan)
        size += plan.layer.nbytes * (SLOW if sees_whole(plan) else 1)
    if pending:
        yield pending


def submission(chosen: Iterable[list[LayerPlan]], environment: Environment) -> tuple[Graph, LayersOf]:
    """The fused graph of these batches, biggest layers first, and the keys to ask for with the layers of each; the
    result of each is a list of receipts, or a Failure. A batch's chains, joined by a node that gathers their receipts,
    are fused into one task, so that what flows along an edge stays inside one worker's thread. Where no chain has a
    branch, one call runs them: fusing the nodes of 100,000 layers takes longer than planning them."""
    graph: Graph = {}
    layers_of: LayersOf = {}
    made = list(chosen)
    # Names decide which of many equal tasks Dask begins with: the last one, or the first where some wait for others.
    waiting = any(_shared_scale(batch[0]) for batch in made)
    for number, batch in enumerate(made):
        key: Key = ("batch", f"{number if waiting else len(made) - number:07d}")
        if all(_is_plain(plan) for plan in batch):
            graph[key] = Task(key, run_chains, tuple(batch), environment)
            layers_of[key] = batch
            continue
        nodes = stage_graph(batch, environment)
        if batch[0].parts:
            layers_of |= dict.fromkeys(_fuse_parts(batch[0], nodes, graph, key), batch)
            continue
        gather = Task(key, gather_receipts, List(*(TaskRef(end) for plan in batch for end in receipt_keys(plan))))
        graph[key] = Task.fuse(*nodes.values(), gather, key=key)
        layers_of[key] = batch
    run = environment.run_id, str(next(_submissions))
    named: Graph = {(*run, *key): _guarded(key, task, run) for key, task in graph.items()}
    return named, {(*run, *key): batch for key, batch in layers_of.items()}


def _is_plain(plan: LayerPlan) -> bool:
    """Whether its part of the stage graph is one chain."""
    return not plan.parts and not plan.together


def _fuse_parts(plan: LayerPlan, nodes: Graph, graph: Graph, prefix: Key) -> list[Key]:
    """One task per row range, and with a shared scale one more for its amax; edges carry single numbers."""
    keys = []
    shared = _shared_scale(plan)
    for part in _ranges(plan):
        suffix = _part_name(part)
        chain = [nodes[(step.name, plan.layer.name, *suffix)] for step in plan.steps]
        if shared is not None:
            before = next(index for index, step in enumerate(plan.steps) if isinstance(step, Scale))
            amax_key = ("amax", plan.layer.name, *suffix)
            graph[amax_key] = Task.fuse(*chain[:before], nodes[amax_key], key=amax_key)
        end = nodes[("receipt", plan.layer.name, *suffix)]
        key = (*prefix, plan.layer.name, *suffix)
        graph[key] = Task.fuse(*chain, end, Task(key, gather_receipts, List(TaskRef(end.key))), key=key)
        keys.append(key)
    if shared is not None:
        graph[shared] = nodes[shared]
    return keys


def _guarded(key: Key, task: GraphNode, run: Key) -> Task:
    """The task, named after its run, with failures as values: others go on, and the driver decides."""
    needs: list[Any] = sorted(task.dependencies, key=str)
    return Task((*run, *key), Guarded(task, tuple(needs)), *(TaskRef((*run, *need)) for need in needs))


@dataclass(frozen=True)
class Guarded:
    """Calls a task with the values of what it needs; an exception, its own or of one of those, becomes its value."""

    task: GraphNode
    needs: tuple[Key, ...]
    """Keys within the task."""

    def __call__(self, *values: Any) -> Any:
        if failure := next((value for value in values if isinstance(value, Failure)), None):
            return failure
        try:
            return self.task(dict(zip(self.needs, values, strict=True)))
        except Exception as error:
            return Failure(error)
