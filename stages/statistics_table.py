"""The table of a statistics store: which layers it covers, which inputs they share, which runs each input has seen.

It is the attributes of the store's root group, one small JSON file that is replaced as a whole. Data that it does not
name does not exist: what a killed run had half written is never read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..formats.errors import CheckpointError, shown

KIND = "quantloom_statistics"
VERSION = 1
METADATA = "zarr.json"
_MAX_BYTES = 256_000_000


@dataclass(frozen=True)
class LayerEntry:
    """One layer."""

    input: str
    """Id of its input: the name of the first layer that gets it."""
    transposed: bool = False
    """Whether its weight is stored (inputs, outputs)."""


@dataclass(frozen=True)
class InputEntry:
    """One input, which several layers may share."""

    width: int
    hessian: bool
    """Whether E[x x^T] is kept whole; otherwise its diagonal only."""
    tokens: int = 0
    amax: float | None = None
    """Largest |x|; None when no value was seen."""
    where: str = ""
    """Group of its arrays, relative to the root; empty before there are any."""
    runs: tuple[str, ...] = ()
    """Fingerprints of the runs that are in it."""
    checksum: int = 0
    """XXH3 (64 bits) over its arrays."""


@dataclass(frozen=True)
class Table:
    """All that a store says of itself."""

    layers: dict[str, LayerEntry]
    inputs: dict[str, InputEntry]
    runs: dict[str, str]
    """Fingerprint of every run that was begun -> what it was, in words."""

    @property
    def digest(self) -> str:
        """sha256 (hex) over everything but places."""
        inputs = {name: asdict(replace(entry, where="")) for name, entry in self.inputs.items()}
        layers = {name: asdict(entry) for name, entry in self.layers.items()}
        return hashlib.sha256(json.dumps([VERSION, layers, inputs], sort_keys=True).encode()).hexdigest()

    def incomplete(self) -> list[str]:
        """Ids of inputs that lack a run which was begun."""
        return [key for key, entry in self.inputs.items() if set(entry.runs) != set(self.runs)]

    def begun(self) -> dict[str, str]:
        """Runs of which at least one input has seen anything."""
        seen = {run for entry in self.inputs.values() for run in entry.runs}
        return {run: words for run, words in self.runs.items() if run in seen}

    def layers_of(self, key: str) -> list[str]:
        """Layers that share an input."""
        return [name for name, layer in self.layers.items() if layer.input == key]

    def with_inputs(self, entries: dict[str, InputEntry]) -> Table:
        """The table after some inputs got further."""
        return replace(self, inputs={**self.inputs, **entries})


def read_table(root: Path) -> Table:
    """The table of a store. Raises CheckpointError for what is none."""
    try:
        path = root / METADATA
        if not path.is_file():
            why = "is no Zarr group" if root.exists() else "does not exist"
            raise CheckpointError(f"{root}: {why}; make statistics with quantloom calibrate")
        if path.stat().st_size > _MAX_BYTES:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes; no statistics store says that much of itself")
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{root / METADATA}: is no JSON: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{root}: cannot be read: {error.strerror or error}") from error
    attributes = found.get("attributes") if isinstance(found, dict) else None
    held = attributes.get(KIND) if isinstance(attributes, dict) else None
    if not isinstance(held, dict):
        raise CheckpointError(f"{root}: a Zarr store, but not of statistics that quantloom calibrate wrote")
    if held.get("version") != VERSION:
        version = shown(held.get("version"))
        raise CheckpointError(f"{root}: statistics of version {version}, this program reads {VERSION}; calibrate again")
    try:
        return _parse(held)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{root / METADATA}: its table of statistics is broken: {error!r}") from error


def write_table(root: Path, table: Table) -> None:
    """Replaces the table in one step, after it has reached the disk."""
    held = {
        "version": VERSION,
        "runs": table.runs,
        "layers": {name: asdict(entry) for name, entry in table.layers.items()},
        "inputs": {name: asdict(entry) for name, entry in table.inputs.items()},
    }
    text = json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {KIND: held}})
    part = root / f"{METADATA}.part"
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(root / METADATA)


def make_table(groups: Iterable[tuple[list[str], InputEntry]], transposed: frozenset[str] = frozenset()) -> Table:
    """A table of (layers that share an input, its entry) that has seen no run."""
    layers: dict[str, LayerEntry] = {}
    inputs: dict[str, InputEntry] = {}
    for names, entry in groups:
        inputs[names[0]] = entry
        layers |= {name: LayerEntry(names[0], name in transposed) for name in names}
    return Table(layers, inputs, {})


def _parse(held: dict[str, Any]) -> Table:
    layers = {str(name): LayerEntry(**entry) for name, entry in held["layers"].items()}
    inputs = {str(key): _input(entry) for key, entry in held["inputs"].items()}
    if lost := [name for name, layer in layers.items() if layer.input not in inputs]:
        raise ValueError(f"layer {lost[0]!r} names an input that is not there")
    return Table(layers, inputs, {str(key): str(words) for key, words in held["runs"].items()})


def _input(entry: dict[str, Any]) -> InputEntry:
    made = InputEntry(**{**entry, "runs": tuple(entry["runs"])})
    if made.width < 1 or made.tokens < 0 or ".." in made.where.split("/") or made.where.startswith("/"):
        raise ValueError(f"an input of width {made.width}, {made.tokens} tokens, at {made.where!r}")
    numbers = (made.width, made.tokens, made.checksum)
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers) or (
        not isinstance(made.hessian, bool) or "." in made.where.split("/")
    ):
        raise ValueError(f"an input that is described by {entry}")
    if made.amax is not None and not 0 <= float(made.amax) < float("inf"):
        raise ValueError(f"an input whose largest value is {made.amax!r}")
    if made.tokens and not made.where:
        raise ValueError(f"an input of {made.tokens} tokens without data")
    return made
