"""What a checkpoint holds, from its headers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from ..formats.layers import describe, group_layers
from ..formats.source import Source, open_source
from ..formats.urls import hide


@dataclass(frozen=True)
class Inspection:
    """A checkpoint in facts."""

    path: str
    files: tuple[str, ...]
    nbytes: int
    metadata: dict[str, str]
    dialects: dict[str, int]
    """Quantized layers by dialect."""
    formats: dict[str, tuple[int, int, int]]
    """How weights are stored -> (layers, stored bytes, weights)."""
    layers: tuple[dict[str, Any], ...]
    """Per layer: name, shape, format or dtype, bytes."""
    problems: tuple[str, ...]
    """Quantized layers that cannot be decoded, and why."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        columns = ("layers", "bytes", "weights")
        formats = {name: dict(zip(columns, row, strict=True)) for name, row in self.formats.items()}
        return {
            "path": self.path, "files": list(self.files), "bytes": self.nbytes, "metadata": self.metadata,
            "dialects": self.dialects, "formats": formats, "layers": list(self.layers), "problems": list(self.problems),
        }  # fmt: skip


def inspect(path: str | list[str]) -> Inspection:
    """Reads headers and markers, never weights."""
    path = hide(path) if isinstance(path, str) else [hide(each) for each in path]
    source: Source = open_source(path)
    layers = group_layers(source)
    formats: dict[str, tuple[int, int, int]] = {}
    for layer in layers:
        count, size, weights = formats.get(describe(layer), (0, 0, 0))
        formats[describe(layer)] = (count + 1, size + layer.nbytes, weights + layer.weight.numel)
    dialects = Counter(layer.encoding.dialect for layer in layers if layer.encoding)
    rows = tuple(
        {"name": layer.name, "shape": list(layer.weight.shape), "format": describe(layer), "bytes": layer.nbytes}
        for layer in layers
    )
    problems = tuple(f"{layer.name}: {layer.problem}" for layer in layers if layer.problem)
    ordered = dict(sorted(formats.items(), key=lambda item: -item[1][1]))
    return Inspection(
        path if isinstance(path, str) else ", ".join(path), tuple(str(file) for file in source.files), source.nbytes,
        source.metadata, dict(dialects), ordered, rows, problems,
    )  # fmt: skip
