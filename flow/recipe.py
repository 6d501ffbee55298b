"""The recipe: everything that a conversion is, as one frozen value that turns into JSON and back.

The Python pipeline, the command line and cluster scripts all build a Recipe; from there is one path.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from ..formats.errors import CheckpointError, UsageError, did_you_mean, shown
from ..formats.safetensors import parse_json
from ..stages.stage import VERBS, Stage, check_types, make_stage
from .sizes import parse_size

RECIPE_VERSION = 1
DIALECTS = ("comfy",)
SCHEDULERS = ("threads", "sync", "distributed", "dask-cuda")
_WORDS = {"writes": ("shared", "exclusive"), "resume": ("auto", "never", "require"), "on_error": ("stop", "keep")}
"""What fields of Run may be."""


@dataclass(frozen=True)
class Output:
    """Where the result goes, and in which dialect."""

    path: str
    """A ``.safetensors`` file, or a folder for shards, index and sidecar files."""
    dialect: str = "comfy"
    shard_bytes: int | None = None
    """Largest shard; None: one file, or 5 GB in a folder."""
    overwrite: bool = False
    """Replace an existing output, once the new one is complete."""

    def __post_init__(self) -> None:
        check_types("output", Output, vars(self))
        if not self.path:
            raise UsageError("the path of the output is empty")
        _check_path("output", self.path)
        if self.dialect not in DIALECTS:
            raise UsageError(f"unknown dialect {shown(self.dialect)}{did_you_mean(self.dialect, DIALECTS)}")
        if self.shard_bytes is not None and self.shard_bytes < 1:
            raise UsageError(f"shard size {self.shard_bytes} must be at least one byte")


@dataclass(frozen=True)
class Run:
    """How the work is done; it never changes the bytes of the result."""

    memory: int | None = None
    """Bytes that the process may use; None: half of what the machine or container has free."""
    workers: int | None = None
    """Tasks at a time; None: as many as cores and memory allow."""
    device: str = "cpu"
    """cpu, cuda (every visible GPU), cuda:<index>, or several such as cuda:0,cuda:1: a process for each."""
    scheduler: str = "threads"
    """threads, sync, distributed (a local cluster), dask-cuda (one of GPUs), or the address of a Dask scheduler."""
    writes: str = "shared"
    """shared: every worker writes into every file; exclusive: each file is written by workers of one machine only, for
    file systems that do not keep the writes of several machines apart."""
    resume: str = "auto"
    """auto: continue what an earlier run of the same conversion left; never: start over; require: refuse to."""
    verify: bool = False
    """Read what an earlier run finished again, and compare it with its checksums, before it is continued."""
    on_error: str = "stop"
    """What happens to a layer that fails for good: stop the run, or keep the layer as it is."""

    def __post_init__(self) -> None:
        check_types("run", Run, vars(self))
        if self.scheduler not in SCHEDULERS and "://" not in self.scheduler:
            hint = did_you_mean(self.scheduler, SCHEDULERS)
            raise UsageError(f"unknown scheduler {shown(self.scheduler)}{hint}; or an address such as tcp://host:8786")
        if not re.fullmatch(r"cpu|cuda|cuda:[0-9]{1,9}(,cuda:[0-9]{1,9})*", self.device):
            raise UsageError(f"unknown device {shown(self.device)}; known: cpu, cuda, cuda:0, cuda:0,cuda:1")
        named = self.device.split(",")
        if twice := [name for name in named if named.count(name) > 1]:
            raise UsageError(f"device {shown(self.device)} names {twice[0]} twice")
        for name, known in _WORDS.items():
            if (value := getattr(self, name)) not in known:
                raise UsageError(f"unknown {name} {shown(value)}{did_you_mean(value, known)}")
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"{self.workers} workers: at least one is needed")
        if self.memory is not None and self.memory < 1:
            raise UsageError(f"memory of {self.memory} bytes: it must be positive")


class OtherRun(TypedDict, total=False):
    """Fields of Run that are rarely given."""

    writes: str
    resume: str
    verify: bool
    on_error: str


@dataclass(frozen=True)
class Recipe:
    """A whole conversion."""

    source: tuple[str, ...] = ()
    """A file, folder, index, glob, or several files."""
    stages: tuple[Stage, ...] = ()
    """At most one of each verb, in planning order."""
    output: Output | None = None
    run: Run = field(default_factory=Run)

    def with_stage(self, stage: Stage) -> Recipe:
        """This recipe with ``stage`` in its place, instead of one of the same verb."""
        others = [item for item in self.stages if item.verb != stage.verb]
        ordered = sorted([*others, stage], key=lambda item: VERBS.index(item.verb))
        return Recipe(self.source, tuple(ordered), self.output, self.run)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; options that have their defaults are written too, so that a recipe means the same later."""
        return {
            "quantloom_recipe": RECIPE_VERSION,
            "source": list(self.source),
            "stages": self.stages_dict(),
            "output": None if self.output is None else asdict(self.output),
            "run": asdict(self.run),
        }

    def stages_dict(self) -> list[dict[str, Any]]:
        """The stages as JSON values."""
        return [{"stage": stage.verb, **stage.to_dict()} for stage in self.stages]

    def identity(self) -> list[dict[str, Any]]:
        """The stages as plan digest and output header have them: without what depends on the machine."""
        return [{"stage": stage.verb, **stage.identity()} for stage in self.stages]

    @property
    def statistics(self) -> str | None:
        """The statistics store that a stage names."""
        return next((found for stage in self.stages if (found := getattr(stage, "statistics", None))), None)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Raises UsageError for a version, stage or option that does not exist."""
        refuse_unknown("recipe", values, ("quantloom_recipe", "source", "stages", "output", "run"))
        version = values.get("quantloom_recipe")
        if version != RECIPE_VERSION:
            wanted = f"the version {RECIPE_VERSION} that this program reads"
            raise UsageError(f"recipe version {shown(version)} is not {wanted}")
        source, stages = values.get("source", []), values.get("stages", [])
        if not isinstance(source, list | tuple) or not all(isinstance(item, str) for item in source):
            raise UsageError("recipe: source must be a list of paths")
        for item in source:
            _check_path("source", item)
        if not isinstance(stages, list) or not all(isinstance(item, dict) and "stage" in item for item in stages):
            raise UsageError("recipe: stages must be a list of objects with a 'stage' each")
        built = [make_stage(item["stage"], {k: v for k, v in item.items() if k != "stage"}) for item in stages]
        output = None if values.get("output") is None else _build(Output, values["output"])
        recipe = cls(tuple(source), (), output, _build(Run, {} if values.get("run") is None else values["run"]))
        verbs = [stage.verb for stage in built]
        if twice := [verb for verb in verbs if verbs.count(verb) > 1]:
            raise UsageError(f"recipe: the stage {twice[0]} is there twice; keep one of both")
        for stage in built:
            recipe = recipe.with_stage(stage)
        return recipe

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Raises UsageError for text that is no recipe."""
        try:
            values = parse_json(text.encode(), "recipe")
        except (ValueError, CheckpointError) as error:
            raise UsageError(f"recipe is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise UsageError("recipe must be a JSON object")
        return cls.from_dict(values)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Reads a recipe file."""
        try:
            return cls.from_json(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise UsageError(f"{path}: cannot read the recipe: {error}") from error
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from error


T = TypeVar("T", Output, Run)

_SIZES = ("memory", "shard_bytes")
"""Entries that a recipe written by hand may give as ``8GB``."""


def _check_path(what: str, path: str) -> None:
    """UsageError for what no file can be called: it would fail long after planning, in words of the system."""
    try:
        path.encode() if what == "output" else os.fsencode(path)
    except UnicodeEncodeError:
        raise UsageError(f"{what}: {shown(path)} is no path: it cannot be written as UTF-8") from None
    if "\0" in path:
        raise UsageError(f"{what}: {shown(path)} is no path: it holds a NUL character")


def refuse_unknown(what: str, values: Any, names: tuple[str, ...]) -> None:
    if not isinstance(values, Mapping):
        raise UsageError(f"{what} must be an object, is {type(values).__name__}")
    for name in values:
        if name not in names:
            raise UsageError(f"{what} has no entry {shown(name)}{did_you_mean(str(name), names)}")


def _build(cls: type[T], values: Any) -> T:
    names = tuple(item.name for item in fields(cls))
    refuse_unknown(cls.__name__.lower(), values, names)
    for name in _SIZES:
        if not isinstance(values.get(name), str | int | float | None):
            raise UsageError(f"{name} {shown(values[name])} is no size; write for example 8GB or 500MiB")
    values = {name: parse_size(value, name) if name in _SIZES else value for name, value in values.items()}
    if lacking := [item.name for item in fields(cls) if item.name not in values and not _has_default(item)]:
        raise UsageError(f"recipe: {cls.__name__.lower()} needs {lacking[0]}")
    return cls(**values)


def _has_default(item: Field[Any]) -> bool:
    return item.default is not MISSING or item.default_factory is not MISSING
