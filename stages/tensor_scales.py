"""Scales of whole tensors that an FP8 model has, by layer: for files whose own scales are those of groups."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..formats.errors import PlanError, listed
from ..formats.layers import Layer, group_layers
from ..formats.source import open_source
from .reading import read_whole

_NAMED = 8


@dataclass(frozen=True)
class TensorScales:
    """What an FP8 model multiplies its E4M3 codes by."""

    path: str
    layers: Mapping[str, Layer]
    """Every layer of the model."""
    scales: Mapping[str, float]
    """By layer: its scale, the largest where it has several (rows, blocks)."""

    @classmethod
    def open(cls, path: str) -> TensorScales:
        """Reads headers and scales, never weights.

        Raises CheckpointError for a broken model, PlanError for one without FP8 scales, or with one that is none.
        """
        layers = {layer.name: layer for layer in group_layers(open_source(path))}
        scales = {}
        for name, layer in layers.items():
            encoding = layer.encoding
            if encoding is None or encoding.format[0] != "fp8" or encoding.scales is None:
                continue
            scales[name] = scale = float(read_whole(encoding.scales).float().amax())
            if not (math.isfinite(scale) and scale > 0):
                raise PlanError(f"{path}: {encoding.scales.name}: a scale of {scale}; it must be a positive number")
        if not scales:
            raise PlanError(
                f"{path}: holds no tensor scales: no FP8 layer with .weight_scale. Make them with `quantloom convert "
                "MODEL OUT --format fp8`"
            )
        return cls(path, layers, scales)

    @property
    def digest(self) -> str:
        """Tells models of different scales apart, wherever they lie."""
        return hashlib.sha256(json.dumps(sorted(self.scales.items())).encode()).hexdigest()

    def of(self, layers: Sequence[Layer]) -> list[float]:
        """The scale of each layer; PlanError with the list of those that have none here, or another shape."""
        problems = [f"{layer.name} ({problem})" for layer in layers if (problem := self._problem(layer))]
        if problems:
            raise PlanError(
                f"{self.path}: no tensor scale for {len(problems)} of {len(layers)} layers: "
                f"{listed(problems, _NAMED)}. Name the same model in FP8, or leave the tensor scales out"
            )
        return [self.scales[layer.name] for layer in layers]

    def _problem(self, layer: Layer) -> str:
        found = self.layers.get(layer.name)
        if found is None:
            return "missing"
        if found.weight.shape != layer.weight.shape:
            return f"of shape {list(found.weight.shape)} there, {list(layer.weight.shape)} here"
        if layer.name not in self.scales:
            return found.problem or (f"{found.encoding.format[0]} there" if found.encoding else found.weight.dtype)
        return ""
