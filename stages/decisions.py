"""What targeting is asked and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .presets import Preset


@dataclass(frozen=True, slots=True)
class Candidate:
    """A weight that might be quantized, as its layer will see it."""

    name: str
    """Key without ``.weight``."""
    shape: tuple[int, ...]
    """True shape: of an already quantized layer the decoded one."""
    dtype: str
    """safetensors dtype: of an already quantized layer that is decoded on read, what it decodes to."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What happens to one weight."""

    keep: str | None = None
    """Why it stays as it is; None: it is quantized."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """Settings that differ from the run's: format, scaling, block_size, rotate, rounding."""
    formats_barred: Mapping[str, str] = field(default_factory=dict)
    """Formats that this layer may not have, each with the reason."""


@dataclass(frozen=True)
class TargetingResult:
    """Decisions for all candidates, and what people should hear of them."""

    decisions: dict[str, Decision]
    """By ``Candidate.name``, in the order of the candidates."""
    preset: Preset | None = None
    notes: list[str] = field(default_factory=list)
    """Announcements; those that begin with ``warning:`` deserve a look."""
    removed: list[str] = field(default_factory=list)
    """Full keys that are left out of the output."""
