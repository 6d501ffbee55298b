"""The edit stage: keys of markers and of the header entry that repeats them; every other byte stays as it is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from ..formats.comfy import HEADER_KEY, marker_tensor
from ..formats.errors import UsageError, shown
from ..formats.layers import Layer
from ..formats.markers import is_legacy_marker, too_deep
from .keeping import verbatim, with_tensor
from .marker_edits import MarkerEdits, edit_markers
from .stage import Context
from .work import LayerPlan


@dataclass(frozen=True)
class Edit:
    """Adds, updates and removes keys of ComfyUI's descriptions of quantized layers.

    A layer's marker tensor and its header entry say the same afterwards. Weights, scales and everything else are copied
    without being decoded.
    """

    verb: ClassVar[str] = "edit"
    alone: ClassVar[bool] = True

    add: Mapping[str, Any] = field(default_factory=dict)
    """Key -> JSON value, in every layer that matches; one that is there gets the new value."""
    remove: tuple[str, ...] = ()
    """Keys that these layers lose."""
    filter: str | None = None
    """Regular expression, searched in names of layers; None: all that have a marker."""
    rebuild_header: bool = False
    """Write the header entry from the marker tensors; where both disagree, the tensor is right."""

    def __post_init__(self) -> None:
        if isinstance(self.remove, str) or not isinstance(self.remove, Sequence):
            raise UsageError(f"edit: remove must be a list of keys, is {shown(self.remove)}")
        object.__setattr__(self, "remove", tuple(self.remove))
        if not isinstance(self.add, Mapping):
            raise UsageError(f"edit: add must be a mapping of key to value, is {shown(self.add)}")
        for key in (*self.add, *self.remove):
            if not isinstance(key, str) or not key or key != key.strip():
                raise UsageError(f"edit: {shown(key)} is no key")
        if both := [key for key in self.remove if key in self.add]:
            raise UsageError(f"edit: {both[0]!r} is to be added and removed; do one of both")
        _check_json([self.add, self.remove])
        if not self.add and not self.remove and (self.filter is not None or not self.rebuild_header):
            raise UsageError("edit: nothing to do: name keys to add or to remove, or rebuild the header alone")
        try:
            re.compile(self.filter or "")
        except re.error as error:
            raise UsageError(f"edit: filter {shown(self.filter)} is no regular expression: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        return {
            "add": dict(self.add), "remove": list(self.remove), "filter": self.filter,
            "rebuild_header": self.rebuild_header,
        }  # fmt: skip

    def identity(self) -> dict[str, Any]:
        """The options: none depends on the machine."""
        return self.to_dict()

    def plan(self, layers: Sequence[LayerPlan], context: Context) -> list[LayerPlan]:
        """Raises what ``edits`` raises."""
        edits = self.edits([plan.layer for plan in layers], context)
        metadata = context.source.metadata
        context.metadata = metadata if edits.header is None else {**metadata, HEADER_KEY: edits.header}
        refs = context.source.refs
        legacy = [Layer(name, ref, (ref,)) for name, ref in refs.items() if is_legacy_marker(name)]
        order = {name: number for number, name in enumerate(refs)}
        every = sorted([*(plan.layer for plan in layers), *legacy], key=lambda layer: order[layer.tensors[0].name])
        return [_copied(layer, edits) for layer in every]

    def edits(self, layers: Sequence[Layer], context: Context) -> MarkerEdits:
        """What becomes of markers and header; notes and warnings go to the context.

        Raises PlanError when no layer is marked or matches, and for a value that a layer's format cannot have.
        """
        return edit_markers(self.add, self.remove, self.filter, self.rebuild_header, layers, context)


def _copied(layer: Layer, edits: MarkerEdits) -> LayerPlan:
    """Every stored tensor under its name; a marker that changes is written from its new content."""
    plan, entry = verbatim(layer), edits.markers.get(layer.name)
    if entry is not None:
        plan = with_tensor(plan, marker_tensor(layer.name, entry))
    return replace(plan, change=edits.changes.get(layer.name, ""))


def _check_json(value: object) -> None:
    """UsageError for what a marker cannot hold: NaN, objects of Python, text that is no UTF-8, hundreds of levels."""
    try:
        json.dumps(value, default=dict, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"edit: {shown(value)} cannot be written as JSON: {error}") from None
    if problem := too_deep(value):
        raise UsageError(f"edit: {shown(value)} is {problem}")
