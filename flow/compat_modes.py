"""Utility modes of convert_to_quant that are a stage here: they change what is stored and quantize nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..stages.stage import make_stage
from .compat_flags import all_flags
from .recipe import Recipe

_EVERYWHERE = {
    "input", "output", "device", "verbose", "overwrite", "memory", "workers", "dry_run", "comfy_quant", "low_memory",
    "save_quant_metadata", "verbose_pinned", "manual_seed", "no_normalize_scales",
}  # fmt: skip
"""Options that mean the same whatever is done, or nothing."""


def hybrid(options: Mapping[str, Any], base: Recipe) -> tuple[Recipe, tuple[str, ...]]:
    """``--make-hybrid-mxfp8`` on top of source, output and run; and what to tell the user."""
    own = {"make_hybrid_mxfp8", "tensor_scales"}
    stage = make_stage("hybrid", {"mode": "legacy", "tensor_scales": options.get("tensor_scales")})
    notes = [
        "quantloom hybrid makes both ways to decode the same number; --make-hybrid-mxfp8 writes what convert_to_quant "
        "writes"
    ]
    if idle := [all_flags()[name].long for name in options if name not in own | _EVERYWHERE]:
        notes.append(f"without effect beside --make-hybrid-mxfp8: {', '.join(idle)}")
    return base.with_stage(stage), tuple(notes)
