"""Hostile values and bytes for fuzzing, and what must hold whatever they are."""

from __future__ import annotations

import contextlib
import os
import random
import tracemalloc
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from quantloom import Flow
from quantloom.flow import execute, graph, session
from quantloom.formats.errors import QuantloomError

EXAMPLES = int(os.environ.get("QUANTLOOM_FUZZ", "40"))
MOST_MEMORY = 64 << 20
"""Bytes that looking at a hostile file of a few kilobytes may take."""

_SHARED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
fuzz = settings(
    max_examples=EXAMPLES, deadline=timedelta(seconds=30), suppress_health_check=_SHARED, database=None,
)  # fmt: skip

# -- hostile values ----------------------------------------------------------------------------------------------------

NUMBERS = st.sampled_from([0, 1, -1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**400, 0.5, -0.0,
                           1e308, float("nan"), float("inf")])  # fmt: skip
PATHS = ["", ".", "..", "/", "../canary", "/etc/passwd", "a/b", "..\\canary", "C:\\x", "\0", "x" * 300, "\ud800", "~",
         "canary", "out.safetensors", "tiny.safetensors", "blocks.0.mlp.up"]  # fmt: skip
TEXTS = st.sampled_from(PATHS) | st.text(max_size=8)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS


def _deep(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
                      max_leaves=6) | st.just(_deep(60))  # fmt: skip


def changed(value: Any, chance: random.Random, hostile: Any) -> Any:
    """``value`` with ``hostile`` in some place, or something of it gone or there twice."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(sorted(value, key=str))
        kind = chance.random()
        if kind < 0.1:
            return {name: item for name, item in value.items() if name != key}
        if kind < 0.2:
            return {**value, str(hostile)[:20]: value[key]}
        return {**value, key: changed(value[key], chance, hostile)}
    if isinstance(value, list) and value and chance.random() < 0.9:
        place = chance.randrange(len(value))
        kind = chance.random()
        if kind < 0.1:
            return value[:place] + value[place + 1 :]
        if kind < 0.2:
            return [*value, value[place]]
        return [*value[:place], changed(value[place], chance, hostile), *value[place + 1 :]]
    return hostile


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Bytes with some flipped, cut, doubled or put in."""
    made = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(made) + 1)
        kind = chance.random()
        if kind < 0.4 and at < len(made):
            made[at] ^= 1 << chance.randrange(8)
        elif kind < 0.6:
            del made[at : at + chance.choice((1, 8, 100))]
        elif kind < 0.8:
            made[at:at] = made[at : at + chance.choice((1, 50))]
        else:
            made[at:at] = chance.choice((b"\0", b"\xff\xfe", b"1e999", b"[" * 5000, b'"', b"\n", b"NaN", b"9" * 5000))
    return bytes(made)


RANDOM = st.integers(0, 2**32).map(random.Random)


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Little memory, and errors of one family only."""
    tracemalloc.start()
    try:
        with contextlib.suppress(QuantloomError):
            yield
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
    finally:
        tracemalloc.stop()


class Stopped(Exception):
    """Ends the run that leaves a journal."""


def stop_after(flow: Flow, count: int) -> None:
    """Runs a conversion whose layers are tasks, and ends it once so many of them are in the journal."""
    finished: list[object] = []

    def advance(receipts: Sequence[object]) -> None:
        finished.extend(receipts)
        if len(finished) == count:
            raise Stopped

    watcher = execute.Silent()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "INTERVAL", 0.0)
        patch.setattr(graph, "BATCH_BYTES", 1)
        patch.setattr(watcher, "advance", advance)
        with pytest.raises(Stopped):
            flow.compute(progress=watcher)
