"""How an output says how it was made: its header entries, and reading them again."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import __version__
from ..formats.comfy import HEADER_KEY, header_entry
from ..formats.errors import UsageError
from ..formats.layers import Layer
from ..formats.source import Source
from ..formats.tensors import FLOAT_DTYPES, TensorSpec
from ..stages.methods import BY_ROWS
from ..stages.presets import find_preset
from ..stages.work import LayerPlan
from .recipe import Recipe

ENTRY = "quantloom"
"""Header entry with version, recipe and plan digest."""


def header_entries(recipe: Recipe, source: Source, layers: Sequence[LayerPlan], digest: str) -> dict[str, str]:
    """``__metadata__`` of the output: the original entries, the dialect's where layers are quantized, and what made
    the file. What only changes the stored form of a quantized source is noted behind what made that."""
    metadata = {key: value for key, value in source.metadata.items() if key not in (HEADER_KEY, ENTRY)}
    entries = {layer.layer.name: layer.entry for layer in layers if layer.entry is not None}
    if entries:
        names = [spec.name for layer in layers for spec in layer.outputs]
        metadata[HEADER_KEY] = header_entry(entries, names)
    stages = recipe.identity()
    if all(stage.verb != "quantize" for stage in recipe.stages):
        stages = [*map(dict, Origin.of(source).stages.values()), *stages]
    made: dict[str, Any] = {"version": __version__, "recipe": {"stages": stages}, "plan": digest}
    if needing := sum(layer.adapter is not None and layer.adapter.method == "svdquant" for layer in layers):
        made["needs_adapter"] = needing  # so many layers are wrong without it
    metadata[ENTRY] = json.dumps(made)
    return metadata


@dataclass(frozen=True)
class Origin:
    """What verification must know of a recipe."""

    stages: Mapping[str, Mapping[str, Any]]
    """Options by verb; empty when the header does not tell."""

    @classmethod
    def of(cls, made: Source) -> Origin:
        """Never raises: an output of another program has no recipe, and a broken one is none."""
        try:
            stages = json.loads(made.metadata[ENTRY])["recipe"]["stages"]
            return cls({stage["stage"]: dict(stage) for stage in stages})
        except (KeyError, ValueError, TypeError):
            return cls({})

    @property
    def bias_correction(self) -> bool:
        """Whether biases of quantized layers were corrected."""
        return self.stages.get("quantize", {}).get("bias_correction") is True

    def feedback(self, name: str) -> bool:
        """Whether a layer may be rounded by a method that looks at a whole matrix: by a rule, or as all others are."""
        rules = self.stages.get("target", {}).get("rules")
        settings = []
        for rule in rules if isinstance(rules, list) else []:
            try:
                if re.search(rule["pattern"], name):
                    settings.append(rule["settings"]["rounding"])
            except (KeyError, TypeError, re.error):
                continue
        named = settings or [self.stages.get("quantize", {}).get("rounding", BY_ROWS[0])]
        return not set(map(str, named)) <= set(BY_ROWS)

    def casts(self, made: TensorSpec, source: TensorSpec) -> bool:
        """Whether a tensor of floats was given another dtype on purpose."""
        asked = self.stages.get("migrate", {}).get("cast") is not None
        return asked and made.dtype != source.dtype and {made.dtype, source.dtype} <= FLOAT_DTYPES

    def removed(self, missing: Sequence[Layer]) -> set[str]:
        """Of the missing layers, those that are left out on purpose: by the preset, or leftovers without a weight."""
        names = [layer.name for layer in missing]
        cleaned = "dequantize" in self.stages or self.stages.get("migrate", {}).get("clean") is True
        lone = {layer.name for layer in missing if layer.orphan and cleaned}
        try:
            preset = self.stages["target"]["preset"]
            return lone | (set() if preset in ("auto", "none") else set(find_preset(preset).removed(names)))
        except (KeyError, TypeError, UsageError):
            return lone
