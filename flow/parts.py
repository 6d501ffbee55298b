"""Row ranges of large layers: a tensor of gigabytes must not be one task while other workers wait."""

from __future__ import annotations

import math
from dataclasses import replace

from ..formats.format import ceil_to
from ..stages.matrix import sees_whole
from ..stages.reading import Decode
from ..stages.work import LayerPlan

PART_BYTES = 512 << 20
"""A layer with more source bytes than this runs as several tasks."""

ROWS_MULTIPLE = 128
"""Ranges start at multiples of this: whole swizzle tiles, and whole blocks of the usual sizes."""


def split_large(plan: LayerPlan) -> LayerPlan:
    """The layer with row ranges of at most PART_BYTES, when it is quantized or decoded by rows and larger; one
    with an adapter stays whole."""
    nbytes = plan.layer.nbytes
    if nbytes <= PART_BYTES:
        return plan
    whole = plan.adapter is not None or sees_whole(plan)
    by_rows = plan.format or isinstance(plan.steps[0], Decode)
    if not by_rows or whole:
        return plan
    multiple = math.lcm(ROWS_MULTIPLE, getattr(plan.steps[0], "multiple", 1))
    count = -(-nbytes // PART_BYTES)
    step = ceil_to(-(-plan.rows // count), multiple)
    parts = tuple((start, min(start + step, plan.rows)) for start in range(0, plan.rows, step))
    return replace(plan, parts=parts) if len(parts) > 1 else plan
