"""How a quantized checkpoint says how it was made: the recipe in its header."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..formats.errors import UsageError
from ..formats.layers import Layer
from ..formats.source import Source
from ..formats.tensors import FLOAT_DTYPES, TensorSpec
from .methods import BY_ROWS
from .presets import find_preset

ENTRY = "quantloom"
"""Header entry with version, recipe and plan digest."""


@dataclass(frozen=True)
class Origin:
    """What its header tells of a checkpoint."""

    stages: Mapping[str, Mapping[str, Any]]
    """Options by verb; empty when the header does not tell."""
    digest: str
    """What adapters call the checkpoint that they belong to: the digest of the plan that made it; for one of another
    program that of its headers."""
    needs_adapter: int = 0
    """So many layers are wrong without their adapter."""

    @classmethod
    def of(cls, made: Source) -> Origin:
        """Never raises: an output of another program has no recipe, and a broken one is none."""
        try:
            entry = json.loads(made.metadata[ENTRY])
            stages = {stage["stage"]: dict(stage) for stage in entry["recipe"]["stages"]}
            return cls(stages, str(entry["plan"]), int(entry.get("needs_adapter", 0)))
        except (KeyError, ValueError, TypeError, OverflowError, RecursionError):
            return cls({}, made.layout)

    @property
    def bias_correction(self) -> bool:
        """Whether biases of quantized layers were corrected."""
        return self.stages.get("quantize", {}).get("bias_correction") is True

    @property
    def statistics(self) -> str | None:
        """Digest of the statistics that it was made with."""
        digest = self.stages.get("quantize", {}).get("statistics")
        return digest if isinstance(digest, str) else None

    @property
    def legacy_scalars(self) -> bool:
        """Whether hybrid layers were given scalars that do not fit all their groups."""
        return self.stages.get("hybrid", {}).get("mode") == "legacy"

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
