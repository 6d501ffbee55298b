"""Tasks and their results as bytes, for a cluster: client and scheduler pass on what they need not read.

Dask would otherwise name each task after a walk through all that it carries, rebuild every plan in the scheduler and
take it apart again for a worker, and take every receipt by itself: 20 ms a task of 25 layers, in one thread.
"""

from __future__ import annotations

import pickle
import zlib
from dataclasses import dataclass
from typing import Any

from dask._task_spec import GraphNode, Task

from .graph import Graph, Key


@dataclass(frozen=True)
class PackedTask:
    """A task's function, and all that it carries. What it is called with and what it returns are packed too."""

    key: Key
    content: bytes

    def __call__(self, *values: bytes) -> bytes:
        return _pack(unpack(self.content)(*map(unpack, values)))

    def __dask_tokenize__(self) -> Key:
        """Its key, which no other task has."""
        return self.key


def pack_tasks(graph: Graph) -> Graph:
    """The same graph of packed tasks, whose results are for ``unpack``."""
    return {key: _packed(key, task) for key, task in graph.items()}


def unpack(content: bytes) -> Any:
    """What was packed."""
    return pickle.loads(zlib.decompress(content))


def _packed(key: Key, task: GraphNode) -> Task:
    assert isinstance(task, Task)
    return Task(key, PackedTask(key, _pack(task.func)), *task.args)


def _pack(value: Any) -> bytes:
    from distributed.protocol.pickle import dumps  # takes what a user's script defined, too

    return zlib.compress(dumps(value), 1)  # names of layers and files repeat: a seventh is left
