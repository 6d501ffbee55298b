"""What adapters brought, in words, columns and JSON values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..formats.errors import listed
from .quality import Column, finite, geometric
from .sizes import count

if TYPE_CHECKING:
    from ..stages.quality import AdapterGain
    from .adapter import AdapterFile

LITTLE = 0.03
"""An adapter that removes less than this share of an error brings little."""
_NAMED = 8

MERGING = (
    "ComfyUI merges a LoRA into a quantized weight by rounding the sum again, which was measured to be worse than no "
    "adapter: apply it beside the matmul, as the node in examples/comfyui does (PEFT and vLLM do so anyway)"
)


def _pair(name: str) -> Callable[[Any], str]:
    def show(layer: Any) -> str:
        if layer.gain is None:
            return ""
        before, after = getattr(layer.gain.before, name), getattr(layer.gain.after, name)
        return "" if before is None else f"{before:.5f} -> {after:.5f}"

    return show


GAINS = (Column("error with adapter", _pair("weight")), Column("output with adapter", _pair("output")))
"""Errors of a layer without and with its adapter."""


def gain_dict(gain: AdapterGain) -> dict[str, Any]:
    """JSON values; an error that is no number is written as null."""
    return {
        "rank": gain.rank,
        "error": [finite(gain.before.weight), finite(gain.after.weight)],
        "output_error": [finite(gain.before.output), finite(gain.after.output)],
    }


def adapter_lines(adapter: AdapterFile, gains: Mapping[str, AdapterGain]) -> list[str]:
    """Where the adapter is, what it brings, and how it must not be used."""
    return [f"adapter {adapter}", *gain_lines(gains), MERGING]


def gain_lines(gains: Mapping[str, AdapterGain]) -> list[str]:
    """Geometric means over layers without and with their adapters, and where these bring little."""
    lines = []
    for name, words in (("weight", "error"), ("output", "output error on these statistics")):
        pairs = [(getattr(gain.before, name), getattr(gain.after, name)) for gain in gains.values()]
        usable = [(a, b) for a, b in pairs if a and b and math.isfinite(a) and math.isfinite(b)]
        if usable:
            before, after = geometric(a for a, _ in usable), geometric(b for _, b in usable)
            change = f"{abs(1 - after / before):.1%} {'less' if after <= before else 'more'}"
            layers = count(len(usable), "layer")
            lines.append(f"{words} {before:.5f} -> {after:.5f} with the adapter ({change}; {layers})")
    if little := _little(gains):
        lines.append(
            f"the adapter brings less than {LITTLE:.0%} on {count(len(little), 'layer')}: {listed(little, _NAMED)}; an "
            "error without structure has no part of low rank"
        )
    return lines


def _little(gains: Mapping[str, AdapterGain]) -> Sequence[str]:
    """Layers by name whose error hardly falls: of outputs where that is known, else of weights."""
    found = []
    for name, gain in gains.items():
        known = gain.before.output is not None and gain.after.output is not None
        before, after = (
            (gain.before.output, gain.after.output) if known else (gain.before.weight, gain.after.weight)
        )
        if before and after is not None and after > (1 - LITTLE) * before:
            found.append(name)
    return found
