"""Errors in words and columns: of what is stored, beside what plain rounding would have stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..stages.quality import Errors, Quality


@dataclass(frozen=True)
class Column:
    """A column of errors; empty where a layer has none."""

    heading: str
    of: Callable[[Any], str]
    """Of a layer of a report or of a verification."""


def _pair(name: str) -> Callable[[Any], str]:
    """An error beside that of plain rounding."""

    def show(layer: Any) -> str:
        if layer.quality is None:
            return ""
        stored, nearest = getattr(layer.quality.stored, name), getattr(layer.quality.nearest, name)
        return "" if stored is None else f"{stored:.5f} ({nearest:.5f})"

    return show


MEASURES = (
    Column("error (nearest)", _pair("weight")),
    Column("projected (nearest)", _pair("projected")),
    Column("output (nearest)", _pair("output")),
)
"""What a layer's errors are shown as; a column stands where a layer has something in it."""

_WORDS = {"weight": "error", "projected": "projected error", "output": "output error on these statistics"}


def finite(value: float | None) -> float | None:
    """The number, or None for what JSON has no number for."""
    return value if value is not None and math.isfinite(value) else None


def quality_dict(quality: Quality) -> dict[str, Any]:
    """JSON values; an error that is no number is written as null."""

    def errors(found: Errors) -> dict[str, float | None]:
        values: dict[str, float | None] = asdict(found)
        return {name: finite(value) for name, value in values.items()}

    return {
        "stored": errors(quality.stored), "nearest": errors(quality.nearest), "kept_start": quality.kept_start,
    }  # fmt: skip


def gains(qualities: Sequence[Quality]) -> list[str]:
    """A line per kind of error: geometric means over layers, and the ratio to plain rounding."""
    return [line for name in _WORDS if (line := _gain(name, [(q.stored, q.nearest) for q in qualities]))]


def _gain(name: str, pairs: Sequence[tuple[Errors, Errors]]) -> str:
    found = [(getattr(stored, name), getattr(nearest, name)) for stored, nearest in pairs]
    usable = [(a, b) for a, b in found if a and b and math.isfinite(a) and math.isfinite(b)]
    if not usable:
        return ""
    stored, nearest = geometric(a for a, _ in usable), geometric(b for _, b in usable)
    layers = f"{len(usable)} layer{'s' if len(usable) != 1 else ''}"
    return f"{_WORDS[name]} {stored:.5f}, nearest rounding {nearest:.5f} ({stored / nearest:.2f}x; {layers})"


def geometric(values: Iterable[float]) -> float:
    """The geometric mean."""
    logarithms = [math.log(value) for value in values]
    return math.exp(math.fsum(logarithms) / len(logarithms))
