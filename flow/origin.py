"""How an output says that it was made: the recipe in its header."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..formats.errors import UsageError
from ..formats.source import Source
from ..stages.methods import BY_ROWS
from ..stages.presets import find_preset

ENTRY = "quantloom"
"""Header entry with version, recipe and plan digest."""


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

    @property
    def statistics(self) -> str | None:
        """Digest of the statistics that it was made with."""
        digest = self.stages.get("quantize", {}).get("statistics")
        return digest if isinstance(digest, str) else None

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

    def removed(self, missing: Sequence[str]) -> set[str]:
        """Of the missing layers, those that the preset drops on purpose."""
        try:
            name = self.stages["target"]["preset"]
            return set() if name in ("auto", "none") else set(find_preset(name).removed(list(missing)))
        except (KeyError, TypeError, UsageError):
            return set()
