"""ComfyUI's words about quantized layers: marker tensors, the header entry that repeats them, and the legacy marker.

Its loader turns the header entry into marker tensors and overwrites those of the file; a ``scaled_fp8`` tensor marks
every layer below its prefix that has a ``scale_weight`` (ComfyUI ``utils.convert_old_quants``).
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

from .comfy import HEADER_KEY, MARKER, PREFIXES, model_prefix
from .errors import CheckpointError
from .fileio import Reader
from .safetensors import parse_json
from .source import Source
from .tensors import TensorRef
from .urls import is_url

LEGACY = "scaled_fp8"
_MAX_BYTES = 1 << 20
_QUESTIONS = 16
"""Markers that are asked for at a time behind a URL."""
_MAX_DEPTH = 64
"""Deeper nesting would come near to what the json module can write."""

_NESTS = (Mapping, list, tuple)

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Markers:
    """What a checkpoint says of its layers."""

    layers: Mapping[str, Entry]
    """Each layer's description, by full name without ``.weight``."""
    conflicts: Mapping[str, str]
    """Layers whose tensor and header disagree about the numbers, and how."""
    legacy: Mapping[str, bool]
    """Prefix of every ``scaled_fp8`` tensor -> whether it asks for multiplication in full precision."""

    def full_precision(self, name: str) -> bool:
        """What the nearest legacy marker above a layer asks for."""
        prefixes = [prefix for prefix in self.legacy if name.startswith(prefix)]
        return bool(prefixes) and self.legacy[max(prefixes, key=len)]


@dataclass(frozen=True)
class HeaderEntry:
    """What the header says of layers."""

    document: Mapping[str, Any]
    """The whole JSON object; empty when there is none."""
    names: Mapping[str, str]
    """Layers as the entry names them -> their full names."""

    @property
    def layers(self) -> dict[str, Entry]:
        """Each layer's description, by full name."""
        return {full: self.document["layers"][name] for name, full in self.names.items()}


def read_markers(source: Source) -> Markers:
    """Reads marker tensors and header; never a weight.

    Raises CheckpointError for a marker that is no JSON object.
    """
    tensors = marker_tensors(source.refs)
    header = read_header_entry(source).layers
    conflicts = {name: conflict(tensors[name], header[name]) for name in header if name in tensors}
    layers = {**tensors, **{name: _join(tensors.get(name, {}), entry) for name, entry in header.items()}}
    legacy = {name.removesuffix(LEGACY): ref.numel == 2 for name, ref in source.refs.items() if is_legacy_marker(name)}
    return Markers(layers, {name: text for name, text in conflicts.items() if text}, legacy)


def is_legacy_marker(name: str) -> bool:
    """Whether a tensor is the marker that names a whole model, and no weight."""
    return name.rpartition(".")[2] == LEGACY


def marker_tensors(refs: Mapping[str, TensorRef]) -> dict[str, Entry]:
    """What the marker tensors say, by layer; CheckpointError for one that is no JSON object."""
    found: dict[str, Entry] = {}
    markers = [(key, ref) for key, ref in refs.items() if key.endswith(MARKER)]
    for path, own in groupby(markers, lambda item: item[1].path):  # one file at a time: there may be thousands
        several = [ref for _, ref in own]
        # A store answers each question late, and a disk at once.
        with Reader(path) as reader, ThreadPoolExecutor(_QUESTIONS if is_url(path) else 1) as pool:
            described = pool.map(partial(_read_marker, reader), several)
            found.update((ref.name.removesuffix(MARKER), entry) for ref, entry in zip(several, described, strict=True))
    return found


def _read_marker(reader: Reader, ref: TensorRef) -> Entry:
    where = f"{reader.path}: {ref.name}"
    if ref.dtype != "U8" or ref.nbytes > _MAX_BYTES:
        held = f"{ref.nbytes} bytes of {ref.dtype}"
        raise CheckpointError(f"{where} holds {held}; a marker is JSON in at most {_MAX_BYTES} bytes of U8")
    content = bytearray(ref.nbytes)
    reader.read_into(memoryview(content), ref.start)
    return _described(bytes(content), where)


def read_header_entry(source: Source) -> HeaderEntry:
    """The header entry, with the full names that its short ones stand for; CheckpointError for a broken one."""
    text = source.metadata.get(HEADER_KEY)
    if text is None:
        return HeaderEntry({}, {})
    where = f"{source.files[0]}: header entry {HEADER_KEY}"
    document = _described(text.encode(), where)
    layers = _object(document.get("layers"), f"{where}: 'layers'")
    prefixes = (model_prefix(source.refs), "", *PREFIXES)

    def full(name: str) -> str:
        return next((prefix + name for prefix in prefixes if prefix + name + ".weight" in source.refs), name)

    for name, entry in layers.items():
        _object(entry, f"{where}: {name!r}")
    return HeaderEntry(document, {name: full(name) for name in layers})


def too_deep(value: object) -> str:
    """Why a JSON value is nested too deep to be written; empty when it is not."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        nodes = [node.values() if isinstance(node, Mapping) else node for node in level if isinstance(node, _NESTS)]
        level = [child for children in nodes for child in children]
        if not level:
            return ""
    return f"nested deeper than {_MAX_DEPTH} levels"


def _described(content: bytes, where: str) -> dict[str, Any]:
    value = parse_json(content, where)
    if problem := too_deep(value):
        raise CheckpointError(f"{where} is {problem}")
    return _object(value, where)


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} must be a JSON object, is {type(value).__name__}")
    return value


def conflict(tensor: Entry, header: Entry) -> str:
    """How two descriptions of a layer disagree: empty when both give the codes the same meaning.

    What the header lacks is absent, whatever the tensor says.
    """
    ours, theirs = _meaning(tensor), _meaning(header)
    return "" if ours == theirs else f"its marker says {ours}, the header {theirs}"


def _meaning(entry: Entry) -> str:
    said = flat(entry)
    rotation = f" rotated {said.get('convrot_groupsize', 256)}" if said.get("convrot") else ""
    return f"{said.get('format')}{rotation}"


def flat(entry: Entry) -> dict[str, Any]:
    """An entry with its nested ``params`` lifted; what stands at the root wins."""
    params = entry.get("params")
    inner = params if isinstance(params, dict) else {}
    return {**inner, **{key: value for key, value in entry.items() if key != "params"}}


def _join(tensor: Entry, header: Entry) -> Entry:
    """The header's entry, in the order of the tensor's; what only describes the original survives from the tensor."""
    return {**{key: value for key, value in tensor.items() if key in header or key.startswith("orig_")}, **header}
