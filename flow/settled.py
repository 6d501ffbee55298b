"""What the plan of a few recipes can only know from weights, and who finds it out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Settled:
    """Found by reading weights once before the output is laid out: by ``nonfinite`` and by ``survey``."""

    kept: Mapping[str, str] = field(default_factory=dict)
    """Layers that are kept, whatever the stages say, with the reason."""
    ranks: Mapping[str, int] | None = None
    """Of adapters by layer, 0 for none; None: not surveyed yet."""
    notes: tuple[str, ...] = ()
    """What the survey found, for people."""


NOTHING = Settled()
"""What most plans start from."""
