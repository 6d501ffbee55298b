"""Stages: the verbs of a recipe. Each plans all layers from shapes alone; registering one gives it a DSL verb."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, get_args, get_type_hints

from ..formats.errors import UsageError, did_you_mean, shown

if TYPE_CHECKING:
    from ..formats.source import Source
    from .work import LayerPlan

_STAGES: dict[str, str] = {
    "target": "target:Target",
    "quantize": "quantize:Quantize",
    "quantized_as": "quantized_as:QuantizedAs",
    "lora": "lora:Lora",
    "dequantize": "dequantize:Dequantize",
    "input_scales": "input_scales:InputScales",
    "edit": "edit:Edit",
    "hybrid": "hybrid:Hybrid",
    "migrate": "migrate:Migrate",
}
"""verb -> ``module:class``, in the order in which they plan."""

VERBS = list(_STAGES)

_OWN = frozenset(_STAGES)
"""Verbs whose modules lie in this package."""


def register_stage(verb: str, where: str) -> None:
    """Makes ``where``, ``full.module.name:Class``, the stage behind a new verb; it plans after all others.

    For stages of other packages. Each process that builds recipes calls it; those that only run steps need not.
    Raises UsageError for a verb that is taken or is no name.
    """
    if verb in _STAGES or not verb.isidentifier():
        raise UsageError(f"stage {shown(verb)}: {'this verb is taken' if verb in _STAGES else 'a verb is one word'}")
    _STAGES[verb] = where
    VERBS.append(verb)


@dataclass
class Context:
    """What stages may know and say while they plan."""

    source: Source
    """The checkpoint: names, shapes, metadata and configuration."""
    notes: list[str] = field(default_factory=list)
    """Announcements for the user (preset detected, groups that do not divide ...)."""
    warnings: list[str] = field(default_factory=list)
    metadata: dict[str, str] | None = None
    """All of the output's ``__metadata__``, set by a stage that only edits: configuration files are then copied as they
    are, too. None: the original entries, the dialect's description of the layers, and what made the file."""
    base: Source | None = None
    """The quantized model that a stage named: nothing is written but what belongs to it."""


class Stage(Protocol):
    """A frozen, JSON-able dataclass; its fields are the options of the verb.

    A stage that works on what is stored, and cannot follow another one, has the class variable ``alone`` too, True.
    """

    verb: ClassVar[str]

    def plan(self, layers: Sequence[LayerPlan], context: Context) -> list[LayerPlan]:
        """The layers with what this stage adds: steps, outputs, reasons. Reads shapes, never weights."""

    def to_dict(self) -> dict[str, Any]:
        """Options as JSON values."""

    def identity(self) -> dict[str, Any]:
        """Options as JSON values that mean the same on every machine: equal ones give equal bytes."""


def stage_class(verb: str) -> type[Any]:
    """The class behind a verb; UsageError with near verbs otherwise."""
    if not isinstance(verb, str) or verb not in _STAGES:
        raise UsageError(f"unknown stage {shown(verb)}{did_you_mean(str(verb), _STAGES)}")
    module, name = _STAGES[verb].split(":")
    cls: type[Any] = getattr(import_module(f".{module}" if verb in _OWN else module, __package__), name)
    return cls


def make_stage(verb: str, options: Mapping[str, Any]) -> Stage:
    """A stage from its verb and options, as recipes hold them; UsageError for options that it cannot have."""
    stage: Stage = build(verb, stage_class(verb), options)
    return stage


def build(what: str, cls: type[Any], options: Mapping[str, Any]) -> Any:
    """A frozen dataclass from JSON options; UsageError for options that it lacks, needs, or cannot have."""
    known = [item.name for item in fields(cls)]
    for name in options:
        if name not in known:
            raise UsageError(f"{what} has no option {shown(name)}{did_you_mean(str(name), known)}")
    for item in fields(cls):
        if item.default is MISSING and item.default_factory is MISSING and item.name not in options:
            raise UsageError(f"{what} needs {item.name}")
    check_types(what, cls, options)
    return cls(**options)


_WORDS: dict[object, str] = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}


def check_types(what: str, cls: type[Any], values: Mapping[str, Any]) -> None:
    """UsageError for a value that is not of its field's type, where that is str, int, float or bool, or None too."""
    for name, hint in get_type_hints(cls).items():
        allowed = get_args(hint) or (hint,)
        if name not in values or not all(kind in _WORDS or kind is type(None) for kind in allowed):
            continue
        if not any(_is_a(values[name], kind) for kind in allowed):
            words = " or ".join(_WORDS.get(kind, "null") for kind in allowed)
            raise UsageError(f"{what}: {name} must be {words}, is {shown(values[name])}")


def _is_a(value: object, kind: Any) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, kind) or (kind is float and isinstance(value, int))
