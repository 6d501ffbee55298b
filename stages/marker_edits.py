"""Editing ComfyUI's descriptions of layers: both places joined, keys changed, and the result held to what is stored."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..formats.comfy import model_prefix
from ..formats.errors import PlanError, did_you_mean, listed, shown
from ..formats.layers import WEIGHT, Layer, stored_as
from ..formats.marker_values import KNOWN_KEYS, changed_keys, check_marker, decoded_as
from ..formats.markers import Entry, HeaderEntry, conflict, marker_tensors, read_header_entry
from ..formats.source import Source
from ..formats.stored import Undecodable
from .stage import Context

_NAMED = 8
_MAX_BYTES = 1 << 20
"""Longest marker that is read."""


@dataclass(frozen=True)
class MarkerEdits:
    """What an edit comes to."""

    markers: Mapping[str, Entry]
    """Layers whose marker tensor is new or says something else -> what it says."""
    header: str | None
    """The header entry; None: it stays as it is, or there is none."""
    changes: Mapping[str, str]
    """Layers that change, and how, in words."""


@dataclass(frozen=True)
class _Marked:
    """A layer that is described."""

    layer: Layer
    tensor: Entry | None
    """By its marker tensor."""
    header: Entry | None

    @property
    def conflict(self) -> str:
        return "" if self.tensor is None or self.header is None else conflict(self.tensor, self.header)

    def joined(self, tensor_wins: bool) -> Entry:
        """What both say; keys in the order of the tensor's."""
        first, second = self.tensor or {}, self.header or {}
        if self.conflict:
            return first
        return {**first, **second, **(first if tensor_wins else {})}


def edit_markers(
    add: Mapping[str, Any], remove: Sequence[str], pattern: str | None, rebuild: bool, layers: Sequence[Layer],
    context: Context,
) -> MarkerEdits:  # fmt: skip
    """See ``Edit.edits``. With ``rebuild`` every marked layer's header entry is written, from its marker tensor."""
    source = context.source
    header = read_header_entry(source)
    marked = _marked(layers, source, header)
    chosen = _chosen(marked, pattern, source) if add or remove else {}
    if not rebuild and (torn := [f"{name}: {one.conflict}" for name, one in chosen.items() if one.conflict]):
        raise PlanError(
            f"{source.place}: {len(torn)} layers are described in two ways: {listed(torn, _NAMED, '; ')}. Give "
            "--rebuild-header to write the header from the markers"
        )
    touched = marked if rebuild else chosen
    joined = {name: one.joined(rebuild) for name, one in touched.items()}
    entries = {name: _edited(entry, add, remove) if name in chosen else entry for name, entry in joined.items()}
    _refuse_values(chosen, entries, source)
    _say(add, remove, {name: joined[name] for name in chosen}, context)
    repaired = Counter(key for one in touched.values() for key in _apart(one))
    if repaired:
        keys = ", ".join(sorted(repaired))
        context.notes.append(f"markers and header entries that differed say the same now: {keys}")
    markers = {name: entry for name, entry in entries.items() if not _equal(entry, touched[name].tensor)}
    text = _header(header, entries, source) if rebuild or header.document else None
    changes = {name: words for name, entry in entries.items() if (words := _words(touched[name], entry, text))}
    if not changes:
        context.notes.append("every layer says so already: nothing changes")
    return MarkerEdits(markers, text, changes)


def _marked(layers: Iterable[Layer], source: Source, header: HeaderEntry) -> dict[str, _Marked]:
    """Layers with a marker tensor or a header entry, by name. Raises PlanError when there is none."""
    tensors, stated = marker_tensors(source.refs), header.layers
    found = {
        layer.name: _Marked(layer, tensors.get(layer.name), stated.get(layer.name))
        for layer in layers
        if layer.weight.name == layer.name + WEIGHT and (layer.name in tensors or layer.name in stated)
    }
    if not found:
        raise PlanError(f"{source.place}: no layer has a .comfy_quant marker or header entry: nothing to edit")
    return found


