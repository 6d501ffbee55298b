"""Which layers get an adapter: by pattern, or by block, aspect ratio and keywords."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..formats.errors import UsageError
from .rules import compile_pattern

METHODS = ("auto", "svd", "weighted", "svdquant")
"""How adapters are made; see ``lora.Lora``."""

SQUARE, LONG = 3.0, 4.0
"""Aspect ratios: below the first a layer is square enough, above the second it never is."""

_BLOCK = re.compile(r"(?:^|\.)(?:\w*blocks?|\w*layers?|\w*refiner|resnets|attentions|h)\.(\d+)(?=\.|$)")
"""``blocks.3``, ``layers.3``, ``double_blocks.3``, ``single_transformer_blocks.3``, ``encoder.layer.3`` ..."""
_ATTENTION = re.compile(r"attn|attention|qkv|proj|(?:^|[._])(?:to_)?[qkv](?:[._]|$)|query|key|value", re.IGNORECASE)


@dataclass(frozen=True)
class AdapterTarget:
    """How layers are chosen."""

    pattern: str | None = None
    """Searched in names with and without ``.weight``; where it is given, it alone decides."""
    depth: int = 1
    """Layers of so many first blocks."""
    ar_threshold: float = 0.0
    """Above 0: layers whose larger edge is less than this many times the smaller one, whatever they are called."""

    def __post_init__(self) -> None:
        if self.pattern is not None:
            compile_pattern(self.pattern, "adapter target")
        if self.depth < 0:
            raise UsageError(f"adapter depth {self.depth}: so many first blocks cannot be chosen; it must be 0 or more")
        if not 0 <= self.ar_threshold < float("inf"):
            raise UsageError(f"adapter aspect ratio {self.ar_threshold} must be 0 (the rules decide) or more")


def block_index(name: str) -> int | None:
    """The first block index in a layer's name; None outside of blocks."""
    match = _BLOCK.search(name)
    return int(match[1]) if match else None


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern is found in the name, with or without ``.weight``."""
    return re.search(pattern, name) is not None or re.search(pattern, f"{name}.weight") is not None


def why_not(name: str, shape: tuple[int, int], target: AdapterTarget) -> str | None:
    """Why the layer of a weight of ``shape`` gets no adapter, or None: it gets one. The first rule that applies counts.

    | rule | adapter |
    |---|---|
    | a pattern is given | if it is found in the name |
    | no block index in the name | no |
    | block index >= depth | no |
    | an aspect ratio is given | if the layer's is below it |
    | aspect ratio above 4 | no |
    | aspect ratio below 3 | yes |
    | aspect ratio from 3 to 4 | in block 0, and where the name speaks of attention or projections |
    """
    if target.pattern is not None:
        return None if matches(target.pattern, name) else f"does not match {target.pattern!r}"
    index, ratio = block_index(name), max(shape) / max(1, min(shape))
    if index is None:
        return "no block index in its name"
    if index >= target.depth:
        return f"block {index} is not among the first {target.depth}"
    if target.ar_threshold > 0:
        return None if ratio < target.ar_threshold else f"aspect ratio {ratio:.3g} is not below {target.ar_threshold:g}"
    if ratio > LONG:
        return f"aspect ratio {ratio:.3g} is above {LONG:g}"
    if ratio < SQUARE or index == 0 or _ATTENTION.search(name):
        return None
    return f"aspect ratio {ratio:.3g} from {SQUARE:g} to {LONG:g}, outside block 0 and attention"