def _chosen(marked: Mapping[str, _Marked], pattern: str | None, source: Source) -> dict[str, _Marked]:
    found = {name: one for name, one in marked.items() if pattern is None or re.search(pattern, name)}
    if not found:
        names = listed(list(marked), _NAMED)
        raise PlanError(
            f"{source.place}: filter {shown(pattern)} matches no layer that has a marker; these have: {names}"
        )
    return found


def _edited(entry: Entry, add: Mapping[str, Any], remove: Sequence[str]) -> Entry:
    """New keys come last; a key that stands in a nested ``params`` alone is edited there."""
    edited = {key: value for key, value in entry.items() if key not in remove}
    inner = edited.get("params")
    nested = {key: value for key, value in inner.items() if key not in remove} if isinstance(inner, dict) else {}
    for key, value in add.items():
        (nested if key in nested and key not in edited else edited)[key] = value
    if isinstance(inner, dict) and isinstance(edited.get("params"), dict) and "params" not in add:
        edited["params"] = nested
    return edited


def _refuse_values(chosen: Mapping[str, _Marked], entries: Mapping[str, Entry], source: Source) -> None:
    """PlanError when a layer's format cannot have a value, or nobody would read a marker as long."""
    refused: dict[str, list[str]] = {}
    for name, one in chosen.items():
        try:
            before = one.joined(False)
            keys = changed_keys(before, entries[name])
            encoding = decoded_as(stored_as(one.layer, before, source))
            check_marker(stored_as(one.layer, entries[name], source), keys, encoding)
            if (size := len(json.dumps(entries[name]))) > _MAX_BYTES:
                raise Undecodable(f"its marker would have {size} bytes, {_MAX_BYTES} are read")
        except Undecodable as error:
            refused.setdefault(str(error), []).append(name)
    if refused:
        reason, names = next(iter(refused.items()))
        others = f"; {len(refused) - 1} more reasons" if len(refused) > 1 else ""
        raise PlanError(f"{source.place}: {listed(names, _NAMED)}: {reason}{others}")


def _say(add: Mapping[str, Any], remove: Sequence[str], before: Mapping[str, Entry], context: Context) -> None:
    """Warns of keys that nobody reads and of keys that nobody has."""
    for key in add:
        if key not in KNOWN_KEYS:
            context.warnings.append(f"no client is known to read the key {key!r}{did_you_mean(key, KNOWN_KEYS)}")
    held = {key for entry in before.values() for key in (*entry, *_inner(entry))}
    for key in remove:
        if key not in held:
            context.warnings.append(f"no layer has the key {key!r}{did_you_mean(key, sorted(held))}")


def _inner(entry: Entry) -> Mapping[str, Any]:
    inner = entry.get("params")
    return inner if isinstance(inner, dict) else {}


def _apart(one: _Marked) -> list[str]:
    """Keys in which a layer's two descriptions differ."""
    return [] if one.tensor is None or one.header is None else changed_keys(one.tensor, one.header)


def _words(one: _Marked, entry: Entry, header: str | None) -> str:
    if one.tensor is None:
        return "marker written from the header entry"
    if not _equal(entry, one.tensor):
        return f"marker edited: {', '.join(changed_keys(one.tensor, entry)) or 'params'}"
    return "" if header is None or _equal(entry, one.header) else "header entry written from the marker"


def _equal(one: Entry, other: Entry | None) -> bool:
    """As JSON: ``true`` is not 1. The order of keys does not count."""
    return other is not None and json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _header(header: HeaderEntry, entries: Mapping[str, Entry], source: Source) -> str | None:
    """The header entry with these descriptions; what it says of others stays. None when nothing in it changes."""
    document = {**(header.document or {"format_version": "1.0"})}
    layers = dict(document.get("layers", {}))
    for name, full in header.names.items():
        if full in entries and not _equal(entries[full], layers[name]):
            layers[name] = entries[full]
    prefix, present = model_prefix(source.refs), set(header.names.values())
    layers |= {name.removeprefix(prefix): entry for name, entry in entries.items() if name not in present}
    if header.document and _equal(layers, header.document["layers"]):
        return None
    return json.dumps({**document, "layers": layers})
